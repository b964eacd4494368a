"""The labelled outcome of a sweep."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnpatch_core import plot
from nnpatch_core._extras import extra
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import OutcomeError
from nnpatch_core.sites import Axis, Grid

if TYPE_CHECKING:
    import pandas
    import xarray

Scale = Literal["restored", "change"]
_FORMAT = "nnpatch outcome 1"


@attrs.frozen(eq=False)
class Baseline:
    """A metric of the unpatched runs, `[batch]` each; an ablation's one run is both."""

    source: Tensor
    target: Tensor


@attrs.frozen(eq=False)
class Prompts:
    """The prompts as they were run: left-padded, `[batch, seq]`; an ablation's are both.

    Args:
        source_tokens, target_tokens: token ids.
        source_mask, target_mask: 1 for a token, 0 for padding.
        strings: the text of each token id that occurs, where a tokenizer was at hand.
    """

    source_tokens: Tensor
    source_mask: Tensor
    target_tokens: Tensor
    target_mask: Tensor
    strings: Mapping[int, str] = attrs.field(factory=dict)

    def label(self, position: int, *, strip: bool = False) -> str:
        """The tokens that the prompts have at a position: two of them, and a sign of more.

        `strip` leaves out the spaces around each, for a picture.
        """
        found: dict[str, None] = {}
        for tokens, mask in (
            (self.source_tokens, self.source_mask),
            (self.target_tokens, self.target_mask),
        ):
            for token in tokens[mask[:, position].bool(), position].tolist():
                text = self.strings.get(token, str(token)).replace("\n", "\\n")
                found[(text.strip() or repr(text)) if strip else text] = None
        shown = list(found)
        if not shown:
            return "(padding)"
        return "|".join(shown[:2]) + ("|…" if len(shown) > 2 else "")


@attrs.frozen(eq=False)
class Cells:
    """Which cells of one site name were swept.

    Args:
        axes: the axes of the result.
        index: `[cells, axes]`, the place of each swept cell.
    """

    axes: tuple[Axis, ...]
    index: Tensor

    @classmethod
    def of(cls, grid: Grid) -> Cells:
        """The places of a grid's cells."""
        return cls(grid.axes, torch.tensor(grid.index, dtype=torch.int64))

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return tuple(len(axis.labels) for axis in self.axes)

    def place(self, values: Tensor, fill: float) -> Tensor:
        """`values` `[cells, ...]` as `[*shape, ...]`, with `fill` where nothing was swept."""
        grid = torch.full((*self.shape, *values.shape[1:]), fill, dtype=values.dtype)
        grid[tuple(self.index.T)] = values
        return grid


