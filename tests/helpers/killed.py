"""Processes that are killed while they sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.checkpoints import done


def killed(code: str, path: Path, before: int) -> int:
    """Run code, and kill it once its checkpoint has more than before: how much it has then."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (path.exists() and done(path) > before) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    # It had not come to its last line.
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL
    return done(path)
