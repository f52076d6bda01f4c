from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.endpoint import endpoint_for
from sglang_hcache.prefetch.server import Server, ServerConfig
from sglang_hcache.prefetch.sockets import HIGH_WATER
from sglang_hcache.storage.contract import Progress
from tests.prefetch.clients import (
    PATIENCE_S,
    SLOTS,
    assert_nothing_held,
    child,
    fetched,
    figures,
    hello,
    line_of,
    parent_of,
    reserved,
    save,
    settle,
    tell,
    until,
)
from tests.prefetch.conftest import Join
from tests.prefetch.raw import Raw, refused_while_one_waits
from tests.storage.pages import LAYOUT, OTHER_FINGERPRINT, fill, holds, key_of, keys_of


def test_a_second_hello_is_refused_and_harms_nobody(directory: Path, join: Join) -> None:
    client = join()
    with Raw(directory) as raw:
        for _ in range(2):
            raw.send(m.encode(hello(fingerprint=OTHER_FINGERPRINT)))
        assert raw.hear(m.Refused).reason == "out_of_order"
        raw.session = raw.hear(m.Welcome).session
        raw.say(m.Lookup(keys=keys_of([1])))
        assert raw.hear(m.Found).present == [False]
    assert until(lambda: figures(client)["prefetcher_clients"] == 1)
    assert client.alive


def test_who_is_told_nothing_is_told_that_the_prefetcher_lives(directory: Path, join: Join) -> None:
    """Its questions may be far back in a long queue, and a client kills a prefetcher that is silent."""
    join()
    with Raw(directory) as raw:
        raw.open(grant=0)
        assert raw.hear(m.Alive, unasked=True).answers == 0


