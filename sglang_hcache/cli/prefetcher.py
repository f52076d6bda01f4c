"""Run a prefetcher in the foreground, for servers on this host and, with --listen, on others.

It ends on SIGTERM, within 15 s. Exit status: 0 stopped; 1 it cannot serve; 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

SUFFIXES = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
NAMES = ("dir", "listen", "keys", "size_limit", "host_limit", "read_limit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON or TOML with the options below (size_limit …)"
    )
    parser.add_argument("--dir", metavar="PATH[,PATH...]", help="directories for pages, the servers' --hcache-dir")
    parser.add_argument(
        "--listen", metavar="tcp://HOST:PORT", help="serve other hosts, too; beyond loopback with --keys"
    )
    parser.add_argument("--keys", metavar="DIR", help="made by `hcache keygen`")
    parser.add_argument(
        "--size-limit", metavar="BYTES", help="bound of each directory, as 500G or 2Ti; 90 %% of what it can have"
    )
    parser.add_argument("--read-limit", metavar="BYTES", help="the most that is read from files in a second")
    parser.add_argument("--host-limit", metavar="BYTES", help="bound of the memory for one model's pages")


def run(arguments: argparse.Namespace) -> int:
    from sglang_hcache.prefetch.process import serve

    try:
        config = configuration(arguments)
    except (OSError, ValueError) as error:
        print(f"hcache prefetcher: {error}", file=sys.stderr)
        return 2
    return serve(config)


def configuration(arguments: argparse.Namespace) -> Any:
    """A ServerConfig. Raises ValueError or OSError, in one line that says what to do."""
    from sglang_hcache.prefetch.door import check_listen
    from sglang_hcache.prefetch.endpoint import endpoint_for
    from sglang_hcache.prefetch.keys import server_keys
    from sglang_hcache.prefetch.server import ServerConfig

    values = read_file(arguments.config) if arguments.config else {}
    values |= {name: value for name in NAMES if (value := getattr(arguments, name)) is not None}
    if not values.get("dir"):
        raise ValueError("give --dir PATH[,PATH...]")
    parts = values["dir"] if isinstance(values["dir"], list) else str(values["dir"]).split(",")
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise ValueError(f"--dir {values['dir']!r} has an empty path in it")
    directories = tuple(str(Path(part).expanduser().absolute()) for part in parts)
    for directory in directories:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    address, listen, keys = (
        endpoint_for(directories).address,
        str(values.get("listen", "")),
        str(values.get("keys", "")),
    )
    if listen in ("ipc", address):  # always served
        listen = ""
    if listen:
        check_listen(listen, keys)
    if keys:
        server_keys(Path(keys))
    return ServerConfig(
        address,
        directories,
        parse_size("--size-limit", values.get("size_limit")),
        ends_when_unused=False,
        listen=listen,
        keys=keys,
        host_bytes=parse_size("--host-limit", values.get("host_limit")),
        read_bytes_per_s=parse_size("--read-limit", values.get("read_limit")),
    )


def read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"--config {path} cannot be parsed: {error}") from None
    if not isinstance(values, dict) or (unknown := set(values) - set(NAMES)):
        what = ", ".join(sorted(unknown)) if isinstance(values, dict) else "no table"
        raise ValueError(f"--config {path}: {what} is not understood; known: {', '.join(NAMES)}")
    return values


def parse_size(flag: str, value: object) -> int | None:
    """Bytes, as a number or with a suffix (500G, 2Ti); None stays None."""
    if value is None:
        return None
    text = str(value).upper().removesuffix("B")
    number = text.rstrip("KMGTI")
    try:
        size = int(float(number) * SUFFIXES[text[len(number) :]])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"{flag} {value!r} is no size: give bytes, or a number with K, M, G, T, Ki, Mi, Gi or Ti")
    return size
