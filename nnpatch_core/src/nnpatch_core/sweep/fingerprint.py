"""A short word for a callable: for its code, and for what that code refers to.

It is the same in another process: nothing in it depends on addresses, on the seed of hashes, or on
the file and the line where the code stands.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import itertools
import logging
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from importlib.util import resolve_name
from pathlib import PurePath
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from nnpatch_core._bytes import bytes_of
from nnpatch_core._models import module_of
from nnpatch_core._upstream import Envoy, is_known, nnsight
from nnpatch_core.sweep.checksum import checksum

#: Values that their text tells: for it 0.0 and -0.0 differ, and nan is nan.
_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type(...), range, torch.dtype, torch.device,
)  # fmt: skip
#: Of code: all but where it stands and what it is called.
_CODE = (
    "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags", "co_code", "co_varnames",
    "co_names", "co_freevars", "co_cellvars", "co_exceptiontable",
)  # fmt: skip
_ATTRIBUTE_READS = ("LOAD_ATTR", "LOAD_METHOD")
#: What a class has for each of its slots.
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
#: Methods of a class with fields that are made from these.
_MADE_OF_FIELDS = (
    "__init__", "__attrs_init__", "__repr__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__",
    "__ge__", "__hash__", "__setattr__", "__delattr__", "__getstate__", "__setstate__",
    "__replace__",
)  # fmt: skip
#: What keeps nothing that numbers depend on, besides its name.
_BY_NAME = (
    *_SLOTS,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    np.ufunc,
    logging.Logger,
)
#: The steps of an import after its module is there.
_IMPORTING = ("IMPORT_FROM", "STORE_", "PUSH_NULL", "SWAP")
#: What a config keeps that says nothing of what its model computes.
_ASIDE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
#: Where Python's own modules are.
_STDLIB = sysconfig.get_path("stdlib")
#: The flag of a class that was made while Python ran.
_MADE = 1 << 9
#: What torch keeps in each module; not whether it is in training: nothing is trained meanwhile.
_OF_TORCH = frozenset(vars(nn.Module()))
#: Where it keeps functions that are run with the module.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: How many objects are looked at.
_MOST = 50_000
#: Where a function of ours keeps what it depends on.
_TOLD = "_nnpatch_told"


@attrs.frozen
class Fingerprint:
    """An object in a few letters, as far as it could be told.

    Args:
        digest: a short word.
        untold: what it depends on and was not looked into, ascending.
    """

    digest: str
    untold: tuple[str, ...]


def fingerprint(value: Any) -> Fingerprint:
    """A callable, or another object that a sweep depends on, in a few letters.

    Functions count by their bytecode, constants, defaults and closures, and by the globals that
    they read; instances by their class's code and their attributes; tensors and arrays by their
    bytes; what an installed library has by its name and the library's version. The rest is
    `untold`.

    Examples:
        >>> def scaled(scale):
        ...     return lambda logits: logits * scale
        >>> fingerprint(scaled(2.0)) == fingerprint(scaled(2.0))
        True
        >>> fingerprint(scaled(2.0)) == fingerprint(scaled(3.0))
        False
    """
    walk = _Walk({})
    try:
        walk.see(value)
    except RecursionError:
        # How deep it came depends on who called.
        return Fingerprint("", (f"{type(value).__name__}, which is nested too deeply",))
    return Fingerprint(walk.digest.hexdigest(), tuple(sorted(walk.untold)))


def telling(function: Callable[..., Any], *parts: Any) -> None:
    """Let a function of ours be known by these parts, and its name, in place of its closure.

    That may hold what changes as the function is called.
    """
    setattr(function, _TOLD, parts)


def settings(config: Any) -> dict[str, Any] | None:
    """The settings of a Hugging Face config that its model computes by."""
    if not callable(getattr(config, "to_dict", None)):
        return None
    return {name: value for name, value in config.to_dict().items() if name not in _ASIDE}


class _Walk:
    """One pass over an object and what it refers to."""

    def __init__(self, seen: Mapping[int, int]) -> None:
        self.digest = hashlib.blake2b(digest_size=6)
        self.untold: set[str] = set()
        #: Objects by address, and how many came before: an object may hold itself.
        self._seen = dict(seen)
        # An address may be taken again by what is made later.
        self._alive: list[Any] = []

    def say(self, *words: object) -> None:
        """Count words."""
        for each in words:
            content = each if isinstance(each, bytes) else str(each).encode(errors="replace")
            self.digest.update(b"%d:" % len(content) + content)

    def see(self, *values: Any) -> None:
        """Count objects and what they refer to."""
        for value in values:
            if type(value) in _ATOMS:
                self.say(type(value).__name__, repr(value))
            elif id(value) in self._seen:
                self.say("again", self._seen[id(value)])
            elif len(self._seen) > _MOST:
                self.untold.add(f"more than {_MOST} objects")
            else:
                self._seen[id(value)] = len(self._seen)
                self._alive.append(value)
                self._see_new(value)

    def _see_new(self, value: Any) -> None:
        if isinstance(value, Tensor | np.ndarray | np.generic):
            self._array(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self.say("module", value.__name__, _version(value.__name__))
            if not _of_library(value.__name__, value):
                self.untold.add(f"the module {value.__name__}")
        elif isinstance(value, types.CodeType):
            self._code(value, {})
        elif isinstance(value, Envoy):
            self.see(module_of(value))
        elif isinstance(value, nn.Module):
            self._network(value)
        elif isinstance(value, Enum):
            self.say("member", type(value).__qualname__, value.name)
            self.see(value.value)
        elif isinstance(value, PurePath):
            self.say("path", str(value))
        elif not self._see_wrapper(value) and not self._see_collection(value):
            self._instance(value)

    def _see_wrapper(self, value: Any) -> bool:
        """Count what only stands for other objects; whether it was such."""
        if isinstance(value, types.MethodType):
            parts = [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
        elif isinstance(value, property):
            parts = [value.fget, value.fset, value.fdel]
        elif isinstance(value, staticmethod | classmethod):
            parts = [value.__func__]
        elif isinstance(value, functools.cached_property):
            parts = [value.func]
        elif isinstance(value, functools._lru_cache_wrapper):
            parts = [value.__wrapped__]
        else:
            return False
        self.say(type(value).__name__)
        self.see(*parts)
        return True

    def _see_collection(self, value: Any) -> bool:
        """Count what holds other objects; whether it was such."""
        kind = type(value)
        if _has_fields(kind) or not isinstance(
            value, Mapping | list | tuple | deque | set | frozenset
        ):
            return False
        self.say(kind.__qualname__, len(value))
        if isinstance(value, Mapping):
            self.see(*(part for item in value.items() for part in item))
        elif isinstance(value, set | frozenset):
            self._set(value)
        elif all(type(each) in _ATOMS for each in value):
            self.say(repr(list(value)))
        else:
            self.see(*value)
        if not _installed(kind):
            self._state(value)
        return True

    def _set(self, values: Collection[Any]) -> None:
        """A set, whose order differs from process to process."""
        words = []
        for value in values:
            walk = _Walk(self._seen)
            walk.see(value)
            self.untold |= walk.untold
            self._alive += walk._alive
            words.append(walk.digest.digest())
        self.say(*sorted(words))

    def _named(self, value: Any) -> None:
        """Count an object of an installed library, by its name and the library's version."""
        module = getattr(value, "__module__", None) or "builtins"
        name = getattr(value, "__qualname__", getattr(value, "__name__", type(value).__name__))
        self.say("named", module, name, _version(module))

    def _array(self, value: Any) -> None:
        try:
            # From numpy by its bytes, as torch does not have all of its types.
            flat = (
                bytes_of(value).numpy()
                if isinstance(value, Tensor)
                else np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            )
        except Exception:  # one without numbers, or of a kind of its own
            self._cannot(value)
            return
        self.say("array", value.dtype, list(value.shape), len(flat))
        self.digest.update(flat.data)

    def _network(self, value: nn.Module) -> None:
        self.say("network", checksum(value))
        for name, module in value.named_modules():
            self.say(name)
            self.see(type(module))
            # A library's modules keep there what says nothing of their numbers.
            private = not _installed(type(module))
            self._named_parts(
                {
                    key: each
                    for key, each in vars(module).items()
                    if key not in _OF_TORCH
                    and (private or key[:1] != "_")
                    and not _is_tracing(each)
                }
            )
            for kind in _HOOKS:
                hooks = vars(module)[kind].values()
                self.see(*(each for each in hooks if not _is_tracing(each) and not is_known(each)))

    def _named_parts(self, parts: Mapping[str, Any]) -> None:
        for name in sorted(parts):
            self.say(name)
            self.see(parts[name])

    def _function(self, value: types.FunctionType) -> None:
        if _TOLD in vars(value):
            self.say("told", value.__qualname__, _version(value.__module__))
            self.see(*vars(value)[_TOLD])
            return
        module = _in_library(value.__code__.co_filename)
        if module is not None:
            self.say("named", module, value.__code__.co_name, _version(module))
        else:
            self.say("function")
            self._code(value.__code__, value.__globals__)
            self.see(value.__defaults__, value.__kwdefaults__)
        # A library's function may hold one that is not.
        for cell in value.__closure__ or ():
            try:
                self.see(cell.cell_contents)
            except ValueError:  # not filled yet
                self.say("empty")
        self._named_parts(vars(value))

    def _code(self, code: types.CodeType, names: Mapping[str, Any]) -> None:
        self.say("code", *(getattr(code, part, "") for part in _CODE))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)
            else:
                self.see(constant)
        self._named_parts(_globals_read(code, names))

    def _class(self, value: type) -> None:
        if _installed(value):
            self._named(value)
            return
        self.say("class", value.__qualname__)
        self.see(*value.__bases__)
        made = _MADE_OF_FIELDS if _has_fields(value) else ()
        self._named_parts(
            {
                name: given
                for name, given in vars(value).items()
                if not isinstance(given, _SLOTS)
                and (name[:2] != "__" or isinstance(given, types.FunctionType))
                and name not in ("_abc_impl", *made)
            }
        )

    def _instance(self, value: Any) -> None:
        kind = type(value)
        config = settings(value)
        if isinstance(value, _BY_NAME):
            self._named(value)
        elif config is not None and _installed(kind):
            self.say("config")
            self.see(config)
        elif not _installed(kind) or _has_fields(kind) or _is_simple(value):
            self.say("instance")
            self.see(kind)
            self._state(value)
        else:
            self._cannot(value)

    def _state(self, value: Any) -> None:
        """The attributes of an instance, in slots and elsewhere."""
        names = set(getattr(value, "__dict__", ()))
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            names |= {slots} if isinstance(slots, str) else set(slots)
        names -= {"__dict__", "__weakref__"}
        if attrs.has(type(value)):
            # What is kept from earlier use says nothing of what comes out.
            names -= {each.name for each in attrs.fields(type(value)) if "cache" in each.metadata}
        self._named_parts({name: getattr(value, name, None) for name in names})

    def _cannot(self, value: Any) -> None:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        self.say("untold", name)
        self.untold.add(name)


