"""The one configuration object: made from the flags in the launcher, passed to every scheduler process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

LINKER_CLASS = "HCacheLinker"
LINKER_MODULE = "sglang_hcache.linker"

DEFAULT_PAGE_SIZE = 64  # tokens
LEAST_PAGE_SIZE = 16  # with less, headers and alignment outweigh the payload
PREFETCH_TIMEOUT_S = 1.0, 0.25  # in all, and for every 1,024 tokens


class Representation(StrEnum):
    """What is stored of a layer: hidden states (the attention's input), or K and V."""

    HIDDEN = "hidden"
    KV = "kv"


REPRESENTATION_CHOICES = ("auto", *Representation)


PLAN_CHOICES = ("auto", "always")  # restore what is faster than to prefill it; or all there is


COPIER_CHOICES = ("auto", "kernel")  # what copies pages to a GPU; auto: its copy engine, where that can


CODEC_CHOICES = ("packed", "lossy_int8", "lossy_fp8_e4m3")  # of hidden states


def default_directory() -> Path:
    """Raises ValueError where the user has no home, as in a container that is run as any user."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise ValueError("has no default, as this user has no home directory: name one") from None
    return Path(base) / "sglang-hcache"


def directories_of(given: str | Sequence[str]) -> list[Path]:
    """Absolute paths, from PATH[,PATH…] or a list of paths. Raises ValueError; its message follows the given text."""
    parts = given.split(",") if isinstance(given, str) else given
    if not parts or not all(part.strip() for part in parts):
        raise ValueError("has an empty path in it: give PATH[,PATH…]")
    paths = [Path(os.path.expanduser(part)).absolute() for part in parts]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ValueError("names a directory twice: name each once")
    return paths


@dataclass(frozen=True)
class HCacheConfig:
    """What the flags say, apart from what SGLang's own fields carry."""

    directories: tuple[str, ...]  # absolute paths, one store each, striped
    representation: str = "auto"  # one of REPRESENTATION_CHOICES
    plan: str = "auto"  # one of PLAN_CHOICES
    codec: str | None = None  # one of CODEC_CHOICES; None: hidden states as they are
    copier: str = "auto"  # one of COPIER_CHOICES
    directory_bytes: int | None = None  # bound of what each directory takes; None: as `Quota` has it
    read_bytes_per_s: float | None = None  # the most that is read from files; None for all they give
    prefetcher: str | None = None  # tcp://HOST:PORT of one on another host; None for this node's own
    keys: str | None = None  # folder of this client's keys for it
    prefetch_timeout_base_s: float = PREFETCH_TIMEOUT_S[0]
    prefetch_timeout_per_ki_token_s: float = PREFETCH_TIMEOUT_S[1]

    @property
    def checkpoint_memo(self) -> Path:
        """The file of what weight files contain, so that the next start does not read them again."""
        return Path(self.directories[0]) / "checkpoints.json"

    @property
    def copy_engine(self) -> bool:
        """Whether the GPU's copy engine may copy pages, where it can."""
        return self.copier == "auto"

    def to_linker_config(self) -> dict[str, Any]:
        """The value of SGLang's `--unified-cache-external-linker-config`."""
        return {
            "linker": LINKER_CLASS,
            "linker_module_path": LINKER_MODULE,
            "linker_extra_config": asdict(self),
        }

    @classmethod
    def from_linker_extra(cls, extra: dict[str, Any]) -> HCacheConfig:
        """From the `linker_extra_config` that `to_linker_config` makes, after a trip through JSON."""
        return cls(**{**extra, "directories": tuple(extra["directories"])})


def names_our_linker(linker_config: object) -> bool:
    """Whether a server's external-linker configuration is this package's."""
    return isinstance(linker_config, dict) and linker_config.get("linker_module_path") == LINKER_MODULE
