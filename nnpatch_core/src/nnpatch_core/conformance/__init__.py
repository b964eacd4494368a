"""The conformance kit: what an adapter must do, as named checks."""

from nnpatch_core.conformance.kit import (
    CHECKS,
    Result,
    check_known_failures,
    perform,
    run_checks,
    why_skipped,
)
from nnpatch_core.conformance.subject import CheckError, Subject, make_subject, random_prompts

__all__ = [
    "CHECKS",
    "CheckError",
    "Result",
    "Subject",
    "check_known_failures",
    "make_subject",
    "perform",
    "random_prompts",
    "run_checks",
    "why_skipped",
]
