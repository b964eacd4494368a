"""A circuit: some edges of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags, listed
from nnpatch_core._arrays import Booleans
from nnpatch_core._extras import extra
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.circuits import choosing, files, pictures, rows
from nnpatch_core.circuits.connected import connected, feeds
from nnpatch_core.circuits.scored import Scored, as_info, check_marks, check_scores, read_scores
from nnpatch_core.edges import ARROW, Nodes
from nnpatch_core.errors import EdgeError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: How the edges of a circuit are chosen.
ChoosingMethod: TypeAlias = Literal["top", "threshold", "greedy"]


@attrs.frozen
class PrecisionRecall:
    """How well a circuit finds a known one.

    Args:
        precision: the share of its edges that are known; nan if it has none.
        recall: the share of the known edges that it has; nan if there are none.
    """

    precision: float
    recall: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.precision, self.recall))


@attrs.frozen(eq=False, repr=False)
class Circuit:
    """A set of edges of a model, which may have a score each.

    It is a set of their names: `len`, `in`, iteration, `|`, `&` and `-`. Two circuits are equal if
    their nodes and edges are, whatever the scores.

    Args:
        nodes: of the model.
        kept: `[senders, receivers]`, bool: the edges of the circuit.
        scores: `[senders, receivers]`, float64: a number for each edge of the model, in the circuit
            or not; nan where there is no edge, or it has none. None if there are no scores.
        exact: `[senders, receivers]`, bool: which scores are measured; the others are estimates.
            None if nothing is known of it.
        info: what else is known of it, such as the model's name, as texts.

    Raises:
        EdgeError: a tensor is none, has another shape than the nodes, or something where there is
            no edge.

    Examples:
        >>> nodes = Nodes(query=(2,), key_value=(1,), parallel=(False,))
        >>> scores = {"input->a0.h1<q>": 0.5, "a0.h1->logits": -0.25, "input->m0": 0.125}
        >>> circuit = Circuit.from_edges(scores, n=3, nodes=nodes, pruned=False)
        >>> print(circuit)
        Circuit: 3 of the 11 edges, 4 nodes
        edge              score
        input->a0.h1<q>   0.500
        a0.h1->logits    -0.250
        input->m0         0.125
        >>> list(circuit.pruned())
        ['input->a0.h1<q>', 'a0.h1->logits']
        >>> "input->m0" in circuit, circuit - circuit.pruned()
        (True, Circuit(1 of 11 edges, 2 nodes))
    """

    nodes: Nodes = attrs.field()
    kept: Tensor = attrs.field()
    scores: Tensor | None = None
    exact: Tensor | None = None
    info: Mapping[str, str] = attrs.field(factory=dict, converter=as_info)

    @nodes.validator
    def _check_nodes(self, _: Any, nodes: Any) -> None:
        if not isinstance(nodes, Nodes):
            raise EdgeError(f"nodes must be the Nodes of a model, got {shown(nodes)}")

    def __attrs_post_init__(self) -> None:
        put = object.__setattr__
        put(self, "kept", check_marks(self.nodes, self.kept, "kept"))
        if self.scores is not None:
            put(self, "scores", check_scores(self.nodes, self.scores, "scores"))
        if self.exact is not None:
            put(self, "exact", check_marks(self.nodes, self.exact, "exact"))

    @classmethod
    def of(cls, nodes: Nodes, edges: Iterable[str]) -> Circuit:
        """The circuit of some edges, by their names, without scores.

        Args:
            nodes: of the model.
            edges: the names; one that comes twice counts once.

        Raises:
            EdgeError: a name is no edge's.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> len(Circuit.of(nodes, ["input->m0", "m0->logits"]))
            2
        """
        if not isinstance(nodes, Nodes):
            raise EdgeError(f"nodes must be the Nodes of a model, got {shown(nodes)}")
        names = None if isinstance(edges, str) else listed(edges)
        if names is None:
            raise EdgeError(f"edges must be names such as ['input->m0'], got {shown(edges)}")
        kept = torch.zeros(nodes.mask.shape, dtype=torch.bool, device="cpu")
        for name in names:
            kept[nodes.place(name)] = True
        return cls(nodes, kept)

    @classmethod
    def from_edges(
        cls,
        edges: Scored | Mapping[str, float],
        n: int | None = None,
        threshold: float | None = None,
        method: ChoosingMethod | None = None,
        *,
        pruned: bool = True,
        absolute: bool = True,
        nodes: Nodes | None = None,
    ) -> Circuit:
        """Choose the edges of a circuit by their scores.

        Of edges that tie, the one comes first that comes first in the order of the model's edges.
        Edges without a score (nan) are never chosen.

        Args:
            edges: the outcome of `edge_patching`, or numbers by the edges' names.
            n: how many edges, before pruning.
            threshold: the least score, in place of `n`.
            method: `"top"` takes the `n` strongest edges, `"greedy"` always the strongest one into
                what is reached already, from the logits down, and `"threshold"` all from the
                threshold on. None is `"top"`, or `"threshold"` if there is one.
            pruned: whether edges are dropped that are on no way from the input to the logits; see
                `Circuit.pruned`.
            absolute: strongest by size; otherwise by value, so that edges that work against the
                answer come last.
            nodes: of the model, if `edges` are numbers by name.

        Returns:
            The circuit, with the scores of all edges.

        Raises:
            EdgeError: no scores, or an argument that is none; fewer edges than `n` have a score, or
                can be reached.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> scores = {"input->m0": 0.9, "a0.h0->m0": -0.5, "m0->logits": 0.25}
            >>> list(Circuit.from_edges(scores, n=2, nodes=nodes))  # nothing leads to the logits
            []
            >>> list(Circuit.from_edges(scores, n=2, method="greedy", nodes=nodes))
            ['input->m0', 'm0->logits']
            >>> list(Circuit.from_edges(scores, threshold=0.3, nodes=nodes, pruned=False))
            ['input->m0', 'a0.h0->m0']
        """
        check_flags(pruned=pruned, absolute=absolute)
        read = read_scores(edges, nodes)
        scores = read.matrix.numpy()
        how = _method(method, n, threshold)
        by = "size" if absolute else "value"
        if how == "threshold":
            least = _threshold(threshold)
            kept = choosing.by_threshold(scores, least, bool(absolute))
            chosen = f"edges of at least {least:g} by {by}"
        else:
            count = _count(n, "n")
            if how == "greedy":
                kept = choosing.by_greed(read.nodes, scores, count, bool(absolute))
            else:
                kept = choosing.by_count(scores, count, bool(absolute))
            chosen = f"{how} {count} by {by}"
        info = {**read.info, "chosen": chosen}
        made = cls(read.nodes, torch.from_numpy(kept), read.matrix, read.exact, info)
        return made.pruned() if pruned else made

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], nodes: Nodes | None = None) -> Circuit:
        """Read a circuit from a JSON file of EAP-IG, of MIB, or of `to_json`.

        Such files have keys and values for each query head. They are read as the `nodes` have them:
        where query heads share a key or a value, all of them must say the same.

        Neurons, and the nodes' own scores and marks, are not read: an edge counts by its own mark.

        Args:
            path: the file.
            nodes: of the model; None takes what `to_json` wrote of them, or else a key and a value
                for each query head.

        Raises:
            EdgeError: there is no such file, it is none of a circuit, or of other nodes.

        Examples:
            See `to_json`.
        """
        return cls._of(files.read_json(path, nodes))

    @classmethod
    def from_pt(cls, path: str | os.PathLike[str], nodes: Nodes | None = None) -> Circuit:
        """Read a circuit from a `.pt` file of EAP-IG or of MIB; no code of the file is run.

        Args:
            path: the file.
            nodes: of the model; None has a key and a value for each query head. See `from_json`.

        Raises:
            EdgeError: there is no such file, it is none of a circuit, or of other nodes.

        Examples:
            >>> import tempfile
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> scores = torch.arange(15.0).reshape(3, 5)
            >>> entries = {
            ...     "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8},
            ...     "src_nodes": list(nodes.sender_names),
            ...     "dst_nodes": list(nodes.receiver_names),
            ...     "edges_scores": scores,
            ...     "edges_in_graph": scores > 13,
            ...     "nodes_in_graph": torch.tensor([False, False, True]),
            ... }
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     torch.save(entries, f"{folder}/circuit.pt")
            ...     found = Circuit.from_pt(f"{folder}/circuit.pt")
            >>> list(found), found.nodes == nodes
            (['m0->logits'], True)
        """
        return cls._of(files.read_pt(path, nodes))

    @classmethod
    def _of(cls, found: files.Content) -> Circuit:
        return cls(found.nodes, found.kept, found.scores, found.exact, found.info)

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __iter__(self) -> Iterator[str]:
        """The names of its edges, sender by sender."""
        for sender, receiver in self.kept.nonzero().tolist():
            yield self.name_of(sender, receiver)

    def __contains__(self, edge: object) -> bool:
        try:
            sender, receiver = self.nodes.place(edge)
        except EdgeError:
            return False
        return bool(self.kept[sender, receiver])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.nodes == other.nodes and torch.equal(self.kept, other.kept)

    def __hash__(self) -> int:
        return hash((self.nodes, self.kept.numpy().tobytes()))

    def __or__(self, other: Circuit) -> Circuit:
        """The edges of either; scores, if both have the same."""
        if not isinstance(other, Circuit):
            return NotImplemented
        kept = self.kept | self._beside(other).kept
        same = _equal(self.scores, other.scores) and _equal(self.exact, other.exact)
        return attrs.evolve(
            self,
            kept=kept,
            scores=self.scores if same else None,
            exact=self.exact if same else None,
            info={name: text for name, text in self.info.items() if other.info.get(name) == text},
        )

    def __and__(self, other: Circuit) -> Circuit:
        """The edges of both, with the scores of the first."""
        if not isinstance(other, Circuit):
            return NotImplemented
        return attrs.evolve(self, kept=self.kept & self._beside(other).kept)

    def __sub__(self, other: Circuit) -> Circuit:
        """The edges that the second has not, with the scores of the first."""
        if not isinstance(other, Circuit):
            return NotImplemented
        return attrs.evolve(self, kept=self.kept & ~self._beside(other).kept)

    def __repr__(self) -> str:
        edges, nodes = f"{len(self):,} of {len(self.nodes):,} edges", len(self.nodes_in_it)
        return f"Circuit({edges}, {nodes:,} nodes)"

    def __str__(self) -> str:
        return rows.as_text(self)

    def _repr_html_(self) -> str:
        return rows.as_html(self)

    @property
    def edges(self) -> tuple[str, ...]:
        """The names of its edges, sender by sender.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> Circuit.of(nodes, ["m0->logits", "input->m0"]).edges
            ('input->m0', 'm0->logits')
        """
        return tuple(self)

    @property
    def nodes_in_it(self) -> tuple[str, ...]:
        """The names of the nodes that its edges touch, in the order of a forward.

        Heads are query heads. A key or a value that a group of them shares belongs to those from
        which an edge of the circuit starts, or which have one into their query; if there are none,
        to all of the group.

        Examples:
            >>> nodes = Nodes(query=(2,), key_value=(1,), parallel=(False,))
            >>> Circuit.of(nodes, ["input->a0.h0<k>", "a0.h1->logits"]).nodes_in_it
            ('input', 'a0.h1', 'logits')
            >>> Circuit.of(nodes, ["input->a0.h0<k>"]).nodes_in_it
            ('input', 'a0.h0', 'a0.h1')
        """
        made = feeds(self.nodes)
        found: Booleans = self.kept.any(1).numpy()
        read: Booleans = self.kept.any(0).numpy()
        alone = made.sum(1) == 1
        found |= (read & alone) @ made
        for receiver in np.flatnonzero(read & ~alone):
            if not (found & made[receiver]).any():
                found |= made[receiver]
        names = [self.nodes.sender_names[place] for place in np.flatnonzero(found)]
        return (*names, "logits") if read[-1] else tuple(names)

    def name_of(self, sender: int, receiver: int) -> str:
        """The name of the edge between two nodes, by their numbers.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> Circuit.of(nodes, []).name_of(0, 3)
            'input->m0'
        """
        return f"{self.nodes.sender_names[sender]}{ARROW}{self.nodes.receiver_names[receiver]}"

    def pruned(self) -> Circuit:
        """The circuit without edges that are on no way from the input to the logits.

        An edge stays if its sender has an edge of the circuit into itself (of a head into its
        query, or the key or the value that it shares), and from its receiver an edge of the circuit
        leads on, until nothing changes. The input needs no edge into it, the logits none from them.
        Nothing is added.

        This is EAP-IG's pruning where each query head has its own key and value. Where heads share
        them, EAP-IG has a copy for each head, and drops those of heads from which nothing leads on;
        here the one key or value stays as long as one head of its group leads on. What a circuit
        computes is the same.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> edges = ["input->m0", "m0->logits", "a0.h0->m0", "input->a0.h0<v>", "a0.h0->logits"]
            >>> list(Circuit.of(nodes, edges[:3]).pruned())  # nothing goes into the head
            ['input->m0', 'm0->logits']
            >>> len(Circuit.of(nodes, edges).pruned())
            5
        """
        kept = connected(self.nodes, self.kept.numpy())
        return attrs.evolve(self, kept=torch.from_numpy(kept), info=self._then("pruned"))

    def top(self, n: int, *, absolute: bool = True) -> Circuit:
        """The circuit of the `n` strongest of its edges; of all, if there are not so many.

        Args:
            n: how many edges.
            absolute: strongest by size; otherwise by value.

        Raises:
            EdgeError: it has no scores, or `n` is no count.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> scores = {"input->m0": 0.1, "m0->logits": -0.5}
            >>> circuit = Circuit.from_edges(scores, n=2, nodes=nodes)
            >>> list(circuit.top(1))
            ['m0->logits']
        """
        check_flags(absolute=absolute)
        count = _count(n, "n")
        if self.scores is None:
            raise EdgeError("a circuit without scores has no strongest edges")
        scores = np.where(self.kept.numpy(), self.scores.numpy(), math.nan)
        order = choosing.ranked(scores, bool(absolute))
        kept = choosing.by_count(scores, min(count, len(order)), bool(absolute))
        info = self._then(f"top {count} by {'size' if absolute else 'value'}")
        return attrs.evolve(self, kept=torch.from_numpy(kept), info=info)

    def precision_recall(self, known: Circuit) -> PrecisionRecall:
        """How much of a known circuit it finds, and how much else.

        Args:
            known: a circuit of the same nodes.

        Raises:
            EdgeError: it is none, or has other nodes.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> known = Circuit.of(nodes, ["input->m0", "m0->logits"])
            >>> Circuit.of(nodes, ["input->m0"]).precision_recall(known)
            PrecisionRecall(precision=1.0, recall=0.5)
        """
        found = len(self & self._beside(known))
        return PrecisionRecall(_share(found, len(self)), _share(found, len(known)))

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each edge, strongest first: edge, sender, receiver, score, exact.

        Raises:
            OutcomeError: pandas is not installed (`pip install nnpatch-core[pandas]`).

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> Circuit.of(nodes, ["input->m0"]).to_dataframe()
                    edge sender receiver
            0  input->m0  input       m0
        """
        module = extra("pandas", "pandas")
        columns = [field.name for field in attrs.fields(rows.Row)]
        if self.scores is None:
            columns.remove("score")
        if self.exact is None:
            columns.remove("exact")
        found = [attrs.asdict(row) for row in rows.rows_of(self)]
        frame: pandas.DataFrame = module.DataFrame(found, columns=columns)
        return frame

    def to_json(self, path: str | os.PathLike[str], *, width: int | None = None) -> None:
        """Write it as JSON that EAP-IG, MIB and `from_json` read, whole or not at all.

        A key or a value that query heads share is written for each of them, with the same score. An
        edge without a score gets 0, as in EAP-IG. Keys that those do not know say what there was.

        Args:
            path: the file.
            width: of the residual stream, which EAP-IG calls `d_model`; None is
                `info["width"]`, or else 0, with which EAP-IG reads circuits of edges as well.

        Raises:
            EdgeError: it cannot be written, or layers differ in their heads or in whether attention
                and MLP are parallel, which the format cannot say.

        Examples:
            >>> import tempfile
            >>> nodes = Nodes(query=(4,), key_value=(2,), parallel=(False,))
            >>> circuit = Circuit.of(nodes, ["input->a0.h1<k>", "a0.h2->logits"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     circuit.to_json(f"{folder}/circuit.json", width=64)
            ...     found = Circuit.from_json(f"{folder}/circuit.json")
            >>> found == circuit
            True
        """
        content = files.Content(self.nodes, self.kept, self.scores, self.exact, self.info)
        files.write_json(path, content, width)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        size: tuple[float, float] | None = None,
        edges: int = 60,
        title: str | None = None,
    ) -> Figure:
        """Draw it as a graph, layers up: the input below, the logits above.

        Within a layer its heads stand below its MLP. An edge is as wide as its score is large, blue
        if it is positive and orange if negative; it is dashed if its score is an estimate where
        others are exact. It ends at the letter q, k or v of a head; heads that share a key and a
        value stand in one frame.

        Args:
            path: also write it there, as PNG, SVG or PDF by its ending.
            size: width and height in inches; by default what it needs.
            edges: how many are drawn at most; the strongest are, and the picture says how many it
                leaves out.
            title: by default the model, and how many edges there are.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            EdgeError: there are no edges, an argument is none, or it cannot be written.
            OutcomeError: matplotlib is not installed (`pip install 'nnpatch-core[plot]'`).

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> type(Circuit.of(nodes, ["input->m0", "m0->logits"]).plot()).__name__
            'Picture'
        """
        figure: Figure = pictures.draw_static(self, path=path, size=size, edges=edges, title=title)
        return figure

    def page(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        edges: int = 300,
        title: str | None = None,
    ) -> str:
        """Draw it as a page in which each edge under the mouse tells its value.

        A node under the mouse, or one that was clicked, shows what it is connected to; a slider
        sets how many of the strongest edges are shown. The page is one file, and needs no network.

        Args:
            path: also write it there.
            edges: how many are drawn at most; the strongest are, and the page says how many it
                leaves out.
            title: by default the model, and how many edges there are.

        Returns:
            The page, as HTML.

        Raises:
            EdgeError: there are no edges, an argument is none, or it cannot be written.

        Examples:
            >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
            >>> page = Circuit.of(nodes, ["input->m0", "m0->logits"]).page()
            >>> page[:15], page.count('class="hit"')
            ('<!DOCTYPE html>', 2)
        """
        return pictures.draw_page(self, path=path, edges=edges, title=title)

    def _beside(self, other: Any) -> Circuit:
        """Another circuit of the same nodes."""
        if not isinstance(other, Circuit):
            raise EdgeError(f"it must be a Circuit, got {shown(other)}")
        if other.nodes != self.nodes:
            sizes = [f"{each.nodes.n_layers} layers, {len(each.nodes):,} edges" for each in
                     (self, other)]  # fmt: skip
            raise EdgeError(f"circuits of other nodes: one has {sizes[0]}, the other {sizes[1]}")
        return other

    def _then(self, words: str) -> dict[str, str]:
        """The info, with what was done last."""
        before = self.info.get("chosen")
        return {**self.info, "chosen": words if before is None else f"{before}, then {words}"}


def _method(method: Any, n: Any, threshold: Any) -> ChoosingMethod:
    if method is not None and (
        not isinstance(method, str) or method not in get_args(ChoosingMethod)
    ):
        raise EdgeError(f"method must be 'top', 'threshold' or 'greedy', got {shown(method)}")
    if (n is None) == (threshold is None):
        raise EdgeError("a circuit is chosen by n= or by threshold=: give one of them")
    by_threshold = threshold is not None
    if method is None:
        return "threshold" if by_threshold else "top"
    if (method == "threshold") != by_threshold:
        raise EdgeError(f"method {method!r} takes {'n=' if by_threshold else 'threshold='}")
    found: ChoosingMethod = method  # type: ignore[assignment]
    return found


def _count(n: Any, what: str) -> int:
    count = strict_int(n, what, EdgeError)
    if count < 0:
        raise EdgeError(f"{what} must be at least 0, got {count}")
    return count


def _threshold(threshold: Any) -> float:
    is_number = isinstance(threshold, int | float | np.number) and not isinstance(threshold, bool)
    if not is_number or threshold != threshold:
        raise EdgeError(f"threshold must be a number, got {shown(threshold)}")
    return float(threshold)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
