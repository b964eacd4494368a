"""Controls of what is learned: other answers, and a model that knows nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._models import input_device
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces import Subspace
from nnpatch_core.subspace.proportion import Proportion


@attrs.frozen(eq=False)
class Control:
    """Something that should do worse than what was learned.

    Args:
        subspace: what was patched; None if it was none of this model.
        accuracy: the share of the pairs held out whose most likely next token is the one that was
            asked for.
        target: the share in which it is the target answer still.
        answers: by source answer the token that was asked for in its place; None if it was the
            source answer itself.
    """

    subspace: Subspace | None
    accuracy: Proportion
    target: Proportion
    answers: dict[int, int] | None = None


def other_answers(
    source: Tensor, target: Tensor, tokens: Tensor, seed: int
) -> dict[int, int] | None:
    """For each source answer another token, always the same, that is neither answer of its pairs.

    Hewitt & Liang, "Designing and Interpreting Probes with Control Tasks" (2019), draw labels so.

    Args:
        source: `[pairs]`, the source answers.
        target: `[pairs]`, the target answers.
        tokens: the tokens of the prompts, of which one is taken where no answer is left.
        seed: of the draw.

    Returns:
        The tokens, by source answer; None if there are no others.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = torch.unique(torch.cat([source, target])).tolist()
    words = torch.unique(tokens).tolist()
    found = {}
    for answer in torch.unique(source).tolist():
        own = {answer, *target[source == answer].tolist()}
        left = [each for each in answers if each not in own]
        left = left or [each for each in words if each not in own]
        if not left:
            return None
        drawn = int(torch.randint(len(left), (1,), generator=generator, device="cpu"))
        found[answer] = left[drawn]
    return found


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same kind whose weights are drawn at random, as before any training.

    Raises:
        SubspaceError: it cannot be made.
    """
    config: Any = copy.deepcopy(getattr(model, "config", None))
    # Of a model that was read from quantised weights, which have no say here.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weight = next(model.parameters())
    # That of an offloaded model is where its weights come in.
    device = input_device(model) or weight.device
    try:
        with torch.random.fork_rng([]), torch.device("cpu"), _in_float32():
            # Of the CPU alone: `torch.manual_seed` sets the numbers of every device.
            torch.default_generator.manual_seed(seed)
            fresh = type(model)(config)
    except Exception as error:
        raise SubspaceError(
            f"no {type(model).__name__} with random weights can be made ({type(error).__name__}: "
            f"{error}): leave out random_model=True"
        ) from error
    own: nn.Module = fresh.to(device=device, dtype=weight.dtype).eval()
    return own


@contextmanager
def _in_float32() -> Iterator[None]:
    """Draw numbers in float32, whatever the default: those of another type are others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
