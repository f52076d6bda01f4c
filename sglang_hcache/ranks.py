"""What the tensor-parallel ranks of a server settle among themselves, at start only: each call is a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sglang.srt.runtime_context import get_parallel

T = TypeVar("T")


def of_first_rank(value: T) -> T:
    """The first rank's value."""
    return _of_all(value)[0]


def of_nodes_first_rank(make: Callable[[], T], ranks_of_a_node: int) -> T | None:
    """What `make` returns on the first rank of this rank's node; it is called on no other."""
    rank: int = get_parallel().tp_rank
    first = rank - rank % ranks_of_a_node
    return _of_all(make() if rank == first else None)[first]


def all_ranks(condition: bool) -> bool:
    """Whether it holds on every rank: what follows may run the model, which takes all of them."""
    return all(_of_all(condition))


def _of_all(value: T) -> list[T]:
    parallel = get_parallel()
    if parallel.tp_size == 1:
        return [value]
    values: list[T] = parallel.tp_group.all_gather_object(value)
    return values
