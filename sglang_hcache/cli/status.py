"""Show what the prefetcher of these directories is doing now. Starts none, and does not disturb a running one.

Exit status: 0 it runs, and all directories are usable; 1 it runs, and some are not; 2 bad arguments; 3 none runs, or
it does not answer. With --wait-written or --wait-ended: 0 there is nothing to wait for any more; 3 it takes longer,
or cannot be seen from here.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_hcache.cli.common import (
    CommandFailed,
    add_common,
    count,
    duration,
    human,
    is_open,
    other_owner,
    print_json,
    require_siblings,
)
from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.endpoint import Endpoint, endpoint_named, is_running, name_for, running

ANSWER_S = 5.0
LOOK_S = 0.1  # between two looks whether it has ended, or has written everything
SOME_FAILED = 1
LIMITS = {
    "quota_bytes": "for each directory",
    "read_bytes_per_s": "read per second",
    "host_bytes": "of memory for each model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    waits = parser.add_mutually_exclusive_group()
    waits.add_argument("--wait-written", action="store_true", help="wait until no page is left to be written")
    waits.add_argument("--wait-ended", action="store_true", help="wait until no prefetcher serves these directories")
    parser.add_argument(
        "--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="how long to wait (default: %(default)g)"
    )


def _seconds(text: str) -> float:
    found = float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else math.inf
    if math.isinf(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return found


def run(arguments: argparse.Namespace) -> int:
    require_siblings(arguments.dir)  # a part of them is another prefetcher's
    name = name_for([str(path) for path in arguments.dir])
    report: dict[str, Any] = {"running": bool(served := running(name))}
    try:
        if not served:
            _look_elsewhere(name, arguments)
        elif arguments.wait_written or arguments.wait_ended:
            report["running"] = _wait(name, arguments)
        else:
            report |= _ask(served[0])
    except CommandFailed as error:
        if arguments.json:
            print_json(report | {"error": str(error)})
        raise
    if arguments.json:
        print_json(report)
    elif "models" in report:
        _print(report)
    states = [volume["state"] for model in report.get("models", ()) for volume in model["volumes"]]
    return 0 if all(state == "ok" for state in states) else SOME_FAILED


def _look_elsewhere(name: str, arguments: argparse.Namespace) -> None:
    """No prefetcher was found. Raises CommandFailed, unless the user waits and none can be running elsewhere."""
    directories: Sequence[Path] = arguments.dir
    none = f"no prefetcher runs for {', '.join(map(str, directories))} (it would be at {endpoint_named(name).socket})"
    for path in directories:
        if owner := other_owner(path):
            raise CommandFailed(f"{none}; {path} belongs to {owner}: run this as that user")
        if is_open(path):
            raise CommandFailed(f"{none}; but a process has {path} open: run this where that runs, as it runs")
    if not (arguments.wait_written or arguments.wait_ended):
        raise CommandFailed(none)


def _wait(name: str, arguments: argparse.Namespace) -> bool:
    """Whether one still runs when there is nothing to wait for any more. Raises CommandFailed."""
    deadline = time.monotonic() + arguments.timeout
    while served := running(name):
        why = "a prefetcher still runs" if arguments.wait_ended else next(filter(None, map(_unwritten, served)), "")
        if not why:
            break
        if time.monotonic() > deadline:
            raise CommandFailed(f"{why}, after {arguments.timeout:g} s")
        time.sleep(LOOK_S)
    return bool(served)


def _unwritten(endpoint: Endpoint) -> str:
    """What it has still to write, or why that is not known; nothing where it has written everything."""
    try:
        pages = _ask(endpoint)["pages_dirty"]
    except CommandFailed as error:
        return str(error)
    return f"{count(pages, 'page')} not yet written" if pages else ""


def _ask(endpoint: Endpoint) -> dict[str, Any]:
    """What it says of itself. Raises CommandFailed."""
    import zmq

    deadline = time.monotonic() + ANSWER_S
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(endpoint.address)
        socket.send(m.encode(m.Overview()))
        while not socket.poll(int(1000 * LOOK_S)):
            if not is_running(endpoint):
                raise CommandFailed("the prefetcher has just ended")
            if time.monotonic() > deadline:
                raise CommandFailed(f"a prefetcher runs, but did not answer within {ANSWER_S:g} s")
        try:
            answer = m.decode_from_server(socket.recv())
        except m.Malformed as error:
            raise CommandFailed(f"a prefetcher runs, but of another version ({error})") from error
    if not isinstance(answer, m.Overviewed):
        raise CommandFailed(f"a prefetcher runs, but of another version ({getattr(answer, 'text', answer)})")
    dirty = answer.pages_closing + sum(int(str(model["pages_dirty"])) for model in answer.models)
    names = ("pid", "version", "uptime_s", "clients", *LIMITS, "models")
    return {"pages_dirty": dirty} | {name: getattr(answer, name) for name in names}


def _print(report: dict[str, Any]) -> None:
    models = report["models"]
    memory = human(sum(model["memory_bytes"] for model in models))
    clients = count(report["clients"], "client")
    print(f"process {report['pid']}, version {report['version']}, up for {duration(report['uptime_s'])}: ", end="")
    print(f"{clients}, {count(len(models), 'model')}, {memory} of memory")
    limits = [f"{human(report[name])} {of_what}" for name, of_what in LIMITS.items() if report[name] is not None]
    print(f"  {count(report['pages_dirty'], 'page')} not yet written; limits: {', '.join(limits) or 'the defaults'}")
    for model in models:
        print(
            f"  {model['fingerprint'][:12]}  {model['about'] or 'unknown model'}, {count(model['clients'], 'client')}"
        )
        print(f"    {human(model['memory_bytes'])} of memory for {count(model['pages_total'], 'page')}: ", end="")
        print(f"{model['pages_host']} in use, {model['pages_dirty']} not yet written; {model['pages_file']} in files")
        for volume in model["volumes"]:
            print(f"    {volume['path']}: {volume['state']}, {count(volume['pages'], 'page')}, ", end="")
            print(f"{human(volume['bytes'])} of {human(volume['quota_bytes'])}")
