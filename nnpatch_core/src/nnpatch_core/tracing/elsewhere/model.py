"""Which models may run elsewhere."""

from __future__ import annotations

from typing import Any

from nnpatch_core._models import Elsewhere, as_nnsight, with_weights
from nnpatch_core._printable import shown
from nnpatch_core._upstream import Envoy
from nnpatch_core.errors import RemoteError
from nnpatch_core.tracing.hooks import forward_hooks, in_words


def model_for(nnmodel: Any, remote: Any) -> Any:
    """The model as sweeps take it: wrapped by nnsight, or `Elsewhere`, if it is to run there.

    Args:
        nnmodel: as the user passes it.
        remote: the argument of that name: False is here.

    Raises:
        AdapterError: it is no model; of a rehearsal, it has no weights.
        RemoteError: `remote` is no place, or the model cannot run there as it is.
    """
    if remote is False:
        return as_nnsight(nnmodel)
    named = isinstance(remote, str) and (
        remote == "local" or remote.startswith(("http://", "https://"))
    )
    if remote is not True and not named:
        raise RemoteError(
            "remote must be False, True (NDIF), 'local' (a rehearsal in this process), or the "
            f"address of a server, as 'https://...', got {shown(remote)}"
        )
    told, traced = f"remote={remote!r}", as_nnsight(nnmodel)
    if traced is not nnmodel or not hasattr(type(traced), "to_model_key"):
        wrapped = isinstance(nnmodel, Envoy) and traced is not nnmodel
        raise RemoteError(
            f"{told} takes nnsight's TransformersModel, by which a server knows which model is "
            f"meant, got {type(nnmodel).__name__}{' around a wrapper' * wrapped}: pass "
            "TransformersModel('owner/name', task='text-generation'), which loads no weights"
        )
    if remote == "local":
        # A rehearsal needs them; nnsight would load them later, and fail in words of its own.
        with_weights(traced)
    found = Elsewhere(traced, remote)
    hooks = forward_hooks(found.module)
    if hooks:
        raise RemoteError(
            f"{told} does not go with hooks of your own, which would stay behind: the model has "
            f"{in_words(hooks)}; take them away"
        )
    if found.away:
        try:
            found.key  # noqa: B018 - it may have to ask for it
        except Exception as error:
            raise RemoteError(
                f"{told}: by which name {found.where} knows the model cannot be told: "
                f"{type(error).__name__}: {error}. Make it as TransformersModel('owner/name'), "
                "where the hub of Hugging Face can be reached"
            ) from error
    return found
