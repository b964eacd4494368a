"""A batch of prompts, packed to left padding: the one layout that everything runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import AnswerError, MaskError, PaddingWarning, TokensError

_INTEGERS = (torch.int32, torch.int64)
#: Tokens as a user gives them: `[batch, seq]`, or a tokenizer's output, which has a mask as well.
GivenTokens: TypeAlias = Tensor | Mapping[str, Any]
#: Stands where there is no token: an id that each vocabulary has.
_FILLER = 0


class WantedSite(Protocol):
    """An activation that is wanted of a run."""

    @property
    def positions(self) -> Tensor:
        """`[batch, places]`, int64 on the CPU: positions from 0; -1 where there is none."""
        ...

    def rows(self, rows: slice | Tensor) -> WantedSite:
        """That of some prompts."""
        ...

    def real(self, mask: Tensor) -> Tensor:
        """`[batch, places]`, bool on the CPU: where there is a token."""
        ...


@attrs.frozen(eq=False)
class Batch:
    """Prompts as left-padded tokens, so that position -1 is each prompt's last token.

    Args:
        tokens: `[batch, seq]`, integers.
        mask: `[batch, seq]`, int64: 1 for a token, 0 for padding, which stands on the left.
        read: `[batch, places]`, int64 on the CPU: the positions, from 0, at which the logits of a
            run are wanted; None is the last token alone.
        appended: how many tokens at the right end are an answer's, appended to the prompt: they
            run, but are never patched.
        sites: activations that are wanted of a run, each with the positions in each prompt.
    """

    tokens: Tensor
    mask: Tensor
    read: Tensor | None = None
    appended: int = 0
    sites: tuple[WantedSite, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seq_len(self) -> int:
        """Tokens per row, padding included."""
        return self.tokens.shape[1]

    @property
    def position_ids(self) -> Tensor:
        """`[batch, seq]`: 0 at each prompt's first token; padding has 0 as well."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def rows(self, rows: slice | Tensor) -> Batch:
        """Some of the prompts, at the same width."""
        read = None if self.read is None else self.read[_on_cpu(rows)]
        sites = tuple(site.rows(_on_cpu(rows)) for site in self.sites)
        return Batch(self.tokens[rows], self.mask[rows], read, self.appended, sites)

    def to(self, device: torch.device) -> Batch:
        """The same prompts on another device."""
        tokens, mask = self.tokens.to(device), self.mask.to(device)
        return Batch(tokens, mask, self.read, self.appended, self.sites)

    @property
    def prompt(self) -> Batch:
        """The prompts without an answer, and without what is wanted of their logits."""
        seq_len = self.seq_len - self.appended
        return Batch(self.tokens[:, :seq_len], self.mask[:, :seq_len])

    @property
    def own(self) -> Tensor:
        """`[batch, seq]`, int64: 1 for a token of the prompt, 0 for padding and an answer."""
        own = self.mask.clone()
        own[:, self.seq_len - self.appended :] = 0
        return own

    def followed_by(self, answers: Tensor) -> Batch:
        """The prompts with tokens appended on the right.

        Where an answer is shorter than another, tokens follow that nobody looks at: none to their
        left sees them, so that every prompt ends at the same position.

        Args:
            answers: `[batch, n]`, token ids; negative ones fill.
        """
        answers = answers.clamp(min=0).to(self.tokens)
        tokens = torch.cat([self.tokens, answers], 1)
        mask = torch.cat([self.mask, torch.ones_like(answers, dtype=self.mask.dtype)], 1)
        return Batch(tokens, mask, self.read, answers.shape[1])

    def repeated(self, times: int) -> Batch:
        """All prompts, several times after one another."""
        assert self.read is None
        return Batch(self.tokens.repeat(times, 1), self.mask.repeat(times, 1), None, self.appended)

    @property
    def read_padding(self) -> Tensor:
        """`[batch, places]`, bool on the CPU: where logits are wanted, and there is no token."""
        assert self.read is not None
        return self.mask.cpu().gather(1, self.read) == 0

    @property
    def looked_at(self) -> Tensor:
        """`[batch, seq]`, bool on the CPU: the positions at which something is wanted of a run."""
        looked_at = torch.zeros(self.mask.shape, dtype=torch.bool, device="cpu")
        if self.read is None:
            looked_at[:, -1] = True
            return looked_at
        looked_at.scatter_(1, self.read, ~self.read_padding)
        for site in self.sites:
            real = site.real(self.mask)
            prompts, places = real.nonzero().T
            looked_at[prompts, site.positions[prompts, places]] = True
        return looked_at

    @property
    def reaching(self) -> Tensor:
        """`[batch, seq]`, bool on the CPU: the positions that those, or later ones, can see."""
        return self.looked_at.flip(1).cumsum(1).flip(1).bool()


