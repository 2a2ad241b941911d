"""Running compiled kernels over blocks of rows on several cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Block = TypeVar("Block")
Result = TypeVar("Result")


def n_threads() -> int:
    """Threads to use: ``POLARPACK_THREADS`` or ``OMP_NUM_THREADS`` if set, else the usable CPUs."""
    for name in ("POLARPACK_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    work: Callable[[Block], Result], blocks: Sequence[Block], threads: int | None = None
) -> list[Result]:
    """``[work(b) for b in blocks]``, in order, the work spread over threads.

    For kernels that release the interpreter lock and write to places of their own; the result does
    not depend on the number of threads.
    """
    count = min(threads or n_threads(), len(blocks))
    if count <= 1:
        return [work(block) for block in blocks]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, blocks))
