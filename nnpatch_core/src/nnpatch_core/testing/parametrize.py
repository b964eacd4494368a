"""One decorator, and a plugin's test file is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import attrs
import pytest

from nnpatch_core._tiny import tiny_model
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.conformance import (
    CHECKS,
    CheckError,
    Subject,
    check_known_failures,
    make_subject,
    perform,
    why_skipped,
)
from nnpatch_core.errors import PatchingError
from nnpatch_core.plugins import find_adapter


@attrs.frozen(eq=False)
class BoundCheck:
    """A check of an adapter on a model; calling it runs it.

    Args:
        name: the check's name.
        subject: makes the adapter on its model; the checks of one model share it.
    """

    name: str
    subject: Callable[[], Subject] = attrs.field(repr=False)

    def __call__(self) -> None:
        """Run the check.

        Raises:
            CheckError: what is wrong with the adapter.
        """
        perform(self.name, self.subject())


def parametrize_with_checks(
    api: Any,
    models: Mapping[str, Callable[[], Any]] | None = None,
    *,
    known_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """Run a test once for each check of the kit, on each of some models.

    Args:
        api: an adapter (class or instance), its registered name, or a list of them.
        models: a name for the test's id to a function that makes a model; by default a tiny
            random one of each model type of the adapter.
        known_failures: name of a check to the reason for which it is known to fail. It is then
            expected to: pytest reports it, with the reason, and a check that passes all the same
            is a failure.

    Returns:
        A decorator for a test with one argument, `check`, which it calls.

    Raises:
        PatchingError: no adapter, models that are no mapping, or a known failure that is no check.

    Examples:
        >>> from nnpatch_core.testing import tiny_api
        >>> @parametrize_with_checks(tiny_api())
        ... def test_conformance(check):
        ...     check()
    """
    if models is not None and not isinstance(models, Mapping):
        raise PatchingError(
            "models must map a name to a function that makes a model, such as "
            f"{{'tiny': lambda: tiny_model('llama')}}, got {type(models).__name__}"
        )
    reasons = dict(known_failures or {})
    check_known_failures(reasons)
    adapters = [find_adapter(each) for each in (api if isinstance(api, list | tuple) else [api])]
    if not adapters:
        raise PatchingError("parametrize_with_checks takes an adapter, or a list of at least one")
    return pytest.mark.parametrize(
        "check", [case for adapter in adapters for case in _cases(adapter, models, reasons)]
    )


def _cases(
    api: ModelAPI, models: Mapping[str, Callable[[], Any]] | None, reasons: Mapping[str, str]
) -> Iterable[Any]:
    made = models or {name: _tiny(name) for name in api.model_types}
    for label, make in made.items():
        subject = cache(_subject(api, make))
        for name in CHECKS:
            marks: list[pytest.MarkDecorator] = []
            skipped = why_skipped(name, api)
            if skipped is not None:
                marks.append(pytest.mark.skip(reason=skipped))
            elif name in reasons:
                marks.append(pytest.mark.xfail(reason=reasons[name], strict=True))
            yield pytest.param(
                BoundCheck(name, subject), id=f"{api.name}-{label}-{name}", marks=marks
            )


def _tiny(model_type: str) -> Callable[[], Any]:
    return lambda: tiny_model(model_type)


def _subject(api: ModelAPI, make: Callable[[], Any]) -> Callable[[], Subject]:
    return lambda: make_subject(api, make())


__all__ = ["BoundCheck", "CheckError", "parametrize_with_checks"]