def _on_cpu(rows: slice | Tensor) -> slice | Tensor:
    return rows.cpu() if isinstance(rows, Tensor) else rows


def pack_left(tokens: Tensor, mask: Tensor) -> Batch:
    """Move each row's real tokens to the right end, in order, and its padding to the left.

    Padding may hold any number, such as an id that the model has no embedding for; it becomes 0.

    Args:
        tokens: `[batch, seq]`.
        mask: `[batch, seq]`, 1 or true for a token, 0 for padding, in any arrangement.

    Examples:
        >>> pack_left(torch.tensor([[7, 8, -100]]), torch.tensor([[1, 1, 0]])).tokens
        tensor([[0, 7, 8]])
    """
    mask = mask.to(torch.int64)
    order = mask.argsort(dim=1, stable=True)
    tokens = tokens.masked_fill(mask == 0, _FILLER)
    return Batch(tokens.gather(1, order), mask.gather(1, order))


def make_batch(
    name: str,
    tokens: Any,
    mask: Any,
    *,
    vocab_size: int | None,
    pad_id: int | None,
    remedy: str = "pass attention_mask=",
) -> Batch:
    """Check tokens and mask of an argument called `name`, and pack them.

    `remedy` is how to give the mask where it is missing, in a warning.

    Raises:
        TokensError: not a `[batch, seq]` tensor of token ids of the vocabulary; what is masked may
            be any number.
        MaskError: not a `[batch, seq]` mask of 0 and 1 with a token in each row.

    Warns:
        PaddingWarning: no mask was given, but rows begin or end with the padding token.
    """
    check_tokens(name, tokens)
    if mask is not None:
        _check_mask(name, mask, tokens)
        mask = mask.to(tokens.device)
    _check_ids(name, tokens if mask is None else tokens[mask.bool()], vocab_size, pad_id)
    if mask is None:
        if pad_id is not None:
            warn_if_padded(name, tokens, pad_id, remedy)
        mask = torch.ones_like(tokens)
    return pack_left(tokens, mask)


def unpack(name: str, tokens: Any, mask: Any = None) -> tuple[Any, Any]:
    """Tokens and mask, of a tokenizer's output too; anything else comes back as it is.

    Args:
        name: of the argument.
        tokens: as the user gives them.
        mask: the mask that is given apart; None is none.

    Raises:
        TokensError: there are no tokens in it, or no tensor of them.
        MaskError: it has a mask as well, which is another one.
    """
    if not isinstance(tokens, Mapping):
        return tokens, mask
    if "input_ids" not in tokens:
        raise TokensError(f"{name} has no 'input_ids', only {shown(list(tokens))}")
    ids, own = tokens["input_ids"], tokens.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise TokensError(
            f"the 'input_ids' of {name} must be a torch tensor [batch, seq], got "
            f"{type(ids).__name__}: ask the tokenizer for tensors, 'pt'"
        )
    if mask is None or own is None:
        return ids, own if mask is None else mask
    for each in (mask, own):
        if not isinstance(each, Tensor) or not has_numbers(each) or each.shape != ids.shape:
            # It is no mask of these tokens, which is said where masks are checked.
            return ids, each
    other = (mask.to(own.device) != own).any(1).nonzero().flatten().tolist()
    if other:
        raise MaskError(
            f"{name} has an attention mask of its own, and the one that was given is another in "
            f"row {other[0]}: leave that out, or give it for the other run alone"
        )
    return ids, own


def check_tokens(name: str, tokens: Any) -> None:
    """Raise `TokensError` unless `tokens` is `[batch, seq]` of integers."""
    if not isinstance(tokens, Tensor):
        raise TokensError(
            f"{name} must be a torch tensor [batch, seq], got {type(tokens).__name__}"
        )
    if not has_numbers(tokens):
        raise TokensError(f"{name} has no numbers that can be read: it is on {where_of(tokens)}")
    if tokens.dtype not in _INTEGERS:
        raise TokensError(f"{name} must hold int64 or int32 token ids, got {tokens.dtype}")
    if tokens.ndim != 2:
        raise TokensError(f"{name} must have the shape [batch, seq], got {list(tokens.shape)}")
    if 0 in tokens.shape:
        raise TokensError(f"{name} is empty: its shape is {list(tokens.shape)}")


