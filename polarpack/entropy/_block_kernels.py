"""Whole blocks of symbols through the range coder: static tables, and counts that adapt.

All kernels take the symbols of a block, (n, n_fields), and go through it field by field, so that
one field's table stays in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .range_coder import (
    LEAST_RANGE,
    Integer,
    State,
    Words,
    carry,
    finish,
    kernel,
    pull,
    push,
    put,
    start_reading,
    start_writing,
)

_U0 = np.uint64(0)
_U1 = np.uint64(1)
_U4 = np.uint64(4)
_U5 = np.uint64(5)
_U15 = np.uint64(15)
_U32 = np.uint64(32)
_U48 = np.uint64(48)
_LOW_WORD = np.uint64(0xFFFFFFFF)

# Static tables. A coder is one long chain of dependent operations; LANES of them, each with its own
# stretch of the rows and its own bytes, overlap in the processor and are 1.4 (writing) to 2.6
# (reading) times as fast as one.

LANES = 4


@kernel
def _write(
    words: Words,  # of one lane
    pos: Integer,
    low: np.uint64,
    range_: np.uint64,
    share: np.uint64,
    precision: np.uint64,
) -> State:
    """``put`` without its branch on range: with lanes, a branch not taken as guessed costs more
    than the work it saves."""
    scale = range_ >> precision
    moved = low + scale * (share & _LOW_WORD)
    if moved < low:
        carry(words, pos)
    range_ = scale * (share >> _U32)
    words[np.uint64(pos)] = np.uint32(moved >> _U32)
    leaves = np.uint64(range_ < LEAST_RANGE)
    shift = leaves << _U5
    return pos + np.int64(leaves), moved << shift, range_ << shift


@kernel
def _read(
    words: Words,  # of one lane, the last one zero
    pos: Integer,
    code: np.uint64,
    range_: np.uint64,
    cdf: npt.NDArray[np.uint32],
    cdf_start: int,
    first: npt.NDArray[np.uint16],
    first_start: int,
    precision: np.uint64,
    bucket: np.uint64,
) -> tuple[np.uint64, Integer, np.uint64, np.uint64]:
    """The next symbol and the state behind it. ``first`` holds the lowest symbol that each bucket
    of 2**bucket looked-up values may mean; the right one is at most a few further on."""
    scale = range_ >> precision
    value = min(code // scale, (_U1 << precision) - _U1)
    symbol = np.uint64(first[np.uint64(first_start) + (value >> bucket)])
    at = np.uint64(cdf_start) + symbol
    while np.uint64(cdf[at + _U1]) <= value:
        at += _U1
    start = np.uint64(cdf[at])
    code -= scale * start
    range_ = scale * (np.uint64(cdf[at + _U1]) - start)
    word = np.uint64(words[np.uint64(min(pos, words.size - 1))])
    leaves = np.uint64(range_ < LEAST_RANGE)
    shift = leaves << _U5
    code = code << shift | word & (_U0 - leaves)
    return at - np.uint64(cdf_start), pos + np.int64(leaves), code, range_ << shift


@kernel
def encode_static(
    symbols: npt.NDArray[Any],  # (n, n_fields) uint8 or uint16, each below its alphabet size
    shares: npt.NDArray[np.uint64],  # all tables: start + 2**32 * size of each symbol
    table_start: npt.NDArray[np.int64],  # (n_fields,) where each field's table starts
    precision: npt.NDArray[np.int64],  # (n_fields,)
    words: Words,  # (capacity(symbols.size),)
) -> int:
    """One message of all symbols, field after field; returns its length in bytes. O(n n_fields)."""
    n, n_fields = symbols.shape
    pos, low, range_ = start_writing()
    for field in range(n_fields):
        base = np.uint64(table_start[field])
        bits = precision[field]
        for row in range(n):
            share = shares[base + np.uint64(symbols[row, field])]
            start, size = share & _LOW_WORD, share >> _U32
            pos, low, range_ = put(words, pos, low, range_, start, size, bits)
    return finish(words, pos, low, range_)


@kernel
def decode_static(
    words: Words,  # from words_from_bytes
    cdf: npt.NDArray[np.uint32],  # all tables, one behind the other
    cdf_start: npt.NDArray[np.int64],  # (n_fields,) where each field's table starts
    first: npt.NDArray[np.uint16],  # all bucket tables, one behind the other
    first_start: npt.NDArray[np.int64],  # (n_fields,)
    precision: npt.NDArray[np.int64],
    bucket: npt.NDArray[np.int64],  # (n_fields,) log2 of the values in a bucket
    symbols: npt.NDArray[Any],  # (n, n_fields) result
) -> None:
    """Inverse of ``encode_static``."""
    n, n_fields = symbols.shape
    pos, code, range_ = start_reading(words)
    for field in range(n_fields):
        base, begin = cdf_start[field], first_start[field]
        bits, shift = np.uint64(precision[field]), np.uint64(bucket[field])
        for row in range(n):
            symbols[row, field], pos, code, range_ = _read(
                words, pos, code, range_, cdf, base, first, begin, bits, shift
            )


@kernel
def encode_lanes(
    symbols: npt.NDArray[Any],  # as in encode_static
    shares: npt.NDArray[np.uint64],
    table_start: npt.NDArray[np.int64],
    precision: npt.NDArray[np.int64],
    words: Words,  # (LANES, capacity(symbols.size // LANES + LANES * n_fields))
    n_bytes: npt.NDArray[np.int64],  # (LANES,) result
) -> None:
    """LANES messages: lane l has rows [l q, (l + 1) q), q = n // LANES; lane 0 also the rest."""
    n, n_fields = symbols.shape
    q = n // LANES
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    p0, l0, r0 = start_writing()
    p1, l1, r1 = start_writing()
    p2, l2, r2 = start_writing()
    p3, l3, r3 = start_writing()
    for field in range(n_fields):
        base = np.uint64(table_start[field])
        bits = np.uint64(precision[field])
        for row in range(q):
            share = shares[base + np.uint64(symbols[row, field])]
            p0, l0, r0 = _write(w0, p0, l0, r0, share, bits)
            share = shares[base + np.uint64(symbols[row + q, field])]
            p1, l1, r1 = _write(w1, p1, l1, r1, share, bits)
            share = shares[base + np.uint64(symbols[row + 2 * q, field])]
            p2, l2, r2 = _write(w2, p2, l2, r2, share, bits)
            share = shares[base + np.uint64(symbols[row + 3 * q, field])]
            p3, l3, r3 = _write(w3, p3, l3, r3, share, bits)
        for row in range(LANES * q, n):
            share = shares[base + np.uint64(symbols[row, field])]
            p0, l0, r0 = _write(w0, p0, l0, r0, share, bits)
    n_bytes[0] = finish(w0, p0, l0, r0)
    n_bytes[1] = finish(w1, p1, l1, r1)
    n_bytes[2] = finish(w2, p2, l2, r2)
    n_bytes[3] = finish(w3, p3, l3, r3)


