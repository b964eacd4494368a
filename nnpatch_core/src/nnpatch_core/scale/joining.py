"""The Ray that workers run in: one that runs, or one of our own."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from typing import Any

from nnpatch_core._printable import shown
from nnpatch_core.errors import WorkerError

#: Seconds in which a machine must take a connection, and in which the Ray there must answer.
_CONNECT, _ANSWER = 10, 60
#: Asks whether a Ray answers, in a process of its own: where none does, Ray waits for minutes, and
#: may then end the process.
_ASKS = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"


def join(ray: Any, address: Any, cpus: int, gpus: float) -> bool:
    """Join the Ray that runs, or start one.

    Args:
        ray: the library.
        address: of one that runs; None starts one, unless this process is in one.
        cpus: that are needed.
        gpus: that are needed.

    Returns:
        Whether this process is in a Ray only now.

    Raises:
        WorkerError: Ray cannot be started, or does not answer.
    """
    if address is not None and not (isinstance(address, str) and address):
        raise WorkerError(f"address must be such as 'auto' or 'host:6379', got {shown(address)}")
    if ray.is_initialized():
        return False
    # "local", as Ray joins some other one that it finds if it is told nothing.
    options: dict[str, Any] = {
        "address": "local", "num_cpus": cpus, "num_gpus": math.ceil(gpus) if gpus else None,
        "include_dashboard": False,
    }  # fmt: skip
    if address is not None:
        _check_answers(address)
        options = {"address": address}
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except Exception as error:
        where = "could not be started" if address is None else f"does not answer at {address!r}"
        raise WorkerError(f"Ray {where}: {type(error).__name__}: {error}") from error
    return True


def _check_answers(address: str) -> None:
    """Raise `WorkerError` where no Ray answers, and soon."""
    fault = _unreachable(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    if fault is None and sys.executable:
        try:
            asked = subprocess.run(
                [sys.executable, "-c", _ASKS, address],
                timeout=_ANSWER, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            fault = f"no answer in {_ANSWER} seconds"
        else:
            lines = asked.stderr.strip().splitlines()
            fault = (lines or ["no answer"])[-1] if asked.returncode else None
    if fault is not None:
        raise WorkerError(f"Ray does not answer at {address!r}: {fault}")


def _unreachable(address: str) -> str | None:
    """Why no connection is taken at `host:port`; None if one is, or the address is no such."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()
    except (OSError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"
    return None
