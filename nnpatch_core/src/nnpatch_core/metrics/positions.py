"""Where the metrics of a sweep read the logits of its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.batch import has_numbers, where_of
from nnpatch_core.errors import MetricError, PatchingError
from nnpatch_core.metrics.context import MetricContext
from nnpatch_core.metrics.declarations import (
    activations_read,
    answers_followed,
    declared_of,
)
from nnpatch_core.metrics.naming import Metric

#: Gives, for the name of a span, its positions `[batch, any]` in the source and in the target run,
#: as many in both; it raises `PatchingError` for a name that is none.
SpanFinder: TypeAlias = Callable[[str], tuple[Tensor, Tensor]]

#: The name of the last token, which every prompt has.
LAST = "last"


@attrs.frozen(eq=False)
class Reading:
    """Where the logits of a sweep are read.

    Args:
        source: `[batch, places]`, positions from 0 in the source run.
        target: the same in the target run, and in every patched run.
        columns: by metric, which of the places it reads, in its order.
        last: the place of the last token, if a metric without declaration reads that.
        appended: `[batch, n]`, the answer that is appended to each prompt; None if none is.
        versions: the names of the answers, where the prompts stand in these once with each, after
            one another; nothing where no answer is appended.
        sites: by metric, which of the places behind those have the activation of a site.
    """

    source: Tensor
    target: Tensor
    columns: Mapping[str, tuple[int, ...]]
    last: int | None
    appended: Tensor | None = None
    versions: tuple[str, ...] = ()
    sites: Mapping[str, Mapping[Any, tuple[int, ...]]] = attrs.field(factory=dict)


def check_metrics(
    metrics: Mapping[str, Metric], source: MetricContext, target: MetricContext
) -> None:
    """Raise where the prompts, or their data, are none that a built-in metric can measure.

    Args:
        metrics: by name.
        source: the context of the source run, without logits.
        target: the same of the target run.
    """
    for metric in metrics.values():
        check = declared_of(metric, "checked_by")
        for context in (source, target) if check is not None else ():
            check(context)


def reading_of(
    metrics: Mapping[str, Metric],
    source: MetricContext,
    target: MetricContext,
    spans: SpanFinder | None = None,
    *,
    last: bool = False,
    appended: Tensor | None = None,
    versions: tuple[str, ...] = (),
) -> Reading | None:
    """Where metrics read the logits; None if each reads those of the last token.

    Args:
        metrics: by name.
        source: the context of the source run, without logits.
        target: the same of the target run.
        spans: finds the positions of a span by its name; None where the prompts have no spans.
        last: whether the last token's are read in any case.
        appended: `[batch, n]`, the answer that is appended to each prompt; None if none is.
        versions: the names of the answers with which the prompts stand in the contexts.

    Raises:
        MetricError: a metric declares something else than positions of the prompts.
    """
    declared = {
        name: wanted
        for name, metric in metrics.items()
        if (wanted := declared_of(metric, "positions_read")) is not None
    }
    following = [name for name, metric in metrics.items() if answers_followed(metric)]
    reading = [name for name, metric in metrics.items() if activations_read(metric)]
    if not declared and not following and not reading:
        return None
    places: dict[tuple[int, ...], int] = {}

    def placed(both: Sequence[Tensor]) -> tuple[int, ...]:
        """The places of some positions; those that another metric reads too are shared."""
        columns = torch.cat([each.cpu() for each in both]).T.tolist()
        return tuple(places.setdefault(tuple(column), len(places)) for column in columns)

    end = None
    if last or len({*declared, *following}) < len(metrics):
        end = placed([_every(len(each), [_width(each) - 1]) for each in (source, target)])[0]
    columns = {
        name: placed(_positions_of(name, wanted, source, target, spans))
        for name, wanted in declared.items()
    }
    if appended is not None:
        # Each token is predicted at the one before it, the first at the prompt's last.
        end_of = _width(target) - 1
        predicting = _every(len(target), range(end_of, end_of + appended.shape[1]))
        columns |= {name: placed([predicting, predicting]) for name in following}
    found = torch.tensor([*places], dtype=torch.int64, device="cpu").T
    return Reading(
        found[: len(source)].clone(), found[len(source) :].clone(), columns, end, appended, versions
    )


def _width(context: MetricContext) -> int:
    assert context.tokens is not None
    return context.tokens.shape[1]


def _every(batch: int, positions: Iterable[int]) -> Tensor:
    """`[batch, positions]`, the same for every prompt."""
    return torch.tensor([[*positions]], dtype=torch.int64, device="cpu").repeat(batch, 1)


def _positions_of(
    name: str, wanted: Any, source: MetricContext, target: MetricContext, spans: SpanFinder | None
) -> tuple[Tensor, Tensor]:
    """`[batch, positions]` from 0, in both runs."""
    if callable(wanted):
        pair = tuple(_given_by(name, wanted, each) for each in (source, target))
    elif isinstance(wanted, Tensor) and wanted.ndim == 2:
        pair = wanted, wanted
    else:
        pair = _listed(name, wanted, source, target, spans)
    found = tuple(
        _checked(name, positions, context, padding=callable(wanted))
        for positions, context in zip(pair, (source, target), strict=True)
    )
    if found[0].shape[1] != found[1].shape[1]:
        raise MetricError(
            f"metric {name!r} declares {found[0].shape[1]} positions of the source run and "
            f"{found[1].shape[1]} of the target run: they must be as many"
        )
    return found[0], found[1]


def _given_by(name: str, wanted: Callable[..., Any], context: MetricContext) -> Any:
    try:
        return wanted(context)
    except PatchingError:
        raise
    except Exception as error:
        raise MetricError(
            f"what metric {name!r} declares with reads_positions raised {type(error).__name__}: "
            f"{error}"
        ) from error


def _listed(
    name: str, wanted: Any, source: MetricContext, target: MetricContext, spans: SpanFinder | None
) -> tuple[Tensor, Tensor]:
    """The positions of a list of integers and names, in both runs."""
    flat = isinstance(wanted, Tensor) and wanted.ndim == 1
    if isinstance(wanted, str):
        wanted = [wanted]
    elif flat or isinstance(wanted, Sequence):
        wanted = [*wanted]
    else:
        raise MetricError(
            f"metric {name!r} declares with reads_positions {shown(wanted)}: it must be a list of "
            "positions, a tensor [batch, positions], a function that gives one, or the name of a "
            "span"
        )
    parts = []
    for each in wanted:
        if isinstance(each, str) and each != LAST:
            parts.append(_spanned(name, each, spans))
        else:
            position = -1 if each == LAST else strict_int(each, _of(name), MetricError)
            pair = [_every(len(context), [position]) for context in (source, target)]
            parts.append((pair[0], pair[1]))
    if not parts:
        raise MetricError(f"metric {name!r} declares with reads_positions no position")
    return torch.cat([each for each, _ in parts], 1), torch.cat([each for _, each in parts], 1)


def _spanned(name: str, span: str, spans: SpanFinder | None) -> tuple[Tensor, Tensor]:
    if spans is None:
        raise MetricError(f"metric {name!r} reads the span {span!r}, and there are no spans here")
    try:
        return spans(span)
    except PatchingError as error:
        raise MetricError(f"metric {name!r} reads the span {span!r}: {error}") from error


def _of(name: str) -> str:
    return f"each position that metric {name!r} declares with reads_positions"


def _checked(name: str, positions: Any, context: MetricContext, *, padding: bool) -> Tensor:
    """Positions from 0, if they are some: `[batch, positions]`."""
    batch, seq_len = len(context), _width(context)
    wanted = f"metric {name!r} declares with reads_positions"
    if not isinstance(positions, Tensor):
        raise MetricError(
            f"{wanted} a function that gives {shown(positions)}: it must give a tensor "
            "[batch, positions]"
        )
    if not has_numbers(positions):
        raise MetricError(f"{wanted} positions that cannot be read: {where_of(positions)}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise MetricError(f"{wanted} positions that are {positions.dtype}, not integers")
    if positions.ndim != 2 or len(positions) != batch or not positions.numel():
        raise MetricError(
            f"{wanted} positions of the shape {list(positions.shape)}: it must be "
            f"[batch, positions] = [{batch}, any]"
        )
    positions = positions.detach().to("cpu", torch.int64)
    wrong = positions[(positions < -seq_len) | (positions >= seq_len)]
    if wrong.numel():
        raise MetricError(
            f"{wanted} position {int(wrong[0])}, out of range for prompts of {seq_len} tokens: "
            f"allowed are {-seq_len} to {seq_len - 1}"
        )
    found: Tensor = positions.remainder(seq_len)
    assert context.mask is not None
    empty = context.mask.cpu().gather(1, found) == 0
    if not padding and empty.any():
        prompt, place = empty.nonzero()[0].tolist()
        raise MetricError(
            f"{wanted} position {int(found[prompt, place])} of the left-padded batch, which is "
            f"padding in prompt {prompt}: name positions from the end, or declare a function that "
            "gives those of each prompt"
        )
    return found
