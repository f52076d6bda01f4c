"""Single flipped bits, in segment files and in the index: each is found or harmless, and no wrong byte is served.

HCACHE_FLIPS: how many in all; half of them in segments, half in the index.
"""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_hcache.storage import index_check
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.index import Index, Size
from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.index_file import prepare, seal_closed
from tests.storage.pages import (
    FINGERPRINT,
    LAYOUT,
    counters,
    key_of,
    keys_of,
    open_store,
    save,
    segment_files,
    served,
    states,
)

FLIPS = int(os.environ.get("HCACHE_FLIPS", "200"))
PAGES = 50
ENTRIES = 300
META_BITS = 8 * 168  # LMDB's two meta pages: a header and what it knows of the file, the rest is unused
LMDB_PAGE_BITS = 8 * 4096
CPU_S = 2  # of a check that goes round in circles, however long the machine takes for that

run_program = subprocess.run


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def means_something(bit: int) -> bool:
    """Whether a bit of a record is none of the padding."""
    at = bit // 8
    if at < LAYOUT.header_bytes:
        return at < LAYOUT.header_sum_at + 8
    starts = [LAYOUT.layer_offset(layer) for layer in range(LAYOUT.n_layers)]
    return any(start <= at < start + size for start, size in zip(starts, LAYOUT.layer_bytes, strict=True))


def records_of(directory: Path) -> dict[int, tuple[Path, int]]:
    """The file and the byte offset of each page's record."""
    pages = {key_of(page): page for page in range(PAGES)}
    found = {}
    for path in segment_files(directory):
        for record, data in enumerate(np.fromfile(path, np.uint8).reshape(-1, LAYOUT.record_bytes)):
            found[pages[data[32:64].tobytes()]] = path, record * LAYOUT.record_bytes
    return found


@pytest.mark.parametrize("while_open", [True, False], ids=["open", "closed"])
def test_a_bit_flipped_in_a_segment_costs_at_most_its_page(tmp_path: Path, while_open: bool) -> None:
    saved, directory = tmp_path / "saved", tmp_path / "work"
    store = open_store(saved)
    save(store, range(PAGES))
    store.close()
    chance = random.Random(while_open)
    records = {page: (path.relative_to(saved), at) for page, (path, at) in records_of(saved).items()}
    assert sorted(records) == list(range(PAGES))
    of_header = 8 * (LAYOUT.header_sum_at + 8)
    count: Counter[str] = Counter()
    while count.total() < FLIPS / 4:
        shutil.copytree(saved, directory)
        bits = {
            page: chance.randrange(of_header if chance.random() < 0.2 else 8 * LAYOUT.record_bytes)
            for page in range(PAGES)
        }
        if while_open:
            store = open_store(directory)
            assert served(store, range(PAGES)) == list(range(PAGES))
            store.drop_host()
        for page, (path, at) in records.items():
            flip(directory / path, 8 * at + bits[page])
        if not while_open:
            store = open_store(directory)
        sound = [page for page in range(PAGES) if not means_something(bits[page])]
        assert served(store, range(PAGES)) == sound
        assert counters(store)["pages_damaged"] == PAGES - len(sound)
        assert states(store) == ["ok"]
        store.check()
        store.close()
        shutil.rmtree(directory)
        count += Counter({"found": PAGES - len(sound), "in padding": len(sound)})
    print(f"segments {'open' if while_open else 'closed'}: {dict(count)}")
    assert count["found"]
    assert count["in padding"]


class Recorded:
    """An index with all that it ever held; many transactions, its last ones add, move, touch or delete."""

    def __init__(self, path: Path, last: Callable[[Index], object]) -> None:
        self.path = path
        path.mkdir(parents=True)
        self._held: dict[bytes, set[Entry]] = {}
        index = Index(path, FINGERPRINT)
        self._note(index)
        for start in range(0, ENTRIES, 20):
            self._put(index, [(page, 0) for page in range(start, start + 20)])
        self._put(index, [(page, 1) for page in range(0, 60, 7)])
        index.touch(dict.fromkeys(keys_of(range(0, ENTRIES, 3)), 2), 1_800_000_000)
        index.delete_many([(key_of(page), self._entry(page, 0)) for page in range(100, 110)])
        index.mark(Size(LAYOUT.record_bytes, LAYOUT.page_tokens))
        self._note(index)
        self.before_last = dict(index.entries())
        last(index)
        self._note(index)
        self.now = dict(index.entries())
        index.close()

    def ever_held(self, entries: dict[bytes, Entry]) -> bool:
        return all(entry in self._held.get(key, ()) for key, entry in entries.items())

    @staticmethod
    def _entry(page: int, place: int) -> Entry:
        return Entry(f"{page // 8 + 1000 * place:016x}", page % 8, bytes(8), 1, 1_700_000_000)

    def _put(self, index: Index, pages: Sequence[tuple[int, int]]) -> None:
        index.put_many([(key_of(page), self._entry(page, place)) for page, place in pages])
        self._note(index)

    def _note(self, index: Index) -> None:
        for key, entry in index.entries():
            self._held.setdefault(key, set()).add(entry)


