"""Looks through a wrapper around a model where the numbers stay, and refuses it where not.

All that nnpatch uses of PEFT and accelerate by name is here. Neither is imported: a model that one
of them has wrapped has imported it.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from nnpatch_core._devices import accelerator
from nnpatch_core.errors import AdapterError

_PEFT_MODELS = ("PeftModel", "PeftMixedModel")


def path_inside(model: nn.Module) -> str:
    """Path from `model` to the model that it wraps and whose forward is its own; "" if it is none.

    Raises:
        AdapterError: it does more than to call the model that it wraps.
    """
    return ".".join(step for _, step in looked_through(model))


def looked_through(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The wrappers from `model` inwards, each with the path from it to what it wraps.

    Raises:
        AdapterError: one does more than to call what it wraps.
    """
    wrappers = []
    while step := _step(model):
        wrappers.append((model, step))
        model = model.get_submodule(step)
    return wrappers


def is_compiled(wrapper: nn.Module) -> bool:
    """Whether a wrapper is that of `torch.compile`, which has a forward of its own."""
    return "_orig_mod" in wrapper._modules


def _step(model: nn.Module) -> str:
    if is_compiled(model):
        # Of `torch.compile`: the same weights, run as they are written.
        return "_orig_mod"
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise AdapterError(
            f"{type(model).__name__} runs each part of a batch elsewhere, where nothing can be "
            "patched: pass the model inside, nnmodel.module, which runs on one device"
        )
    return _peft_step(model)


def _peft_step(model: Any) -> str:
    peft: Any = sys.modules.get("peft")
    kinds = tuple(vars(peft)[name] for name in _PEFT_MODELS if name in vars(peft)) if peft else ()
    if not isinstance(model, kinds):
        return ""
    active = model.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    configs = [model.peft_config[name] for name in names]
    prompts = [config for config in configs if config.is_prompt_learning]
    if prompts:
        if getattr(model, "_adapters_disabled", False):
            return "base_model"
        raise AdapterError(
            f"{_kind(prompts[0])} puts virtual tokens before each prompt, which sites and "
            "positions do not count, and which cannot be merged into weights. To sweep the model "
            "as it was before, pass model.get_base_model(), or sweep inside "
            "`with model.disable_adapter():`. What is tuned by an adapter inside its modules, "
            "such as LoRA, can be swept as it is"
        )
    tuner = model.base_model
    by_token = [config for config in configs if getattr(config, "alora_invocation_tokens", None)]
    if by_token or not _plain_forward(tuner):
        raise AdapterError(
            f"{_kind((by_token or configs)[0])} ({type(tuner).__name__}) looks at each call before "
            "it runs the model, so that what is inside gives other numbers by itself: merge it "
            "(model.merge_and_unload()) if it can be, or pass model.get_base_model() if you want "
            "the numbers of what is inside"
        )
    return "base_model.model"


def _kind(config: Any) -> str:
    return f"PEFT's {getattr(config.peft_type, 'value', config.peft_type)}"


def _plain_forward(tuner: Any) -> bool:
    """Whether a tuner's forward is that of the model inside, as far as logits go."""
    base = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTuner", None)
    # AdaLoRA's adds to the loss alone.
    adalora = getattr(sys.modules.get("peft"), "AdaLoraModel", None)
    if any(kind and type(tuner).forward is kind.forward for kind in (base, adalora)):
        return True
    # Some are not called themselves: they have put the model's own forward in their place.
    own = vars(tuner).get("forward")
    return own is not None and own == tuner.model.forward


#: What PEFT calls the module that it adapts, inside the one that it puts in its place.
_ADAPTED = ("base_layer", "original_module")


def as_it_was(module: nn.Module) -> nn.Module:
    """The module that PEFT has adapted; the module itself if it has not."""
    while inner := [child for name, child in _children(module) if name in _ADAPTED]:
        module = inner[0]
    return module


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]


def parts_of_adapters(model: nn.Module) -> set[str]:
    """Paths of what is inside an adapted module: the module as it was, and what is added to it."""
    adapted = [
        f"{path}." if path else ""
        for path, module in model.named_modules()
        if as_it_was(module) is not module
    ]
    return {
        path
        for path, _ in model.named_modules()
        if path and any(path.startswith(prefix) for prefix in adapted)
    }


def offload_hooks(module: Any) -> list[Any]:
    """The hooks by which accelerate brings a module's weights in when it runs."""
    hook = getattr(module, "_hf_hook", None)
    several = getattr(hook, "hooks", None) or [hook]
    return [hook for hook in several if getattr(hook, "offload", False)]


