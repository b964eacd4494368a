"""Finds the installed plugins and collects what they register; a broken one harms no other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable
from importlib import metadata
from typing import Any, Generic, TypeAlias, TypeVar

import attrs
import pluggy

from nnpatch_core._warnings import warn
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.errors import PluginWarning
from nnpatch_core.metrics import BUILTIN_METRICS
from nnpatch_core.plugins import hookspecs
from nnpatch_core.seq_pos import BUILTIN_SEQ_POS

#: Limits what is loaded: entry-point or distribution names, separated by commas; empty is none.
ENVIRONMENT_VARIABLE = "NNPATCH_PLUGINS"
_PACKAGE = __name__.partition(".")[0]
_INFER = "infer_model_api"
_ADAPTERS, _SEQ_POS, _METRICS = "register_model_apis", "register_seq_pos", "register_metrics"

T = TypeVar("T")


@attrs.frozen
class Plugin:
    """An installed plugin: one entry point of one distribution.

    Args:
        name: of the entry point.
        distribution: that it is of.
        version: of the distribution.
        module: what the entry point names.
        hooks: those that it implements, once it is loaded.
    """

    name: str
    distribution: str
    version: str
    module: str
    hooks: tuple[str, ...] = attrs.field(default=(), eq=False)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@attrs.frozen(eq=False)
class Registered(Generic[T]):
    """Something that a plugin registered, and which plugin did."""

    name: str
    value: T
    plugin: Plugin


@attrs.frozen(eq=False)
class Failure:
    """A plugin, or one hook of it, that was left out, and why."""

    plugin: Plugin
    stage: str
    error: BaseException

    @property
    def reason(self) -> str:
        """The error's class and text."""
        try:
            text = str(self.error)
        except Exception:
            text = "(it has no text)"
        return f"{type(self.error).__name__}: {text}"

    def __str__(self) -> str:
        return f"plugin {self.plugin.name!r} of {self.plugin}: {self.stage} failed: {self.reason}"


@attrs.frozen(eq=False)
class Registry:
    """All that the installed plugins offer, and which of them failed.

    `inferring` has the hooks that read an adapter off a model, ours last. `unknown` has the names
    that `NNPATCH_PLUGINS` limits them to but that are not installed.
    """

    plugins: tuple[Plugin, ...] = ()
    adapters: tuple[Registered[ModelAPI], ...] = ()
    seq_pos: tuple[Registered[Callable[..., Any]], ...] = ()
    metrics: tuple[Registered[Callable[..., Any]], ...] = ()
    inferring: tuple[Registered[Callable[..., Any]], ...] = ()
    failures: tuple[Failure, ...] = ()
    unknown: tuple[str, ...] = ()


#: The hook that something is registered by, to all that is.
_Collected: TypeAlias = dict[str, list[Registered[Any]]]


