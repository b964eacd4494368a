"""`nnpatch run` and `nnpatch plan`: from a table of prompts to a report, or to its cost."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from nnpatch_core._files import UNWRITTEN, write_whole
from nnpatch_core.cli.output import say, say_aside
from nnpatch_core.errors import PatchingError, SettingsError
from nnpatch_core.run import (
    METHODS,
    SETTINGS,
    Job,
    Option,
    Settings,
    in_options,
    options,
    read_settings,
    read_toml,
    template,
)

_CONFIG = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Take settings from a TOML file; options override it."),
]
_TEMPLATE = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a TOML file with all settings, and stop."),
]
_RESUME = Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")]
_METAVARS: Mapping[type, str] = {int: "N", float: "X", Path: "PATH"}
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Begin anew in the folder.")]


def _run(
    *,
    config: _CONFIG = None,
    write_config: _TEMPLATE = None,
    resume: _RESUME = False,
    overwrite: _OVERWRITE = False,
    **given: Any,
) -> bool:
    """Patch a table of prompts, and write outcome, tables, pictures and a report.

    Table and model are looked at first, and all that is wrong is told at once. What was measured is
    kept: a run that is stopped goes on with --resume.
    """
    if write_config is not None:
        if write_config.exists() and not overwrite:
            raise SettingsError(f"{write_config} exists already: --overwrite writes another")
        text = template(_merged(config, given)[0])
        write_whole(write_config, lambda part: part.write_text(text, "utf-8"), SettingsError)
        say(f"{write_config}: all settings; those with # have their defaults")
        return True
    settings = _settings(config, given)
    job = Job.prepared(settings, _warn, resume=resume, overwrite=overwrite)
    say(job.plan())
    say()
    try:
        job.run(say, progress=sys.stderr.isatty(), resume=resume)
    except PatchingError as error:
        words = in_options(str(error))
        # Such as a full disk: the same run can go on.
        if UNWRITTEN in words and (job.folder.path / SETTINGS).exists():
            words += f"; {_onwards(job, 'nothing is kept: begin again')}"
        raise type(error)(words) from error
    except KeyboardInterrupt:
        told = _onwards(job, "nothing was measured yet: begin again")
        raise KeyboardInterrupt(f"interrupted; {told}") from None
    return True


def _onwards(job: Job, otherwise: str) -> str:
    """How to go on with a run that was broken off, or what is said where nothing is kept of it."""
    left = "go on" if job.folder.checkpoint.exists() else otherwise
    told = shlex.quote(str(job.folder.path / SETTINGS))
    return f"{left} with nnpatch run --config {told} --resume"


def _plan(*, config: _CONFIG = None, **given: Any) -> bool:
    """Say what a run would cost, and whether table and model are fit for it; nothing is written.

    No weights are loaded.
    """
    say(Job.prepared(_settings(config, given), _warn, overwrite=True).plan())
    return True


def _warn(words: str) -> None:
    """Say a warning in one line; those below its first one are a list."""
    first, *others = in_options(words).strip().splitlines()
    say_aside(first + (f": {'; '.join(others)}" if others else ""))


def _settings(config: Path | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a file, and of the options, which come first."""
    return read_settings(*_merged(config, given))


def _merged(
    config: Path | None, given: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[str], str]]:
    """The values of a file and of the options, and how an error names the place of one."""
    values, places = ({}, {}) if config is None else read_toml(config)
    chosen = {name: value for name, value in given.items() if value not in (None, [])}

    def place(name: str) -> str:
        if name in places and name not in chosen:
            return places[name]
        return name.upper() if name == "table" else f"--{name.replace('_', '-')}"

    return {**values, **chosen}, place


def _with_settings(function: Callable[..., bool], name: str) -> Callable[..., bool]:
    """The command with an option for each setting, as typer reads it off a signature."""
    own = [
        each
        for each in inspect.signature(function, eval_str=True).parameters.values()
        if each.kind is not each.VAR_KEYWORD
    ]
    named = [
        inspect.Parameter(
            key,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(key, kind, default, option),
        )
        for key, kind, default, option in options()
    ]
    parameters = [*named, *own]

    def command(**given: Any) -> bool:
        return function(**given)

    command.__name__, command.__doc__ = name, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _annotation(key: str, kind: Any, default: Any, option: Option) -> Any:
    """The type of an option and its help."""
    words = _help(default, option)
    if key == "table":
        return Annotated[Path | None, typer.Argument(metavar="TABLE", help=words)]
    several = kind == tuple[str, ...]
    kinds = (kind, *get_args(kind))
    plain = next((each for each in (bool, int, float, Path) if each in kinds), str)
    told: Any = {"help": words, "rich_help_panel": option.group}
    flag = f"--{key.replace('_', '-')}"
    if plain is bool:
        return Annotated[bool | None, typer.Option(f"{flag}/{_off(flag)}", **told)]
    # All choices in one word would be broken inside of names where there is little room.
    told["metavar"] = "NAME" if option.choices else _METAVARS.get(plain, "TEXT")
    return Annotated[(list[str] if several else plain) | None, typer.Option(flag, **told)]


def _off(flag: str) -> str:
    """The option that takes a flag back."""
    return f"--no-{flag[2:]}"


def _help(default: Any, option: Option) -> str:
    words, others = option.words, [name for name in METHODS if name not in option.methods]
    if option.choices[1:]:
        words += f" One of {', '.join(option.choices)}."
    elif option.choices:
        words += f" There is {option.choices[0]}."
    if default not in (None, (), False, "", Path()):
        words += f" By default {'on' if default is True else default}."
    if len(others) == 1:
        words += f" Not with {others[0]}."
    elif others:
        words += f" With {', '.join(option.methods)}."
    return words


run = _with_settings(_run, "run")
plan = _with_settings(_plan, "plan")
