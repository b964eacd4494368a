"""The unembedding: only at the last token, only the ids that a metric looks at."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules import module as of_torch

from nnpatch_core._models import follow
from nnpatch_core._upstream import forward_of
from nnpatch_core._wrappers import is_dispatched
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

    def restrict(self, traced: Any, ids: Tensor) -> None:
        """Inside a trace: project to some ids of the vocabulary, at the last token.

        What the model does with its logits afterwards, as capping and scaling, goes on as usual.
        """
        envoy = follow(traced, self.path)
        last = envoy.input[..., -1:, :]
        index = ids.to(self.module.weight.device)
        bias = None if self.module.bias is None else self.module.bias[index]
        skip(envoy, linear(last, self.module.weight[index], bias))


def find_unembedding(model: Any) -> Unembedding | None:
    """The model's output projection; None if it is no plain matrix, or not at hand."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A quantised or hooked subclass, or an offloaded weight, does its own arithmetic; so does a
    # weight of a type of its own, of which rows cannot be taken, or are rounded otherwise.
    if type(module) is not nn.Linear or type(module.weight) not in (nn.Parameter, Tensor):
        return None
    if module.weight.is_meta or is_dispatched(module):
        return None
    # A hook of whatever kind is made for all ids.
    if module._forward_hooks or module._forward_pre_hooks or forward_of(module) is not None:
        return None
    if of_torch._global_forward_hooks or of_torch._global_forward_pre_hooks:
        return None
    path = next((name for name, each in model.named_modules() if each is module), "")
    return Unembedding(path, module) if path else None