def load_plugins(report: bool = True) -> Registry:
    """Load the installed plugins and collect what they register.

    The environment variable `NNPATCH_PLUGINS` limits what is loaded.

    Args:
        report: whether each plugin that fails gives a `PluginWarning`.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    wanted = _wanted(os.environ.get(ENVIRONMENT_VARIABLE))
    loaded: list[Plugin] = []
    failures: list[Failure] = []
    collected: _Collected = {hook: [] for hook in (_ADAPTERS, _SEQ_POS, _METRICS)}
    # Not in the order of folders, which differs from machine to machine.
    installed = sorted(_installed(), key=lambda entry: (_key(entry[0].distribution), entry[0].name))
    unknown = _unknown(wanted or set(), [plugin for plugin, _ in installed])
    if report and unknown:
        names = ", ".join(plugin.name for plugin, _ in installed) or "none"
        warn(
            f"{ENVIRONMENT_VARIABLE} names {', '.join(unknown)}, but installed are {names}",
            PluginWarning,
        )
    for plugin, entry_point in installed:
        if wanted is not None and not wanted & _keys(plugin):
            continue
        failure = _load(manager, plugin, entry_point) or _call_hooks(manager, plugin, collected)
        if failure is None:
            loaded.append(attrs.evolve(plugin, hooks=_hooks(manager, plugin)))
        else:
            failures.append(failure)
            if report:
                warn(str(failure), PluginWarning)
    own, entry_point = _own_package()
    _load(manager, own, entry_point)
    readers = [*(plugin for plugin in loaded if _INFER in plugin.hooks), own]
    return Registry(
        plugins=tuple(loaded),
        adapters=tuple(collected[_ADAPTERS]),
        seq_pos=tuple(collected[_SEQ_POS]),
        metrics=tuple(collected[_METRICS]),
        inferring=tuple(
            Registered(_INFER, _only(manager, plugin, _INFER), plugin) for plugin in readers
        ),
        failures=tuple(failures),
        unknown=tuple(unknown),
    )


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).strip().lower()


def _keys(plugin: Plugin) -> set[str]:
    return {_key(plugin.name), _key(plugin.distribution)}


def _unknown(wanted: set[str], installed: list[Plugin]) -> list[str]:
    return sorted(wanted.difference(*map(_keys, installed)))


def _wanted(variable: str | None) -> set[str] | None:
    if variable is None:
        return None
    return {_key(name) for name in variable.split(",") if name.strip()}


def _installed() -> Iterable[tuple[Plugin, metadata.EntryPoint | Exception]]:
    """Each entry point of the group, once; of a distribution found twice, the first counts.

    A distribution whose entry points cannot be read gives the error in place of one.
    """
    seen: set[str] = set()
    for distribution in metadata.distributions():
        # Asked first, as reading the metadata of all that is installed takes a tenth of a second.
        if not _has_group(distribution):
            continue
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # whose it is cannot be told, nor whether it is a plugin
            continue
        if name is None or _key(name) in seen or _is_hidden(name, distribution):
            continue
        seen.add(_key(name))
        try:
            entry_points = list(distribution.entry_points)
        except Exception as error:
            yield Plugin(name, name, version, ""), error
            continue
        for entry_point in entry_points:
            if entry_point.group == hookspecs.PROJECT:
                yield Plugin(entry_point.name, name, version, entry_point.value), entry_point


def _has_group(distribution: metadata.Distribution) -> bool:
    """Whether a distribution seems to have plugins, even if they cannot be read."""
    try:
        return hookspecs.PROJECT in (distribution.read_text("entry_points.txt") or "")
    except UnicodeDecodeError as error:
        return hookspecs.PROJECT.encode() in error.object


def _is_hidden(name: str, distribution: metadata.Distribution) -> bool:
    """Whether another distribution of that name, without plugins, comes first."""
    try:
        return not _has_group(metadata.distribution(name))
    except metadata.PackageNotFoundError:
        return False


def _load(
    manager: pluggy.PluginManager, plugin: Plugin, entry_point: metadata.EntryPoint | Exception
) -> Failure | None:
    if isinstance(entry_point, Exception):
        return Failure(plugin, "reading its entry points", entry_point)
    try:
        module = entry_point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Failure(plugin, "import", error)
    try:
        manager.register(module, name=_registered_name(plugin))
        manager.check_pending()
    except Exception as error:
        if manager.has_plugin(_registered_name(plugin)):
            manager.unregister(name=_registered_name(plugin))
        return Failure(plugin, "registration", error)
    return None


def _hooks(manager: pluggy.PluginManager, plugin: Plugin) -> tuple[str, ...]:
    callers = manager.get_hookcallers(manager.get_plugin(_registered_name(plugin))) or ()
    return tuple(sorted(caller.name for caller in callers))


def _registered_name(plugin: Plugin) -> str:
    return f"{plugin.distribution}:{plugin.name}"


def _only(manager: pluggy.PluginManager, plugin: Plugin, hook: str) -> pluggy.HookCaller:
    """The hook, as far as this plugin implements it."""
    own = _registered_name(plugin)
    left_out = [module for name, module in manager.list_name_plugin() if name != own]
    return manager.subset_hook_caller(hook, left_out)


def _own_package() -> tuple[Plugin, metadata.EntryPoint]:
    """Our own package, whose face has a hook too: it is there whatever plugins are limited to."""
    try:
        version = metadata.version("nnpatch-core")
    except metadata.PackageNotFoundError:  # vendored, or a source tree that nobody installed
        version = "of unknown version"
    entry_point = metadata.EntryPoint("built in", _PACKAGE, hookspecs.PROJECT)
    return Plugin(entry_point.name, "nnpatch-core", version, _PACKAGE, (_INFER,)), entry_point


def _call_hooks(
    manager: pluggy.PluginManager, plugin: Plugin, collected: _Collected
) -> Failure | None:
    """Call the hooks of this plugin alone; what it registers counts only if all of them succeed."""
    own: _Collected = {hook: [] for hook in collected}
    registers = {
        _ADAPTERS: _adapter_register(plugin, own[_ADAPTERS]),
        _SEQ_POS: _named_register(plugin, own[_SEQ_POS], BUILTIN_SEQ_POS),
        _METRICS: _named_register(plugin, own[_METRICS], BUILTIN_METRICS),
    }
    for hook, register in registers.items():
        try:
            _only(manager, plugin, hook)(register=register)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Failure(plugin, f"hook {hook}", error)
    for hook, registered in own.items():
        collected[hook] += registered
    return None


def _adapter_register(
    plugin: Plugin, into: list[Registered[ModelAPI]]
) -> Callable[[ModelAPI | type[ModelAPI]], None]:
    def register(adapter: ModelAPI | type[ModelAPI]) -> None:
        instance = adapter() if isinstance(adapter, type) else adapter
        if not isinstance(instance, ModelAPI):
            raise TypeError(f"an adapter must be a ModelAPI, got {adapter!r}")
        name, types = instance.name, instance.model_types
        if not isinstance(name, str) or not name:
            raise TypeError(f"an adapter's name must be a non-empty string, got {name!r}")
        if not isinstance(types, tuple | list) or not all(isinstance(name, str) for name in types):
            raise TypeError(f"model_types of {name!r} must be a tuple of strings, got {types!r}")
        into.append(Registered(name, instance, plugin))

    return register


def _named_register(
    plugin: Plugin, into: list[Registered[Callable[..., Any]]], builtin: Container[str]
) -> Callable[[str, Callable[..., Any]], None]:
    def register(name: str, value: Callable[..., Any]) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"a name must be a non-empty string, got {name!r}")
        if name in builtin:
            raise ValueError(f"{name!r} is built in; register under another name")
        if not callable(value):
            raise TypeError(f"{name!r} must be callable, got {value!r}")
        into.append(Registered(name, value, plugin))

    return register
