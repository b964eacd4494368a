"""Random paths in random prompts: as nnpatch is asked for them, and as an oracle says they are."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from nnpatch_core import MultiSite, Outcome, Site, path_patching
from nnpatch_core.testing import tiny_model
from nnpatch_llama import Llama3
from tests.helpers.edge_oracle import EdgeOracle, Node, node_of
from tests.helpers.families import FAMILIES, model_of
from tests.helpers.oracle import Prompt, lay_out, random_prompts

#: Grouped queries, norms after the blocks, parallel blocks, fused projections, a factor, windows,
#: experts, biases on the scores, layers that differ.
NAMES = (
    "falcon, alibi",
    "falcon, by group",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "llama, more heads in one layer",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen3",
)
#: Counted from the end, 1 is the last token; None is everywhere.
Positions = tuple[int, ...] | None


class Entry(NamedTuple):
    """Nodes that count together, and where."""

    names: tuple[str, ...]
    at: Positions = None


@functools.cache
def model_and_oracle(family: str) -> tuple[Any, Any, EdgeOracle]:
    """A tiny model, its adapter and the oracle."""
    if family == "llama":
        model, api = tiny_model("llama"), Llama3
    else:
        model, api = model_of(family), FAMILIES[family].api
    return model, api, EdgeOracle(model, family)


@attrs.frozen
class Case:
    """A sweep over paths: entries for each member, and the prompts.

    Of pairs that differ in length one has padding where the other has none.
    """

    family: str
    members: Sequence[Sequence[Entry]]
    source: list[Prompt]
    target: list[Prompt]
    layout: str = "left"

    @classmethod
    def drawn(cls, family: str, members: int, seed: int, *, layout: str = "left") -> Case:
        """A sweep of two entries for each member: one node, and two that count together.

        Each node has one before it, and one after it.
        """
        _, _, oracle = model_and_oracle(family)
        draw = random.Random(f"{family} {members} {seed}")
        senders, readers = (
            list(dict.fromkeys(names))
            for names in zip(*(edge.split("->") for edge in oracle.edges()), strict=True)
        )
        streams = [f"resid_pre{layer}" for layer in range(1, len(oracle.layers))]
        between = [name for name in readers if name != "logits"]
        pools = [senders, *[between] * (members - 2), [*readers, *streams]]
        lengths = [5, 7, 4], [5, 6, 4]
        source, target = (random_prompts(each, seed + n) for n, each in enumerate(lengths))
        while True:
            found: list[list[Entry]] = []
            for pool in pools:
                places: list[Positions] = [None, tuple(draw.sample(range(1, 7), 3))]
                draw.shuffle(places)
                names = (draw.choice(pool),), tuple(draw.sample(pool, 2))
                found.append([Entry(*each) for each in zip(names, places, strict=True)])
            case = cls(family, found, source, target, layout)
            if case._is_ordered:
                return case

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """The paths that there are: some node of each entry is before some node of the next."""
        return [
            path
            for path in itertools.product(*(range(len(each)) for each in self.members))
            if all(
                any(self._leads(one, other) for one in before.names for other in after.names)
                for before, after in itertools.pairwise(
                    some[number] for some, number in zip(self.members, path, strict=True)
                )
            )
        ]

    @property
    def _is_ordered(self) -> bool:
        for before, after in itertools.pairwise(self.members):
            ones, others = ([n for entry in some for n in entry.names] for some in (before, after))
            if not all(any(self._leads(one, other) for other in others) for one in ones):
                return False
            if not all(any(self._leads(one, other) for one in ones) for other in others):
                return False
        return bool(self.paths)

    def _leads(self, before: str, after: str) -> bool:
        """Whether what a node writes is in the stream that another one reads."""
        _, _, oracle = model_and_oracle(self.family)
        node = _node(before)
        nodes = [node]
        if node[0] in ("q", "k", "v"):
            nodes = [("o", node[1], head) for head in oracle._readers(node)]
        return any(oracle._feeds(each, _node(after)) for each in nodes)

    def asked(self) -> list[list[Any]]:
        """The members as `path_patching` takes them."""
        _, api, oracle = model_and_oracle(self.family)
        last = len(oracle.layers) - 1
        return [[_asked(api, entry, last) for entry in entries] for entries in self.members]

    def run(self, through: str | None, engine: str, **options: Any) -> Outcome:
        """The sweep."""
        model, api, _ = model_and_oracle(self.family)
        width = max(map(len, self.source + self.target))
        (source, source_mask), (target, target_mask) = (
            lay_out(each, self.layout, width) for each in (self.source, self.target)
        )
        return path_patching(
            model,
            api,
            None,
            None,
            source,
            target,
            *answers(len(self.source)),
            path=self.asked(),
            through=through,
            source_attention_mask=source_mask,
            target_attention_mask=target_mask,
            engine=engine,
            progress=False,
            **options,
        )

    def expected(self, through: str | None, path: Sequence[int]) -> Tensor:
        """`[prompts]`: the logit difference of a path, by its entry in each member."""
        _, _, oracle = model_and_oracle(self.family)
        entries = [some[number] for some, number in zip(self.members, path, strict=True)]
        nodes = [[_node(name) for name in entry.names] for entry in entries]
        rows = [
            oracle.chain(source, target, nodes, through, [entry.at for entry in entries])
            for source, target in zip(self.source, self.target, strict=True)
        ]
        one, other = answers(len(rows))
        logits = torch.stack(rows)
        return (logits.gather(1, one[:, None]) - logits.gather(1, other[:, None]))[:, 0]


def answers(count: int) -> tuple[Tensor, Tensor]:
    """Two for each prompt."""
    return torch.arange(3, 3 + count), torch.arange(9, 9 + count)


def site_of(api: Any, name: str, last: int, at: Any = None) -> Site:
    """A node as a site; `last` is the number of the last layer."""
    if name == "logits":
        return Site.get_site(api, "resid", last, seq_pos=at)
    component, layer, *head = _node(name)
    return Site.get_site(api, component, layer, *head, seq_pos=at)


def _asked(api: Any, entry: Entry, last: int) -> Any:
    if entry.at is None:
        return entry.names if len(entry.names) > 1 else entry.names[0]
    positions = [-back for back in entry.at]
    sites = [site_of(api, name, last, positions) for name in entry.names]
    return MultiSite(sites) if len(sites) > 1 else sites[0]


def _node(name: str) -> Node:
    if name.startswith("resid_pre"):
        return ("resid_pre", int(name.removeprefix("resid_pre")))
    return node_of(name)
