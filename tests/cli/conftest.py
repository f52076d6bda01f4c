"""Prefetchers for `hcache status`, and a directory of the tests' own for sockets."""

from tests.prefetch.conftest import directory, join, runtime
from tests.storage.conftest import patience

__all__ = ["directory", "join", "patience", "runtime"]
