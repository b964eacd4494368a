"""Tiny models whose weights a formula gives: the same bits under every torch and transformers.

A seed would not do: what `torch.manual_seed` and a class's own initialisation give changes between
releases, and what another library measured on a model (`tests/edges/files/eap_ig.json`) is compared
with ours in another environment. This file therefore needs torch and transformers alone, of any
version that has the classes.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import torch
import transformers

VOCAB = 48
#: Class, and what its config says. Eight is the size of a head, in all of them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # A norm with a bias, a fused projection, learned positions, tied embeddings.
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 16,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    # Two query heads read each key/value head.
    "llama": (
        "LlamaForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "rms_norm_eps": 1e-5,
        },
    ),
    # Norms after attention and MLP, too.
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "max_position_embeddings": 16,
        },
    ),
    # Attention and MLP of a layer read the same stream.
    "neox": (
        "GPTNeoXForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
        },
    ),
}


def uniform(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers in [-1, 1) that a name gives, from integers alone: float64, exact in float32."""
    found = torch.arange(shape.numel(), dtype=torch.int64) + zlib.crc32(name.encode())
    for _ in range(3):
        found = ((found >> 16) ^ found) & 0xFFFFFFFF
        found = (found * 0x2C1B3C6D) & 0xFFFFFFFF  # below 2**62: int64 holds the product
    found = ((found >> 15) ^ found) & 0xFFFFFF
    return (found.double() / 2**23 - 1).reshape(shape)


def stable(name: str) -> str:
    """What a parameter is called by every release: GPT-NeoX's head was renamed."""
    return name.replace("embed_out", "lm_head")


def weight(model: str, name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter: sizes at which heads look at one token or another and no layer drowns."""
    name = stable(name)
    drawn = uniform(f"{model}/{name}", shape)
    if name.endswith("bias"):
        return drawn * 0.25
    if len(shape) == 1:  # a norm; Gemma's adds the one itself
        return drawn * 0.25 + (0 if model == "gemma2" else 1)
    return drawn if "embed" in name or "wte" in name else drawn * 0.5


def formula_model(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """One of `MODELS`, with weights that are exact in float32, whatever `dtype` they stand in."""
    kind, sizes = MODELS[model]
    cls = getattr(transformers, kind)
    made = cls(cls.config_class(attn_implementation="eager", **sizes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(weight(model, name, parameter.shape))
    return made.to(dtype).eval()


def checksum(model: Any) -> str:
    """Of all parameters' float32 bits, by name."""
    found = hashlib.sha256()
    for name, parameter in sorted((stable(name), one) for name, one in model.named_parameters()):
        found.update(name.encode())
        found.update(parameter.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()
