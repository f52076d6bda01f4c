"""CURVE keys: they authenticate a prefetcher and its clients on other hosts to each other.

The folder that `hcache keygen DIR` makes, and that a prefetcher is given:

    server.key_secret      the server's pair, and its public half
    server.key
    clients/NAME.key       public keys of those who are let in; read anew whenever somebody connects
    NAME/                  what goes to the host of client NAME, and is all that a client is given:
      client.key_secret      its pair
      server.key             whom to expect
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import zmq
import zmq.auth

from sglang_hcache.storage.files import make_private

SERVER, CLIENT, CLIENTS = "server", "client", "clients"
_NO_NAMES = (CLIENTS, f"{SERVER}.key", f"{SERVER}.key_secret", "", ".", "..")  # of clients' folders

logger = logging.getLogger(__name__)

Pair = tuple[bytes, bytes]  # public and secret key, Z85


class KeyFileError(OSError):
    """A key cannot be made, read or trusted; the message is one line and says what to do."""


def make_keys(directory: Path, clients: Sequence[str] = (CLIENT,)) -> list[Path]:
    """Make the server's keys if there are none, and keys of new clients; returns the folders to copy to their hosts.

    Raises KeyFileError, before anything is made, if a client's name is invalid, taken or given twice, or if other
    users can enter a folder that exists already.
    """
    for name in clients:
        if name in _NO_NAMES or "/" in name:
            raise KeyFileError(f"{name!r} cannot be the name of a client")
        if clients.count(name) > 1:
            raise KeyFileError(f"{name!r} is given twice: name each client once")
        if (directory / name).exists() or (directory / CLIENTS / f"{name}.key").exists():
            raise KeyFileError(f"{directory} has keys of {name!r} already: name another client, or remove them")
    for folder in filter(Path.exists, (directory, directory / CLIENTS)):
        _check_private(folder)
    make_private(directory / CLIENTS)
    if not (directory / f"{SERVER}.key_secret").exists():
        _make_pair(directory, SERVER)
    for name in clients:
        folder = directory / name
        folder.mkdir(mode=0o700)
        public = _make_pair(folder, CLIENT)
        public.rename(directory / CLIENTS / f"{name}.key")
        shutil.copy(directory / f"{SERVER}.key", folder)
    return [directory / name for name in clients]


def server_keys(directory: Path) -> Pair:
    """Raises KeyFileError."""
    return _load_pair(directory, SERVER)


def client_keys(directory: Path) -> tuple[Pair, bytes]:
    """A client's pair and the server's public key. Raises KeyFileError."""
    return _load_pair(directory, CLIENT), _load_public(directory / f"{SERVER}.key")


def is_authorized(directory: Path, public: bytes) -> bool:
    """Whether the key (Z85) is one of `clients/`."""
    for path in sorted((directory / CLIENTS).glob("*.key")):
        try:
            if _load_public(path) == public:
                return True
        except KeyFileError as error:
            logger.error("hcache: one client less is let in: %s", error)
    return False


def _make_pair(directory: Path, name: str) -> Path:
    public, secret = zmq.auth.create_certificates(directory, name)
    Path(secret).chmod(0o600)
    Path(public).chmod(0o600)
    return Path(public)


def _load_pair(directory: Path, name: str) -> Pair:
    path = directory / f"{name}.key_secret"
    public, secret = _load(path)
    _check_private(directory)
    _check_private(path)
    if secret is None:
        raise KeyFileError(f"{path} holds no secret key: make another with `hcache keygen`")
    return public, secret


def _load_public(path: Path) -> bytes:
    return _load(path)[0]


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        path.stat()  # else pyzmq calls a missing file invalid
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "it holds no key"
        raise KeyFileError(f"{path} cannot be read ({what}): `hcache keygen` makes keys") from None


def _check_private(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise KeyFileError(f"{path} belongs to another user: make keys of your own with `hcache keygen`")
    if status.st_mode & 0o077:
        mode = "700" if path.is_dir() else "600"
        raise KeyFileError(f"{path} is open to other users: chmod {mode} {path}")