def _check_ids(name: str, tokens: Tensor, vocab_size: int | None, pad_id: int | None) -> None:
    """Raise `TokensError` unless all are ids of the vocabulary."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        bad = low if low < 0 else high
        last = "" if vocab_size is None else f" to {vocab_size - 1}"
        mask = ". It is the padding token: pass attention_mask=" if bad == pad_id else ""
        raise TokensError(f"{name} holds the id {bad}; the model's vocabulary is 0{last}{mask}")


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one, with its numbers at hand."""
    return tensor.layout == torch.strided and not tensor.is_meta


def where_of(tensor: Tensor) -> str:
    """Say in an error on which device a tensor is, and in which layout."""
    return f"device {str(tensor.device)!r}, with the layout {tensor.layout}"


def _check_mask(name: str, mask: Any, tokens: Tensor) -> None:
    of = f"the attention mask of {name}"
    if not isinstance(mask, Tensor):
        raise MaskError(f"{of} must be a torch tensor [batch, seq], got {type(mask).__name__}")
    if not has_numbers(mask):
        raise MaskError(f"{of} has no numbers that can be read: it is on {where_of(mask)}")
    if mask.shape != tokens.shape:
        raise MaskError(f"{of} must have its shape {list(tokens.shape)}, got {list(mask.shape)}")
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise MaskError(f"{of} may hold only 0 and 1, got {wrong[0].item()}")
    empty = (mask == 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise MaskError(f"{of} leaves no token in row {empty[0]}: each prompt needs at least one 1")


def warn_if_padded(name: str, tokens: Tensor, pad_id: int, remedy: str) -> None:
    """Rows that differ in a leading run of the padding token, or end in it, look padded."""
    is_pad = tokens == pad_id
    leading = is_pad.cumprod(dim=1).sum(dim=1)
    # A padding token that is also the BOS token leads every row once without being padding.
    led = bool((leading > 1).any()) or bool(leading.min() != leading.max())
    if led or bool(is_pad[:, -1].any()):
        warn(
            f"{name} has rows that begin or end with the padding token {pad_id}, but no mask was "
            f"given: these are run as ordinary tokens. If they are padding, {remedy}",
            PaddingWarning,
        )


def check_answers(name: str, answers: Any, batch: int, vocab_size: int | None) -> Tensor:
    """Answer ids as `[batch]` int64 on the CPU.

    Raises:
        AnswerError: not one id of the vocabulary for each prompt.
    """
    if not isinstance(answers, Tensor):
        raise AnswerError(f"{name} must be a torch tensor [batch], got {type(answers).__name__}")
    if not has_numbers(answers):
        raise AnswerError(f"{name} has no numbers that can be read: it is on {where_of(answers)}")
    if answers.dtype not in _INTEGERS:
        raise AnswerError(f"{name} must hold int64 or int32 token ids, got {answers.dtype}")
    if answers.shape != (batch,):
        raise AnswerError(
            f"{name} must have the shape [batch] = [{batch}], got {list(answers.shape)}"
        )
    bad = answers[(answers < 0) | (answers >= (vocab_size or 2**62))]
    if bad.numel():
        last = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise AnswerError(f"{name} holds the id {int(bad[0])}; the model's vocabulary is 0{last}")
    return answers.detach().to("cpu", torch.int64)


def check_paired(source: Batch, target: Batch) -> None:
    """Raise `TokensError` unless the two runs have the same shape and dtype."""
    if source.tokens.shape != target.tokens.shape:
        raise TokensError(
            f"source_tokens have the shape {list(source.tokens.shape)} and target_tokens "
            f"{list(target.tokens.shape)}; they must be the same: pad the shorter prompts "
            "and pass the masks (PromptPairs does)"
        )
    if source.tokens.dtype != target.tokens.dtype:
        raise TokensError(
            f"source_tokens are {source.tokens.dtype} and target_tokens {target.tokens.dtype}; "
            "they must be the same"
        )
