"""Starts servers as forks of a process that has imported what their processes import.

Three quarters of what a server's start costs are imports of PyTorch, Transformers and SGLang: the launcher's, the
scheduler's and the detokenizer's. All that comes later is as always: the launcher runs as `python -m
sglang.launch_server` and loads plugins, and what it starts by `multiprocessing` are its children, which get from it
what new interpreters would get. All forks hash strings alike, where new interpreters do not: tests that this could
deceive ask for new ones by `PYTHONHASHSEED`, and of the ranks of one machine, one is a fork.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import select
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import setproctitle

MODULES = (
    "flashinfer",
    "torch._inductor.compile_fx",
    "openai",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)
NOT_READ_AT_IMPORT = {"HCACHE_RATES", "HCACHE_SPOIL", "PYTHONPATH", "SGLANG_CPU_OMP_THREADS_BIND"}  # forks notice
RANKS = {"--tp", "--dp"}
ROOT = Path(__file__).parents[2]  # of the repository
POLL_S = 0.02
LONGEST = 1 << 20  # message, in bytes


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
    setproctitle.getproctitle()  # which finds where the title is as long as the environment is the first one
    gc.freeze()
    gc.enable()
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, LONGEST, 2)
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
    live_in(environment)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.modules.pop("sitecustomize", None)
    site.execsitecustomize()
    fork_children(1 if RANKS & set(arguments) else 2)
    sys.argv = ["sglang.launch_server", *arguments]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
    sys.exit()


def live_in(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def fork_children(count: int) -> None:
    """So many processes that this one will start by `multiprocessing` are forks of what it is now."""
    waiting: list[tuple[int, socket.socket]] = []
    for _ in range(count):
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if (pid := os.fork()) == 0:
            for _, sibling in (*waiting, (0, ours)):
                sibling.close()
            work_as_told(its)
        its.close()
        waiting.append((pid, ours))
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_sooner(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        if "--multiprocessing-fork" not in args or not waiting:
            return spawn(path, args, passfds)
        pid, child = waiting.pop(0)
        message = [args[list(args).index("-c") :], list(passfds), dict(os.environ)]
        socket.send_fds(child, [json.dumps(message).encode()], passfds)
        child.close()
        return pid

    multiprocessing.util.spawnv_passfds = spawn_sooner


def work_as_told(parent: socket.socket) -> None:
    """As a new interpreter with the command `-c CODE …` and the parent's open files does; not if it ends before."""
    message, files, *_ = socket.recv_fds(parent, LONGEST, 64)
    parent.close()
    if not message:
        os._exit(0)
    (_, code, *words), numbers, environment = json.loads(message)
    out_of_the_way = [fcntl.fcntl(file, fcntl.F_DUPFD, max(numbers) + 1) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(numbers, out_of_the_way, strict=True):
        os.dup2(file, number)
        os.close(file)
    live_in(environment)
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
