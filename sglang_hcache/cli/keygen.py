"""Create the keys by which a prefetcher and its clients on other hosts authenticate each other.

Called again, it adds clients; a running prefetcher accepts them at once.
Exit status: 0; 2 bad arguments; 3 the keys cannot be created.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="folder of the keys; created if it does not exist"
    )
    parser.add_argument(
        "--client",
        action="append",
        metavar="NAME",
        help="name of a client to admit; may be repeated (default: client)",
    )


def run(arguments: argparse.Namespace) -> int:
    from sglang_hcache.prefetch.keys import make_keys

    folders = make_keys(arguments.directory, arguments.client or ("client",))
    print(f"prefetcher: start it with --keys {arguments.directory}")
    for folder in folders:
        print(f"client {folder.name}: move {folder} to its host, and name it there with --hcache-keys")
    return 0
