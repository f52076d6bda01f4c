"""Which rank this is, and what the ranks of a server settle among themselves.

A server may run several replicas (`--dp-size`), each of as many ranks as `--tp-size` says. All ranks of a replica
have the same requests; with data-parallel attention, those that share the heads of an attention have (`attn_tp_rank`
of `attn_tp_size`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from sglang.srt.runtime_context import get_parallel
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from sglang_hcache.storage.files import lock_within, make_private

TURN_S = 60.0  # the longest that others are waited for; each takes some seconds
SAID_S = 5.0  # then a line in the log says so

logger = logging.getLogger(__name__)

T = TypeVar("T")


def ranks_of_a_node() -> int:
    """How many ranks of one replica are on a node; a server with several replicas runs on one node only."""
    parallel = get_parallel()
    return max(1, int(parallel.tp_size) // int(parallel.nnodes))


def shares_requests() -> bool:
    """Whether other ranks have the same requests. Ranks that have not may take their steps at different times."""
    return bool(get_parallel().attn_tp_size > 1)


def first_of_its_requests() -> bool:
    """Whether it is the first rank on its node that has its requests."""
    parallel = get_parallel()
    return bool(parallel.attn_tp_rank == 0 or parallel.tp_rank % ranks_of_a_node() == 0)


def replica() -> int:
    parallel = get_parallel()
    return int(parallel.dp_rank) if parallel.dp_size > 1 else 0


def rank_name() -> str:
    """For people."""
    parallel = get_parallel()
    return (f"replica {replica()} " if parallel.dp_size > 1 else "") + f"rank {parallel.tp_rank}"


@contextlib.contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Replicas and servers that name the same folder run the body one after the other, not at the same time.

    A collective. Where files cannot be locked, or the holder of the lock hangs, the body runs without it.
    """
    with contextlib.ExitStack() as stack:
        if get_parallel().tp_rank == 0:
            try:
                make_private(folder)
                lock = stack.enter_context((folder / "lock").open("w"))
                _wait_for(lock.fileno(), folder)
            except OSError as error:
                logger.info("hcache: %s cannot be locked (%s)", folder, error)
        all_ranks(True)
        yield


def _wait_for(lock: int, folder: Path) -> None:
    """Raises OSError; TimeoutError where others keep it too long."""
    try:
        lock_within(lock, exclusive=True, timeout_s=SAID_S)
    except TimeoutError:
        logger.info("hcache: waiting for another server, which measures its rates and keeps them in %s", folder)
        lock_within(lock, exclusive=True, timeout_s=TURN_S - SAID_S)


# ---- collectives of a replica's ranks, at start, and where an adapter is loaded ----


def of_first_rank(value: T) -> T:
    """The first rank's value."""
    return _of_all(value)[0]


def of_nodes_first_rank(make: Callable[[], T]) -> T | None:
    """What `make` returns on the first rank of this rank's node; it is called on no other."""
    rank: int = get_parallel().tp_rank
    first = rank - rank % ranks_of_a_node()
    return _of_all(make() if rank == first else None)[first]


def if_all_alike(value: T) -> T | None:
    """The value, if it is the same on all ranks."""
    return value if len(set(_of_all(value))) == 1 else None


def all_ranks(condition: bool) -> bool:
    """Whether it holds on every rank: what follows may run the model, which takes all of them."""
    return all(_of_all(condition))


def _of_all(value: T) -> list[T]:
    parallel = get_parallel()
    if parallel.tp_size == 1:
        return [value]
    values: list[T] = parallel.tp_group.all_gather_object(value)
    return values


# ---- a collective of the ranks with the same requests, in steps in which some may be admitted ----


def true_on_all(conditions: Sequence[bool], group: ProcessGroup) -> list[bool]:
    """Which of the conditions hold on every rank of the group; all name as many."""
    flags = torch.tensor(conditions, dtype=torch.int)
    all_reduce(flags, op=ReduceOp.MIN, group=group)
    return flags.to(torch.bool).tolist()
