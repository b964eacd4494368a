"""A run from its settings to its files: look at everything first, then sweep, then write."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from nnpatch_core._pretrained import skeleton_of
from nnpatch_core._printable import shown
from nnpatch_core.errors import PatchingError, PictureWarning, SettingsError
from nnpatch_core.patching import plan_sweep
from nnpatch_core.plugins import find_adapter
from nnpatch_core.prompts import PromptPairs, read_prompts
from nnpatch_core.report import read_asked
from nnpatch_core.run.command import command_of, in_options
from nnpatch_core.run.costs import cost_of
from nnpatch_core.run.folder import REPORT, SETTINGS, Folder
from nnpatch_core.run.loading import (
    check_libraries,
    device_of,
    load_config,
    load_model,
    load_tokenizer,
)
from nnpatch_core.run.outputs import check_extras, outputs_of
from nnpatch_core.run.settings import PAIRED, SITES, Settings
from nnpatch_core.run.sweeps import Asked, name_checks, run_sweep, sites_of
from nnpatch_core.scale import merge_shards
from nnpatch_core.sweep import Share, ShareFile, ShareMeasured, label_prompts, warn_of_columns

#: Takes a line for the user.
Say = Callable[[str], None]


@attrs.frozen(eq=False)
class Job:
    """A run that nothing is wrong with, as far as can be told without the model's weights.

    Args:
        settings: of the run.
        folder: where it writes.
        pairs: the prompts.
        reference: tokens and mask of a data set, if there is one.
        skeleton: the model without weights.
        api: its adapter.
        warn: takes a warning as it comes.
        heard: the warnings so far, each once.
    """

    settings: Settings
    folder: Folder
    pairs: PromptPairs
    reference: Any
    skeleton: nn.Module
    api: Any
    warn: Say
    heard: list[str]

    @classmethod
    def prepared(
        cls, settings: Settings, warn: Say, *, resume: bool = False, overwrite: bool = False
    ) -> Job:
        """Look at the folder, the table, the tokenizer, the model's config and the sites.

        Args:
            settings: of the run.
            warn: takes a warning as it comes.
            resume: whether to go on with what is in the folder.
            overwrite: whether to begin anew where another run is.

        Raises:
            PatchingError: one of its kinds, with all that is wrong with table and model.
        """
        folder = Folder.of(settings)
        faults: list[PatchingError] = []
        heard: list[str] = []
        _tried(check_extras, faults)
        _tried(lambda: check_libraries(settings), faults)
        _tried(lambda: folder.check(settings, resume=resume, overwrite=overwrite), faults)
        with _hearing(warn, heard):
            pairs = _tried(lambda: read_pairs(settings), faults)
            reference = _tried(lambda: read_reference(settings), faults)
            looked = _tried(lambda: _looked_at(settings, pairs, faults), faults)
        if pairs is None or looked is None or faults:
            told = (in_options(str(each)) for each in faults)
            raise SettingsError("\n".join(dict.fromkeys(told))) from faults[0]
        skeleton, api = looked
        return cls(settings, folder, pairs, reference, skeleton, api, warn, heard)

    def plan(self) -> str:
        """The cost, before anything runs, in lines for people."""
        settings = self.settings
        lines = [
            f"model   {settings.model}, {settings.dtype}, {self._where()}",
            f"table   {settings.table}: {self.pairs!r}",
        ]
        if settings.method in SITES and settings.method != "subspace":
            try:
                with _hearing(self.warn, self.heard):
                    plan = plan_sweep(
                        self.skeleton,
                        self.api,
                        sites_of(settings, self.api),
                        *((None, self.pairs) if settings.method == "ablation" else (self.pairs,)),
                        batch_size=settings.batch_size,
                        memory_budget=settings.memory_budget,
                    )
            except PatchingError as error:
                return "\n".join([*lines, f"plan    none: {error}"])
            return "\n".join([*lines, str(plan)])
        lines.append(f"method  {settings.method}, {len(self.pairs)} pairs")
        return "\n".join([*lines, *cost_of(settings, self.skeleton, self.api, self.pairs)])

    def _where(self) -> str:
        if self.settings.device_map is not None:
            return f"device map {self.settings.device_map}"
        return device_of(self.settings)

    def run(
        self, say: Say, *, progress: bool, resume: bool = False, shards: Sequence[Path] = ()
    ) -> Any:
        """Load the weights, sweep, and write all files; of a shard its checkpoint alone.

        Args:
            say: takes what came out.
            progress: whether bars show what is done.
            resume: whether to go on with what is in the folder.
            shards: the checkpoints of all shards, which have measured everything.

        Returns:
            The result of the sweep; None of a shard.

        Raises:
            PatchingError: one of its kinds. What was measured stays in the folder.
        """
        settings, folder = self.settings, self.folder
        folder.begin(settings, resume=resume)
        if shards:
            merge_shards(shards, folder.checkpoint)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with _hearing(self.warn, self.heard):
            model = load_model(settings)
            given = self.pairs, self.reference, self._checkpoint
            asked = Asked(settings, model, self.api, *given, progress)
            try:
                result = run_sweep(asked)
            except ShareMeasured as done:
                say(f"shard {settings.shard}: {done.told}")
                say(f"{folder.path}/: nnpatch merge {folder.path.parent} puts all shards together")
                return None
            outputs = outputs_of(result, settings.level)
            for name, write in outputs.data.items():
                folder.write(name, write)
            drawn = [
                name
                for name, draw in outputs.pictures.items()
                if _drawn(name, partial(folder.write, name, draw))
            ]
            pages = {words: name for name, words in outputs.pages.items() if name in drawn}
            told = read_asked(command_of(settings), settings.question, None, pages, self.heard)
            told = attrs.evolve(told, spelled=in_options)
            folder.write(
                REPORT, lambda path: result._write(path, told, settings.width, settings.level)
            )
        folder.forget()
        say(in_options(outputs.table))
        say("")
        say(f"{folder.path}/: {', '.join([*outputs.data, *drawn, REPORT, SETTINGS])}")
        return result

    @property
    def _checkpoint(self) -> Path | ShareFile:
        path = self.folder.checkpoint
        shard = self.settings.shard
        return path if shard is None else ShareFile(path, Share.of(shard))


def read_pairs(settings: Settings) -> PromptPairs:
    """The pairs of the table, as settings ask for them.

    Raises:
        PatchingError: one of its kinds, naming all faulty lines and columns.
    """
    columns = dict(_all_named("columns", settings.columns))
    spans = {name: _span(column) for name, column in _all_named("spans", settings.spans)}
    options: dict[str, Any] = {"spans": spans or None}
    options |= {"system": settings.system} if settings.system is not None else {}
    pairs = PromptPairs.from_table(
        settings.table,
        load_tokenizer(settings),
        columns=columns or None,
        layout=settings.layout,  # type: ignore[arg-type]
        chat=settings.chat,
        space=settings.space,
        answers=settings.answers,
        multi_token=settings.multi_token,
        faulty=settings.faulty,
        **options,
    )
    if settings.limit is not None:
        pairs = pairs[: settings.limit]
    return pairs.swapped() if settings.swap else pairs


def read_reference(settings: Settings) -> Any:
    """The tokens and the mask of the data set for means, if settings name one.

    Raises:
        PatchingError: one of its kinds, naming all faulty lines and columns.
    """
    if settings.reference is None:
        return None
    columns = dict(_all_named("columns", settings.columns))
    try:
        return read_prompts(
            settings.reference,
            load_tokenizer(settings),
            columns=columns,
            chat=settings.chat,
            system=settings.system,
        )
    except PatchingError as error:
        # Lines are those of another table.
        raise type(error)(f"reference: {error}") from error


def _all_named(setting: str, parts: Sequence[str]) -> list[tuple[str, str]]:
    return [_named(setting, part) for part in parts]


def _named(setting: str, part: str) -> tuple[str, str]:
    name, separator, column = part.partition("=")
    if not (name and separator and column):
        raise SettingsError(f"{setting}: {shown(part)} is not NAME=COLUMN, as source=question")
    return name, column


def _span(columns: str) -> Any:
    """The column of a span's texts, with the place that is meant, or those of source and target."""
    found = [_place(column) for column in columns.split("/")]
    return found[0] if len(found) == 1 else tuple(found)


