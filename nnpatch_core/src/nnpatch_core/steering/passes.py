"""Which tokens a forward runs, and which of them are steered.

Generation is a row of forwards: the prompt first, then a token at a time, after keys and values
that are kept, or, without a cache, all tokens again and one more.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._upstream import UnderWay, cache_given, is_packed, kept_tokens
from nnpatch_core.batch import warn_if_padded
from nnpatch_core.errors import MaskError, PositionError, SteeringError
from nnpatch_core.seq_pos import Group, PromptGroups, are_per_prompt, from_start

#: Stands for each prompt's last token, and then for each that is generated.
_LAST = -1


@attrs.frozen(eq=False)
class Inputs:
    """The tokens of one forward.

    Args:
        ids: `[rows, tokens]`, or `[rows, tokens, width]` of embeddings.
        kept: how many tokens of each row there are keys and values of.
        real: `[rows, kept + tokens]`, bool on the CPU: where there is no padding.
        masked: whether it was told what is padding.
        told: whether `real` is known of what was kept, too.
    """

    ids: Tensor
    kept: int
    real: Tensor
    masked: bool
    told: bool = True

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        """How many tokens of each row are run."""
        return self.ids.shape[1]

    @property
    def end(self) -> int:
        """How many tokens there are with those that were kept."""
        return self.kept + self.tokens


@attrs.frozen(eq=False)
class Prompt:
    """The prompts that generation goes on from.

    Args:
        ids: as of `Inputs`, of the forward that ran them.
        real: `[rows, end]`, as of `Inputs`.
        end: where they end, and what is generated begins.
        run: how many tokens of each row have been run.
    """

    ids: Tensor
    real: Tensor
    end: int
    run: int

    def goes_on(self, inputs: Inputs) -> bool:
        """Whether a forward goes on from here."""
        if len(self.real) != inputs.rows:
            return False
        if inputs.kept:
            return self.end <= inputs.kept <= self.run
        if inputs.end != self.run + 1 or inputs.ids.shape[2:] != self.ids.shape[2:]:
            return False
        same = bool((inputs.ids[:, : self.end].to(self.ids.device) == self.ids).all())
        return same and bool((inputs.real[:, : self.end] == self.real).all())


@attrs.frozen(eq=False)
class Steered:
    """The tokens of one forward that are steered.

    Args:
        at: `[rows, tokens]`, bool on the CPU.
        prompts: `[rows]`, int64 on the CPU, the prompt of each row; None where all are alike.
    """

    at: Tensor
    prompts: Tensor | None

    @property
    def columns(self) -> Tensor | None:
        """`[tokens]`, bool, of any row whatever; None where rows are not alike.

        Padding is steered too then, which no token sees.
        """
        if self.prompts is not None:
            return None
        return self.at.any(0)


def inputs_of(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Inputs:
    """Read what a forward is called with.

    Raises:
        SteeringError: it has no tokens, or several prompts in one row.
        MaskError: a mask that cannot be read.
    """
    given = _named(model, args, kwargs)
    if is_packed(given):
        raise SteeringError(
            "several prompts run in one row, one behind the other, and steering would take them "
            "for one: run them as a padded batch, by generate()"
        )
    ids = next(
        (given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None),
        None,
    )
    if not isinstance(ids, Tensor) or ids.ndim not in (2, 3):
        raise SteeringError(
            f"{type(model).__name__} runs without input_ids or inputs_embeds [batch, seq, ...], "
            "so that it is not known which tokens are steered: pass one of them"
        )
    ids, cache, mask = ids.detach(), cache_given(given), given.get("attention_mask")
    kept = 0 if cache is None else kept_tokens(cache)
    rows, tokens = ids.shape[:2]
    if isinstance(mask, Mapping):
        # Layers that see a window have a narrower one.
        some = [each for each in mask.values() if isinstance(each, Tensor)]
        mask = max(some, key=lambda each: each.shape[-1], default=None)
    if mask is None:
        real = torch.ones(rows, kept + tokens, dtype=torch.bool, device="cpu")
        return Inputs(ids, kept, real, masked=False)
    if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == rows:
        # A state that is no cache of keys and values does not tell how many it has seen.
        kept = kept or max(mask.shape[1] - tokens, 0)
        if mask.shape[1] >= kept + tokens:
            real = mask[:, : kept + tokens].detach().cpu() != 0
            return Inputs(ids, kept, real, masked=True)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] >= kept + tokens:
        return Inputs(ids, kept, _by_square(mask, rows, kept, tokens), masked=True, told=not kept)
    if isinstance(mask, Tensor) and mask.ndim == 4 and kept:
        # Of a window: what was kept is known from before, and what is generated is no padding.
        real = torch.ones(rows, kept + tokens, dtype=torch.bool, device="cpu")
        return Inputs(ids, kept, real, masked=True, told=False)
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise MaskError(
        f"the attention mask of a steered forward must be [batch, seq] = [{rows}, "
        f"{kept + tokens}], with what was kept, or [batch, 1, queries, keys]; got {got}"
    )


def _named(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _by_square(mask: Tensor, rows: int, kept: int, tokens: int) -> Tensor:
    """`[rows, kept + tokens]`, bool: a token that is no padding sees itself."""
    own = mask.detach()[:, 0, -tokens:].diagonal(offset=kept, dim1=-2, dim2=-1)[:, :tokens]
    seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    before = torch.ones(rows, kept, dtype=torch.bool, device="cpu")
    return torch.cat([before, seen.cpu().expand(rows, -1)], 1)


@attrs.define(eq=False)
class Watch:
    """Follows the forwards of a steered model, and says which tokens are steered.

    Args:
        positions: of each prompt or of all, as a `Site` has them; None is all.
        prompts: for how many prompts there are values; None where they are for all alike.
        pad_id: the padding token, if there is one.
    """

    positions: Group | PromptGroups | None
    prompts: int | None
    pad_id: int | None
    _prompt: Prompt | None = attrs.field(default=None, init=False)

    def steered(self, inputs: Inputs, way: UnderWay, appended: int | None) -> Steered:
        """The tokens of the next forward that are steered.

        Args:
            inputs: what it runs.
            way: the generation that it belongs to.
            appended: how many tokens at the right end are an answer's; None where nnpatch does not
                run it.

        Raises:
            SteeringError: rows that are not those of the prompts, or it cannot be known where a
                prompt ends.
            PositionError: a position that is not in a prompt.
        """
        before = self._prompt
        own = appended is not None or way.prefill
        goes_on = not own and before is not None and before.goes_on(inputs)
        if self.positions is not None:
            self._check(inputs, way, goes_on)
        if goes_on:
            assert before is not None
            prompt = attrs.evolve(before, run=inputs.end)
        else:
            end = inputs.end - (appended or 0)
            prompt = Prompt(
                inputs.ids[:, : end - inputs.kept], inputs.real[:, :end], end, inputs.end
            )
            if not inputs.masked and self.pad_id is not None and inputs.ids.ndim == 2:
                remedy = "pass attention_mask="
                warn_if_padded("what is steered", inputs.ids, self.pad_id, remedy)
        self._prompt = prompt
        prompts = self._rows(inputs, prompt, new=not goes_on)
        if self.positions is None:
            return Steered(inputs.real[:, inputs.kept :], prompts)
        # A sweep has run what it keeps of a prompt itself, steered.
        strict = not goes_on and appended is None
        return Steered(self._at(inputs, prompt, prompts, strict=strict), prompts)

    def _check(self, inputs: Inputs, way: UnderWay, goes_on: bool) -> None:
        """Raise `SteeringError` where it cannot be known where the prompt ends."""
        unknown = None
        if way.assisted:
            unknown = "assisted decoding runs the prompt together with guessed tokens"
        elif way.parted:
            unknown = "the prompt runs in several parts, by prefill_chunk_size="
        elif goes_on and inputs.kept and inputs.tokens > 1:
            unknown = f"{inputs.tokens} tokens run together after {inputs.kept} that were kept"
        elif not inputs.told and not goes_on:
            unknown = "tokens were kept, and the attention mask is not [batch, seq]"
        if unknown:
            raise SteeringError(
                f"{unknown}, so that it is not known where a prompt ends, from which positions are "
                "counted: generate without that, or steer every token, by seq_pos=None"
            )

    def _rows(self, inputs: Inputs, prompt: Prompt, *, new: bool) -> Tensor | None:
        """`[rows]`: the prompt of each row; None where values and positions are for all alike."""
        per_prompt = are_per_prompt(self.positions)
        count = self.prompts or (len(self.positions or ()) if per_prompt else None)
        if count is None:
            return None
        rows = inputs.rows
        if rows % count:
            raise SteeringError(
                f"there are values or positions of {count} prompts, and {rows} rows run together: "
                "run all prompts at once, in their order (in a sweep, by a larger batch_size= or "
                "memory_budget=), or give what is the same for all"
            )
        times = rows // count
        if times > 1 and new:
            groups = prompt.ids.reshape(count, times, -1)
            real = prompt.real.reshape(count, times, -1)
            if not bool((groups == groups[:, :1]).all() and (real == real[:, :1]).all()):
                raise SteeringError(
                    f"there are values or positions of {count} prompts, and the {rows} rows that "
                    f"run together are not each prompt {times} times over, as with beams: give one "
                    "for each row"
                )
        return torch.arange(count, device="cpu").repeat_interleave(times)

    def _at(
        self, inputs: Inputs, prompt: Prompt, prompts: Tensor | None, *, strict: bool
    ) -> Tensor:
        """`[rows, tokens]`, bool: the positions that are run, and what is generated."""
        assert self.positions is not None
        at = torch.zeros(inputs.rows, inputs.end, dtype=torch.bool, device="cpu")
        # Each row's tokens moved to the right end, in order, as prompts are counted.
        order = prompt.real.to(torch.int64).argsort(dim=1, stable=True)
        for row in range(inputs.rows):
            group: Any = self.positions
            number = row if prompts is None else int(prompts[row])
            if are_per_prompt(self.positions):
                group = self.positions[number]
            for position in group:
                column = int(order[row, from_start(position, prompt.end)])
                if not prompt.real[row, column]:
                    count = int(prompt.real[row].sum())
                    raise PositionError(
                        f"position {position} is padding in prompt {number}, whose {count} tokens "
                        f"are -{count} to -1"
                    )
                if strict and column < inputs.kept:
                    raise PositionError(
                        f"position {position} of prompt {number} is among the {inputs.kept} tokens "
                        "whose keys and values were kept before: run them inside the `with` too"
                    )
                at[row, column] = True
            if _LAST in group:
                at[row, prompt.end :] = inputs.real[row, prompt.end :]
        return at[:, inputs.kept :]
