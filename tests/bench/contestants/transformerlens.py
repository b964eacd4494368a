"""TransformerLens by its own patching functions, on the same weights through its bridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import torch
from jobs import Cell
from subject import Prompts, Subject
from tokenizers import Tokenizer, models
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedTokenizerFast

#: `resid` is a layer's output. The library's ready-made function takes a layer's input, which for
#: the layer above is the same but leaves out the last; this is that function on the output.
get_act_patch_resid_post = partial(
    patching.generic_activation_patch,
    patch_setter=patching.layer_pos_patch_setter,
    activation_name="resid_post",
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "resid": get_act_patch_resid_post,
    "attn": patching.get_act_patch_attn_out,
    "mlp": patching.get_act_patch_mlp_out,
    "q": patching.get_act_patch_attn_head_q_by_pos,
    "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
    "o": patching.get_act_patch_attn_head_out_by_pos,
}


def make(subject: Subject) -> Lens:
    """The library around that model."""
    return Lens(subject)


class Lens:
    """One run for the cache, and one for every cell."""

    def __init__(self, subject: Subject) -> None:
        with _tokenizer(subject.name) as tokenizer:
            self.bridge = TransformerBridge.boot_transformers(
                subject.name,
                hf_model=subject.model,
                device=str(subject.device),
                dtype=subject.model.dtype,
                tokenizer=tokenizer,
            )

    @torch.no_grad()
    def sweep(self, prompts: Prompts, cells: Sequence[Cell]) -> list[list[float]]:
        """See `Contestant`."""
        _, cache = self.bridge.run_with_cache(prompts.source)
        found: dict[Cell, list[float]] = {}
        for component in dict.fromkeys(cell.component for cell in cells):
            own = [cell for cell in cells if cell.component == component]
            result = FUNCTIONS[component](
                self.bridge,
                prompts.target,
                cache,
                lambda logits: prompts.metric(logits[:, -1]),
                index_axis_names=None,
                index_df=_index(own),
                reduce="none",
            )
            found.update(zip(own, result.values.tolist(), strict=True))
        return [found[cell] for cell in cells]


@contextmanager
def _tokenizer(folder: str) -> Iterator[Any]:
    """One of a single word where a folder has none: the library wants it, and nobody uses it."""
    if any(Path(folder).glob("tokenizer*")):
        yield None
        return
    words = Tokenizer(models.WordLevel({"?": 0}, "?"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "?")
    # The library loads it once more, by name.
    with TemporaryDirectory() as made:
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(made)
        yield AutoTokenizer.from_pretrained(made)


def _index(cells: Sequence[Cell]) -> pandas.DataFrame:
    """Which cells to run: without it the functions run every one of the model."""
    rows = [
        {"layer": cell.layer, "pos": cell.position}
        | ({} if cell.head is None else {"head": cell.head})
        for cell in cells
    ]
    return pandas.DataFrame(rows)
