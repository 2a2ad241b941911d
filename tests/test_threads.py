"""Blocks over threads: in order, one level deep, and numpy's BLAS kept to one thread meanwhile."""

from __future__ import annotations

import threading
import time

import pytest

from polarpack import _threads
from polarpack._threads import BLAS_WORTH, in_threads, one_blas_thread


def blas_threads() -> list[int]:
    """Threads of numpy's BLAS (and of others that were there when it was looked for). Not of one
    built on OpenMP, as faiss brings, whose limit is each thread's own."""
    found = _threads._blas().info()
    return [v["num_threads"] for v in found if v.get("threading_layer") != "openmp"]


@pytest.fixture
def two_blas_threads():
    """At the start two threads; what was there before is put back."""
    with _threads._blas().limit(limits=2):
        if set(blas_threads()) != {2}:
            pytest.skip("this BLAS does not say how many threads it has")
        yield


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_keep_the_order_of_the_blocks(threads):
    assert in_threads(lambda b: b * b, range(20), threads) == [b * b for b in range(20)]
    assert in_threads(lambda b: b, [], threads) == []


def test_nested_calls_stay_on_their_thread():
    def inner(_: int) -> int:
        return threading.get_ident()

    def outer(_: int) -> bool:
        return set(in_threads(inner, range(4), 4)) == {threading.get_ident()}

    assert all(in_threads(outer, range(8), 2))


def test_an_error_comes_back_and_the_blas_with_it(two_blas_threads):
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda b: 1 // b, [1, 0], 2)
    assert set(blas_threads()) == {2}


def test_the_error_of_the_first_block_that_fails_is_raised():
    def work(b: int) -> int:
        if b >= 5:
            time.sleep(0.001 * (8 - b))  # later ones fail sooner
            raise ValueError(str(b))
        return b

    for _ in range(10):
        with pytest.raises(ValueError, match="^5$"):
            in_threads(work, range(8), 3)
    assert in_threads(lambda b: b, range(8), 3) == [*range(8)]
    assert not getattr(_threads._here, "inside", False)


def test_blas_is_limited_inside_alone(two_blas_threads):
    assert all(in_threads(lambda _: set(blas_threads()) == {1}, range(3), 2))
    with one_blas_thread():
        with one_blas_thread():
            assert set(blas_threads()) == {1}
        assert set(blas_threads()) == {1}
    assert set(blas_threads()) == {2}
    with one_blas_thread(BLAS_WORTH + 1):
        assert set(blas_threads()) == {2}


def test_the_last_to_leave_puts_blas_back(two_blas_threads):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_blas_thread():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with one_blas_thread():
        thread.start()
        assert entered.wait(10)
    assert set(blas_threads()) == {1}
    leave.set()
    thread.join()
    assert set(blas_threads()) == {2}
