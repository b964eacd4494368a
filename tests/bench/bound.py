"""The time that one token's way through one layer takes at least.

By its matrix products alone, and by the model's own layers, which have norms, attention and other
things between them.
"""

from __future__ import annotations

import torch
from clock import Seconds, timed
from subject import Subject
from torch import Tensor, nn

#: Tokens multiplied at once: so many that fetching a weight costs little beside using it.
TOKENS = {"cpu": (512, 1024), "cuda": (4096, 16384)}
#: Rows of a plain forward, and tokens of each.
ROWS = {"cpu": (16, 32), "cuda": (64, 256)}
LENGTH = 24
#: Layers gone through one after the other: more weights than a cache holds.
LAYERS = 10


def seconds_per_token_layer(subject: Subject) -> Seconds:
    """The best rate found, each clock by itself."""
    layers = [_weights(layer) for layer in subject.layers[:LAYERS]]
    tried = []
    for tokens in TOKENS[subject.device.type]:
        weight = layers[0][0]
        given = {
            width: torch.randn(tokens, width, device=weight.device, dtype=weight.dtype)
            for width in {weight.shape[1] for weight in layers[0]}
        }
        _multiply(layers[:1], given)
        _, taken = timed(lambda given=given: _multiply(layers, given), subject.device)
        tried.append(Seconds(*(each / tokens / len(layers) for each in taken)))
    return Seconds(min(each.cpu for each in tried), min(each.wall for each in tried))


def own_seconds_per_token_layer(subject: Subject) -> Seconds:
    """What the model itself takes for a token in a layer, in a plain forward of many tokens."""
    tried = []
    for rows in ROWS[subject.device.type]:
        tokens = torch.randint(3, 1000, (rows, LENGTH), device=subject.device)
        count = tokens.numel() * len(subject.layers)
        _forward(subject, tokens[:1])
        _, taken = timed(lambda tokens=tokens: _forward(subject, tokens), subject.device)
        tried.append(Seconds(*(each / count for each in taken)))
    return Seconds(min(each.cpu for each in tried), min(each.wall for each in tried))


def _forward(subject: Subject, tokens: Tensor) -> None:
    with torch.inference_mode():
        # Without the head, which is no layer.
        subject.model.model(tokens, use_cache=False)


def _weights(layer: nn.Module) -> list[Tensor]:
    return [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]


def _multiply(layers: list[list[Tensor]], given: dict[int, Tensor]) -> None:
    with torch.inference_mode():
        for weights in layers:
            for weight in weights:
                nn.functional.linear(given[weight.shape[1]], weight)