def offloaded(model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight of a model from where accelerate keeps it; as it is, if it is kept nowhere else.

    Args:
        model: the model.
        name: the weight's path.
        weight: what stands there.
    """
    if not weight.is_meta:
        return weight
    parts = name.split(".")
    # The hook is the module's own, or that of a module around it.
    for depth in range(len(parts) - 1, -1, -1):
        for hook in offload_hooks(model.get_submodule(".".join(parts[:depth]))):
            with suppress(KeyError):
                kept: torch.Tensor = (hook.weights_map or {})[".".join(parts[depth:])]
                return kept
    return weight


def execution_device(module: Any) -> torch.device | None:
    """Find the device on which a module runs whose weights are elsewhere; None if nobody says."""
    return _runs_on(offload_hooks(module))


def hooked_device(module: Any) -> torch.device | None:
    """Find the device to which accelerate moves what a module is given; None if nobody does."""
    hook = getattr(module, "_hf_hook", None)
    return _runs_on(getattr(hook, "hooks", None) or [hook])


def _runs_on(hooks: list[Any]) -> torch.device | None:
    for hook in hooks:
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return accelerator(device) if isinstance(device, int) else torch.device(device)
    return None


def only_moved_to(module: Any) -> bool:
    """Whether accelerate does no more to a module than to move there what it is given, if that."""
    hook = getattr(module, "_hf_hook", None)
    hooks = [] if hook is None else getattr(hook, "hooks", None) or [hook]
    return all(getattr(each, "offload", None) is False for each in hooks)


def is_dispatched(module: Any) -> bool:
    """Whether accelerate does something when a module runs."""
    return hasattr(module, "_hf_hook")


def forward_before(module: nn.Module) -> Any:
    """The forward that accelerate has put its own in front of; None if it has not."""
    return module.__dict__.get("_old_forward")


def missing_weight(model: nn.Module) -> str | None:
    """The path of a weight that no forward will bring in; None if there is none."""
    # Asked before each forward, and hardly ever so.
    if not any(weight.is_meta for weight in model.parameters()):
        return None
    brought: set[int] = set()
    for path, module in model.named_modules():
        hooks = offload_hooks(module)
        if any(getattr(hook, "place_submodules", False) for hook in hooks):
            brought |= {id(child) for child in module.modules()}
        if hooks or id(module) in brought:
            continue
        for name, weight in module.named_parameters(path, recurse=False):
            if weight.is_meta:
                return str(name)
    return None


def _part_of_another(name: str) -> Any:
    """A class of torch's distributed tensors, if the model may have any."""
    module, _, own = name.rpartition(".")
    return getattr(sys.modules.get(f"torch.distributed.{module}"), own, ())


def is_at_hand(weight: Any) -> bool:
    """Whether a weight can be computed with outside of the forward that it belongs to."""
    if not isinstance(weight, torch.Tensor) or type(weight) not in (nn.Parameter, torch.Tensor):
        return False
    # FSDP keeps the shape of a weight whose numbers are spread over processes.
    return not weight.is_meta and weight.untyped_storage().nbytes() > 0


def is_spread(weight: Any) -> bool:
    """Whether a weight is spread over processes, each of which has a part."""
    kind = _part_of_another("tensor.DTensor")
    return bool(kind) and isinstance(weight, kind)


def check_whole(model: nn.Module) -> None:
    """Raise `AdapterError` for a tensor-parallel model, of which no process has whole layers.

    Weights that FSDP puts together as a layer runs are no such thing.
    """
    size = getattr(model, "_tp_size", None)
    parted = isinstance(size, int) and size > 1
    spread = next((weight for weight in model.parameters() if is_spread(weight)), None)
    if spread is not None and not parted:
        mesh: Any = spread.device_mesh  # type: ignore[attr-defined]
        together = _part_of_another("fsdp.FSDPModule")
        by_layer = bool(together) and any(isinstance(each, together) for each in model.modules())
        parted = not by_layer or "tp" in (mesh.mesh_dim_names or ())
    if parted:
        raise AdapterError(
            f"{type(model).__name__} is tensor-parallel: each process has some of the heads and "
            "columns of every layer, so that what one of them patches is not the activation. Load "
            "it in one process, over its devices, with device_map='auto' instead of tp_plan= or "
            "DistributedConfig(tp_size=...)"
        )


def check_weights(model: nn.Module) -> None:
    """Raise `AdapterError` for a model with weights that no forward will bring in, or in parts."""
    check_whole(model)
    name = missing_weight(model)
    if name is not None:
        raise AdapterError(
            f"{type(model).__name__} has no weights: {name!r} is on torch's meta device, "
            "and nothing brings it in. Load the model with from_pretrained; only "
            "plan_sweep does without weights"
        )
