"""A subspace for each site of a grid: in which layer is it found?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import attrs

from nnpatch_core._arguments import check_flags
from nnpatch_core._extras import extra
from nnpatch_core._html import block, preformatted
from nnpatch_core._models import as_nnsight, in_one_thread
from nnpatch_core._printable import shown
from nnpatch_core.errors import CheckpointError, SubspaceError, TokensError
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.report import Facts, Reports, Study
from nnpatch_core.site import Site
from nnpatch_core.subspace.arguments import TrainingArguments
from nnpatch_core.subspace.found import from_end
from nnpatch_core.subspace.pictures import plot_layers
from nnpatch_core.subspace.proportion import check_level
from nnpatch_core.subspace.reported import facts_of_evaluation, study_of_sweep
from nnpatch_core.subspace.trained import Trained
from nnpatch_core.subspace.training import train_subspace
from nnpatch_core.sweep import make_bar


@attrs.frozen(eq=False, repr=False)
class SubspaceSweep(Reports, Mapping[str, Trained]):
    """A subspace learned at each site of a grid, by the site's label.

    Args:
        sites: the sites, by their labels.
        learned: what was learned, by the same.
    """

    sites: Mapping[str, Site]
    learned: Mapping[str, Trained]

    def __getitem__(self, label: str) -> Trained:
        return self.learned[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.learned)

    def __len__(self) -> int:
        return len(self.learned)

    @property
    def best(self) -> str:
        """The label of the site with the highest accuracy; of equals, the lowest loss held out."""
        learned = self.learned
        return max(
            learned, key=lambda at: (learned[at].accuracy.value, -learned[at].best.held_out_loss)
        )

    @property
    def subspaces(self) -> dict[int, Any]:
        """The subspaces by layer, as `Sites(..., subspace=)` takes them.

        Raises:
            SubspaceError: a layer has several.
        """
        layers = [site.layer for site in self.sites.values()]
        if len(set(layers)) < len(layers):
            raise SubspaceError(
                "a layer has several subspaces: take them by label, as sweep[label]"
            )
        return {self.sites[label].layer: each.subspace for label, each in self.learned.items()}

    def to_dataframe(self) -> Any:
        """A frame of pandas, a row for each site and each of what was patched there.

        Raises:
            OutcomeError: pandas is not installed.
        """
        pandas = extra("pandas", "pandas")
        frames = []
        for label, each in self.learned.items():
            site = self.sites[label]
            frame = each.evaluation.to_dataframe()
            for number, (name, value) in enumerate(
                {
                    "site": label,
                    "component": site.name,
                    "layer": site.layer,
                    "head": site.head,
                    "epoch": each.best.epoch,
                }.items()
            ):
                frame.insert(number, name, value)
            frames.append(frame)
        return pandas.concat(frames, ignore_index=True)

    def _study(self, level: float) -> Study:
        check_level(level)
        return study_of_sweep(self)

    def _report_facts(self, width: float, level: float) -> Facts:
        best = facts_of_evaluation(self[self.best].evaluation, width)
        return attrs.evolve(best, chosen_here=len(self) > 1 or best.chosen_here)

    def plot(self) -> Any:
        """Accuracy over layers with 95 percent intervals, beside the controls.

        A matplotlib figure. Where there are several sites in a layer, each has a line, and controls
        are left out.

        Raises:
            OutcomeError: matplotlib is not installed.
        """
        lines: dict[str, dict[int, Trained]] = {}
        for label, each in self.learned.items():
            site = self.sites[label]
            at = f" L{site.layer}"
            lines.setdefault(label.replace(at, "", 1), {})[site.layer] = each
        first = next(iter(self.learned.values()))
        title = f"Interchange accuracy on {first.accuracy.count} pairs held out"
        if len(lines) > 1:
            rows = {
                name: {layer: each.accuracy for layer, each in by_layer.items()}
                for name, by_layer in lines.items()
            }
            return plot_layers(rows, title)
        ((name, by_layer),) = lines.items()
        names = dict.fromkeys(row for each in by_layer.values() for row in each.evaluation)
        rows = {
            row: {
                layer: each.evaluation[row].accuracy
                for layer, each in by_layer.items()
                if row in each.evaluation
            }
            for row in names
        }
        rank = first.subspace.rank
        return plot_layers(rows, f"{title}: rank {rank} of {name}")

    def __str__(self) -> str:
        width = max(map(len, self.learned))
        rows = dict.fromkeys(name for each in self.learned.values() for name in each.evaluation)
        lines = [f"{'interchange accuracy':<{width}}  " + "  ".join(f"{row:>19}" for row in rows)]
        for label, each in self.learned.items():
            cells = [
                str(each.evaluation[row].accuracy) if row in each.evaluation else "" for row in rows
            ]
            lines.append(f"{label:<{width}}  " + "  ".join(f"{cell:>19}" for cell in cells))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return block(preformatted(str(self)))

    def __repr__(self) -> str:
        return f"SubspaceSweep({len(self)} sites, best {self.best}: {self[self.best].accuracy})"


@in_one_thread
def sweep_subspaces(
    nnmodel: Any,
    api: Any,
    sites: Any,
    pairs: Any,
    rank: int = 1,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **training: Unpack[TrainingArguments],
) -> SubspaceSweep:
    """Learn a subspace at each site of a grid, each by itself, and measure it on pairs held out.

    The pairs held out are the same everywhere.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        sites: `Sites(...)` or `Sites.from_sites([...])`, such as
            `Sites("resid", seq_pos_type="last")`, the last token in every layer.
        pairs: a `PromptPairs`.
        rank: how many directions.
        checkpoint: a folder, with a file for each site; see `train_subspace`. It is made where it
            is missing.
        progress: whether a bar shows the sites done.
        **training: the other arguments of `train_subspace`.

    Raises:
        PatchingError: one of its kinds, as `train_subspace` raises it.

    Examples:
        >>> from nnpatch_core import PromptPairs, Sites
        >>> from nnpatch_core.testing import tiny_model, tiny_tokenizer
        >>> words = [" red", " blue", " green", " black"]
        >>> others = words[1:] + words[:1]
        >>> pairs = PromptPairs.from_texts(words, others, words, others, tiny_tokenizer(words))
        >>> sweep = sweep_subspaces(
        ...     tiny_model(), None, Sites("resid", [0, 2], "last"), pairs, epochs=1, progress=False
        ... )
        >>> list(sweep)
        ['resid L0 [-1]', 'resid L2 [-1]']
    """
    check_flags(progress=progress)
    if not isinstance(pairs, PromptPairs):
        raise TokensError(f"pairs must be a PromptPairs, got {shown(pairs)}")
    if not hasattr(sites, "get_sites_dict") or isinstance(sites, type):
        raise SubspaceError(f"sites must be Sites(...) or Sites.from_sites, got {shown(sites)}")
    traced = as_nnsight(nnmodel)
    found = sites.get_sites_dict(traced, api, pairs)
    given = [site for each in found.values() for site in each]
    for site in given:
        if not isinstance(site, Site):
            raise SubspaceError(f"a subspace is of one site, and {site.label} has several")
    named = [from_end(site, pairs.target_tokens.shape[1]) for site in given]
    cells = {site.label: site for site in named}
    folder = None if checkpoint is None else _folder(checkpoint)
    learned = {}
    with make_bar(len(cells), progress, desc="subspaces", unit="site") as bar:
        for number, (label, site) in enumerate(cells.items()):
            file = None if folder is None else folder / f"{number:04d}.safetensors"
            learned[label] = train_subspace(
                traced, api, site, pairs, rank, checkpoint=file, progress=False, **training
            )
            bar.set_postfix_str(f"{label}: {learned[label].accuracy}", refresh=False)
            bar.update()
    return SubspaceSweep(cells, learned)


def _folder(checkpoint: str | os.PathLike[str]) -> Path:
    try:
        folder = Path(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint must name a folder: {error}") from error
    return folder
