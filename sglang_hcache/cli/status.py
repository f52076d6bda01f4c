"""Show what the prefetcher of these directories is doing now. Starts none, and does not disturb a running one.

Exit status: 0 it runs, and all directories are usable; 1 it runs, and some are not; 2 bad arguments; 3 none runs, or
it does not answer.
"""

from __future__ import annotations

import argparse
from typing import Any

from sglang_hcache.cli.common import CommandFailed, add_common, count, duration, human, print_json, require_siblings

ANSWER_S = 5.0
SOME_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    from sglang_hcache.prefetch.endpoint import endpoint_for, is_running

    require_siblings(arguments.dir)  # a part of them is another prefetcher's
    endpoint = endpoint_for([str(path) for path in arguments.dir])
    running = is_running(endpoint)
    report = _ask(endpoint.address) if running else {}
    if arguments.json:
        print_json({"running": running, **report})
    elif running:
        _print(report)
    if not running:
        raise CommandFailed(f"no prefetcher runs for {', '.join(map(str, arguments.dir))}")
    states = [volume["state"] for model in report["models"] for volume in model["volumes"]]
    return 0 if all(state == "ok" for state in states) else SOME_FAILED


def _ask(address: str) -> dict[str, Any]:
    """What it says of itself. Raises CommandFailed."""
    import zmq

    from sglang_hcache.prefetch import messages as m

    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(address)
        socket.send(m.encode(m.Overview()))
        if not socket.poll(int(1000 * ANSWER_S)):
            raise CommandFailed(f"a prefetcher runs, but did not answer within {ANSWER_S:g} s")
        try:
            answer = m.decode_from_server(socket.recv())
        except m.Malformed as error:
            raise CommandFailed(f"a prefetcher runs, but of another version ({error})") from error
    if not isinstance(answer, m.Overviewed):
        raise CommandFailed(f"a prefetcher runs, but of another version ({getattr(answer, 'text', answer)})")
    return {name: getattr(answer, name) for name in ("pid", "uptime_s", "clients", "models")}


def _print(report: dict[str, Any]) -> None:
    models = report["models"]
    memory = human(sum(model["memory_bytes"] for model in models))
    clients = count(report["clients"], "client")
    print(f"process {report['pid']}, up for {duration(report['uptime_s'])}: ", end="")
    print(f"{clients}, {count(len(models), 'model')}, {memory} of memory")
    for model in models:
        print(
            f"  {model['fingerprint'][:12]}  {model['about'] or 'unknown model'}, {count(model['clients'], 'client')}"
        )
        print(f"    {human(model['memory_bytes'])} of memory for {count(model['pages_total'], 'page')}: ", end="")
        print(f"{model['pages_host']} in use, {model['pages_dirty']} not yet written; {model['pages_file']} in files")
        for volume in model["volumes"]:
            print(f"    {volume['path']}: {volume['state']}, {count(volume['pages'], 'page')}")
