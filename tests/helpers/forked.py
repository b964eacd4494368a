"""Processes that begin with everything imported: forks of one that is started once for all.

To import torch and transformers costs more than what most tests do with them. A fork has been
through that; for the rest it is a process of its own, in a folder and an environment of its own,
which ends as any interpreter does. What tests the import itself must start an interpreter.
"""

from __future__ import annotations

import array
import atexit
import functools
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.paths import ROOT

#: It waits for work, and goes on to it in a fork; whoever forked tells the process's number, and
#: how it ended.
_PARENT = """
import json, os, signal, socket, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import matplotlib.backends.backend_svg
import matplotlib.figure
import transformers.models.llama.modeling_llama
import nnpatch_core.cli
import tests.helpers.faults

def work(asked):
    # Nobody waits for those who wait for the processes.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        told, files, _, _ = socket.recv_fds(asked, 1 << 16, 3)
        if not told:
            os._exit(0)
        if os.fork():
            for file in files:
                os.close(file)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asked.close()
        process = os.fork()
        if process:
            os.write(files[2], b"%d " % process)
            for file in files[:2]:
                os.close(file)
            os.write(files[2], b"%d" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
            os._exit(0)
        for number, file in enumerate(files[:2], 1):
            os.dup2(file, number)
        for file in files:
            os.close(file)
        return json.loads(told)

asked = work(socket.socket(fileno={socket}))
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
sys.stdout.reconfigure(line_buffering=os.isatty(1))
exec(compile(asked["code"], "<string>", "exec"), {{"__name__": "__main__"}})
"""


@functools.cache
def _parent() -> socket.socket:
    """What to ask for a process."""
    own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = _PARENT.format(root=str(ROOT), socket=its.fileno())
    with its:
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[its.fileno()])

    def end() -> None:
        own.close()
        process.wait()

    atexit.register(end)
    return own


class Forked:
    """A process that runs code, with what a `subprocess.Popen` has of it.

    Args:
        code: what it runs, as `python -c` would.
        environment: all of its variables.
        stdout: where it writes to, a file's number; by default to `communicate`.
        stderr: the same.
    """

    def __init__(
        self,
        code: str,
        environment: Mapping[str, str],
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        asked = {"code": code, "folder": str(Path.cwd()), "environment": dict(environment)}
        self._read: list[int | None] = []
        files, own = [], []
        for given in (stdout, stderr):
            if given is None:
                reads, writes = os.pipe()
                own.append(writes)
                self._read.append(reads)
                given = writes
            else:
                self._read.append(None)
            files.append(given)
        self._told, told = os.pipe()
        own.append(told)
        packed = array.array("i", [*files, told])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)
        _parent().sendmsg([json.dumps(asked).encode()], [rights])
        for file in own:
            os.close(file)
        word = b""
        while not word.endswith(b" "):
            byte = os.read(self._told, 1)
            assert byte, "no process was made"
            word += byte
        self.pid = int(word)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How it ended; None as long as it runs."""
        return self._ended(0)

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """All that it writes until it ends; nothing of what was sent elsewhere."""
        deadline = time.monotonic() + timeout
        written: dict[int, bytes] = {read: b"" for read in self._read if read is not None}
        reading = set(written)
        while reading:
            for read in _ready(reading, deadline):
                part = os.read(read, 1 << 16)
                written[read] += part
                if not part:
                    reading.remove(read)
                    os.close(read)
        assert self._ended(deadline - time.monotonic()) is not None, "it does not end"
        out, err = ("" if read is None else written[read].decode() for read in self._read)
        return out, err

    def _ended(self, timeout: float) -> int | None:
        if self.returncode is None and (word := self._word(timeout)):
            self.returncode = int(word)
            os.close(self._told)
        return self.returncode

    def _word(self, timeout: float) -> bytes:
        return os.read(self._told, 100) if _selected({self._told}, timeout) else b""


def _ready(files: set[int], deadline: float) -> list[int]:
    found = _selected(files, deadline - time.monotonic())
    assert found, "it does not end"
    return found


def _selected(files: set[int], timeout: float) -> list[int]:
    return list(select.select(list(files), [], [], max(0.0, timeout))[0])
