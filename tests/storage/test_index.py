from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
import xxhash

from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.index import Index, Size
from sglang_hcache.storage.index_check import Entry, decode, encode
from sglang_hcache.storage.index_file import prepare
from tests.storage.pages import FINGERPRINT, LAYOUT, counters, key_of, open_store, save, segment_files, served

SIZE = Size(LAYOUT.record_bytes, LAYOUT.page_tokens)
OTHER = b"g" * 16


def entry_of(page: int) -> Entry:
    return Entry(f"{page:016x}", page, hashlib.sha256(b"%d" % page).digest()[:8], page, 1_700_000_000 + page)


def test_an_entry_comes_back_and_every_flipped_bit_is_found() -> None:
    name = FINGERPRINT + key_of(1)
    value = encode(name, entry_of(1))
    assert decode(name, value) == entry_of(1)
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode(name, bytes(damaged)) is None
    assert decode(FINGERPRINT + key_of(2), value) is None
    assert decode(name, value[:-1]) is None


def test_touching_adds_hits_to_what_is_there_and_to_nothing_else(tmp_path: Path) -> None:
    index = Index(tmp_path, FINGERPRINT)
    index.put_many([(key_of(page), entry_of(page)) for page in range(3)])
    index.touch({key_of(1): 5, key_of(2): (1 << 32) - 2, key_of(9): 1}, now=1_800_000_000)
    assert index.get_many([key_of(page) for page in (0, 1, 2, 9)]) == {
        key_of(0): entry_of(0),
        key_of(1): entry_of(1)._replace(hits=6, last_use=1_800_000_000),
        key_of(2): entry_of(2)._replace(hits=(1 << 32) - 1, last_use=1_800_000_000),
    }
    assert index.delete_many([(key_of(1), entry_of(1))]) == 1, "a page is where it was, whoever used it since"
    assert index.delete_many([(key_of(0), Entry("0" * 16, 7))]) == 0
    index.close()


def test_what_is_named_is_read_again_only_after_a_change(tmp_path: Path) -> None:
    index = Index(tmp_path, FINGERPRINT)
    assert index.used(FINGERPRINT).slots == {}
    index.mark(SIZE)
    index.put_many((key_of(page), Entry(f"{page // 4:016x}", page)) for page in range(10))
    used = index.used(FINGERPRINT)
    assert {name: used.of(name) for name in used.slots} == {
        f"{0:016x}": {0, 1, 2, 3},
        f"{1:016x}": {4, 5, 6, 7},
        f"{2:016x}": {8, 9},
    }
    assert (used.pages, used.count(f"{2:016x}"), used.count("none"), used.of("none")) == (10, 2, 0, set())
    assert index.used(FINGERPRINT, used) is used
    assert index.used(OTHER).pages == 0
    other = Index(tmp_path, OTHER)
    other.put_many([(key_of(1), entry_of(1))])
    again = other.used(FINGERPRINT, used)
    assert again is not used
    assert again.slots == used.slots
    other.close()
    index.close()


def test_readers_that_were_killed_do_not_make_the_index_grow(tmp_path: Path) -> None:
    index = Index(tmp_path, FINGERPRINT)
    keys = [key_of(page) for page in range(500)]
    index.put_many((key, entry_of(page)) for page, key in enumerate(keys))
    program = (
        "import lmdb, os, signal, sys\n"
        "begun = lmdb.open(sys.argv[1], readonly=True, max_readers=512).begin()\n"
        "begun.stat(), os.kill(os.getpid(), signal.SIGKILL)"
    )
    size = (tmp_path / "data.mdb").stat().st_size
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode < 0
    for round_ in range(200):
        index.touch(dict.fromkeys(keys[round_ : round_ + 50], 1), now=round_)
    assert (tmp_path / "data.mdb").stat().st_size < 3 * size
    index.close()


def test_marks_tell_the_size_of_each_fingerprint(tmp_path: Path) -> None:
    index, other = Index(tmp_path, FINGERPRINT), None
    assert not index.is_marked(SIZE)
    index.put_many([(key_of(page), entry_of(page)) for page in range(50)])
    assert index.marks() == {}
    index.mark(SIZE)
    assert index.is_marked(SIZE)
    assert not index.is_marked(SIZE._replace(page_tokens=6))
    index.close()
    other = Index(tmp_path, OTHER)
    other.mark(Size(1, 2))
    assert other.marks() == {FINGERPRINT: SIZE, OTHER: Size(1, 2)}
    names, values = other.raw()
    assert [name.tobytes() for name in names] == sorted(FINGERPRINT + key_of(page) for page in range(50))
    assert all(decode(name.tobytes(), value.tobytes()) for name, value in zip(names, values, strict=True))
    other.close()


def test_an_index_of_the_first_version_is_rebuilt_without_a_word_of_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(5))
    store.close()
    for file in (tmp_path / "index").iterdir():
        file.unlink()
    with lmdb.open(str(tmp_path / "index")) as env, env.begin(write=True) as txn:
        for name, segment in ((FINGERPRINT + key_of(3), b"0123456789abcdef"), (FINGERPRINT, b"all pages listed")):
            checksum = xxhash.xxh3_64_intdigest(name + segment + bytes(4))
            txn.put(name, struct.pack("<16sIQ", segment, 0, checksum))
    damage = Damage()
    prepare(tmp_path / "index", damage)
    assert (damage.pages, damage.files) == (0, 0)
    store = open_store(tmp_path)
    assert served(store, range(5)) == list(range(5))
    assert counters(store)["index_rebuilt"] == 1
    assert counters(store)["pages_damaged"] == 0
    store.close()


@pytest.mark.parametrize("mtime", [-86400, 1 << 33])
def test_a_rebuilt_index_takes_files_of_any_time(tmp_path: Path, mtime: int) -> None:
    store = open_store(tmp_path)
    save(store, range(5))
    store.close()
    for file in segment_files(tmp_path):
        os.utime(file, (mtime, mtime))
    (tmp_path / "index" / "data.mdb").unlink()
    store = open_store(tmp_path)
    assert served(store, range(5)) == list(range(5))
    store.close()