@pytest.mark.parametrize(
    ("message", "reason", "fatal"),
    [
        (m.Lookup(session=99, seq=1, keys=[]), "unknown_session", True),
        (m.Lookup(seq=5, keys=[]), "out_of_order", True),
        (m.Lookup(seq=0, keys=[]), "replayed", False),
        (m.Commit(seq=1, pages=[m.Page(key_of(1), key_of(0), 60)]), "not_granted", True),
        (m.Commit(seq=1, pages=[m.Page(key_of(1), key_of(0), 1 << 40)]), "not_granted", True),
        (m.GiveBack(seq=1, slots=[60]), "not_granted", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_session_does_not_allow_is_refused(
    directory: Path, join: Join, message: m.Message, reason: str, fatal: bool
) -> None:
    client = join()
    with Raw(directory) as raw:
        raw.open()
        raw.seq = 9  # a goodbye may come out of order
        struct = {name: getattr(message, name) for name in message.__struct_fields__}
        raw.send(m.encode(type(message)(**struct | {"session": message.session or raw.session})))
        refused = raw.hear(m.Refused)
        assert (refused.reason, refused.fatal) == (reason, fatal)
    assert figures(client)["messages_refused"] == 1
    assert_nothing_held(client)


def test_releases_and_cancels_of_prefetches_nobody_knows_are_nothing(directory: Path, join: Join) -> None:
    client = join()
    with Raw(directory) as raw:
        raw.open()
        raw.say(m.Release(prefetch=7))
        raw.say(m.Cancel(prefetch=7))
        raw.say(m.Health())
        raw.hear(m.Alive)
    assert figures(client)["messages_refused"] == 0


def test_a_client_that_never_reads_delays_nobody_and_is_given_up(directory: Path, join: Join) -> None:
    client = join()
    save(client, range(20))
    assert client.flush(PATIENCE_S)
    process = psutil.Process(client.prefetcher_pid)
    rude = child("never_read", directory)

    def goes_on_for(messages: int) -> bool:
        assert client.contains(keys_of(range(20))) == [True] * 20
        assert rude.poll() is None
        return figures(client).get("refused_malformed", 0) > messages

    assert until(lambda: goes_on_for(10_000))
    before = process.memory_info().rss
    with Raw(directory) as raw:
        raw.open(grant=0)
        assert refused_while_one_waits(raw) < HIGH_WATER, "each of them has its turn"
    assert fetched(client, range(20)) == 20
    assert until(lambda: goes_on_for(60_000))
    assert process.memory_info().rss - before < 4 << 20, "what it does not take is not kept"
    rude.kill()
    rude.communicate()
    assert until(lambda: figures(client)["prefetcher_clients"] == 1)


def test_slots_come_while_pages_stay_open(join: Join) -> None:
    """Pages of what is decoded stay open until their request ends: more of them than are kept ready."""
    client = join(grant=8, host_bytes=256 * LAYOUT.record_bytes)
    slots = [reserved(client) for _ in range(64)]
    assert len(set(slots)) == 64
    settle(client)
    assert client.reserve() is None, "a quarter of all slots"
    assert figures(client)["pages_open"] == 64
    for page, slot in enumerate(slots[:5]):
        fill(client.memory[slot], page)
        client.commit(key_of(page), slot, parent_of(page))
    assert fetched(client, range(5)) == 5
    for slot in slots[5:]:
        client.abandon(slot)
    save(client, range(5, 100))
    assert figures(client)["pages_open"] <= 64


def test_a_client_is_granted_no_more_than_it_said_it_would_want(directory: Path, join: Join) -> None:
    client = join(grant=1)
    with Raw(directory) as raw:
        raw.open(grant=2)
        assert len(raw.hear(m.Granted).slots) == 2
        raw.say(m.Want(slots=1 << 40))
        assert len(raw.hear(m.Granted).slots) == 2
    assert_nothing_held(client)


def test_many_clients_leave_room_for_pages(join: Join) -> None:
    clients = [join(grant=64) for _ in range(8)]
    assert until(lambda: [figures(client)["pages_granted"] for client in clients] == [2] * 8)
    settle(*clients)
    assert figures(clients[0])["pages_open"] == 16, "a quarter of all slots"
    save(clients[0], range(20))
    assert clients[0].flush(30)
    assert fetched(clients[1], range(20)) == 20
    save(clients[-1], range(30, 35))
    for client in clients:
        save(client, range(40, 45))
        assert figures(client)["pages_open"] <= 16


def test_clients_that_save_nothing_take_no_slots_from_those_that_do(join: Join) -> None:
    """As ranks whose pages another one saves."""
    for _ in range(7):
        join(grant=0)
    client = join(grant=64)
    assert until(lambda: figures(client)["pages_granted"] == 16)
    assert len({reserved(client) for _ in range(16)}) == 16


@pytest.mark.parametrize("filling", [0, 16])
def test_slots_that_a_client_does_not_fill_go_to_others(join: Join, filling: int) -> None:
    """As with a server that nobody asks for anything."""

    def granted(*clients: PrefetchClient) -> list[int]:
        return [figures(client)["pages_granted"] for client in clients]

    idle = join(grant=64)
    assert until(lambda: granted(idle) == [16])
    slots = [reserved(idle) for _ in range(filling)]
    other = join(grant=64)
    if filling:
        settle(idle, other)
        assert granted(idle, other) == [0, 0], "what is being filled is not taken away"
    for slot in slots:
        idle.abandon(slot)
    assert until(lambda: granted(idle, other) == [8, 8])
    save(other, range(20))
    other.close()
    assert until(lambda: granted(idle) == [16])
    assert_nothing_held(idle)


def test_a_client_that_is_stopped_keeps_no_more_than_its_share(directory: Path, join: Join) -> None:
    join(grant=0)
    with Raw(directory) as raw:
        raw.open(grant=64)
        assert len(raw.hear(m.Granted).slots) == 16
        other = join(grant=64)
        raw.say(m.Health())
        raw.hear(m.Alive)
        settle(other)
        assert figures(other)["pages_granted"] == 0
        assert until(lambda: figures(other)["pages_granted"] == 8)


def test_whoever_waits_for_slots_gets_those_that_others_have_filled(join: Join) -> None:
    first = join(grant=64)
    filled = [reserved(first) for _ in range(16)]
    second = join(grant=64)
    assert second.reserve() is None
    for page, slot in enumerate(filled[:10]):
        fill(first.memory[slot], page)
        first.commit(key_of(page), slot, parent_of(page))
    assert until(lambda: figures(second)["pages_granted"] == 8), "without asking again"
    settle(first, second)
    assert figures(first)["pages_open"] == 16


def test_pages_are_shared_and_read_once(join: Join) -> None:
    one, other = join(), join()
    save(one, range(20))
    assert one.flush(30)
    one.drop_host()
    before = figures(one)["hits_file"]
    one.prefetch("a", keys_of(range(20)))
    other.prefetch("a", keys_of(range(20)))
    mine, theirs = one.wait("a", PATIENCE_S), other.wait("a", PATIENCE_S)
    assert mine == theirs
    assert len(mine.slots) == 20
    assert all(holds(other.memory[slot], page) for page, slot in enumerate(theirs.slots))
    count = figures(one)
    assert count["hits_file"] - before == 20
    assert count["pages_leased"] == 20
    one.release("a")
    assert figures(one)["pages_leased"] == 20, "the other still reads"
    other.release("a")
    assert until(lambda: figures(one)["pages_leased"] == 0)
    settle(one, other)
    count = figures(one)
    assert count["pages_open"] == count["pages_granted"] + figures(other)["pages_granted"]


def test_asking_for_progress_again_copies_nothing(join: Join) -> None:
    client = join()
    save(client, range(4))
    client.prefetch("request", keys_of(range(4)))
    assert len(client.wait("request", PATIENCE_S).slots) == 4
    assert client.progress("request") is client.progress("request")


def test_too_much_at_once_waits_for_room(join: Join) -> None:
    client = join(grant=4)
    save(client, range(60))
    assert client.flush(PATIENCE_S)
    client.prefetch("first", keys_of(range(30)))
    assert len(client.wait("first", PATIENCE_S).slots) == 30
    client.prefetch("second", keys_of(range(30, 60)))
    assert figures(client)["prefetches_waiting"] == 1
    assert not client.progress("second").done
    client.prefetch("third", keys_of(range(30, 50)))
    client.cut("third")
    slots, *is_over = client.wait("third", PATIENCE_S)
    assert is_over == [True, True, len(slots)], "it may be cut while it waits"
    assert slots
    assert all(holds(client.memory[slot], 30 + i) for i, slot in enumerate(slots))
    client.release("first")
    assert len(client.wait("second", PATIENCE_S).slots) == 30
    client.release("second")
    client.release("third")
    assert_nothing_held(client)


def test_a_cancelled_prefetch_keeps_what_is_there(join: Join) -> None:
    client = join(grant=4)
    save(client, range(60))
    assert client.flush(PATIENCE_S)
    client.prefetch("first", keys_of(range(30)))
    client.wait("first", PATIENCE_S)
    client.prefetch("second", keys_of(range(20, 55)))
    client.cut("second")
    slots, done, *_ = client.wait("second", PATIENCE_S)
    assert done
    assert all(holds(client.memory[slot], 20 + i) for i, slot in enumerate(slots))
    client.cut("first")
    assert len(client.progress("first").slots) == 30
    client.release("first")
    client.release("second")
    assert_nothing_held(client)


def test_a_goodbye_and_the_end_of_its_process_at_once(directory: Path, join: Join) -> None:
    client = join()
    leaving = [child("leave", directory) for _ in range(3)]
    assert [line_of(process) for process in leaving] == ["ready"] * 3
    os.kill(client.prefetcher_pid, signal.SIGSTOP)
    for process in leaving:
        process.communicate("go\n", timeout=PATIENCE_S)
    os.kill(client.prefetcher_pid, signal.SIGCONT)
    assert until(lambda: figures(client)["prefetcher_clients"] == 1)
    assert_nothing_held(client)


def test_what_a_client_has_committed_before_its_end_is_kept(directory: Path, join: Join) -> None:
    client = join()
    ending = child("commit", directory, 4)
    assert line_of(ending) == "ready"
    os.kill(client.prefetcher_pid, signal.SIGSTOP)
    ending.communicate("go\n", timeout=PATIENCE_S)
    os.kill(client.prefetcher_pid, signal.SIGCONT)
    assert until(lambda: figures(client)["prefetcher_clients"] == 1)
    assert figures(client)["pages_host"] == 4
    assert figures(client)["messages_refused"] == 0
    assert_nothing_held(client)


def test_pages_are_announced_as_they_come_and_in_their_order(directory: Path, join: Join) -> None:
    client = join()
    save(client, range(40))
    assert client.flush(PATIENCE_S)
    client.drop_host()
    with Raw(directory) as raw:
        raw.open(grant=1)
        asked = raw.say(m.Prefetch(keys=keys_of(range(30)), priority=0, page_priority=0))
        slots: list[int] = []
        done = False
        while not done:
            ready = raw.hear(m.Ready)
            assert (ready.answers, ready.first) == (asked, len(slots))
            assert ready.done or ready.slots or not slots
            slots += ready.slots
            done = ready.done
        assert len(slots) == 30
        assert all(holds(client.memory[slot], page) for page, slot in enumerate(slots))
    assert_nothing_held(client)


def test_a_prefetch_that_fails_brings_nothing_and_nobody_waits_for_it(directory: Path, join: Join) -> None:
    process = child("fail_to_look_up", directory, "666")
    assert until(endpoint_for([str(directory)]).socket.exists)
    client = join()
    assert client.prefetcher_pid == process.pid
    save(client, range(4))
    client.prefetch("bad", keys_of([0, 666]))
    assert client.wait("bad", PATIENCE_S)[:3] == ((), True, True)
    client.prefetch("good", keys_of(range(4)))
    assert len(client.wait("good", PATIENCE_S).slots) == 4
    assert figures(client)["refused_failed"] == 1
    client.release("bad")
    client.release("good")
    assert_nothing_held(client)


def test_what_is_in_memory_is_announced_at_once(directory: Path, join: Join) -> None:
    """Though it is nothing: a client that must guess would take what is in memory for what is on a drive."""
    process = child("read_when_told", directory)
    assert until(endpoint_for([str(directory)]).socket.exists)
    client = join()
    assert client.prefetcher_pid == process.pid
    save(client, range(40))
    assert client.flush(PATIENCE_S)
    with Raw(directory) as raw:
        raw.open(grant=1)
        asked = raw.say(m.Prefetch(keys=keys_of(range(8)), priority=0, page_priority=0))
        ready = raw.hear(m.Ready)
        assert (ready.answers, len(ready.slots), ready.done, ready.total) == (asked, 8, True, 8)
        raw.say(m.Release(prefetch=asked))
        raw.say(m.DropHost())
        half_there = keys_of(range(20, 60))
        asked = raw.say(m.Prefetch(keys=half_there, priority=0, page_priority=0))
        ready = raw.hear(m.Ready)
        assert (ready.answers, ready.slots, ready.done, ready.total) == (asked, [], False, 20)
    client.prefetch("a", half_there)
    assert client.wait("a", PATIENCE_S, until_known=True) == Progress((), done=False, known=True, total=20)
    tell(process)
    client.release("a")
    assert_nothing_held(client)


def test_a_prefetcher_that_is_stopped_leaves_alone_what_is_leased(directory: Path, join: Join) -> None:
    """Its client may be restoring from it; nor does it go to another one, who has waited for room."""
    one = join()
    other = join()
    save(one, range(SLOTS - 4))
    assert one.flush(30)
    one.prefetch("one", keys_of(range(SLOTS // 2)))
    slots = one.wait("one", PATIENCE_S).slots
    assert len(slots) == SLOTS // 2
    other.prefetch("other", keys_of(range(SLOTS // 2, SLOTS - 4)))
    assert figures(other)["prefetches_waiting"] == 1
    assert not other.progress("other").done
    os.kill(one.prefetcher_pid, signal.SIGTERM)
    while one.alive:
        assert all(holds(one.memory[slot], page) for page, slot in enumerate(slots))
    assert all(holds(one.memory[slot], page) for page, slot in enumerate(slots))


def test_who_waits_for_a_slow_disk_keeps_nobody_from_joining(directory: Path, join: Join) -> None:
    """More of them than there are threads that open stores."""
    process = child("write_when_told", directory)
    assert until(endpoint_for([str(directory)]).socket.exists)
    client = join()
    assert client.prefetcher_pid == process.pid
    save(client, range(20))
    asked = [client.connection.send(m.Flush()) for _ in range(8)]
    assert all(asked)
    join(fingerprint=OTHER_FINGERPRINT)
    assert figures(client)["pages_file"] == 0
    tell(process)
    assert client.flush(PATIENCE_S)
    assert figures(client)["pages_file"] == 20


def test_whoever_stops_it_after_its_end_writes_to_nobody_elses_file(runtime: Path, tmp_path: Path) -> None:
    """As a second SIGTERM, and a thread that is late."""
    server = Server(ServerConfig(f"ipc://{runtime}.sock", (str(tmp_path / "volume"),)))
    server.stop()
    server.run()
    files = [(tmp_path / str(number)).open("wb") for number in range(16)]  # one has the number of what was closed
    server.stop()
    server._later(lambda: None)
    for file in files:
        file.close()
    assert not any(path.stat().st_size for path in tmp_path.iterdir())
