"""A Llama whose weights are set by hand: all of them are 0, but those that are named here.

The residual stream has named parts, each of one or more coordinates, and each signal has a part of
its own, so that none disturbs another. A constant that is a thousand times larger than any signal
stands in the part `one` of every token. It alone makes the length by which a norm divides (signals
change that by less than 1e-5 of it), and the norms' weights undo it: whoever reads the stream finds
each signal as it was written, and 1 in `one`.

A head finds tokens by keys. All but the first pair of a head's dimensions rotate so slowly that
they never move; in that pair positions are told apart, for a head that looks one token back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 64
HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 16
#: Units of each MLP.
UNITS = 24
#: What stands in the part `one`.
LARGE = 1000.0
#: By so much the score of a token that is found is above that of the first token, where a head
#: looks that finds nothing, and that one's above all others: what leaks is e^-20, or 2e-9.
SHARP = 20.0
#: As that, for heads that look at the first token in any case: e^-150 is 0 in float32.
SURE = 150.0
#: Of a head that looks one token back, over up to 6 tokens the next best has at most .54 of it.
BACK = 100.0


class Wiring:
    """A model in the making.

    Args:
        layers: how many.
        tokens: the names of the vocabulary, in the order of their ids.
        parts: the parts of the stream by name, with how many coordinates each has. `one`, `bos`
            (the first token of each prompt) and `last` (the last one) are there without that.
    """

    def __init__(self, layers: int, tokens: Sequence[str], parts: Mapping[str, int]) -> None:
        config = LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=UNITS,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_VALUE_HEADS,
            head_dim=HEAD_DIM,
            hidden_act="relu",
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e30},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        # Weights that are drawn and thrown away leave the generator as it was.
        with torch.random.fork_rng(devices=[]):
            self.model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for weight in self.model.parameters():
            weight.zero_()
        self.tokens = {name: number for number, name in enumerate(tokens)}
        self.parts: dict[str, list[int]] = {}
        used = 0
        for name, size in {"one": 1, "bos": 1, "last": 1, **parts}.items():
            self.parts[name] = list(range(used, used + size))
            used += size
        assert used <= WIDTH, used
        self._keys: dict[tuple[int, int], dict[str, list[int]]] = {}
        self._values: dict[tuple[int, int], dict[str, list[int]]] = {}
        self._units = [0] * layers
        for name, weight in self.model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(LARGE / math.sqrt(WIDTH))
                weight[self.at("one")] = 1 / math.sqrt(WIDTH)
        self.model.model.embed_tokens.weight[:, self.at("one")] = LARGE
        self.embed("bos", "bos")
        self.embed("last", "last")

    def at(self, part: str) -> list[int]:
        """The coordinates of `part`, or of one of them: `part.0`."""
        name, _, index = part.partition(".")
        return [self.parts[name][int(index)]] if index else self.parts[name]

    def prompts(self, *prompts: Iterable[str]) -> Tensor:
        """`[batch, seq]`, without the first and the last token, which each of them gets."""
        rows = [[self.tokens[each] for each in ("bos", *prompt, "last")] for prompt in prompts]
        return torch.tensor(rows)

    def answers(self, pairs: Iterable[tuple[str, str]]) -> Tensor:
        """`[2, batch]`: the tokens of the source answers, and of the target answers."""
        return torch.tensor([[self.tokens[each] for each in pair] for pair in pairs]).T

    def embed(self, token: str, *parts: str) -> None:
        """A token has 1 in these parts."""
        for part in parts:
            self.model.model.embed_tokens.weight[self.tokens[token], self.at(part)] = 1

    def unembed(self, token: str, parts: Mapping[str, float]) -> None:
        """The logit of a token is the sum of what stands in parts, times these."""
        for part, gain in parts.items():
            self.model.lm_head.weight[self.tokens[token], self.at(part)] = gain

    def keys(self, layer: int, group: int, *parts: str) -> None:
        """What the keys of a key/value head tell of each token."""
        rows = iter([each for each in range(HEAD_DIM) if each % (HEAD_DIM // 2)])
        weight = self.model.model.layers[layer].self_attn.k_proj.weight
        laid = self._keys[layer, group] = {}
        for part in parts:
            laid[part] = []
            for column in self.at(part):
                row = next(rows)
                weight[group * HEAD_DIM + row, column] = 1
                laid[part].append(row)

    def values(self, layer: int, group: int, *parts: str) -> None:
        """What the values of a key/value head hold of each token."""
        rows = iter(range(HEAD_DIM))
        weight = self.model.model.layers[layer].self_attn.v_proj.weight
        laid = self._values[layer, group] = {}
        for part in parts:
            laid[part] = []
            for column in self.at(part):
                row = next(rows)
                weight[group * HEAD_DIM + row, column] = 1
                laid[part].append(row)

    def looks(self, layer: int, head: int, asked: str, key: str, gain: float) -> None:
        """A head adds gain x (what stands in a part) x (a key) to a token's score.

        Args:
            layer: of the head.
            head: the query head.
            asked: the part that the query reads. If it has as many coordinates as the key, they
                are matched one by one; if the key has one, all of them go with that.
            key: one of the parts in the head's keys.
            gain: the score, where 1 meets 1.
        """
        rows = self._keys[layer, head * KEY_VALUE_HEADS // HEADS][key]
        columns = self.at(asked)
        weight = self.model.model.layers[layer].self_attn.q_proj.weight
        for row, column in zip(rows * (len(columns) // len(rows)), columns, strict=True):
            weight[head * HEAD_DIM + row, column] += gain * math.sqrt(HEAD_DIM)

    def looks_back(self, layer: int, head: int) -> None:
        """A head looks at the token before."""
        group = head * KEY_VALUE_HEADS // HEADS
        attention = self.model.model.layers[layer].self_attn
        attention.k_proj.weight[group * HEAD_DIM, self.at("one")] = 1
        # The first pair turns by 1 for each position; a query that is turned back by 1 from the
        # start points where the key before it does.
        gain = BACK * math.sqrt(HEAD_DIM)
        start = head * HEAD_DIM
        attention.q_proj.weight[start, self.at("one")] = gain * math.cos(1)
        attention.q_proj.weight[start + HEAD_DIM // 2, self.at("one")] = -gain * math.sin(1)

    def finds(self, layer: int, head: int, asked: str, key: str) -> None:
        """A head looks where the key is what is asked, or else at the first token."""
        self.looks(layer, head, "one", "bos", SHARP)
        self.looks(layer, head, asked, key, 2 * SHARP)

    def writes(self, layer: int, head: int, value: str, part: str, gain: float = 1) -> None:
        """A head adds gain x (a part of its values) to a part of the stream."""
        rows = self._values[layer, head * KEY_VALUE_HEADS // HEADS][value]
        weight = self.model.model.layers[layer].self_attn.o_proj.weight
        for row, column in zip(self.at(part), rows, strict=True):
            weight[row, head * HEAD_DIM + column] = gain

    def unit(
        self,
        layer: int,
        gate: Mapping[str, float],
        out: Mapping[str, float],
        up: Mapping[str, float] | None = None,
    ) -> None:
        """A unit of an MLP: relu(gate) x up, where each is a sum of parts of one coordinate.

        Args:
            layer: of the MLP.
            gate: how much of each part is in the gate.
            out: how much of the unit is added to each part.
            up: how much of each part is in the other factor; by default that is 1.
        """
        mlp, unit = self.model.model.layers[layer].mlp, self._units[layer]
        self._units[layer] += 1
        for weight, parts in ((mlp.gate_proj.weight, gate), (mlp.up_proj.weight, up or {"one": 1})):
            for part, gain in parts.items():
                weight[unit, self.at(part)] = gain
        for part, gain in out.items():
            mlp.down_proj.weight[self.at(part), unit] = gain

    def copies(self, layer: int, read: str, part: str) -> None:
        """An MLP adds what it reads in one part to another: a linear one."""
        size = len(self.at(read))
        for each in range(size):
            dot = f".{each}" if size > 1 else ""
            self.unit(layer, {"one": 1}, {f"{part}{dot}": 1}, up={f"{read}{dot}": 1})

    def alike(self, layer: int, head: int | None) -> None:
        """A head (or None, the MLP) adds 1 to the part `alike`, whatever the prompt."""
        if head is None:
            self.unit(layer, {"one": 1}, {"alike": 1})
        else:
            self.looks(layer, head, "one", "bos", SURE)
            self.writes(layer, head, "bos", "alike")
