"""Makes torch believe in a GPU: `install()` builds `device.cpp`, loads it, and puts it behind `torch.cuda`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("device.cpp")
_GPU = torch.device("cuda", 0)
_BYTES = 8 << 30  # of its memory, by what it says


def build(folder: Path) -> Path:
    """The library, compiled anew where its source is younger."""
    library = folder / "emulated_gpu.so"
    if library.exists() and library.stat().st_mtime > _SOURCE.stat().st_mtime:
        return library
    torch_folder = Path(torch.__file__).parent
    include = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    include.append(Path(sysconfig.get_path("include")))
    folder.mkdir(parents=True, exist_ok=True)
    ours = library.with_suffix(f".{os.getpid()}")
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w", "-DTORCH_EXTENSION_NAME=emulated_gpu"]
    command += [f"-I{path}" for path in include] + [str(_SOURCE), "-o", str(ours), f"-L{torch_folder / 'lib'}"]
    # Under this name `ctypes.CDLL` finds it once it is loaded.
    command += ["-ltorch_cpu", "-ltorch_python", "-lc10", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, check=True)
    ours.rename(library)
    return library


def install(library: Path, *, lazy: bool, registers: bool = True) -> None:
    """lazy: no work is done before somebody waits for it; else some pieces of work come late, by chance.

    registers: whether host memory may be registered.
    """
    spec = importlib.util.spec_from_file_location("emulated_gpu", library)
    assert spec is not None
    assert spec.loader is not None
    gpu: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    gpu.set_lazy(lazy)
    _put_behind_torch(gpu, registers=registers)
    _interpret_on_streams(gpu)


def _put_behind_torch(gpu: Any, *, registers: bool) -> None:
    class Stream(torch.Stream):
        def __new__(cls, device: object = None, priority: int = 0, **place: Any) -> Stream:
            made: Stream = super().__new__(cls, **place) if place else super().__new__(cls, _GPU, priority=priority)
            return made

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

        def record_event(self, event: Any = None) -> Any:
            recorded = event or Event()
            recorded.record(self)
            return recorded

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, **_others: object) -> Event:
            made: Event = super().__new__(cls, _GPU, enable_timing=enable_timing, blocking=blocking)
            return made

        def __init__(self, enable_timing: bool = False, **_others: object) -> None:
            self._timed = enable_timing

        def elapsed_time(self, end: Any) -> float:
            if not (self._timed and end._timed and self.query() and end.query()):
                raise RuntimeError("both events are timed, and have been passed")
            took: float = gpu.elapsed_ms(self.event_id, end.event_id)
            return took

        def wait(self, stream: Any = None) -> None:
            super().wait(stream or current_stream())

        def record(self, stream: Any = None) -> None:
            super().record(stream or current_stream())

    class StreamContext:
        def __init__(self, stream: Any) -> None:
            self.stream = stream
            self._before: list[int] = []

        def __enter__(self) -> None:
            if self.stream is not None:
                self._before.append(gpu.exchange(self.stream.stream_id))

        def __exit__(self, *_error: object) -> None:
            if self.stream is not None:
                gpu.exchange(self._before.pop())

    def stream_of(number: int) -> Stream:
        return Stream(stream_id=number, device_index=0, device_type=1)

    def current_stream(_device: object = None) -> Stream:
        return stream_of(gpu.current())

    class CUDAGraph(gpu.Graph):  # type: ignore[misc]
        def capture_begin(self, *_args: object, **_kwargs: object) -> None:
            self.begin()

        def capture_end(self) -> None:
            self.end()

    @contextlib.contextmanager
    def graph(
        cuda_graph: Any, pool: object = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        gpu.synchronize()
        with StreamContext(stream or Stream()):
            cuda_graph.begin()
            try:
                yield
            finally:
                cuda_graph.end()

    properties = SimpleNamespace(
        name="emulated GPU", major=9, minor=0, total_memory=_BYTES, multi_processor_count=4, is_integrated=False,
        warp_size=32, max_threads_per_multi_processor=2048, shared_memory_per_block_optin=227 << 10, uuid="0",
        L2_cache_size=1 << 20, gcnArchName="", regs_per_multiprocessor=65536,
    )  # fmt: skip
    cudart = SimpleNamespace(
        cudaGetErrorString=lambda error: f"CUDA error {int(error)}",
        cudaHostRegister=lambda pointer, size, flags: gpu.host_register(pointer, size) if registers else 2,
        cudaHostUnregister=gpu.host_unregister,
    )
    replaced = {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "current_stream": current_stream,
        "default_stream": lambda device=None: stream_of(0),
        "set_stream": lambda stream: gpu.exchange(stream.stream_id) and None,
        "synchronize": lambda device=None: gpu.synchronize(),
        "is_current_stream_capturing": gpu.is_capturing,
        "graph_pool_handle": lambda: (0, 0),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **kwargs: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device=None: contextlib.nullcontext(),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (_BYTES, _BYTES),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "_sleep": lambda cycles: None,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "cudart": lambda: cudart,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        **{
            name: lambda device=None: 0
            for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
        },
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.cuda.streams.Stream, torch.cuda.streams.Event = Stream, Event  # type: ignore[misc,assignment]
    torch.accelerator.is_available = lambda: True
    torch.version.cuda = None  # SGLang would take it for a reason to use its own CUDA kernels


def _interpret_on_streams(gpu: Any) -> None:
    """Triton's interpreter runs a kernel when its stream comes to it, in place."""
    from triton.runtime import interpreter

    launch_now: Callable[..., None] = interpreter.GridExecutor.__call__
    one_at_a_time = threading.Lock()  # it keeps a kernel's state in globals

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_cuda and not gpu.is_registered(value.data_ptr(), value.nbytes):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return gpu.on_cpu(value)

    def run(call: Callable[[], None]) -> None:
        with one_at_a_time:
            call()

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        inspect.signature(executor.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in executor.arg_names})
        placed = {name: place(value) for name, value in kwargs.items()}
        gpu.launch(functools.partial(run, functools.partial(launch_now, executor, *map(place, args), **placed)))

    interpreter.GridExecutor.__call__ = launch
    interpreter.GridExecutor._init_args_hst = lambda _executor, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda *_args: None
