"""The file that `hcache export` writes. Little endian:

0    magic          8 bytes, "hcexport"
8    version        uint32, 1
12   header bytes   uint32
16   header         JSON: {"models": [{"fingerprint": hex, "page_tokens", "layer_bytes", "about", "pages"}]}
...  records        as in segment files: of each model in turn so many pages, each after its parent
end  checksum       uint64, xxh3_64 of everything before it
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
import xxhash

from sglang_hcache.storage.layout import ChunkDamaged, ChunkLayout, Record, read_header, verify

MAGIC = b"hcexport"
VERSION = 1
_FIXED = struct.Struct("<8sII")
_MOST_HEADER = 64 << 20
_PART = 4 << 20


Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]


class Model(msgspec.Struct):
    fingerprint: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    page_tokens: Size
    layer_bytes: tuple[Size, ...]
    about: dict[str, str]
    pages: Annotated[int, msgspec.Meta(ge=1)]

    @property
    def layout(self) -> ChunkLayout:
        return ChunkLayout(self.page_tokens, self.layer_bytes)


class Header(msgspec.Struct):
    models: Annotated[list[Model], msgspec.Meta(min_length=1)]


class BundleDamaged(Exception):
    """The file is no export, or not whole."""


def write_bundle(path: Path, models: Sequence[tuple[Model, Iterable[Record]]]) -> list[Model]:
    """Write the file as a whole or not at all, private to the user, and return the models in it.

    A given model's `pages` is an upper limit; the file states how many records there were. Models without records are
    left out, and without any model no file is written. Raises OSError, which may name the temporary file beside it.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if os.path.lexists(path) and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    wanted = [model for model, _ in models]
    header = _header(wanted)
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w+b") as file:
            file.write(header)
            checksum = xxhash.xxh3_64(header)
            counts = [_write(file, records, checksum) for _, records in models]
            written = [msgspec.structs.replace(one, pages=n) for one, n in zip(wanted, counts, strict=True) if n]
            if written != wanted:  # another header, so another sum
                file.seek(0)
                file.write(_header(written, len(header)))
                file.seek(0)
                checksum = xxhash.xxh3_64()
                while part := file.read(_PART):
                    checksum.update(part)
            file.write(struct.pack("<Q", checksum.intdigest()))
            file.flush()
            os.fsync(file.fileno())
        if written:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _header(models: list[Model], size: int = 0) -> bytes:
    """Of so many bytes at least: spaces behind JSON mean nothing."""
    header = msgspec.json.encode(Header(models)).ljust(size - _FIXED.size)
    return _FIXED.pack(MAGIC, VERSION, len(header)) + header


def _write(file: BinaryIO, records: Iterable[Record], checksum: xxhash.xxh3_64) -> int:
    """How many there were."""
    count = 0
    for record in records:
        checksum.update(record.data)
        file.write(record.data)
        count += 1
    return count


def read_header_of(path: Path) -> tuple[Header, int]:
    """What a file holds, once its checksum is found right; and where the records start. Raises BundleDamaged."""
    _check_sum(path)
    with path.open("rb") as file:
        fixed = file.read(_FIXED.size)
        if len(fixed) < _FIXED.size or fixed[:8] != MAGIC:
            raise BundleDamaged("it is not an export")
        _, version, length = _FIXED.unpack(fixed)
        if version != VERSION:
            raise BundleDamaged(f"its version is {version}, not {VERSION}")
        if length > _MOST_HEADER:
            raise BundleDamaged("its header is too long")
        try:
            header = msgspec.json.decode(file.read(length), type=Header)
            records = sum(model.pages * model.layout.record_bytes for model in header.models)
        except ValueError as error:
            raise BundleDamaged(f"its header cannot be read ({error})") from error
    start = _FIXED.size + length
    if len({model.fingerprint for model in header.models}) < len(header.models):
        raise BundleDamaged("it names a model twice")
    if path.stat().st_size != start + records + 8:
        raise BundleDamaged("its length is wrong")
    return header, start


def read_records(path: Path, start: int, models: list[Model]) -> Iterator[tuple[Model, bytes, Record]]:
    """Each page: its model, key and a record of its own, verified. Raises BundleDamaged."""
    with path.open("rb") as file:
        file.seek(start)
        for model in models:
            layout, fingerprint = model.layout, bytes.fromhex(model.fingerprint)
            for _ in range(model.pages):
                record = np.frombuffer(bytearray(file.read(layout.record_bytes)), np.uint8)
                try:
                    key = read_header(record, layout).key
                    verify(record, layout, fingerprint, key)
                except ChunkDamaged as damaged:
                    raise BundleDamaged(damaged.reason) from damaged
                yield model, key, record


def _check_sum(path: Path) -> None:
    left, checksum = path.stat().st_size - 8, xxhash.xxh3_64()
    with path.open("rb") as file:
        if file.read(8) != MAGIC:
            raise BundleDamaged("it is not an export")
        file.seek(0)
        while left > 0 and (part := file.read(min(left, _PART))):
            checksum.update(part)
            left -= len(part)
        if file.read() != struct.pack("<Q", checksum.intdigest()):
            raise BundleDamaged("its checksum is wrong")
