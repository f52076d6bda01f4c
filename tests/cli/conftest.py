"""Prefetchers for `hcache status`, and a directory of the tests' own for sockets."""

from tests.prefetch.conftest import directory, join, runtime

__all__ = ["directory", "join", "runtime"]
