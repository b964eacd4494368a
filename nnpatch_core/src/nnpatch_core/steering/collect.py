"""Collects the coordinates that prompts have in a subspace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._models import as_nnsight, evaluating, in_one_thread, with_weights
from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PatchingError, SubspaceError, TokensError
from nnpatch_core.interventions import read_batch, read_batches
from nnpatch_core.memory import limits_of
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.seq_pos import NONE, Positions, PromptBatch
from nnpatch_core.site import Site
from nnpatch_core.sites import bind_cells
from nnpatch_core.spaces import as_space
from nnpatch_core.steering.collected import OWN, Collected, joined
from nnpatch_core.steering.sited import site_of
from nnpatch_core.sweep import Options, check_padding, make_bar
from nnpatch_core.tracing import BoundSite, Patches, record

_COORDINATE = re.compile(r"c\d+")


@in_one_thread
def collect(
    nnmodel: Any,
    subspace: Any,
    prompts: Any,
    *,
    site: Site | None = None,
    api: Any = None,
    batch_size: int | None = None,
    labels: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> Collected:
    """Collect the coordinates of prompts in a subspace, a row for each token.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        subspace: a `Subspace`, at the site where it was made; or a `Site` with `subspace=`.
        prompts: tokens `[batch, seq]`, a tuple `(tokens, mask)`, a tokenizer's output, an iterable
            of these; or a `PromptPairs`, whose source and target prompts are both run, and whose
            further columns are labels.
        site: another site for a `Subspace`: its component, layer, head and positions. Of positions
            None is every token of each prompt.
        api: the adapter by which the site of a `Subspace` is found; None finds it by the model.
        batch_size: how many prompts run together; None is as many as fit.
        labels: what is said of the prompts: a mapping from names to one value for each prompt (for
            each pair), or one list of values, which is called `label`.
        tokenizer: gives the rows the text of their tokens; by default the one of a `PromptPairs` or
            a `TransformersModel`.
        progress: whether a bar shows the prompts done.

    Raises:
        SubspaceError: no subspace, one of another width, or one that does not know its site.
        PositionError: a position that is not in a prompt, or is padding there.
        TokensError, MaskError: malformed prompts.
        PatchingError: one of its kinds, if the model does not have the site; labels that are not
            one for each prompt, or have the name of another column.

    Examples:
        >>> import torch
        >>> from nnpatch_core.spaces import Subspace
        >>> from nnpatch_core import Site
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> space = Subspace.random(
        ...     32, site=Site.get_site(tiny_api(), "resid", layer=1, seq_pos=[-1])
        ... )
        >>> tokens = torch.tensor([[5, 6, 7], [5, 9, 7]])
        >>> found = collect(tiny_model("llama"), space, tokens, api=tiny_api(), progress=False)
        >>> found.values.shape, found.positions
        (torch.Size([2, 1]), (-1, -1))
    """
    model = with_weights(nnmodel)
    options = Options(batch_size, None, progress)
    found = _site_of(subspace, site, api, model)
    traced = as_nnsight(nnmodel)
    whole = _read(traced, prompts)
    named = _labels(labels, prompts)
    tokenizer = whole.tokenizer if tokenizer is None else tokenizer
    tokenizer = getattr(traced, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise TokensError(f"tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}")
    if whole.count is not None:
        _check_count(named, whole.count)
    run = _Run(traced, found, options, named, tokenizer)
    parts: list[Collected] = []
    done = dict.fromkeys(whole.runs, 0)
    with evaluating(model), make_bar(whole.total, bool(progress), desc="prompts") as bar:
        for name, batch in whole.batches:
            for part, size in run.parts(batch, name, done[name]):
                parts.append(part)
                bar.update(size)
            done[name] += len(batch)
    if not parts:
        raise TokensError("prompts are empty: give at least one batch")
    _check_count(named, max(done.values()))
    return joined(parts)


@attrs.frozen(eq=False)
class _Prompts:
    """Prompts, read.

    Args:
        batches: each with the name of its run.
        runs: the names of the runs.
        count: how many prompts there are, of each run; None where that shows as they are read.
        total: the same of all runs.
        tokenizer: what made them, if that is known.
    """

    batches: Iterable[tuple[str | None, Batch]]
    runs: tuple[str | None, ...]
    count: int | None
    total: int | None
    tokenizer: Any = None


def _read(nnmodel: Any, prompts: Any) -> _Prompts:
    if isinstance(prompts, PromptPairs):
        sides = {
            "source": (prompts.source_tokens, prompts.source_attention_mask),
            "target": (prompts.target_tokens, prompts.target_attention_mask),
        }
        both = [(name, read_batch(nnmodel, "prompts", *side)) for name, side in sides.items()]
        return _Prompts(both, tuple(sides), len(prompts), 2 * len(prompts), prompts.tokenizer)
    batches = read_batches(nnmodel, "prompts", prompts)
    count = sum(map(len, batches)) if isinstance(batches, Sized) else None
    return _Prompts(((None, batch) for batch in batches), (None,), count, count)


def _site_of(given: Any, site: Any, api: Any, model: Any) -> Site:
    if site is None:
        found = site_of(given, api, model)
        if found.subspace is None:
            raise SubspaceError(
                f"site {found.label} has no subspace, of which coordinates could be collected: "
                "name one, by subspace="
            )
        return found
    if isinstance(given, Site):
        raise PatchingError("site= is for a Subspace: subspace is a Site already, so leave it out")
    space = as_space(given)
    if space is None:
        raise SubspaceError("subspace must be a Subspace, or a Site with one, got None")
    if not isinstance(site, Site) or site.subspace is not None:
        raise SubspaceError(f"site must be a Site without a subspace of its own, got {shown(site)}")
    return site_of(attrs.evolve(site, subspace=space), api, model)


def _labels(labels: Any, prompts: Any) -> dict[str, tuple[Any, ...]]:
    """Labels by name, each one value for each prompt, and further columns of pairs."""
    given = {} if labels is None else labels
    if not isinstance(given, Mapping):
        given = {"label": given}
    columns = prompts.columns if isinstance(prompts, PromptPairs) else {}
    found = {str(name): tuple(values) for name, values in columns.items()}
    for name, values in given.items():
        each = None if isinstance(values, str | bytes | Mapping) else listed(values)
        if not isinstance(name, str) or each is None:
            raise PatchingError(
                "labels must be a mapping from names to one value for each prompt, or one list of "
                f"them, got {shown(labels)}"
            )
        if name in found:
            raise PatchingError(f"label {name!r} is a column of the pairs too: name it otherwise")
        found[name] = each
    for name in found:
        if name in OWN or _COORDINATE.fullmatch(name):
            raise PatchingError(
                f"a label cannot be called {name!r}, as rows have a column of that name: name it "
                "otherwise"
            )
    return found


def _check_count(labels: Mapping[str, tuple[Any, ...]], count: int) -> None:
    for name, values in labels.items():
        if len(values) != count:
            raise PatchingError(
                f"label {name!r} has {len(values)} values, and there are {count} prompts: give one "
                "for each"
            )


@attrs.frozen(eq=False)
class _Run:
    """How batches of prompts are run.

    Args:
        nnmodel: the model, wrapped by nnsight.
        site: where coordinates are collected.
        options: how it may run.
        labels: one value for each prompt, by name.
        tokenizer: gives the text of tokens; None if there is none.
    """

    nnmodel: Any
    site: Site
    options: Options
    labels: Mapping[str, tuple[Any, ...]]
    tokenizer: Any

    def parts(self, batch: Batch, run: str | None, first: int) -> Iterator[tuple[Collected, int]]:
        """The rows of some prompts, and how many prompts these are.

        Args:
            batch: the prompts.
            run: the name of their run, if they are of pairs.
            first: the number of the first of them.
        """
        patches = bind_cells([self.site], self.nnmodel, batch.seq_len, PromptBatch(batch))
        check_padding(patches, batch)
        (bound,) = patches.cells[0].sites
        at = bound.positions
        chosen = self._chosen(batch, at)
        for chunk in self._chunks(patches, batch):
            yield (
                self._collected(batch, chunk, chosen[chunk], bound, run, first),
                len(range(*chunk.indices(len(batch)))),
            )

    def _chunks(self, patches: Patches, batch: Batch) -> list[slice]:
        limits = limits_of(
            patches, len(batch), batch.seq_len, given=None, batch_size=self.options.batch_size,
            whole=True,
        )  # fmt: skip
        return limits.chunks(len(batch))

    def _chosen(self, batch: Batch, at: Positions) -> Tensor:
        """`[batch, seq]`, bool on the CPU: the tokens that have a row."""
        real = batch.mask.bool().cpu()
        if self.site.seq_pos is None:
            return real
        groups = at.at.expand(len(batch), -1)
        for prompt, group in enumerate(groups.tolist()):
            padded = [each for each in group if each != NONE and not real[prompt, each]]
            if padded:
                raise PromptBatch(batch).padding_error(
                    prompt, padded[0], batch, f"site {self.site.label}"
                )
        return at.mask(batch.seq_len).expand(len(batch), -1)

    def _collected(
        self,
        batch: Batch,
        chunk: slice,
        chosen: Tensor,
        bound: BoundSite,
        run: str | None,
        first: int,
    ) -> Collected:
        own = batch.rows(chunk)
        _, kept = record(self.nnmodel, own, [bound.place])
        activation = kept[bound.place.location]
        rows, columns = chosen.nonzero().T
        there = activation[rows.to(activation.device), columns.to(activation.device)]
        part = bound.columns(there.shape[-1])
        there = there if part is None else there[:, part.to(there.device)]
        space = self.site.subspace
        assert space is not None
        prompts = [first + (chunk.start or 0) + row for row in rows.tolist()]
        ids = own.tokens.cpu()[rows, columns].tolist()
        return Collected(
            space.encode(there).detach().to("cpu", torch.float32),
            tuple(prompts),
            None if run is None else (run,) * len(prompts),
            tuple(column - batch.seq_len for column in columns.tolist()),
            tuple(self._text(token) for token in ids),
            {name: self._own(values, prompts, name) for name, values in self.labels.items()},
            self.site.label,
        )

    def _own(self, values: tuple[Any, ...], prompts: list[int], name: str) -> tuple[Any, ...]:
        if prompts and prompts[-1] >= len(values):
            _check_count({name: values}, prompts[-1] + 1)
        return tuple(values[prompt] for prompt in prompts)

    def _text(self, token: int) -> Any:
        if self.tokenizer is None:
            return token
        try:
            return str(self.tokenizer.decode([token]))
        except Exception as error:
            raise TokensError(
                f"tokenizer {shown(self.tokenizer)} does not decode the tokens: {error}"
            ) from error