@kernel
def decode_lanes(
    words: Words,  # (LANES, n_words)
    cdf: npt.NDArray[np.uint32],  # as in decode_static
    cdf_start: npt.NDArray[np.int64],
    first: npt.NDArray[np.uint16],
    first_start: npt.NDArray[np.int64],
    precision: npt.NDArray[np.int64],
    bucket: npt.NDArray[np.int64],
    symbols: npt.NDArray[Any],  # (n, n_fields) result
) -> None:
    """Inverse of ``encode_lanes``."""
    n, n_fields = symbols.shape
    q = n // LANES
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    p0, c0, r0 = start_reading(w0)
    p1, c1, r1 = start_reading(w1)
    p2, c2, r2 = start_reading(w2)
    p3, c3, r3 = start_reading(w3)
    for field in range(n_fields):
        base, begin = cdf_start[field], first_start[field]
        bits, shift = np.uint64(precision[field]), np.uint64(bucket[field])
        for row in range(q):
            symbols[row, field], p0, c0, r0 = _read(
                w0, p0, c0, r0, cdf, base, first, begin, bits, shift
            )
            symbols[row + q, field], p1, c1, r1 = _read(
                w1, p1, c1, r1, cdf, base, first, begin, bits, shift
            )
            symbols[row + 2 * q, field], p2, c2, r2 = _read(
                w2, p2, c2, r2, cdf, base, first, begin, bits, shift
            )
            symbols[row + 3 * q, field], p3, c3, r3 = _read(
                w3, p3, c3, r3, cdf, base, first, begin, bits, shift
            )
        for row in range(LANES * q, n):
            symbols[row, field], p0, c0, r0 = _read(
                w0, p0, c0, r0, cdf, base, first, begin, bits, shift
            )


# Adaptive coding. A symbol of b bits is a path through a tree of nodes with 16 branches: first the
# top 1 to 4 bits, then four bits at a time; node = (symbols before it on its level) and so on. Each
# node counts its branches. Cumulative counts sit in 16-bit lanes of NODE_WORDS uint64: lane j is
# the count of branches below j, lane 16 the total. So one subtraction compares four branches, and
# one addition of a row of _STEPS counts a branch.

