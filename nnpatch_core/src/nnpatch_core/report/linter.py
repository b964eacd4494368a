"""The linter: advice on an outcome, without a report."""

from __future__ import annotations

from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.report.advice import Advice, advice_on
from nnpatch_core.report.asked import read_width
from nnpatch_core.report.facts import LEVEL, WIDTH
from nnpatch_core.report.reports import Reports


def advice(outcome: Reports, *, width: float = WIDTH) -> list[Advice]:
    """Advice on how an outcome was made: what to know, or to do, before it is trusted.

    Nothing runs. Each rule reads what the outcome knows of itself, and says nothing of what it does
    not know.

    Args:
        outcome: an `Outcome`, an `EdgeOutcome`, what `evaluate_circuit` and `find_circuit` give, or
            a subspace that was learned or evaluated.
        width: how wide the interval of the strongest may be, from end to end, where 0 is the target
            and 1 the source run, or of a share.

    Returns:
        The advice, the weightiest first; none if no rule has any.

    Raises:
        OutcomeError: something that is no outcome, or no width.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites, activation_patching
        >>> from nnpatch_core.testing import tiny_model
        >>> out = activation_patching(
        ...     tiny_model(), None, Sites("mlp", seq_pos_type="last"),
        ...     torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]]), torch.tensor([1]),
        ...     torch.tensor([2]), metric="answer_probability", progress=False,
        ... )
        >>> [each.rule for each in advice(out)]
        ['one-prompt', 'probability-alone', 'one-direction']
        >>> advice(out)[0].link
        'https://arxiv.org/abs/2404.15255'
    """
    if not isinstance(outcome, Reports):
        raise OutcomeError(f"advice is on an outcome, got {shown(outcome)}")
    return advice_on(outcome._report_facts(read_width(width), LEVEL))
