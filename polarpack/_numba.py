"""numba's ``njit`` for kernels whose machine code is kept on the disk, where that can be done.

numba keeps it beside the module, else in the user's cache folder, or where NUMBA_CACHE_DIR says: a
second start compiles nothing. Where none of these can be written it would refuse to define a
kernel, and fail in the first call where the disk is full or a file in the cache is damaged. Here a
kernel is then compiled in memory, in each process anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit(**options)``, for which a cache is a help and never a condition."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            kernel = numba.njit(**options)(function)
        except RuntimeError:  # no folder for a cache
            return numba.njit(**options | {"cache": False})(function)
        cache = getattr(kernel, "_cache", None)
        for name in ("load_overload", "save_overload"):
            if hasattr(cache, name):
                setattr(cache, name, _or_nothing(getattr(cache, name)))
        return kernel

    return decorate


def _or_nothing(access: Callable[..., Any]) -> Callable[..., Any]:
    """An access to the cache that finds and keeps nothing where it fails, for whatever reason: what
    is pickled there may be damaged in any way."""

    @wraps(access)
    def quietly(*args: Any) -> Any:
        try:
            return access(*args)
        except Exception:
            return None

    return quietly
