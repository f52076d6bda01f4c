"""The flags: translated to SGLang's own fields, after refusing what conflicts with `--hicache-backend hcache`.

SGLang's `ServerArgs` is sealed, so the flags are turned into its external-linker fields before one is made.
Everything here works on a plain mapping of field names to values: an argparse namespace's `__dict__`, or the
keyword arguments of `sglang.Engine`.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_hcache.config import (
    CODEC_CHOICES,
    COPIER_CHOICES,
    DEFAULT_PAGE_SIZE,
    LEAST_PAGE_SIZE,
    PLAN_CHOICES,
    PREFETCH_TIMEOUT_S,
    REPRESENTATION_CHOICES,
    HCacheConfig,
    Representation,
    default_directory,
    directories_of,
    names_our_linker,
)
from sglang_hcache.prefetch.host_memory import total_bytes
from sglang_hcache.storage.files import make_private

GB = 10**9

_LOCAL = ("hcache_dir", "hcache_dir_size", "hcache_read_limit")  # about files on this host
_CHOICES = {
    "hcache_representation": REPRESENTATION_CHOICES,
    "hcache_codec": CODEC_CHOICES,
    "hcache_copier": COPIER_CHOICES,
    "hcache_plan": PLAN_CHOICES,
}
_OURS = (*_LOCAL, *_CHOICES, "hcache_prefetch_timeout", "hcache_prefetcher", "hcache_keys")

# field → (value without a conflict, why others cannot be combined with the tier, what to do). None never conflicts.
_CONFLICTS: dict[str, tuple[object, str, str]] = {
    "enable_hierarchical_cache": (False, "SGLang's own HiCache and this tier replace each other", "drop one"),
    "hicache_storage_backend": (None, "it belongs to SGLang's own HiCache", "use --hcache-dir instead"),
    "disable_radix_cache": (False, "the tier restores what the radix cache evicts", "drop it"),
    "radix_cache_backend": (None, "the tier needs SGLang's default radix cache", "drop it"),
    "enable_lmcache": (False, "only one cache tier can serve the radix cache", "drop one"),
    "enable_flexkv": (False, "only one cache tier can serve the radix cache", "drop one"),
    "speculative_eagle_topk": (1, "accepted drafts of a tree are moved after their forward", "use 1"),
    "enable_multi_layer_eagle": (False, "several draft models are not supported yet", "drop it"),
    "enable_mis": (False, "multi-item scoring works without the radix cache", "drop one"),
    "dllm_algorithm": (None, "batches of a diffusion model start no loads", "drop it"),
    "hicache_storage_backend_extra_config": (
        *(None, "it belongs to SGLang's own HiCache"),
        "use --hcache-prefetch-timeout and --hcache-dir instead",
    ),
    "hicache_storage_prefetch_retry_poll_interval": (8, "it belongs to SGLang's own HiCache", "drop it"),
    "hicache_storage_prefetch_retry_max_attempts": (8, "it belongs to SGLang's own HiCache", "drop it"),
    "hicache_io_backend": ("kernel", "the tier moves pages in its own way", "drop it"),
    "hicache_mem_layout": ("page_first", "the tier has a layout of its own", "drop it"),
    "hicache_host_memory_mode": ("cache", "the tier's memory is a cache", "drop it"),
    "disaggregation_mode": ("null", "prefill/decode disaggregation is not supported yet", "drop it"),
    "language_only": (False, "images that another server encodes are of weights unknown here", "drop it"),
    "encoder_only": (False, "an encoder has no prefixes to restore", "drop one"),
    "enable_pdmux": (False, "layers of one batch run interleaved with another's", "drop it"),
    "enable_two_batch_overlap": (False, "layers of one batch run interleaved with another's", "drop it"),
    "pp_size": (1, "pipeline parallelism is not supported yet", "use --tp instead"),
    "dcp_size": (1, "context parallelism is not supported yet", "drop it"),
    "attn_cp_size": (1, "context parallelism is not supported yet", "drop it"),
    "enable_prefill_cp": (False, "context parallelism is not supported yet", "drop it"),
    "dwdp_size": (1, "ranks that fetch each other's experts are not supported yet", "drop it"),
    "elastic_ep_backend": (None, "ranks that come and go are not supported yet", "drop it"),
    "enable_return_routed_experts": (False, "nobody knows which experts restored tokens went through", "drop one"),
    "enable_nvidia_megakernel": (False, "its decoding calls none of the modules that are captured", "drop it"),
    "enable_amd_monokernel": (False, "its decoding calls none of the modules that are captured", "drop it"),
    "kv_canary": ("none", "restored slots have no canary of their own", "drop it"),
    "enable_unified_memory": (False, "slots of a unified pool move while the tier fills them", "drop it"),
    "use_ray": (False, "Ray's workers load no plugins of SGLang", "drop it"),
    "enable_unified_cache_external_linker": (False, "the tier is itself the external linker", "drop one"),
    "unified_cache_external_linker_backend": ("mooncake", "the tier is itself the external linker", "drop one"),
    "unified_cache_external_linker_config": (None, "the tier is itself the external linker", "drop one"),
}

_DRAFTING = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")  # a chain of drafts, by a draft model


_NO_RADIX_CACHE = "requires the default UnifiedRadixCache"  # what SGLang says of an external linker without one


_of_command_line = False  # arguments were parsed from one, so what is wrong with them is told in one line


class FlagError(ValueError):
    """Flags that conflict with each other or with this machine; the message is one line and says what to do."""


def add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER hook of `ServerArgs.add_cli_args`."""
    group = parser.add_argument_group("hcache", "hidden-state cache tier (sglang-hcache)")
    group.add_argument(
        "--hicache-backend",
        choices=("sglang", "hcache"),
        default="sglang",
        help="Cache tier behind the radix cache: SGLang's own HiCache (as set by its flags), or hcache, "
        "which keeps evicted prefixes, as hidden states or K and V, in host memory (--hicache-size, --hicache-ratio) "
        f"and files (--hcache-dir). With hcache, --page-size defaults to {DEFAULT_PAGE_SIZE}.",
    )
    group.add_argument(
        "--hcache-dir",
        default=None,
        metavar="PATH[,PATH...]",
        help="Where hcache keeps its files; several paths, best on several drives, are striped. "
        "Default: $XDG_CACHE_HOME/sglang-hcache, or ~/.cache/sglang-hcache.",
    )
    group.add_argument(
        "--hcache-representation",
        choices=REPRESENTATION_CHOICES,
        default=None,
        help="What hcache stores of each layer: hidden states, K and V, or (auto, the default) what is restored "
        "fastest on this machine. With --hcache-plan always or --hcache-prefetcher, auto is the smaller one; with "
        "several ranks it is the same for all layers.",
    )
    group.add_argument(
        "--hcache-codec",
        choices=CODEC_CHOICES,
        default=None,
        help="Compress hidden states: packed is lossless and takes three quarters of bf16's bytes; the lossy ones "
        "take eight bits per value, and answers are close, not equal. Default: no compression.",
    )
    group.add_argument(
        "--hcache-copier",
        choices=COPIER_CHOICES,
        default=None,
        help="What copies pages to a GPU: its copy engine, where the driver can (auto, the default), or a kernel, "
        "for drivers that hang in cuMemcpyBatchAsync.",
    )
    group.add_argument(
        "--hcache-plan",
        choices=PLAN_CHOICES,
        default=None,
        help="How much of a stored prefix is restored: as much as is faster than prefilling it, by rates measured on "
        "this machine (auto, the default), or always all of it.",
    )
    group.add_argument(
        "--hcache-dir-size",
        type=float,
        default=None,
        metavar="GB",
        help="Limit on hcache's files in each directory; the least valuable pages are evicted for new ones. Default: "
        "the space they take plus the space free at start, less the largest of a tenth of that, 5 %% of the disk, "
        "and 10 GB; at least a quarter of it.",
    )
    group.add_argument(
        "--hcache-read-limit",
        type=float,
        default=None,
        metavar="GB/S",
        help="Limit on reads from hcache's files, in all directories together, for drives shared with other "
        "workloads. Default: none.",
    )
    group.add_argument(
        "--hcache-prefetcher",
        default=None,
        metavar="tcp://HOST:PORT",
        help="Keep pages in a prefetcher on another host (`hcache prefetcher --listen`), instead of one on this node "
        "and --hcache-dir. The rates measured on this host are kept in the default directory.",
    )
    group.add_argument(
        "--hcache-keys",
        default=None,
        metavar="DIR",
        help="This client's keys for --hcache-prefetcher, made by `hcache keygen`.",
    )
    group.add_argument(
        "--hcache-prefetch-timeout",
        default=None,
        metavar="BASE[,PER_KI_TOKEN]",
        help="With --hicache-storage-prefetch-policy timeout: how long a queued request waits for its pages at most: "
        f"BASE seconds, plus PER_KI_TOKEN (0 if not given) seconds for every 1,024 tokens. Default: "
        f"{PREFETCH_TIMEOUT_S[0]:g},{PREFETCH_TIMEOUT_S[1]}",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND hook of `ServerArgs.from_cli_args`: invalid flags print one line on stderr and exit."""
    global _of_command_line
    _of_command_line = True
    try:
        translate(vars(args))
    except FlagError as error:
        raise _exit(error) from None
    return original(cls, args)


def _exit(error: FlagError) -> SystemExit:
    return SystemExit(f"sglang: error: {error}")


def resolve(original: Callable[..., Any], server_args: Any) -> Any:
    """AROUND hook of `ServerArgs.resolve_once`, where SGLang may decide against a radix cache by itself.

    Raises `FlagError` then, or exits as above: what SGLang says of it names a flag that nobody has given.
    """
    try:
        return original(server_args)
    except ValueError as error:
        if _NO_RADIX_CACHE in str(error) and names_our_linker(server_args.unified_cache_external_linker_config):
            refused = FlagError(
                "--hicache-backend hcache needs a radix cache, without which SGLang serves this model with these "
                "flags: drop it, or what switches the radix cache off, such as --enable-deterministic-inference with "
                "--attention-backend flashinfer"
            )
            raise (_exit(refused) if _of_command_line else refused) from None
        raise


def server_kwargs(**kwargs: Any) -> dict[str, Any]:
    """Keyword arguments for `sglang.ServerArgs`, `Engine` or `Runtime` with the tier switched on.

    Takes SGLang's own arguments plus the flags of `add_cli_args`, as `hcache_dir` for `--hcache-dir`.
    Raises `FlagError` for a contradiction.
    """
    values = {**kwargs, "hicache_backend": "hcache"}
    translate(values)
    return values


class EngineArguments:
    """Stands in for `Engine.server_args_class`, so that `Engine(hicache_backend="hcache")` works."""

    def __init__(self, server_args_class: Callable[..., Any]) -> None:
        self._server_args_class = server_args_class

    def __call__(self, **kwargs: Any) -> Any:
        translate(kwargs)
        return self._server_args_class(**kwargs)


def translate(values: MutableMapping[str, Any]) -> None:
    """Replace the tier's own flags in `values` by SGLang's fields, in place. Raises `FlagError`."""
    backend = values.pop("hicache_backend", None) or "sglang"
    ours = {name: values.pop(name, None) for name in _OURS}
    if backend not in ("sglang", "hcache"):
        raise FlagError(f"--hicache-backend: {backend!r} is not one of sglang, hcache")
    if backend == "sglang":
        for name, value in ours.items():
            if value is not None:
                raise FlagError(
                    f"{_flag(name)} does nothing without --hicache-backend hcache: add that, or drop this"
                )
        return
    for name, choices in _CHOICES.items():
        if ours[name] not in (None, *choices):
            raise FlagError(f"{_flag(name)}: {ours[name]!r} is not one of {', '.join(choices)}")
    representation, codec = ours["hcache_representation"], ours["hcache_codec"]
    if codec is not None and representation == Representation.KV:
        raise FlagError("--hcache-codec is for hidden states: drop it, or --hcache-representation kv")
    if codec is not None:
        representation = str(Representation.HIDDEN)
    directory_bytes = _bytes_of("--hcache-dir-size", ours["hcache_dir_size"], "gigabytes")
    read_bytes_per_s = _bytes_of("--hcache-read-limit", ours["hcache_read_limit"], "gigabytes a second")
    prefetcher, keys = ours["hcache_prefetcher"], ours["hcache_keys"]
    _refuse_conflicts(values)
    if (pages_of := values.get("page_size")) is not None and pages_of < LEAST_PAGE_SIZE:
        raise FlagError(f"--page-size {pages_of} is below {LEAST_PAGE_SIZE}: drop it to use {DEFAULT_PAGE_SIZE}")
    _check_host_size(values)
    _check_prefetcher(prefetcher, keys, {name: ours[name] for name in _LOCAL})
    base_s, per_ki_token_s = _prefetch_timeout(ours["hcache_prefetch_timeout"])
    config = HCacheConfig(
        directories=_writable_directories(ours["hcache_dir"], remote=prefetcher is not None),
        representation=representation or "auto",
        plan=ours["hcache_plan"] or "auto",
        codec=codec,
        copier=ours["hcache_copier"] or "auto",
        directory_bytes=None if directory_bytes is None else int(directory_bytes),
        read_bytes_per_s=read_bytes_per_s,
        prefetcher=prefetcher,
        keys=str(Path(keys).expanduser().absolute()) if keys else None,
        prefetch_timeout_base_s=base_s,
        prefetch_timeout_per_ki_token_s=per_ki_token_s,
    )
    if values.get("page_size") is None:
        values["page_size"] = DEFAULT_PAGE_SIZE
    values["enable_unified_cache_external_linker"] = True
    values["unified_cache_external_linker_backend"] = "dynamic"
    values["unified_cache_external_linker_config"] = config.to_linker_config()


def _refuse_conflicts(values: MutableMapping[str, Any]) -> None:
    for name, (harmless, why, what_to_do) in _CONFLICTS.items():
        value = values.get(name)
        if value is not None and value != harmless:
            raise FlagError(f"{_flag(name)} cannot be combined with --hicache-backend hcache: {why}; {what_to_do}")
    if (algorithm := values.get("speculative_algorithm")) is not None and algorithm.upper() not in _DRAFTING:
        raise FlagError(
            f"--speculative-algorithm {algorithm} cannot be combined with --hicache-backend hcache: it is not "
            f"supported yet; use {', '.join(_DRAFTING[:-1])} or {_DRAFTING[-1]}, or drop it"
        )


def _check_prefetcher(address: str | None, keys: str | None, local: dict[str, object]) -> None:
    """Refuse a malformed address, keys that are not a directory, and flags about files on this host."""
    if address is None:
        if keys is not None:
            raise FlagError("--hcache-keys does nothing without --hcache-prefetcher: add that, or drop this")
        return
    if not _is_tcp(address):
        raise FlagError(f"--hcache-prefetcher {address!r} is not tcp://HOST:PORT")
    if keys is not None and not (keys and Path(keys).expanduser().is_dir()):
        raise FlagError(
            f"--hcache-keys {keys!r} is not a directory: give the one that `hcache keygen` made for this client"
        )
    for name, value in local.items():
        if value is not None:
            raise FlagError(
                f"{_flag(name)} cannot be combined with --hcache-prefetcher: files are on its host; drop one"
            )


def _is_tcp(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname and parts.port) and address == f"tcp://{parts.netloc}"
    except ValueError:  # such as a port beyond 65535
        return False


def _bytes_of(flag: str, gigabytes: object, unit: str) -> float | None:
    """The bytes of a flag given in gigabytes; None where it is not given. Raises `FlagError`."""
    if gigabytes is None:
        return None
    if not isinstance(gigabytes, int | float) or not 0 < gigabytes < math.inf:
        raise FlagError(f"{flag} {gigabytes!r} is not a positive number of {unit}: give one, such as 500, or drop it")
    return gigabytes * GB


def _prefetch_timeout(flag: object) -> tuple[float, float]:
    """Seconds, and seconds for every 1,024 tokens."""
    if flag is None:
        return PREFETCH_TIMEOUT_S
    try:
        base_s, per_ki_token_s = [*map(float, str(flag).split(",")), 0.0][:2]
    except ValueError:
        base_s = per_ki_token_s = -1.0
    if not (0 <= base_s < math.inf and 0 <= per_ki_token_s < math.inf) or str(flag).count(",") > 1:
        raise FlagError(f"--hcache-prefetch-timeout {flag!r} is not BASE[,PER_KI_TOKEN] in seconds, such as 1,0.25")
    if not base_s + per_ki_token_s:
        raise FlagError(
            f"--hcache-prefetch-timeout {flag} leaves no time to read anything: not to wait for drives, give "
            "--hicache-storage-prefetch-policy best_effort instead"
        )
    return base_s, per_ki_token_s


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_host_size(values: MutableMapping[str, Any]) -> None:
    ratio = values.get("hicache_ratio")
    if ratio is not None and not 0 < ratio < math.inf:
        raise FlagError(f"--hicache-ratio {ratio} is no size for the tier's host memory: give a positive ratio")
    size_gb = values.get("hicache_size") or 0
    if size_gb < 0:
        raise FlagError(f"--hicache-size {size_gb} is negative: give gigabytes, or drop it")
    replicas = 1 if values.get("enable_dp_attention") else values.get("dp_size") or 1
    ranks = max(1, replicas * (values.get("tp_size") or 1) // (values.get("nnodes") or 1))
    wanted, total = size_gb * GB * ranks, total_bytes()
    if wanted > total:
        raise FlagError(
            f"--hicache-size {size_gb} does not fit: {wanted / GB:.1f} GB for {ranks} rank(s) of this host, "
            f"{total / GB:.1f} GB of host memory in all; give at most {int(total / GB / ranks)}"
        )


def _writable_directories(flag: str | None, *, remote: bool) -> tuple[str, ...]:
    """remote: pages are on another host, and the default directory, which no flag names, is for rates and digests."""
    remedy = "set $XDG_CACHE_HOME to another directory" if remote else "name another"
    try:
        paths = [default_directory()] if flag is None else directories_of(flag)
    except ValueError as error:
        if remote:
            raise FlagError(
                f"--hcache-prefetcher keeps measured rates on this host, but this user has no home: {remedy}"
            ) from None
        raise FlagError(f"--hcache-dir{'' if flag is None else f' {flag!r}'} {error}") from None
    for path in paths:
        try:
            make_private(path)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            what = f"--hcache-prefetcher keeps measured rates in {path}, which" if remote else f"--hcache-dir {path}"
            raise FlagError(f"{what} cannot be written ({reason}): make it writable, or {remedy}") from None
    return tuple(str(path) for path in paths)