def add_pages(index: Index) -> None:
    index.put_many([(key_of(page), Recorded._entry(page, 0)) for page in range(ENTRIES, ENTRIES + 10)])


def delete_pages(index: Index) -> None:
    index.delete_many([(key_of(page), Recorded._entry(page, 0)) for page in range(200, 210)])


def touch_pages(index: Index) -> None:
    index.touch(dict.fromkeys(keys_of(range(ENTRIES)), 1), 1_900_000_000)


def forked(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` for the check: the same program, in a fork of this process, which has its imports already."""
    assert command[2] == index_check.__file__
    outputs = [os.memfd_create(name) for name in ("out", "err")]
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        faulthandler.disable()
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        sys.argv = command[2:]
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        status = 1
        try:
            index_check.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    out, err = (os.pread(output, 1 << 20, 0).decode() for output in outputs)
    for output in outputs:
        os.close(output)
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(ended), out, err)


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the index without a new interpreter each time, except for every 50th."""
    calls = iter(range(1 << 30))

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if next(calls) % 50:
            done = forked(command)
        else:
            done = run_program(["sh", "-c", f'ulimit -t {CPU_S} && exec "$@"', "sh", *command], **options)
        if done.returncode == -signal.SIGKILL:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return done

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: copies of an index are synced thousands of times."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
            yield Path(path)
    else:
        yield tmp_path


def bits_to_flip(path: Path, n: int, chance: random.Random) -> list[int]:
    """A third in what LMDB's meta pages say (all of it where that is enough), the rest anywhere."""
    meta = [page * LMDB_PAGE_BITS + bit for page in (0, 1) for bit in range(META_BITS)]
    some = chance.sample(meta, min(n // 3, len(meta)))
    return some + [chance.randrange(8 * path.stat().st_size) for _ in range(n - len(some))]


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("last", [add_pages, delete_pages, touch_pages])
def test_a_bit_flipped_in_the_index_makes_nothing_up_and_is_noticed(
    folder: Path, last: Callable[[Index], object], closed: bool
) -> None:
    index = Recorded(folder / "saved", last)
    if closed:
        seal_closed(index.path)
    (index.path / "lock.mdb").unlink()
    count: Counter[str] = Counter()
    for bit in bits_to_flip(index.path / "data.mdb", -(-FLIPS // 12), random.Random(f"{last.__name__} {closed}")):
        path, damage = folder / "work", Damage()
        shutil.copytree(index.path, path)
        flip(path / "data.mdb", bit)
        prepare(path, damage)
        opened = Index(path, FINGERPRINT)
        found = dict(opened.entries())
        opened.close()
        shutil.rmtree(path)
        assert index.ever_held(found), f"bit {bit}: an entry that never was"
        if damage.files:
            count["rebuilt" if not found else "entries dropped"] += 1
        elif found == index.now:
            count["harmless"] += 1
        else:
            assert not closed, f"bit {bit}: entries are missing or older, and nobody says so"
            assert found == index.before_last, f"bit {bit}: more is missed than the last transaction"
            count["as before the last transaction"] += 1
    print(f"index {'closed' if closed else 'killed'} after {last.__name__}: {dict(count)}")
    assert count["harmless"]
    assert count["rebuilt"] + count["entries dropped"]


@pytest.mark.usefixtures("quick_check")
def test_pages_are_served_right_whatever_bit_of_the_index_is_flipped(folder: Path) -> None:
    saved, directory = folder / "saved", folder / "work"
    store = open_store(saved)
    save(store, range(PAGES))
    store.close()
    size = (saved / "index" / "data.mdb").stat().st_size
    count: Counter[str] = Counter()
    for bit in bits_to_flip(saved / "index" / "data.mdb", max(30, FLIPS // 20), random.Random(1)):
        assert bit < 8 * size
        shutil.copytree(saved, directory)
        flip(directory / "index" / "data.mdb", bit)
        store = open_store(directory)
        assert states(store) == ["ok"]
        found, stats = served(store, range(PAGES)), counters(store)
        lost = 0 if stats["index_rebuilt"] else stats["pages_damaged"]  # a lost mark counts, and has it rebuilt
        assert len(found) == PAGES - lost, f"bit {bit}: pages are missed, and nobody says so"
        count["rebuilt" if stats["index_rebuilt"] else "entries dropped" if len(found) < PAGES else "harmless"] += 1
        store.close()
        shutil.rmtree(directory)
    print(f"stores: {dict(count)}")


@pytest.mark.usefixtures("quick_check")
def test_a_bit_flipped_in_the_seal_of_an_index_costs_no_page(folder: Path) -> None:
    store = open_store(folder)
    save(store, range(PAGES))
    store.close()
    seal = folder / "index" / "closed.xxh3"
    for bit in range(0, 8 * seal.stat().st_size, 7):
        flip(seal, bit)
        store = open_store(folder)
        assert served(store, range(PAGES)) == list(range(PAGES))
        store.close()
