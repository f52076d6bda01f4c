"""Run a prefetcher in the foreground, for servers on this host and, with --listen, on others.

It ends within 15 s of SIGTERM. While one that a server has started serves the same directories, it says so and waits.
Exit status: 0 stopped; 1 it cannot serve; 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from sglang_hcache.cli.common import explain, size
from sglang_hcache.config import directories_of
from sglang_hcache.storage.files import make_private
from sglang_hcache.storage.layout import ALIGNMENT
from sglang_hcache.storage.quota import SEGMENTS

NAMES = ("dir", "listen", "keys", "size_limit", "host_limit", "read_limit")
_LEAST_PAGE = 2 * ALIGNMENT  # a header and one layer
MOST_BYTES = 1 << 60
LEAST = {"size_limit": SEGMENTS * _LEAST_PAGE, "host_limit": 2 * _LEAST_PAGE, "read_limit": 1}  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help='the options below in JSON, or in TOML if FILE ends in .toml (size_limit = "2TB")',
    )
    parser.add_argument(
        "--dir",
        metavar="PATH[,PATH...]",
        help="directories of the pages: the servers' --hcache-dir; required, here or in --config",
    )
    parser.add_argument(
        "--listen",
        metavar="tcp://HOST:PORT",
        help="also serve other hosts; requires --keys unless HOST is a loopback address",
    )
    parser.add_argument("--keys", metavar="DIR", help="folder of keys that `hcache keygen` made")
    parser.add_argument(
        "--size-limit", metavar="SIZE", help="limit for each directory, such as 2TiB (default: as --hcache-dir-size)"
    )
    parser.add_argument("--read-limit", metavar="SIZE", help="limit on bytes read from files per second")
    parser.add_argument("--host-limit", metavar="SIZE", help="limit on host memory for one model's pages")


def run(arguments: argparse.Namespace) -> int:
    from sglang_hcache.prefetch.process import serve

    try:
        config = configuration(arguments)
    except (OSError, ValueError) as error:
        print(f"hcache prefetcher: {explain(error)}", file=sys.stderr)
        return 2
    return serve(config)


def configuration(arguments: argparse.Namespace) -> Any:
    """A ServerConfig. Raises ValueError or OSError, in one line that says what to do."""
    from sglang_hcache.prefetch.endpoint import endpoint_for
    from sglang_hcache.prefetch.keys import server_keys
    from sglang_hcache.prefetch.listeners import check_listen
    from sglang_hcache.prefetch.server import ServerConfig

    values = read_file(arguments.config) if arguments.config else {}
    values |= {name: value for name in NAMES if (value := getattr(arguments, name)) is not None}
    if not values.get("dir"):
        raise ValueError("no directory is given: add --dir PATH[,PATH...]")
    given = values["dir"]
    try:
        paths = directories_of([str(part) for part in given] if isinstance(given, list) else str(given))
    except ValueError as error:
        raise ValueError(f"--dir {given!r} {error}") from None
    limits = {name: limit(name, values) for name in LEAST}
    directories, listen, keys = tuple(map(str, paths)), str(values.get("listen", "")), str(values.get("keys", ""))
    address = endpoint_for(directories).address
    if listen in ("ipc", address):  # always served
        listen = ""
    if listen:
        check_listen(listen, keys)
    if keys:
        server_keys(Path(keys))
    for path in paths:
        make_private(path)
    return ServerConfig(
        address,
        directories,
        limits["size_limit"],
        ends_when_unused=False,
        listen=listen,
        keys=keys,
        host_bytes=limits["host_limit"],
        read_bytes_per_s=limits["read_limit"],
    )


def read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        form = "TOML" if path.suffix == ".toml" else "JSON (TOML needs a name in .toml)"
        raise ValueError(f"--config {path} cannot be parsed as {form}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} is not a JSON object with any of {', '.join(NAMES)}")
    if unknown := set(values) - set(NAMES):
        raise ValueError(f"--config {path}: unknown {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        parts = value if name == "dir" and isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float) for part in parts):
            raise ValueError(f"--config {path}: {name} is not a string{', nor a list of strings' * (name == 'dir')}")
    return given


def limit(name: str, values: dict[str, Any]) -> int | None:
    """Bytes, or None where none are given."""
    if (value := values.get(name)) is None:
        return None
    flag = "--" + name.replace("_", "-")
    try:
        bound = size(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{flag} {error}") from None
    if bound < LEAST[name]:
        raise ValueError(f"{flag} {value} is too small to be of use: give more, or drop it")
    if bound > MOST_BYTES:
        raise ValueError(f"{flag} {value} is more than any disk or memory has: give less, or drop it")
    return bound