NODE_WORDS = 5
BRANCHES = 16
INCREMENT = 8  # what one symbol adds to the count of its branch
INITIAL = 4  # count of each possible branch before the first symbol (Krichevsky-Trofimov's 1/2)
SETTLE_EVERY = 1024  # symbols between two checks of the totals
SETTLED = 0x7FFF - INCREMENT * SETTLE_EVERY  # so that no lane ever reaches 2**15

_LANE = np.uint64(0xFFFF)
_EVERY_LANE = np.uint64(0x0001000100010001)
_TOP_BITS = np.uint64(0x8000800080008000)


def _steps() -> npt.NDArray[np.uint64]:
    """Row d: what counting branch d adds to the first four words: INCREMENT in each lane j > d."""
    lanes = np.arange(BRANCHES)
    above = (lanes[:, None] < lanes[None, :]).astype(np.uint64) * np.uint64(INCREMENT)
    shifts = (16 * (lanes % 4)).astype(np.uint64)
    rows = (above << shifts).reshape(BRANCHES, NODE_WORDS - 1, 4).sum(axis=2, dtype=np.uint64)
    return np.asarray(rows.ravel(), np.uint64)


_STEPS = _steps()


@kernel
def _below(nodes: npt.NDArray[np.uint64], at: Integer, branch: Integer) -> np.uint64:
    """Count of the branches below ``branch`` (0..16) in the node whose words start at ``at``."""
    word = nodes[np.uint64(at + (branch >> 2))]
    return np.uint64(word >> (np.uint64(branch & 3) << _U4) & _LANE)


@kernel
def _count(nodes: npt.NDArray[np.uint64], at: Integer, branch: Integer) -> None:
    """Count ``branch`` once more. The total does not wait for ``branch`` to be known."""
    nodes[np.uint64(at + 4)] += np.uint64(INCREMENT)
    nodes[np.uint64(at)] += _STEPS[np.uint64(4 * branch)]
    nodes[np.uint64(at + 1)] += _STEPS[np.uint64(4 * branch + 1)]
    nodes[np.uint64(at + 2)] += _STEPS[np.uint64(4 * branch + 2)]
    nodes[np.uint64(at + 3)] += _STEPS[np.uint64(4 * branch + 3)]


@kernel
def _settle(nodes: npt.NDArray[np.uint64], begin: int, end: int) -> None:
    """Halve the counts (rounding up, so none becomes zero) of each node in words [begin, end) whose
    total is above SETTLED. This keeps lanes from overflowing, and lets old symbols fade."""
    for at in range(begin, end, NODE_WORDS):
        if nodes[at + 4] > np.uint64(SETTLED):
            before = _U0
            halved = _U0
            for branch in range(1, BRANCHES + 1):
                below = _below(nodes, at, branch)
                count = below - before
                before = below
                halved += count - (count >> _U1)
                shift = np.uint64(branch & 3) << _U4
                word = nodes[at + (branch >> 2)] & ~(_LANE << shift)
                nodes[at + (branch >> 2)] = word | halved << shift


@kernel
def encode_adaptive(
    symbols: npt.NDArray[Any],  # (n, n_fields) uint8 or uint16
    n_bits: npt.NDArray[np.int64],  # (n_fields,) bits of a symbol, at least 1
    node_start: npt.NDArray[np.int64],  # (n_fields,) first word of the field's first tree
    n_nodes: npt.NDArray[np.int64],  # (n_fields,) nodes of one tree
    context: npt.NDArray[np.int64],  # (n_fields,) field whose symbol picks the tree, -1: none
    context_shift: npt.NDArray[np.int64],  # (n_fields,) tree number = context symbol >> shift
    n_trees: npt.NDArray[np.int64],  # (n_fields,)
    nodes: npt.NDArray[np.uint64],  # all trees in their initial state; changed
    words: Words,  # 1-D
) -> int:
    """One message of all symbols, field after field; returns its length in bytes. About 5 ns for
    every four bits of a symbol."""
    n, n_fields = symbols.shape
    pos, low, range_ = start_writing()
    for field in range(n_fields):
        top = (n_bits[field] - 1 & 3) + 1
        end = node_start[field] + n_trees[field] * n_nodes[field] * NODE_WORDS
        for row in range(n):
            if row % SETTLE_EVERY == 0:
                _settle(nodes, node_start[field], end)
            level = node_start[field]
            if context[field] >= 0:
                seen = np.int64(symbols[row, context[field]]) >> context_shift[field]
                level += seen * n_nodes[field] * NODE_WORDS
            symbol = np.int64(symbols[row, field])
            width = top
            shift = n_bits[field] - top
            prefix = 0
            while True:
                at = level + prefix * NODE_WORDS
                branch = symbol >> shift & 15
                scale = range_ // nodes[np.uint64(at + 4)]
                start = _below(nodes, at, branch)
                size = _below(nodes, at, branch + 1) - start
                moved = low + scale * start
                if moved < low:
                    carry(words, pos)
                pos, low, range_ = push(words, pos, moved, scale * size)
                _count(nodes, at, branch)
                if shift == 0:
                    break
                level += NODE_WORDS << (n_bits[field] - shift - width)
                prefix = prefix << width | branch
                width = 4
                shift -= 4
    return finish(words, pos, low, range_)


