"""Fingerprints: digests of everything that the bytes of a chunk depend on, so that any difference is a miss."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import xxhash
from huggingface_hub import constants

from sglang_hcache.storage.files import write_atomically
from sglang_hcache.storage.layout import SCHEMA_VERSION

logger = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_CONFIGURATIONS = ("config.json", "adapter_config.json")
# What else SGLang takes of a model from JSON: which weights are where, quantisation by various names, Mistral's own
# format, how it attends.
_FURTHER = ("*.index.json", "*quant*.json", "params.json", "decision_config.json")
_SAMPLES, _SAMPLE_BYTES = 16, 16 << 10


def fingerprint(parts: Iterable[tuple[str, object]]) -> bytes:
    """16 bytes from named parts; their order matters, their representation is `repr`."""
    digest = xxhash.xxh3_128(f"hcache schema {SCHEMA_VERSION}".encode())
    for name, value in parts:
        digest.update(f"\n{name}={value!r}".encode())
    return digest.digest()


def checkpoint_identity(
    model_path: str, memo: Path | None, *, revision: str | None = None, cache: str | None = None
) -> str:
    """A digest of a model's or an adapter's configuration, code and every byte of its weights, whatever it is called.

    model_path: a local folder or file, or a hub id: what SGLang has loaded for it lies in a cache of the hub, at
    `revision`; in `cache`, or else where huggingface_hub keeps its own. Weights are read once at memory or disk
    speed; the result is kept in the file `memo` under what is seen of each file without reading it all, so the next
    start does not read them. Raises OSError when there are no weights to read, or they cannot be read.
    """
    roots = _local(model_path, revision, cache)
    files = next(filter(None, (_files(root, _WEIGHT_SUFFIXES) for root in roots)), [])
    if not files:
        raise FileNotFoundError(f"no weight files in {' or '.join(map(str, roots))}")
    known = _read_memo(memo) if memo is not None else {}
    seen = {path: _seen(path) for path in files}
    unknown = [path for path in files if seen[path] not in known]
    if unknown:
        known.update(zip((seen[path] for path in unknown), _digests(unknown), strict=True))
        if memo is not None:
            _write_memo(memo, known)
    digest = xxhash.xxh3_128()
    folders = [root.parent if root.is_file() else root for root in roots]  # beside a GGUF file is its configuration
    for configuration in (folder / name for folder in folders for name in _CONFIGURATIONS):
        if configuration.is_file():
            digest.update(configuration.read_bytes())
    further = [path for folder in folders for path in _files(folder, {".json"}) if any(map(path.match, _FURTHER))]
    code = [path for folder in folders for path in _files(folder, {".py"})]  # which --trust-remote-code runs
    for path in further + code:
        digest.update(f"{path.name}:{file_digest(path)}".encode())
    for path in files:
        digest.update(f"{path.name}:{known[seen[path]]}".encode())
    return digest.hexdigest()


def adapter_identity(path: str, memo: Path | None, *, cache: str | None = None) -> str:
    """As `checkpoint_identity`, of a LoRA adapter.

    Also raises OSError if its configuration does not list modules: a server's flags then say where it is applied.
    """
    for configuration in (root / "adapter_config.json" for root in _local(path, None, cache)):
        if configuration.is_file():
            modules = _target_modules(configuration)
            if not isinstance(modules, list) or any(str(module).split(".")[-1] == "all" for module in modules):
                raise OSError(f"it does not list its modules: target_modules is {modules!r}")
    return checkpoint_identity(path, memo, cache=cache)


def _target_modules(configuration: Path) -> object:
    try:
        return msgspec.json.decode(configuration.read_bytes(), type=dict[str, object]).get("target_modules")
    except msgspec.MsgspecError as error:
        raise OSError(f"{configuration.name} cannot be read: {error}") from None


def _digests(weights: Sequence[Path]) -> list[str]:
    size_gb, began = sum(path.stat().st_size for path in weights) / 1e9, time.monotonic()
    logger.info("hcache: reading %.1f GB of weights, to know them again at the next start", size_gb)
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(file_digest, weights))
    logger.info("hcache: the weights are read, in %.1f s", time.monotonic() - began)
    return digests


def _local(model_path: str, revision: str | None, cache: str | None) -> list[Path]:
    """The folders that SGLang takes a model from: weights from the first that has some."""
    if (path := Path(model_path)).exists():
        return [path]
    roots = []
    for hub in filter(None, (cache, constants.HF_HUB_CACHE)):
        repository = Path(hub) / constants.REPO_ID_SEPARATOR.join(("models", *model_path.split("/")))
        reference = repository / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        roots.append(repository / "snapshots" / (commit or "main"))
    return roots


def _files(root: Path, suffixes: set[str]) -> list[Path]:
    found = root.iterdir() if root.is_dir() else [root] if root.is_file() else []
    return sorted(path for path in found if path.suffix in suffixes)


def process_identity() -> str:
    """An identity no other process shares: what is stored under it is never found again."""
    return f"process {os.getpid()} {secrets.token_hex(16)}"


def _seen(path: Path) -> str:
    """What tells a weight file from others, and from what it was before. Raises OSError.

    Archives and images set the modification time, and a file system gives an inode's number to the next file; only
    the kernel sets the time of the last change, but a read-only image has none of its own: hence the samples.
    """
    info = path.stat()
    sample = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        for i in range(_SAMPLES):
            file.seek(max(0, info.st_size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            sample.update(file.read(_SAMPLE_BYTES))
    times = f"{info.st_mtime_ns}:{info.st_ctime_ns}"
    return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{times}:{sample.hexdigest()}"


def file_digest(path: Path) -> str:
    """Of its content. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _read_memo(memo: Path) -> dict[str, str]:
    """What the memo knows; nothing where it is not, byte for byte, what was written."""
    try:
        content = json.loads(memo.read_text())
        digests: dict[str, str] = content["digests"]
        return digests if content["checksum"] == _checksum(digests) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _checksum(digests: dict[str, str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(digests, sort_keys=True).encode())


def _write_memo(memo: Path, known: dict[str, str]) -> None:
    """Best effort: without the memo the next start reads the weights again."""
    content = {"digests": known, "checksum": _checksum(known)}
    with contextlib.suppress(OSError):
        write_atomically(memo, json.dumps(content, indent=1).encode())
