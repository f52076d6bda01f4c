"""Starts launchers of servers as forks of a process that has imported what they import first.

A third of a server's start is the launcher's import of PyTorch, Transformers and FlashInfer, while nothing else runs.
All that comes later is as always: the launcher runs as `python -m sglang.launch_server` and loads plugins, and its
scheduler and detokenizer are new interpreters.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

MODULES = ("sglang.srt.server_args", "flashinfer", "torch._inductor.compile_fx", "fastapi", "openai")
READ_AT_IMPORT = {"HF_HUB_CACHE", "TRITON_INTERPRET"}  # variables of which the fork would not hear
ROOT = Path(__file__).parents[2]  # of the repository
POLL_S = 0.02


class Launched:
    """As `subprocess.Popen`, for a process whose parent is another one, which writes its pid and status to a pipe."""

    def __init__(self, told: int) -> None:
        self._told = os.fdopen(told)
        self.pid = int(self._told.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._told.readline()))
            self._told.close()
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("sglang.launch_server", timeout)
            time.sleep(POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Preloaded:
    """The process that is forked; it ends with the block."""

    def __enter__(self) -> Self:
        self._ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(its.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
        its.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()
        self._process.wait()

    def launch(self, arguments: list[str], environment: dict[str, str], log: int) -> Launched:
        """`python -m sglang.launch_server`, in a session of its own."""
        read, write = os.pipe()
        try:
            socket.send_fds(self._ours, [json.dumps([arguments, environment]).encode()], [log, write])
        finally:
            os.close(write)
        return Launched(read)


def serve(requests: socket.socket) -> None:
    """Fork once for each request, until there is nobody to make one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends needs no burial
    gc.disable()
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 2)
        if not request:
            return
        log, told = descriptors
        if os.fork() == 0:
            requests.close()
            arguments, environment = json.loads(request)
            keep(arguments, environment, log, told)
        os.close(log)
        os.close(told)


def keep(arguments: list[str], environment: dict[str, str], log: int, told: int) -> None:
    """Fork the launcher and wait for it; return in neither of the two."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.write(told, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(told, f"{status}\n".encode())
        os._exit(0)
    os.setsid()
    os.close(told)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["sglang.launch_server", *arguments]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
