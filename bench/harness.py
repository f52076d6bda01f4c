"""Runs the real SGLang server and talks to it: what the demo, the benches and the end-to-end tests share.

    model = make_model(tmp / "llama", ModelSpec("llama"))
    with Server(model, ["--max-total-tokens", "4096", "--page-size", "64"], log=tmp / "server.log") as server:
        answer = server.generate(random_prompt(700, seed=1), max_new_tokens=16)

Run scripts that use it as modules from the repository's root: `python -m bench.demo`. `HCACHE_SERVER_ARGS` in the
environment has more arguments for all servers, where a machine needs them.
"""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Protocol, Self

import psutil

from bench.client import Answer, Client, Difference, Request, RequestFailed, compare, random_prompt
from bench.models import ModelSpec, make_model
from sglang_hcache.prefetch.endpoint import endpoint_for, is_running

__all__ = [
    "Answer",
    "Client",
    "Difference",
    "ModelSpec",
    "Request",
    "RequestFailed",
    "Server",
    "ServerDied",
    "compare",
    "disk_bytes",
    "make_model",
    "on_accelerator",
    "random_prompt",
]

HOST = "127.0.0.1"
KILL_TIMEOUT_S = 30.0
POLL_S = 0.2  # between two looks at a starting or stopping server
LOG_TAIL_LINES = 60
CPU_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--mem-fraction-static", "0.2"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
)
ACCELERATOR_ARGS = ("--mem-fraction-static", "0.3")
CPU_START_S = 240.0
ACCELERATOR_START_S = 1200.0  # SGLang compiles kernels when it first starts


# Below those that the kernel gives to whoever asks for any, and those that SGLang takes for itself.
_ports = itertools.cycle(random.sample(range(12000, 22000), 10000))
_PORTS_TO_TRY = 1000
_given: list[socket.socket] = []


class ServerDied(RuntimeError):
    """The server ended, or did not answer in time; the message ends with its log's last lines."""


class Progress(Protocol):
    def __call__(self, elapsed_s: float, last_log_line: str) -> None:
        """Called about once a second while the server starts."""