def _place(column: str) -> Any:
    name, separator, which = column.rpartition(":")
    return (name, int(which)) if separator and which.lstrip("-").isdigit() else column


def _looked_at(
    settings: Settings, pairs: PromptPairs | None, faults: list[PatchingError]
) -> tuple[nn.Module, Any]:
    """The model without weights, and its adapter, which has the sites that are asked for."""
    skeleton = skeleton_of(load_config(settings))
    api = find_adapter(settings.api, skeleton)
    for check in name_checks(settings, skeleton, api):
        _tried(check, faults)
    if settings.method in SITES:
        if pairs is None:
            # Names and numbers can be looked at all the same.
            some = attrs.evolve(settings, at=(), positions="last" if settings.sites else None)
            sites_of(some, api).grids(skeleton, api, 1)
        else:
            sites = sites_of(settings, api)
            sites.grids(skeleton, api, pairs.batch.seq_len, pairs.batch)
            if settings.method in PAIRED:
                prompts = pairs.batch
                assert prompts.source is not None
                named = label_prompts(None, prompts.source, prompts.target, pairs.tokenizer)
                warn_of_columns(sites, prompts, named.strings)
    return skeleton, api


def _drawn(name: str, draw: Callable[[], object]) -> bool:
    """Whether a picture could be drawn; nothing is lost for want of one."""
    try:
        draw()
    except PatchingError as error:
        warnings.warn(f"{name} is left out: {error}", PictureWarning, stacklevel=2)
        return False
    return True


def _tried(make: Callable[[], Any], faults: list[PatchingError]) -> Any:
    try:
        return make()
    except PatchingError as error:
        faults.append(error)
        return None


@contextmanager
def _hearing(warn: Say, heard: list[str]) -> Iterator[None]:
    """Hear the warnings that are raised meanwhile: each is said once, as it comes."""

    def show(message: Warning | str, *_: Any) -> None:
        words = str(message)
        if words not in heard:
            heard.append(words)
            warn(words)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show  # type: ignore[assignment]
        yield
