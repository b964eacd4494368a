"""The unembedding: only at the tokens, and of the ids, that a metric looks at."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules import module as of_torch

from nnpatch_core._models import follow
from nnpatch_core._upstream import forward_of
from nnpatch_core._wrappers import is_at_hand, only_moved_to
from nnpatch_core.tracing import skip


@attrs.frozen(eq=False)
class Unembedding:
    """A model's output projection, where it is a plain matrix.

    Args:
        path: where it is in the model.
        module: the projection.
    """

    path: str
    module: nn.Linear

    def restrict(
        self, traced: Any, ids: Tensor | None, tokens: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Inside a trace: project to some ids of the vocabulary, at some tokens.

        What the model does with its logits afterwards, as capping and scaling, goes on as usual.

        Args:
            traced: the envoy of the model.
            ids: which ids; None is all.
            tokens: `[tokens]`, the row of each and where it stands in it; the logits are then
                `[1, tokens, ids]`. None is the last token of each row.
        """
        envoy = follow(traced, self.path)
        if tokens is None:
            seen = envoy.input[..., -1:, :]
        else:
            hidden = envoy.input
            seen = hidden[tokens[0].to(hidden.device), tokens[1].to(hidden.device)][None]
        weight: Tensor = self.module.weight
        bias: Tensor | None = self.module.bias
        if ids is not None:
            index = ids.to(weight.device)
            weight, bias = weight[index], None if bias is None else bias[index]
        # What comes in may lie on the device of the layers.
        skip(envoy, linear(seen.to(weight.device), weight, bias))


def find_unembedding(model: Any) -> Unembedding | None:
    """The model's output projection; None if it is no plain matrix, or not at hand."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A quantised or hooked subclass, or an offloaded weight, does its own arithmetic; so does a
    # weight of a type of its own, of which rows cannot be taken, or are rounded otherwise.
    if type(module) is not nn.Linear or not is_at_hand(module.weight) or not only_moved_to(module):
        return None
    # A hook of whatever kind is made for all ids.
    if module._forward_hooks or module._forward_pre_hooks or forward_of(module) is not None:
        return None
    if of_torch._global_forward_hooks or of_torch._global_forward_pre_hooks:
        return None
    path = next((name for name, each in model.named_modules() if each is module), "")
    return Unembedding(path, module) if path else None
