"""The conformance kit: what an adapter must do, as named checks."""

from nnpatch_core.testing.conformance.kit import CHECKS, Result, run_checks, why_skipped
from nnpatch_core.testing.conformance.subject import CheckError, Subject, make_subject

__all__ = ["CHECKS", "CheckError", "Result", "Subject", "make_subject", "run_checks", "why_skipped"]