@kernel
def decode_adaptive(
    words: Words,  # 1-D
    n_bits: npt.NDArray[np.int64],  # these as in encode_adaptive
    node_start: npt.NDArray[np.int64],
    n_nodes: npt.NDArray[np.int64],
    context: npt.NDArray[np.int64],
    context_shift: npt.NDArray[np.int64],
    n_trees: npt.NDArray[np.int64],
    nodes: npt.NDArray[np.uint64],
    symbols: npt.NDArray[Any],  # (n, n_fields) result
) -> None:
    """Inverse of ``encode_adaptive``. About 13 ns for every four bits of a symbol. Branches that no
    symbol of the alphabet takes have no count, hence no value leads to them."""
    n, n_fields = symbols.shape
    pos, code, range_ = start_reading(words)
    for field in range(n_fields):
        top = (n_bits[field] - 1 & 3) + 1
        end = node_start[field] + n_trees[field] * n_nodes[field] * NODE_WORDS
        for row in range(n):
            if row % SETTLE_EVERY == 0:
                _settle(nodes, node_start[field], end)
            level = node_start[field]
            if context[field] >= 0:
                seen = np.int64(symbols[row, context[field]]) >> context_shift[field]
                level += seen * n_nodes[field] * NODE_WORDS
            width = top
            shift = n_bits[field] - top
            prefix = 0
            while True:
                at = level + prefix * NODE_WORDS
                total = nodes[np.uint64(at + 4)]
                scale = range_ // total
                value = min(code // scale, total - _U1)
                # lanes are below 2**15: 2**15 + value - lane keeps its top bit if value >= lane
                sought = value * _EVERY_LANE | _TOP_BITS
                reached = (sought - nodes[np.uint64(at)] & _TOP_BITS) >> _U15
                reached += (sought - nodes[np.uint64(at + 1)] & _TOP_BITS) >> _U15
                reached += (sought - nodes[np.uint64(at + 2)] & _TOP_BITS) >> _U15
                reached += (sought - nodes[np.uint64(at + 3)] & _TOP_BITS) >> _U15
                branch = np.int64(reached * _EVERY_LANE >> _U48) - 1  # sum of the four lanes
                start = _below(nodes, at, branch)
                size = _below(nodes, at, branch + 1) - start
                pos, code, range_ = pull(words, pos, code - scale * start, scale * size)
                _count(nodes, at, branch)
                prefix_below = prefix << width | branch
                if shift == 0:
                    symbols[row, field] = prefix_below
                    break
                level += NODE_WORDS << (n_bits[field] - shift - width)
                prefix = prefix_below
                width = 4
                shift -= 4


@kernel
def adaptive_bits(
    symbols: npt.NDArray[Any],  # as in encode_adaptive
    n_bits: npt.NDArray[np.int64],
    node_start: npt.NDArray[np.int64],
    n_nodes: npt.NDArray[np.int64],
    context: npt.NDArray[np.int64],
    context_shift: npt.NDArray[np.int64],
    n_trees: npt.NDArray[np.int64],
    nodes: npt.NDArray[np.uint64],
) -> float:
    """Ideal length in bits of what ``encode_adaptive`` writes; for reports and choices only."""
    n, n_fields = symbols.shape
    bits = 0.0
    for field in range(n_fields):
        top = (n_bits[field] - 1 & 3) + 1
        end = node_start[field] + n_trees[field] * n_nodes[field] * NODE_WORDS
        for row in range(n):
            if row % SETTLE_EVERY == 0:
                _settle(nodes, node_start[field], end)
            level = node_start[field]
            if context[field] >= 0:
                seen = np.int64(symbols[row, context[field]]) >> context_shift[field]
                level += seen * n_nodes[field] * NODE_WORDS
            symbol = np.int64(symbols[row, field])
            width = top
            shift = n_bits[field] - top
            prefix = 0
            while True:
                at = level + prefix * NODE_WORDS
                branch = symbol >> shift & 15
                size = _below(nodes, at, branch + 1) - _below(nodes, at, branch)
                bits += np.log2(np.float64(nodes[np.uint64(at + 4)]) / np.float64(size))
                _count(nodes, at, branch)
                if shift == 0:
                    break
                level += NODE_WORDS << (n_bits[field] - shift - width)
                prefix = prefix << width | branch
                width = 4
                shift -= 4
    return bits
