"""Running kernels and matrix products over blocks of rows on several cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

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
    not depend on the number of threads. Inside ``work``, numpy's matrix products keep to the
    thread they are asked on, and so do further calls of this function. threads=1: as it stands, for
    work so small that preparing anything would take longer.
    """
    if threads == 1 or getattr(_here, "inside", False):
        return [work(block) for block in blocks]
    count = min(threads or n_threads(), len(blocks))
    with one_blas_thread():
        if count <= 1:
            return [work(block) for block in blocks]
        return _shared(work, blocks, count)


def _shared(work: Callable[[Block], Result], blocks: Sequence[Block], count: int) -> list[Result]:
    """``in_threads`` on this thread and count - 1 others. Each takes the next block when it is done
    with one: no thread waits for another, nor does this one hand out what takes a millisecond."""
    found: dict[int, Result] = {}
    failed: dict[int, BaseException] = {}
    numbers = iter(range(len(blocks)))

    def take() -> None:
        while not failed:
            i = next(numbers, None)
            if i is None:
                return
            try:
                found[i] = work(blocks[i])
            except BaseException as error:
                failed[i] = error

    with ThreadPoolExecutor(count - 1, initializer=_enter) as pool:
        for _ in range(count - 1):
            pool.submit(take)
        _here.inside = True
        try:
            take()
        finally:
            _here.inside = False
            for _ in numbers:  # after an interrupt: nobody is to go on
                pass
    if failed:  # blocks before the first of them were all begun
        raise failed[min(failed)]
    return [found[i] for i in range(len(blocks))]


BLAS_WORTH = 1024
FEW_ROWS = 64  # are decoded faster than threads are made ready


def threads_for(n_rows: int) -> int | None:
    """What ``in_threads`` is to be told for the decoding of so many rows."""
    return 1 if n_rows <= FEW_ROWS else None


_here = threading.local()


def _enter() -> None:
    _here.inside = True
    _blas().limit(limits=1)  # where BLAS is built on OpenMP, each thread has a limit of its own


# The number of BLAS threads belongs to the process, so those who limit it are counted.
_lock = threading.Lock()
_limits: list[Any] = []  # one for each thread inside; the first holds what is to be put back


@contextmanager
def one_blas_thread(d: int = 0) -> Iterator[None]:
    """Within, linear algebra of numpy runs on the thread that asks for it.

    OpenBLAS's threads spin while they wait for each other: where other work keeps the cores busy, a
    fit takes ten times as long with two of them as with one. Threads of ours over blocks of
    rows do not wait. The last caller to leave puts the setting back. d: matrices of so many
    dimensions are worked on; of more than BLAS_WORTH, its threads are worth having.
    """
    if d > BLAS_WORTH:
        yield
        return
    with _lock:
        _limits.append(None if _limits else _blas().limit(limits=1))
    try:
        yield
    finally:
        with _lock:
            if len(_limits) == 1:
                _put_back(_limits[0])
            _limits.pop()


def _put_back(limit: Any) -> None:
    """End a limit, which threadpoolctl would have only the thread do that set it."""
    libraries = [v for v in _blas().lib_controllers if hasattr(v, "clear_controlling_thread")]
    for library in libraries:
        library.clear_controlling_thread(force=True)
    limit.restore_original_limits()
    for library in libraries:
        library.clear_controlling_thread(force=True)


@cache
def _blas() -> Any:
    """Control over numpy's BLAS; finding it takes milliseconds."""
    import numpy  # noqa: F401  so that it is there to be found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
