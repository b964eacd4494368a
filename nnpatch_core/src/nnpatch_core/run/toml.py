"""Settings in a TOML file."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnpatch_core._files import reason, write_whole
from nnpatch_core.errors import SettingsError
from nnpatch_core.run.settings import METHODS, Settings, options, read_settings


def read_toml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a TOML file by name, and where each stands.

    Raises:
        SettingsError: it cannot be read as one.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8: save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is no TOML: {error}") from error
    # People write --top-k as top-k, too.
    named = {name.replace("-", "_"): value for name, value in values.items()}
    return named, {name: f"{path}, line {_line(text, name)}, {name}" for name in named}


def _line(text: str, name: str) -> int:
    """The line in which a key is given a value, or a table of it begins."""
    key = re.compile(rf"\s*\[?\s*[\"']?{re.escape(name).replace('_', '[-_]')}[\"']?\s*[\]=.]")
    for number, line in enumerate(text.splitlines(), start=1):
        if key.match(line):
            return number
    return 1


def write_toml(path: Path, settings: Settings) -> None:
    """Write settings, so that `read_toml` gives them: those that differ from their defaults.

    Raises:
        SettingsError: the file cannot be written.
    """
    write_whole(path, lambda part: part.write_text(as_toml(settings), "utf-8"), SettingsError)


def as_toml(settings: Settings) -> str:
    """The settings that differ from their defaults, as TOML."""
    return "".join(f"{name} = {_value(value)}\n" for name, value in changed(settings).items())


def changed(settings: Settings) -> Mapping[str, Any]:
    """The settings that differ from their defaults, by name."""
    own = {name: getattr(settings, name) for name, _, _, _ in options()}
    return {name: own[name] for name, _, default, _ in options() if own[name] != default}


def template(given: Mapping[str, Any] | None = None) -> str:
    """A TOML file that has all settings, each with its help; those not given are comments.

    Args:
        given: name to value.

    Raises:
        SettingsError: one of them is no value of its setting.
    """
    given = given or {}
    known = read_settings({"table": "table", "model": "model", **given})
    lines = ["# Settings of `nnpatch run --config`. A line without # counts.", ""]
    group = None
    for name, _, default, option in options():
        if option.group != group:
            group = option.group
            lines += [f"# {group}", ""]
        lines.append(f"# {option.words}")
        if option.choices:
            lines.append(f"# One of {', '.join(option.choices)}.")
        if option.methods != METHODS:
            lines.append(f"# With method {', '.join(option.methods)}.")
        if name in given:
            lines += [f"{name} = {_value(getattr(known, name))}", ""]
            continue
        needed = name in ("table", "model")
        told = '""' if default is None or needed else _value(default)
        lines += [f"{'' if needed else '# '}{name} = {told}", ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    # What JSON leaves as it is, TOML reads; all else is escaped in the same way.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