@functools.cache
def on_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: how fast a run is may depend on whether it comes first, and on which run came before it.

    In as many rounds as there are names each comes first once, and after each other once if the number is even
    (Williams' design).
    """
    places = ((place + 1) // 2 if place % 2 else -place // 2 for place in range(len(names)))
    return [names[(place + turn) % len(names)] for place in places]


def free_port() -> int:
    """One that nobody listens on, and that no other server of ours was given, which may not listen yet."""
    for port in itertools.islice(_ports, _PORTS_TO_TRY):
        ours = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe, suppress(OSError):
            ours.bind(f"\0sglang-hcache port {port}")  # no file: it is gone with this process
            probe.bind((HOST, port))
            _given.append(ours)
            return port
        ours.close()
    raise OSError(f"none of {_PORTS_TO_TRY} ports can be listened on")


def disk_bytes(folder: Path) -> int:
    """What all files in it, and in its folders, take of the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _end_as_if_interrupted() -> None:
    """SIGTERM ends this process as Ctrl-C does, so that no server in a `with` is left behind."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


class Launcher(Protocol):
    """What `subprocess.Popen` has of a process."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def send_signal(self, number: int) -> None: ...


def launch(server: Server, log: int) -> Launcher:
    """Of a session of its own, so that it can be killed with all that it starts."""
    return subprocess.Popen(
        server.command(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=server.environment(),
        start_new_session=True,
    )


class Server(Client):
    """A server process with all its children, started on entry and gone on exit."""

    launch: ClassVar[Callable[[Server, int], Launcher]] = launch

    def __init__(
        self,
        model: Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(free_port(), HOST)
        self._nccl_port = free_port()
        self.model = Path(model)
        self.args = tuple(args)
        self.log = Path(log)
        self.env = dict(env or {})
        self.start_timeout_s = start_timeout_s or (ACCELERATOR_START_S if on_accelerator() else CPU_START_S)
        self.progress = progress
        self.start_s = 0.0  # seconds from launch to the first answered request
        self.stop_s = 0.0  # seconds from the signal until no process is left
        self.shares_prefetcher = False  # with another server on the same directories
        self._launcher: Launcher | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop() if kind is None else self.kill()

    def command(self) -> list[str]:
        words = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model)]
        words += ["--host", HOST, "--port", str(self.port)]
        if "--dp" not in self.args:  # each replica needs another port, which SGLang chooses
            words += ["--nccl-port", str(self._nccl_port)]
        words += ["--skip-server-warmup"]
        words += ACCELERATOR_ARGS if on_accelerator() else CPU_ARGS
        if "--dtype" not in self.args:
            words += ["--dtype", self._model_dtype()]
        return [*words, *self.args, *shlex.split(os.environ.get("HCACHE_SERVER_ARGS", ""))]

    def start(self) -> None:
        if self._launcher is not None:
            raise RuntimeError("the server was started already")
        _end_as_if_interrupted()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with self.log.open("wb") as log:
            self._launcher = self.launch(log.fileno())
        try:
            self._wait_until_it_answers(began)
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - began

    def stop(self, timeout_s: float = 60.0) -> int:
        """Asks the launcher to drain and end, as an operator would; kills what is left after `timeout_s`.

        Returns the launcher's exit status, negative where a signal ended it.
        """
        launcher = self._running_launcher()
        if launcher is None:
            return self._reap()
        began = time.monotonic()
        family = self.processes()
        launcher.send_signal(signal.SIGTERM)
        try:
            launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._note(f"the launcher was still there {timeout_s:g} s after SIGTERM: killing it")
        finally:
            self._kill(family)
        status = self._reap()
        self._wait_for_prefetcher()
        self.stop_s = time.monotonic() - began
        return status

    def kill(self) -> None:
        """SIGKILL to the launcher and all its descendants at once, as when the machine goes down."""
        began = time.monotonic()
        self._kill(self.processes())
        self._reap()
        self._wait_for_prefetcher()
        self.stop_s = time.monotonic() - began

    def processes(self) -> list[psutil.Process]:
        """The launcher, its descendants and whatever else runs in its process group."""
        launcher = self._launcher
        if launcher is None:
            return []
        everyone = psutil.process_iter()
        found = {process.pid: process for process in everyone if _group(process.pid) == launcher.pid}
        if self._running_launcher() is not None:
            with _gone_is_fine():
                root = psutil.Process(launcher.pid)
                found.update({process.pid: process for process in (root, *root.children(recursive=True))})
        return [process for process in found.values() if _runs(process)]

    def pids(self, title: str) -> list[int]:
        """Processes whose title holds `title`; SGLang's are `sglang::scheduler` and `sglang::detokenizer`."""
        pids = []
        for process in self.processes():
            with _gone_is_fine():
                if title in " ".join(process.cmdline()):
                    pids.append(process.pid)
        return sorted(pids)

    def cpu_s(self) -> float:
        """Seconds of CPU time that its processes have taken so far, and the prefetcher's, if it has one."""
        everyone, total = self.processes(), 0.0
        if "--hicache-backend" in self.args:
            everyone.append(psutil.Process(self.tier_state()["prefetcher_pid"]))
        for process in everyone:
            with _gone_is_fine():
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def alive(self) -> bool:
        return self._running_launcher() is not None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def reported_leaks(self) -> list[str]:
        """What SGLang's checks of its memory pools said.

        Not what Python's resource tracker says of tqdm's lock, as any server's processes are killed at their end.
        """
        lines = self.log_text().splitlines()
        return [line for line in lines if "leak" in line.lower() and "leaked semaphore objects" not in line]

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def _model_dtype(self) -> str:
        """SGLang's own choice for a float32 checkpoint is float16."""
        config = json.loads((self.model / "config.json").read_text())
        return str(config.get("dtype") or config.get("torch_dtype") or "auto")

    def environment(self) -> dict[str, str]:
        child = {**os.environ, **self.env}
        if "PYTHONDONTWRITEBYTECODE" not in self.env:
            child.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles all of SGLang anew
        return child

    def _wait_until_it_answers(self, began: float) -> None:
        told = 0.0
        while True:
            elapsed = time.monotonic() - began
            if not self.alive():
                raise ServerDied(f"the server ended after {elapsed:.0f} s\n{self.log_tail()}")
            if elapsed > self.start_timeout_s:
                raise ServerDied(f"no answer within {self.start_timeout_s:g} s\n{self.log_tail()}")
            if self.progress and elapsed - told >= 1.0:
                told = elapsed
                self.progress(elapsed, self.log_tail(1))
            if self._listens() and self._answers():
                return
            time.sleep(POLL_S)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    def _answers(self) -> bool:
        """Sooner than `healthy`: each scheduler tells its state."""
        try:
            return bool(self.server_info())
        except (OSError, http.client.HTTPException, RequestFailed):
            return False

    def _running_launcher(self) -> Launcher | None:
        return self._launcher if self._launcher is not None and self._launcher.poll() is None else None

    def _reap(self) -> int:
        if self._launcher is None:
            return 0
        return self._launcher.wait(30.0)

    def _wait_for_prefetcher(self) -> None:
        """Until it has written what was left, unless another server uses it, too."""
        if "--hcache-dir" not in self.args or self.shares_prefetcher:
            return
        endpoint = endpoint_for(self.args[self.args.index("--hcache-dir") + 1].split(","))
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while is_running(endpoint):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the prefetcher still runs {KILL_TIMEOUT_S:g} s after its last server")
            time.sleep(POLL_S / 4)

    def _kill(self, family: list[psutil.Process]) -> None:
        """Kills `family` and every process that joined the group meanwhile, and waits until they are gone."""
        left = {process.pid: process for process in (*family, *self.processes())}
        for process in left.values():
            with _gone_is_fine():
                process.kill()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while alive := [process for process in left.values() if _runs(process)]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes survive SIGKILL: {alive}")
            time.sleep(0.02)

    def _note(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(f"[harness] {line}\n")


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    """A process may end between being found and being asked."""
    with suppress(psutil.NoSuchProcess):
        yield


def _runs(process: psutil.Process) -> bool:
    """False also for a zombie: an orphan stays one until the machine's first process collects it."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
