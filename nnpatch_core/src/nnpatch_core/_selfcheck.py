"""Tries, on import, a release that nnpatch's tests do not know: once in an environment."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

import torch

from nnpatch_core._versions import untested
from nnpatch_core._warnings import warn
from nnpatch_core.components import COMPONENT_NAMES
from nnpatch_core.errors import PromptWarning, ReleaseWarning
from nnpatch_core.patching import activation_patching
from nnpatch_core.sites import Sites
from nnpatch_core.testing import tiny_api, tiny_model

_HOLDS = "holds"
#: How far the engines may be apart; in practice it is a hundredth of this.
_GAP = 1e-3


def check_release() -> None:
    """Hold the cone engine to the full one, if a newer release is installed than was tested.

    Warns:
        ReleaseWarning: they differ, or one does not run.
    """
    newer = untested()
    if not newer:
        return
    told = ", ".join(f"{name} {version}" for name, version in sorted(newer.items()))
    file = _known(f"{told}, nnpatch-core {metadata.version('nnpatch-core')}")
    if _read(file) == _HOLDS:
        return
    # Padding is tried too; what it mixes is nobody's concern here.
    with warnings.catch_warnings(action="ignore"):
        verdict = _try()
    # A failure may pass, as one for want of memory does: it is tried again the next time.
    if verdict == _HOLDS:
        _write(file)
    else:
        warn(
            f"nnpatch was not tested with {told}, and fails its self-check there: {verdict}. Do "
            "not trust its numbers with this release; an older one is in constraints.txt of "
            "nnpatch's repository",
            ReleaseWarning,
        )


def _try() -> str:
    """Give `_HOLDS`, or say in a line why the engines do not agree."""
    source = torch.tensor([[5, 6, 7, 8], [0, 9, 11, 3]], device="cpu")
    target = torch.tensor([[5, 16, 7, 8], [0, 9, 12, 3]], device="cpu")
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], device="cpu")
    answers = torch.tensor([20, 21], device="cpu"), torch.tensor([30, 31], device="cpu")
    model, sites = tiny_model("llama"), Sites(COMPONENT_NAMES, seq_pos_type="each")
    try:
        with warnings.catch_warnings():
            # Padding is tried too; the columns that it mixes are nobody's concern here.
            warnings.simplefilter("ignore", PromptWarning)
            cone, full = (
                activation_patching(
                    *(model, tiny_api(), sites, source, target, *answers),
                    attention_mask=mask,
                    engine=engine,
                    progress=False,
                )
                for engine in ("cone", "full")
            )
        gap = max(float((cone[name] - full[name]).abs().max()) for name in full)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return _HOLDS if gap < _GAP else f"the cone engine is off by {gap:.3g}"


def _known(releases: str) -> Path:
    """The file that keeps what was found with these releases in this environment."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never fails
    environment = hashlib.sha256(f"{sys.prefix} {__file__} {releases}".encode()).hexdigest()[:16]
    return Path(home) / "nnpatch" / "self-check" / environment


def _read(file: Path) -> str | None:
    try:
        return file.read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _write(file: Path) -> None:
    # Where nothing can be kept, it is tried again the next time.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{_HOLDS}\n", "utf-8")
    except OSError:
        pass
