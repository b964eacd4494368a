"""What patching must give in many families, by plain torch hooks: shares no code with nnpatch.

As in oracle.py each prompt runs alone and unpadded, in one whole forward for every cell, on a copy
of a plain Hugging Face model, and a position is counted from the end of a prompt. Where components
live, and which columns each head has, is written out here once more, for tiny models: heads are 8
wide, there are 4 query heads, and 2 key/value heads where queries are grouped.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Prompt = tuple[int, ...]


class Place(NamedTuple):
    """A module of a layer, which side of it, and the columns of each head, if it has heads."""

    path: str
    side: str = "output"
    heads: tuple[tuple[int, ...], ...] | None = None


Table = Mapping[str, Place]


class Layout(NamedTuple):
    """Where the layers are, and the table of each; of all of them if there is one."""

    layers: str
    tables: Sequence[Table]

    def table(self, layer: int) -> Table:
        return self.tables[layer % len(self.tables)]


def every(count: int, start: int = 0, step: int = 8) -> tuple[tuple[int, ...], ...]:
    """Heads that are 8 wide; the first column of each is `step` after that of the one before."""
    firsts = [start + step * head for head in range(count)]
    return tuple(tuple(range(first, first + 8)) for first in firsts)


def apart(
    attention: str, key_value: int, q: str = "q_proj", o: str = "o_proj", query: Any = None
) -> Table:
    """A projection for each of q, k, v and o."""
    return {
        "q": Place(f"{attention}.{q}", "output", query or every(4)),
        "k": Place(f"{attention}.k_proj", "output", every(key_value)),
        "v": Place(f"{attention}.v_proj", "output", every(key_value)),
        "o": Place(f"{attention}.{o}", "input", every(4)),
    }


def together(qkv: str, o: str, q: Any, k: Any, v: Any) -> Table:
    """One projection for q, k and v."""
    return {
        "q": Place(qkv, "output", q),
        "k": Place(qkv, "output", k),
        "v": Place(qkv, "output", v),
        "o": Place(o, "input", every(4)),
    }


def layer(heads: Table, attn: str | None = "self_attn", mlp: str = "mlp") -> Table:
    added = {"mlp": Place(mlp)} if attn is None else {"attn": Place(attn), "mlp": Place(mlp)}
    return {"resid_pre": Place("", "input"), **heads, **added, "resid": Place("")}


GROUPED = layer(apart("self_attn", 2))
POST_NORMS = layer(apart("self_attn", 2), "post_attention_layernorm", "post_feedforward_layernorm")
FALCON = ("self_attention.query_key_value", "self_attention.dense")
#: Query, key, value of the first head, then of the second, ...
BY_HEAD = (every(4, 0, 24), every(4, 8, 24), every(4, 16, 24))
#: One key and one value after all queries.
MULTI_QUERY = (every(4), every(1, 32), every(1, 40))
#: Two queries with their key and their value, then the other two with theirs.
BY_GROUP = (
    (*every(2), *every(2, 32)),
    every(2, 16, 32),
    every(2, 24, 32),
)
LINEAR = layer({}, "linear_attn")

LAYOUTS = {
    "bloom": Layout(
        "transformer.h",
        [
            layer(
                together("self_attention.query_key_value", "self_attention.dense", *BY_HEAD),
                "self_attention.dense",
                "mlp.dense_4h_to_h",
            )
        ],
    ),
    "cohere": Layout("model.layers", [GROUPED]),
    "falcon": Layout("transformer.h", [layer(together(*FALCON, *MULTI_QUERY), "self_attention")]),
    "falcon, by head": Layout(
        "transformer.h", [layer(together(*FALCON, *BY_HEAD), "self_attention")]
    ),
    "falcon, by group": Layout(
        "transformer.h", [layer(together(*FALCON, *BY_GROUP), "self_attention")]
    ),
    "gemma": Layout("model.layers", [GROUPED]),
    "gemma2": Layout("model.layers", [POST_NORMS]),
    "gemma3_text": Layout("model.layers", [POST_NORMS]),
    "gpt2": Layout(
        "transformer.h",
        [
            layer(
                together("attn.c_attn", "attn.c_proj", every(4), every(4, 32), every(4, 64)),
                "attn",
            )
        ],
    ),
    "gpt_neox": Layout(
        "gpt_neox.layers",
        [layer(together("attention.query_key_value", "attention.dense", *BY_HEAD), "attention")],
    ),
    "gptj": Layout("transformer.h", [layer(apart("attn", 4, o="out_proj"), "attn")]),
    "granite": Layout("model.layers", [GROUPED]),
    "lfm2": Layout(
        "model.layers",
        [
            layer({}, None, "feed_forward"),
            layer(apart("self_attn", 2, o="out_proj"), mlp="feed_forward"),
            layer({}, None, "feed_forward"),
        ],
    ),
    "llama, MLP first in one layer": Layout("model.layers", [GROUPED]),
    "llama, more heads in one layer": Layout(
        "model.layers", [GROUPED, layer(apart("self_attn", 4)), GROUPED]
    ),
    "mixtral": Layout("model.layers", [GROUPED]),
    "mpt": Layout(
        "transformer.blocks",
        [
            layer(
                together("attn.Wqkv", "attn.out_proj", every(4), every(4, 32), every(4, 64)),
                "attn",
                "ffn.down_proj",
            )
        ],
    ),
    "olmo2": Layout("model.layers", [POST_NORMS]),
    "olmo_hybrid": Layout("model.layers", [LINEAR, POST_NORMS, LINEAR]),
    "opt": Layout("model.decoder.layers", [layer(apart("self_attn", 4, o="out_proj"), mlp="fc2")]),
    "phi": Layout("model.layers", [layer(apart("self_attn", 2, o="dense"))]),
    "phi3": Layout(
        "model.layers",
        [
            layer(
                together(
                    "self_attn.qkv_proj", "self_attn.o_proj", every(4), every(2, 32), every(2, 48)
                )
            )
        ],
    ),
    "qwen3": Layout("model.layers", [GROUPED]),
    # Each head's query is followed by its gate.
    "qwen3_next": Layout(
        "model.layers", [LINEAR, layer(apart("self_attn", 2, query=every(4, 0, 16))), LINEAR]
    ),
    "starcoder2": Layout("model.layers", [GROUPED]),
}


#: A component, a layer, a head or (None) all, and a position counted from the end of a prompt.
Spot = tuple[str, int, int | None, int]


class FamilyOracle:
    """Plain hooks on a copy of `model`."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = copy.deepcopy(model).eval()
        self.layout = layout
        self._activations: dict[tuple[Prompt, str, int], Tensor] = {}

    def heads(self, component: str, layer: int) -> list[int] | list[None]:
        """Each head of a component that has heads, else one None."""
        heads = self.layout.table(layer)[component].heads
        return [None] if heads is None else list(range(len(heads)))

    def logits(self, prompt: Prompt, hooks: Iterable[Any] = ()) -> Tensor:
        """`[vocab]` at the prompt's last token."""
        try:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits[0, -1].float()

    def activation(self, prompt: Prompt, component: str, layer: int) -> Tensor:
        """`[seq, width]`."""
        key = (prompt, component, layer)
        if key not in self._activations:

            def keep(rows: Tensor) -> None:
                self._activations[key] = rows.clone()

            self.logits(prompt, [self._hook(component, layer, len(prompt), keep)])
        return self._activations[key]

    def patched(
        self,
        target: Prompt,
        source: Prompt,
        spots: Iterable[Spot],
        projector: Tensor | None = None,
    ) -> Tensor:
        """`[vocab]`: `target` with what `source` has at the spots, all in one forward.

        Or only with that of it onto which a matrix `[columns, columns]` projects.
        """
        hooks = []
        for component, layer, head, back in spots:
            donor = self.activation(source, component, layer)[len(source) - back]
            heads = self.layout.table(layer)[component].heads
            columns = list(range(len(donor)))
            if heads is not None:
                columns = [*sum(heads, ())] if head is None else [*heads[head]]
            place = (len(target) - back, columns)
            write = functools.partial(_write, place, donor[columns], projector)
            hooks.append(self._hook(component, layer, len(target), write))
        return self.logits(target, hooks)

    def _hook(self, component: str, layer: int, length: int, visit: Callable[..., None]) -> Any:
        """Let `visit` read, or edit in place, the activation `[seq, width]`."""
        place = self.layout.table(layer)[component]
        module = self.model.get_submodule(self.layout.layers)[layer].get_submodule(place.path)

        def visited(found: Tensor) -> Tensor:
            edited = found.clone()
            # Some modules are given all tokens in a row, without an axis of prompts.
            visit(edited.view(length, -1))
            return edited

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple:
            if args:
                return (visited(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": visited(kwargs["hidden_states"])}

        def after(_: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (visited(output[0]), *output[1:])
            return visited(output)

        if place.side == "input":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)


def _write(
    place: tuple[int, list[int]], values: Tensor, projector: Tensor | None, rows: Tensor
) -> None:
    if projector is not None:
        values = rows[place] + ((values - rows[place]).double() @ projector).to(values.dtype)
    rows[place] = values
