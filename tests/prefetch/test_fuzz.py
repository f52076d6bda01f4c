"""Hostile frames at the prefetcher's socket, beside a client that must not notice.

Continuous integration sends a slice; `HCACHE_FUZZ_FRAMES=1000000` is the full count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import psutil
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.endpoint import endpoint_for
from tests.prefetch.clients import (
    PATIENCE_S,
    REPOSITORY,
    assert_nothing_held,
    children,
    fetched,
    figures,
    hello,
    save,
    tell,
    until,
)
from tests.prefetch.conftest import Join
from tests.prefetch.fuzzer import AHEAD, SOCKETS, TURN
from tests.prefetch.raw import is_unasked
from tests.storage.pages import key_of, keys_of

FRAMES = int(os.environ.get("HCACHE_FUZZ_FRAMES", "20000"))
ROUND = 100_000  # frames of one hostile process
QUESTIONS = 20  # asked beside it, at least
PAGES = 20
NOBODYS = 5000  # a page that the fuzzer, whose commits may be in order, does not know
REASONS = {
    "malformed",
    "unknown_version",
    "oversized",
    "unknown_session",
    "replayed",
    "out_of_order",
    "not_granted",
}


def test_no_frame_harms_the_prefetcher_or_its_other_clients(directory: Path, join: Join) -> None:
    client = join()
    process = psutil.Process(client.prefetcher_pid)
    save(client, range(1000, 1000 + PAGES))
    assert client.flush(PATIENCE_S)
    before = process.memory_info().rss
    answered: Counter[str] = Counter()
    sent, waits, memory = 0, list[int](), list[int]()
    for seed, start in enumerate(range(0, FRAMES, ROUND)):
        command = [
            sys.executable,
            "-m",
            "tests.prefetch.fuzzer",
            str(directory),
            str(seed),
            str(min(ROUND, FRAMES - start)),
        ]
        former = figures(client)["messages_refused"]
        fuzzer = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(fuzzer)
        asked = 0
        while fuzzer.poll() is None:
            before_it = figures(client)["messages_refused"]
            assert client.contains(keys_of([1000, 1001, NOBODYS])) == [True, True, False]
            if before_it > former:
                waits.append(figures(client)["messages_refused"] - before_it)
                asked += 1
            if asked == QUESTIONS:
                tell(fuzzer)
            assert fetched(client, range(1000, 1000 + PAGES)) == PAGES
            client.drop_host()
        report = json.loads(fuzzer.communicate()[0])
        sent += report["sent"]
        answered += Counter(report["refused"])
        assert until(lambda: figures(client)["prefetcher_clients"] == 1)
        memory.append(process.memory_info().rss)
    count = figures(client)
    refused = {name.removeprefix("refused_"): n for name, n in count.items() if name.startswith("refused_")}
    waited = median(waits)
    print(f"\n{sent} frames, refused {refused}; beside a question of another, {waited} of them")
    print(f"resident memory after each {ROUND}: {[rss >> 20 for rss in memory]} MiB")
    assert client.prefetcher_pid == process.pid
    assert client.alive
    assert refused.keys() >= REASONS
    assert "failed" not in refused, "the prefetcher's log says why"
    assert refused == answered, "each is counted once, and answered once"
    assert count["messages_refused"] == sum(refused.values())
    assert waited < SOCKETS * AHEAD * TURN / 2, "a hostile client does not hold up another"
    assert memory[0] - before < 32 << 20
    assert memory[-1] - memory[0] < 16 << 20, "after the first, no more is taken"
    assert_nothing_held(client)
    assert fetched(client, range(1000, 1000 + PAGES)) == PAGES


def test_each_refusal_has_its_reason(directory: Path, join: Join) -> None:
    join()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint_for([str(directory)]).address)

    def answer(*frames: bytes) -> m.FromServer:
        socket.send_multipart(frames)
        skipped = m.Waiting | m.Granted | m.Share | m.Ready
        while isinstance(reply := m.decode_from_server(socket.recv()), skipped) or is_unasked(reply):
            pass
        return reply

    def refusal(*frames: bytes) -> str:
        reply = answer(*frames)
        assert isinstance(reply, m.Refused), reply
        return reply.reason

    assert refusal(b"noise") == "malformed"
    assert refusal(b"HC\x09\x00") == "unknown_version"
    assert refusal(m.PREFIX + bytes(m.MAX_MESSAGE_BYTES)) == "oversized"
    assert refusal(m.encode(m.Health(session=1 << 30, seq=1))) == "unknown_session"
    assert refusal(m.encode(hello(pid=1 << 30))) == "bad_hello"
    welcome = answer(m.encode(hello()))
    assert isinstance(welcome, m.Welcome)
    assert isinstance(answer(m.encode(m.Health(session=welcome.session, seq=1))), m.Alive)
    assert refusal(m.encode(m.Health(session=welcome.session, seq=1))) == "replayed"
    assert refusal(m.encode(hello())) == "out_of_order"
    commit = m.Commit(pages=[m.Page(key_of(1), key_of(0), 1 << 40)], session=welcome.session, seq=2)
    assert refusal(m.encode(commit)) == "not_granted"
    assert refusal(m.encode(m.Health(session=welcome.session, seq=3))) == "session_over"
    assert isinstance(answer(m.encode(m.Bye(session=welcome.session, seq=4))), m.Alive)
    socket.close()
    context.term()
