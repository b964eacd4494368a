"""The kit: every check by its name, which of them apply to an adapter, and running them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import attrs

from nnpatch_core._models import in_one_thread
from nnpatch_core.adapters import ModelAPI, check_fits
from nnpatch_core.conformance import flow, heads, patches, structure
from nnpatch_core.conformance.needs import Check, Needs
from nnpatch_core.conformance.subject import CheckError, Subject, make_subject
from nnpatch_core.errors import UnknownNameError

Status: TypeAlias = Literal["passed", "failed", "skipped", "known failure", "fixed"]

_NEEDS: Needs = {**structure.CHECKS, **patches.CHECKS, **heads.CHECKS, **flow.CHECKS}
#: Check name to the check, in the order in which they are run.
CHECKS: Mapping[str, Check] = {check.__name__: check for check in _NEEDS}


@attrs.frozen
class Result:
    """The result of one check.

    Args:
        check: its name.
        status: `"passed"`, `"failed"`, `"skipped"`, `"known failure"` (failed, as declared) or
            `"fixed"` (passed, though declared to fail).
        reason: why it failed or does not apply; for a declared failure also the declared reason.
    """

    check: str
    status: Status
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it came out as declared: neither a failure, nor one declared that is none."""
        return self.status not in ("failed", "fixed")


def why_skipped(check: str, api: ModelAPI) -> str | None:
    """Why a check does not apply to an adapter, by what it declares; None if it applies."""
    reasons = (need(api) for need in _NEEDS[CHECKS[check]])
    return next((reason for reason in reasons if reason is not None), None)


def check_known_failures(known_failures: Mapping[str, str]) -> None:
    """Raise `UnknownNameError` unless each is the name of a check."""
    for name in known_failures:
        if name not in CHECKS:
            raise UnknownNameError(f"unknown check {name!r}; there are {', '.join(CHECKS)}")


@in_one_thread
def run_checks(
    api: ModelAPI,
    nnmodel: Any,
    *,
    known_failures: Mapping[str, str] | None = None,
    only: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
) -> list[Result]:
    """Put an adapter through the checks on a model.

    Args:
        api: the adapter.
        nnmodel: a model of one of its families; a tiny random one will do.
        known_failures: name of a check to the reason for which it is known to fail.
        only: the names of the checks to run; all by default.
        layers: the layers to look at; all by default.

    Returns:
        A `Result` for each check.

    Raises:
        UnknownNameError: a name that is no check.
        AdapterError: `nnmodel` is no model.

    Examples:
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> results = run_checks(tiny_api(), tiny_model("llama"))
        >>> {result.status for result in results}
        {'passed'}
    """
    reasons = dict(known_failures or {})
    wanted = [only] if isinstance(only, str) else list(CHECKS if only is None else only)
    check_known_failures({**reasons, **dict.fromkeys(wanted, "")})
    subject = make_subject(api, nnmodel, layers)
    return [_run(name, subject, reasons.get(name)) for name in wanted]


def perform(check: str, subject: Subject) -> None:
    """Run one check.

    Raises:
        CheckError: what is wrong with the adapter.
        AdapterError: its table does not fit the model, which is why the check cannot run.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            CHECKS[check](subject)
        except CheckError:
            raise
        except Exception:
            # A path that leads nowhere shows in many ways; this one names it.
            check_fits(subject.api, subject.model)
            raise


def _run(name: str, subject: Subject, declared: str | None) -> Result:
    try:
        skipped = why_skipped(name, subject.api)
        if skipped is not None:
            return Result(name, "skipped", skipped)
        perform(name, subject)
    except Exception as error:
        reason = str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
        if declared is None:
            return Result(name, "failed", reason)
        return Result(name, "known failure", f"{declared} ({reason})")
    return Result(name, "passed") if declared is None else Result(name, "fixed", declared)
