"""The output projection: only the last token, only the columns that a metric looks at."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor, nn
from torch.nn.functional import linear

from nnpatch_core._models import follow
from nnpatch_core._upstream import forward_of
from nnpatch_core._wrappers import is_dispatched


@attrs.frozen(eq=False)
class Head:
    """A model's output projection, where it is a plain one.

    Args:
        path: where it is in the model.
        module: the projection.
    """

    path: str
    module: nn.Linear

    def restrict(self, traced: Any, columns: Tensor) -> None:
        """Inside a trace: project to some ids of the vocabulary, at the last token.

        What the model does with its logits afterwards, as capping and scaling, goes on as usual.
        """
        envoy = follow(traced, self.path)
        last = envoy.input[..., -1:, :]
        index = columns.to(self.module.weight.device)
        bias = None if self.module.bias is None else self.module.bias[index]
        envoy.skip(linear(last, self.module.weight[index], bias))


def find_head(model: Any) -> Head | None:
    """The model's output projection; None if it is no plain matrix, or not at hand."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A quantised or hooked subclass, or an offloaded weight, does its own arithmetic; so does a
    # weight of a type of its own, of which rows cannot be taken, or are rounded otherwise.
    if type(found) is not nn.Linear or type(found.weight) not in (nn.Parameter, Tensor):
        return None
    if found.weight.is_meta or is_dispatched(found):
        return None
    # A hook of whatever kind is made for all columns.
    hooked = found._forward_hooks or found._forward_pre_hooks or forward_of(found) is not None
    if hooked:
        return None
    path = next((name for name, module in model.named_modules() if module is found), "")
    return Head(path, found) if path else None
