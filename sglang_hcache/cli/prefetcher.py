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

from sglang_hcache.cli.common import explain, size
from sglang_hcache.config import directories_of
from sglang_hcache.storage.files import make_private
from sglang_hcache.storage.layout import ALIGNMENT
from sglang_hcache.storage.quota import SEGMENTS

NAMES = ("dir", "listen", "keys", "size_limit", "host_limit", "read_limit")
_LEAST_PAGE = 2 * ALIGNMENT  # a header and one layer
LEAST = {"size_limit": SEGMENTS * _LEAST_PAGE, "host_limit": 2 * _LEAST_PAGE, "read_limit": 1}  # bytes


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
        "--size-limit", metavar="SIZE", help="bound of each directory, as 500GB or 2TiB; --hcache-dir-size's default"
    )
    parser.add_argument("--read-limit", metavar="SIZE", help="the most that is read from files in a second")
    parser.add_argument("--host-limit", metavar="SIZE", help="bound of the memory for one model's pages")


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
        raise ValueError("give --dir PATH[,PATH...]")
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
        raise ValueError(f"--config {path} cannot be parsed: {error}") from None
    if not isinstance(values, dict) or (unknown := set(values) - set(NAMES)):
        what = ", ".join(sorted(unknown)) if isinstance(values, dict) else "no table"
        raise ValueError(f"--config {path}: {what} is not understood; known: {', '.join(NAMES)}")
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
        raise ValueError(f"{flag} {value} holds nothing: give more, or drop it")
    return bound