def _is_tracing(value: Any) -> bool:
    """Whether nnsight has put it there, to trace the module."""
    return bool(type(value).__module__.partition(".")[0] == nnsight.__name__)


def _has_fields(kind: type) -> bool:
    return attrs.has(kind) or hasattr(kind, "__dataclass_fields__")


def _is_simple(value: Any) -> bool:
    """Whether a library's object keeps a few plain values and nothing else, as `no_grad` does."""
    lowest = type(value).__mro__[-2:][0]
    # What is below `object` alone is written in Python, and keeps nothing elsewhere.
    kept = vars(value).values() if "__dict__" in vars(lowest) else [value]
    return type(value) is object or all(type(each) in _ATOMS for each in kept)


def _globals_read(code: types.CodeType, names: Mapping[str, Any]) -> dict[str, Any]:
    """The globals that code reads, and what it imports; of a module only what it takes of it."""
    attributes: dict[str, Any] = {}
    # Those that only widen the next one's argument stand between what belongs together.
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for place, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            # How many packages up it is looked for, and what is taken of it, come right before.
            name = "." * (steps[place - 2].argval or 0) + step.argval
            attributes |= _imported(name, names.get("__package__"), steps[place + 1 :])
            continue
        if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or step.argval not in names:
            continue
        name, value = step.argval, names[step.argval]
        for later in steps[place + 1 :]:
            if not isinstance(value, types.ModuleType) or later.opname not in _ATTRIBUTE_READS:
                break
            name, value = f"{name}.{later.argval}", getattr(value, later.argval, None)
        attributes[name] = value
    return attributes


