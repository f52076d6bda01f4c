"""Make the keys with which a prefetcher and its clients on other hosts know each other.

Called again, it adds clients; a prefetcher that runs lets them in at once.
Exit status: 0; 2 bad arguments; 3 keys cannot be made.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the keys are kept; made if need be")
    parser.add_argument(
        "--client", action="append", metavar="NAME", help="a client to let in; can be repeated (default: client)"
    )


def run(arguments: argparse.Namespace) -> int:
    from sglang_hcache.prefetch.keys import make_keys

    folders = make_keys(arguments.directory, arguments.client or ("client",))
    print(f"prefetcher: --keys {arguments.directory}")
    for folder in folders:
        print(f"client {folder.name}: move {folder} to its host")
    return 0