@attrs.frozen(eq=False, repr=False)
class Outcome(Mapping[str, Tensor]):
    """The outcome of a sweep: a mapping from site name to a tensor of values.

    The tensor's axes are layer, then position (where positions were patched one by one), then head
    (for components with heads); cells that were not swept are 0. The labelled forms have nan there.

    Args:
        kind: what was swept, such as `"activation"` or `"ablation (zero)"`.
        scale: `"restored"`: (mean patched - mean target) / (mean source - mean target), so that 0
            is the target run and 1 the source run; `"change"`: mean patched - mean unpatched, in
            the metric's unit.
        cells: site name to the cells that were swept.
        raw: metric to site name to the metric of each patched run, `[cells, batch]`.
        baselines: metric to the unpatched runs' values.
        prompts: what was run.
        metric: the metric that the mapping shows.
        info: adapter, model, engine and versions.
    """

    kind: str
    scale: Scale
    cells: Mapping[str, Cells]
    raw: Mapping[str, Mapping[str, Tensor]]
    baselines: Mapping[str, Baseline]
    prompts: Prompts
    metric: str
    info: Mapping[str, str]

    # Two outcomes are compared by their tensors, not by `==` on a mapping of them.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Tensor:
        """The values of a site name, 0 where nothing was swept."""
        return self._placed(name, 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(cells.shape)}" for name, cells in self.cells.items())
        return f"Outcome({self.kind}, {self.metric}: {shapes})"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured."""
        return tuple(self.raw)

    @property
    def baseline(self) -> Baseline:
        """The unpatched runs' values of the metric."""
        return self.baselines[self.metric]

    @property
    def tokens(self) -> tuple[str, ...]:
        """A label for each position."""
        return tuple(
            self.prompts.label(position) for position in range(self.prompts.target_tokens.shape[1])
        )

    def for_metric(self, metric: str) -> Outcome:
        """The same sweep, seen through another of its metrics.

        Raises:
            OutcomeError: the metric was not measured.
        """
        if metric not in self.raw:
            raise OutcomeError(f"no metric {metric!r} was measured; there are {list(self.raw)}")
        return attrs.evolve(self, metric=metric)

    def axes(self, name: str) -> tuple[Axis, ...]:
        """The axes of a site name's tensor."""
        return self._cells(name).axes

    def swept(self, name: str) -> Tensor:
        """Which cells of a site name were swept, bool, of the shape of its tensor."""
        cells = self._cells(name)
        return cells.place(torch.ones(len(cells.index), dtype=torch.bool), 0.0)

    def patched(self, name: str) -> Tensor:
        """The metric of each patched run, `[..., batch]`, in its unit; nan where not swept."""
        cells = self._cells(name)
        return cells.place(self.raw[self.metric][canonical_name(name)], float("nan"))

    def per_prompt(self, name: str) -> Tensor:
        """Each prompt's own value, `[..., batch]`, on the outcome's scale; nan where not swept.

        A prompt whose own source and target run agree has inf or nan on the scale `"restored"`.
        """
        return self._scaled(self.patched(name), self.baseline.source, self.baseline.target)

    def strongest(self, k: int = 10) -> list[dict[str, Any]]:
        """The `k` cells of the largest absolute value: site, labels of the axes, value."""
        rows = [row for row in self._rows() if row["value"] == row["value"]]
        return sorted(rows, key=lambda row: -abs(row["value"]))[:k]

    def to_dataframe(self, per_prompt: bool = False) -> pandas.DataFrame:
        """One row a cell: site, layer, position, token, head, value; nan where not swept.

        Args:
            per_prompt: one row a cell and prompt instead, with the metric of the patched, the
                source and the target run in its unit.

        Raises:
            OutcomeError: pandas is not installed (`pip install nnpatch-core[pandas]`).
        """
        module = extra("pandas", "pandas")
        columns = ["site", "layer", "position", "token", "head"]
        values = ["prompt", "patched", "source", "target"] if per_prompt else ["value"]
        rows = list(self._rows(per_prompt))
        used = [column for column in columns if any(column in row for row in rows)]
        frame: pandas.DataFrame = module.DataFrame(rows, columns=[*used, *values])
        # A column of numbers that some rows lack stays one of integers.
        whole = [column for column in used if column in ("layer", "position", "head")]
        return frame.astype(dict.fromkeys(whole, "Int64"))

    def to_xarray(self, per_prompt: bool = False) -> xarray.Dataset:
        """One variable a site name, with labelled axes; nan where not swept.

        Args:
            per_prompt: with a last axis `prompt`, and the metric of the patched run in its unit.

        Raises:
            OutcomeError: xarray is not installed (`pip install nnpatch-core[xarray]`).
        """
        module = extra("xarray", "xarray")
        arrays = {}
        for name in self:
            axes = self.axes(name)
            values = self.patched(name) if per_prompt else self._placed(name, float("nan"))
            dims = [_dimension(axis, name) for axis in axes] + ["prompt"] * per_prompt
            coords = {_dimension(axis, name): list(axis.labels) for axis in axes}
            array = module.DataArray(values.numpy(), dims=dims, coords=coords)
            if "position" in dims:
                array = array.assign_coords(token=("position", list(self.tokens)))
            arrays[name] = array
        attributes = {"kind": self.kind, "scale": self.scale, "metric": self.metric, **self.info}
        dataset: xarray.Dataset = module.Dataset(arrays, attrs=attributes)
        return dataset

    def plot(self, **options: Any) -> Any:
        """A heatmap: layers on one axis, tokens (or heads) on the other, one panel a component.

        See `nnpatch_core.plot.heatmap` for the options.
        """
        return plot.heatmap(self, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the outcome to one safetensors file, whole or not at all."""
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / "outcome"
            save_file(self._tensors(), part, metadata={"nnpatch": json.dumps(self._header())})
            part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Outcome:
        """Read what `save` wrote.

        Raises:
            OutcomeError: the file is not an outcome.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("nnpatch", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise OutcomeError(f"{os.fspath(path)} is not an outcome: {error}") from error
        if header.get("format") != _FORMAT:
            raise OutcomeError(
                f"{os.fspath(path)} is not an outcome of this version: its format is "
                f"{header.get('format')!r}, this version reads {_FORMAT!r}"
            )
        return cls._restore(header, tensors)

    def _header(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "kind": self.kind,
            "scale": self.scale,
            "metric": self.metric,
            "metrics": list(self.raw),
            "axes": {
                name: [[axis.name, list(axis.labels)] for axis in cells.axes]
                for name, cells in self.cells.items()
            },
            "strings": {str(token): text for token, text in self.prompts.strings.items()},
            "info": dict(self.info),
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"prompts/{field}": getattr(self.prompts, field) for field in _PROMPT_TENSORS}
        for name, cells in self.cells.items():
            tensors[f"cells/{name}"] = cells.index
        for metric, baseline in self.baselines.items():
            tensors[f"source/{metric}"] = baseline.source
            tensors[f"target/{metric}"] = baseline.target
            for name, values in self.raw[metric].items():
                tensors[f"raw/{metric}/{name}"] = values
        # safetensors refuses tensors that share memory, as an ablation's two baselines do.
        return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}

    @classmethod
    def _restore(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Outcome:
        cells = {
            name: Cells(
                tuple(Axis(axis, tuple(labels)) for axis, labels in axes), tensors[f"cells/{name}"]
            )
            for name, axes in header["axes"].items()
        }
        return cls(
            kind=header["kind"],
            scale=header["scale"],
            cells=cells,
            raw={
                metric: {name: tensors[f"raw/{metric}/{name}"] for name in cells}
                for metric in header["metrics"]
            },
            baselines={
                metric: Baseline(tensors[f"source/{metric}"], tensors[f"target/{metric}"])
                for metric in header["metrics"]
            },
            prompts=Prompts(
                **{field: tensors[f"prompts/{field}"] for field in _PROMPT_TENSORS},
                strings={int(token): text for token, text in header["strings"].items()},
            ),
            metric=header["metric"],
            info=header["info"],
        )

    def _cells(self, name: str) -> Cells:
        cells = self.cells.get(canonical_name(name))
        if cells is None:
            raise KeyError(f"{name!r} was not swept; there are {list(self.cells)}")
        return cells

    def _scaled(self, patched: Tensor, source: Tensor, target: Tensor) -> Tensor:
        # 0.0 is added so that nothing moved is 0 and not -0.
        change = patched - target
        return 0.0 + (change if self.scale == "change" else change / (source - target))

    def _values(self, name: str) -> Tensor:
        # float64, so that a cell equal to a run gives its value to the last digit.
        patched = self.raw[self.metric][canonical_name(name)].double().mean(-1)
        source, target = self.baseline.source.double().mean(), self.baseline.target.double().mean()
        return self._scaled(patched, source, target).float()

    def _placed(self, name: str, fill: float) -> Tensor:
        return self._cells(name).place(self._values(name), fill)

    def _rows(self, per_prompt: bool = False) -> Iterator[dict[str, Any]]:
        """Every cell of every grid as labels and values."""
        tokens = self.tokens
        for name in self:
            axes = self.axes(name)
            values = self.patched(name) if per_prompt else self._placed(name, float("nan"))
            for place in product(*(range(len(axis.labels)) for axis in axes)):
                row: dict[str, Any] = {"site": name}
                for axis, number in zip(axes, place, strict=True):
                    row[_COLUMNS[axis.name]] = axis.labels[number]
                if "position" in row:
                    row["token"] = tokens[row["position"]]
                if not per_prompt:
                    yield {**row, "value": values[place].item()}
                    continue
                for prompt, patched in enumerate(values[place].tolist()):
                    yield {
                        **row,
                        "prompt": prompt,
                        "patched": patched,
                        "source": self.baseline.source[prompt].item(),
                        "target": self.baseline.target[prompt].item(),
                    }


_PROMPT_TENSORS = ("source_tokens", "source_mask", "target_tokens", "target_mask")
#: A site of the user's own list has its label in the column of the site.
_COLUMNS = {
    "layer": "layer",
    "position": "position",
    "head": "head",
    "kv_head": "head",
    "site": "site",
}


def _dimension(axis: Axis, name: str) -> str:
    # Lists of sites differ in length from name to name, so each has a dimension of its own.
    return f"site_{name}" if axis.name == "site" else axis.name
