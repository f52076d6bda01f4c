"""A stand-in for the driver's `cuMemcpyBatchAsync`, on host memory."""

from __future__ import annotations

import ctypes

from sglang_hcache.restoring.copy_engine import BatchFunction


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address)) if count else []


@BatchFunction
def batch(targets, sources, sizes, count, attributes, firsts, attribute_count, failed, stream):
    """As the driver's: refuses what it would, and copies in an order of its own."""
    settings = attributes[0]
    if not stream or attribute_count != 1 or firsts[0] != 0 or (settings.source_order, settings.flags) != (1, 1):
        failed[0] = 2**64 - 1
        return 1
    arrays = (_words(array, count) for array in (targets, sources, sizes))
    for number, (target, source, size) in reversed(list(enumerate(zip(*arrays, strict=True)))):
        if not target or not source or not size:
            failed[0] = number
            return 1
        ctypes.memmove(target, source, size)
    return 0
