"""Hypothesis strategies and checks shared by the tests: vectors, symbols, chunks, quantizers."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

MAX_N, MAX_D = 64, 40
EDGES = (
    "none",
    "zero rows",
    "duplicates",
    "constant columns",
    "one value",
    "mean far off",
    "mixed",
)


@st.composite
def vectors(
    draw: st.DrawFn,
    *,
    min_n: int = 0,
    max_n: int = MAX_N,
    min_d: int = 1,
    max_d: int = MAX_D,
    dtypes: tuple[str, ...] = ("float16", "float32", "float64"),
    log10_scale: tuple[float, float] = (-30.0, 30.0),
) -> np.ndarray:
    """Finite (n, d) arrays of every magnitude, with the odd cases of real tables: zero rows,
    duplicates, constant columns, rows of very different norm, and layouts that are not contiguous.
    """
    n, d = draw(st.integers(min_n, max_n)), draw(st.integers(min_d, max_d))
    dtype = draw(st.sampled_from(dtypes))
    edge = draw(st.sampled_from(EDGES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((n, d))
    if edge == "zero rows":
        x[rng.random(n) < 0.5] = 0.0
    elif edge == "duplicates" and n:
        x = x[rng.integers(0, max(1, n // 4), n)]
    elif edge == "constant columns":
        x[:, rng.random(d) < 0.5] = rng.standard_normal()
    elif edge == "one value":
        x[:] = rng.standard_normal()
    elif edge == "mean far off":
        x += 1000.0
    elif edge == "mixed":
        x *= 10.0 ** rng.uniform(-3, 3, (n, 1))
    half = dtype == "float16"
    log10 = draw(st.floats(-3.0, 1.0) if half else st.floats(*log10_scale))
    limit = 6e4 if half else 1e36
    x = np.clip(x * 10.0**log10, -limit, limit).astype(dtype)
    layout = draw(st.sampled_from(("C", "F", "strided", "reversed")))
    if layout == "F":
        return np.asfortranarray(x)
    if layout == "strided":
        return np.repeat(x, 2, axis=1)[:, ::2]
    return x[::-1] if layout == "reversed" else x


@st.composite
def frequencies(draw: st.DrawFn, *, max_size: int = 64) -> np.ndarray:
    """Positive integer weights (alphabet size,) int64 of 1.. symbols, from flat to very skewed."""
    size = draw(st.integers(1, max_size))
    skew = draw(st.floats(0.0, 3.0))
    weights = 1000.0 / np.arange(1, size + 1) ** skew
    order = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).permutation(size)
    return np.maximum(weights[order], 1).astype(np.int64)


@st.composite
def symbols(
    draw: st.DrawFn, *, max_length: int = 300, max_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Symbols (length,) int64 and the weights (alphabet size,) they were drawn with."""
    weights = draw(frequencies(max_size=max_size))
    length = draw(st.integers(0, max_length))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.choice(weights.size, length, p=weights / weights.sum()), weights


@st.composite
def codes(
    draw: st.DrawFn, *, max_n: int = MAX_N, max_fields: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """A code matrix (n, n_fields) of unsigned integers and its alphabet_sizes (n_fields,) int64."""
    sizes = np.array(
        draw(
            st.lists(
                st.sampled_from([1, 2, 3, 16, 200, 256, 1024]), min_size=1, max_size=max_fields
            )
        ),
        np.int64,
    )
    n = draw(st.integers(0, max_n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    matrix = np.floor(rng.random((n, sizes.size)) ** 2 * sizes)
    return matrix.astype(np.uint8 if sizes.max() <= 256 else np.uint16), sizes


def chunks(
    *, max_chunks: int = 5, max_parts: int = 4
) -> st.SearchStrategy[list[tuple[str, list[bytes]]]]:
    """Named chunks, each of some parts of bytes; names are distinct."""
    parts = st.lists(st.binary(max_size=64), max_size=max_parts)
    names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
    return st.lists(st.tuples(names, parts), max_size=max_chunks, unique_by=lambda chunk: chunk[0])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bytes: -0.0 differs from 0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check_quantizer(q: Any, x: np.ndarray) -> np.ndarray:
    """What every fitted quantizer of rows owes any rows x of its width; returns the codes.

    Codes fit their alphabets and do not depend on the layout of x or on the rows beside them; x is
    left alone; decoding is finite, float32, and the same after config and arrays have travelled.
    """
    before = x.copy()
    codes = q.encode(x)
    assert same_bits(x, before)
    assert codes.dtype in (np.uint8, np.uint16)
    assert codes.shape == (x.shape[0], q.n_fields)
    assert len(q.alphabet_sizes) == q.n_fields
    assert q.alphabet_sizes.dtype == np.int64
    assert (codes < q.alphabet_sizes).all()
    assert same_bits(q.encode(np.ascontiguousarray(x)), codes)
    decoded = q.decode(codes)
    assert decoded.dtype == np.float32
    assert decoded.shape == x.shape
    assert np.isfinite(decoded).all()
    half = x.shape[0] // 2
    assert same_bits(q.decode(codes[half:]), decoded[half:])
    assert same_bits(q.decode(codes.astype(np.int64)), decoded)
    twin = type(q).from_config(q.get_config()).load_arrays(q.arrays())
    assert repr(twin) == repr(q)
    assert same_bits(twin.decode(codes), decoded)
    assert same_bits(twin.encode(x), codes)
    return codes