def _imported(name: str, package: str | None, later: Sequence[dis.Instruction]) -> dict[str, Any]:
    """The parts of a module that code imports, or the module."""
    try:
        whole = resolve_name(name, package) if package else name
    except ImportError:
        # It leads out of the package, which is for who runs it.
        whole = name
    module = sys.modules.get(whole)
    taken = [
        step.argval
        for step in itertools.takewhile(lambda step: step.opname.startswith(_IMPORTING), later)
        if step.opname == "IMPORT_FROM"
    ]
    if not taken:
        return {whole: module}
    return {f"{whole}.{part}": getattr(module, part, None) for part in taken}


def _of_library(name: str, module: Any) -> bool:
    """Whether a module, which goes by a name, comes with Python or an installed library."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
    return _in_library(file) is not None


def _installed(value: Any) -> bool:
    """Whether a class or a function comes with a library, whose version stands for it."""
    if isinstance(value, types.FunctionType):
        # Not by its module, which a decorator may have copied from what it wraps.
        return _in_library(value.__code__.co_filename) is not None
    module = getattr(value, "__module__", None) or "builtins"
    if module == "builtins":
        return not value.__flags__ & _MADE if isinstance(value, type) else True
    return _of_library(module, sys.modules.get(module))


def _in_library(file: str) -> str | None:
    """The name, in its library, of the module that a file is; None if it is of none."""
    if file.startswith("<frozen "):
        return file[len("<frozen ") : -1]
    if not PurePath(file).name:
        # Of a module that is made as Python runs, as a notebook's is.
        return None
    parts = PurePath(file).with_suffix("").parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return ".".join(parts[parts.index(folder) + 1 :])
    if file.startswith(_STDLIB):
        return ".".join(PurePath(file).with_suffix("").relative_to(_STDLIB).parts)
    return None


def _version(module: str) -> str:
    """The release of the library that a module is of, as far as it says."""
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    return str(getattr(sys.modules.get(root), "__version__", ""))
