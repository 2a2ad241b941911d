"""The range coder against plain Python integers, bit for bit, and on bytes that are no message."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarpack.entropy import _block_kernels as blocks
from polarpack.entropy import range_coder as rc
from polarpack.entropy._tables import Tables, cdf_from_counts

LEAST = 1 << 30
FULL = (1 << 64) - 1


class Writer:
    """The coder without words and carries: ``low`` is one integer of any length."""

    def __init__(self) -> None:
        self.low, self.range, self.n_words = 0, FULL, 0

    def narrow(self, offset: int, size: int) -> None:
        self.low, self.range = self.low + offset, size
        if self.range < LEAST:
            self.low, self.range, self.n_words = self.low << 32, self.range << 32, self.n_words + 1

    def put(self, start: int, size: int, total: int) -> None:
        self.narrow(self.range // total * start, self.range // total * size)

    def put_bit(self, probability: int, bit: int) -> None:
        bound = (self.range >> 16) * probability
        self.narrow(bound if bit else 0, self.range - bound if bit else bound)

    def finish(self) -> bytes:
        for kept in range(9):
            step = 1 << 64 - 8 * kept
            value = -(-self.low // step) * step
            if value - self.low < self.range:
                break
        return value.to_bytes(4 * self.n_words + 8, "big").rstrip(b"\0")


class Reader:
    """Mirrors ``Writer``; sees zeros behind the end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.range = data, 8, FULL
        self.code = int.from_bytes(data[:8].ljust(8, b"\0"), "big")

    def narrow(self, offset: int, size: int) -> None:
        self.code, self.range = (self.code - offset) & FULL, size
        if self.range < LEAST:
            word = self.data[self.position : self.position + 4].ljust(4, b"\0")
            self.code = (self.code << 32 & FULL) | int.from_bytes(word, "big")
            self.range, self.position = self.range << 32, self.position + 4

    def get(self, cdf: list[int]) -> int:
        scale = self.range // cdf[-1]
        value = min(self.code // scale, cdf[-1] - 1)
        symbol = max(s for s in range(len(cdf) - 1) if cdf[s] <= value)
        self.narrow(scale * cdf[symbol], scale * (cdf[symbol + 1] - cdf[symbol]))
        return symbol

    def get_bit(self, probability: int) -> int:
        bound = (self.range >> 16) * probability
        bit = int(self.code >= bound)
        self.narrow(bound if bit else 0, self.range - bound if bit else bound)
        return bit


# A mixed message for the small functions: rows (kind, a, b, c), one per symbol.
SYMBOL, BIT, RAW = 0, 1, 2


@rc.kernel
def write_mixed(message: Any, words: Any) -> int:
    pos, low, range_ = rc.start_writing()
    for i in range(len(message)):
        kind, a, b, c = message[i, 0], message[i, 1], message[i, 2], message[i, 3]
        if kind == 0:
            pos, low, range_ = rc.put(words, pos, low, range_, a, b, c)
        elif kind == 1:
            pos, low, range_ = rc.put_bit(words, pos, low, range_, a, b)
        else:
            pos, low, range_ = rc.put_raw(words, pos, low, range_, a, c)
    return rc.finish(words, pos, low, range_)


@rc.kernel
def read_mixed(words: Any, message: Any, out: Any) -> None:
    pos, code, range_ = rc.start_reading(words)
    for i in range(len(message)):
        kind, a, b, c = message[i, 0], message[i, 1], message[i, 2], message[i, 3]
        if kind == 0:
            value, scale = rc.peek(code, range_, c)
            inside = np.int64(value) >= a and np.int64(value) < a + b
            out[i] = inside
            pos, code, range_ = rc.advance(words, pos, code, range_, scale, a, b)
        elif kind == 1:
            out[i], pos, code, range_ = rc.get_bit(words, pos, code, range_, a)
        else:
            out[i], pos, code, range_ = rc.get_raw(words, pos, code, range_, c)


@st.composite
def one_symbol(draw: st.DrawFn) -> tuple[int, int, int, int]:
    kind = draw(st.sampled_from([SYMBOL, BIT, RAW]))
    if kind == BIT:
        edge = st.sampled_from([1, 2, 32768, 65534, 65535])
        return BIT, draw(edge | st.integers(1, 65535)), draw(st.integers(0, 1)), 0
    bits = draw(st.integers(0, rc.MAX_PRECISION))
    start = draw(st.sampled_from([0, (1 << bits) - 1]) | st.integers(0, (1 << bits) - 1))
    if kind == RAW:
        return RAW, start, 0, bits
    room = (1 << bits) - start
    return SYMBOL, start, draw(st.sampled_from([1, room]) | st.integers(1, room)), bits


def twin_of(message: list[tuple[int, int, int, int]]) -> bytes:
    writer = Writer()
    for kind, a, b, c in message:
        if kind == BIT:
            writer.put_bit(a, b)
        else:
            writer.put(a, b if kind == SYMBOL else 1, 1 << c)
    return writer.finish()


@given(st.lists(one_symbol(), max_size=60), st.integers(1, 40))
def test_small_functions_equal_plain_integers(message, repeats):
    message = message * repeats  # long enough for many words
    rows = np.array(message, np.int64).reshape(-1, 4)
    words = np.empty(rc.capacity(len(rows)), np.uint32)
    data = rc.words_to_bytes(words, write_mixed(rows, words))
    assert data == twin_of(message)
    out = np.empty(len(rows), np.int64)
    read_mixed(rc.words_from_bytes(data), rows, out)
    expected = [1 if kind == SYMBOL else b if kind == BIT else a for kind, a, b, _ in message]
    assert out.tolist() == expected


@given(st.binary(max_size=40), st.lists(st.integers(1, 65535), max_size=300))
def test_bits_of_any_bytes_equal_plain_integers(data, probabilities):
    rows = np.array([(BIT, p, 0, 0) for p in probabilities], np.int64).reshape(-1, 4)
    out = np.empty(len(rows), np.int64)
    read_mixed(rc.words_from_bytes(data), rows, out)
    reader = Reader(data)
    assert out.tolist() == [reader.get_bit(p) for p in probabilities]


def test_exact_words():
    message = [(SYMBOL, 1, 2, 3), (BIT, 60000, 1, 0), (RAW, 0xABCDE, 0, 20), (SYMBOL, 7, 1, 24)]
    rows = np.array(message * 3, np.int64)
    words = np.empty(rc.capacity(len(rows)), np.uint32)
    data = rc.words_to_bytes(words, write_mixed(rows, words))
    assert data.hex() == "5e38d103000192f5329f8380d759a01ae5ef06"


def test_nothing_takes_no_bytes():
    words = np.empty(rc.capacity(0), np.uint32)
    assert rc.finish(words, *rc.start_writing()) == 0
    assert rc.words_to_bytes(words, 0) == b""
    certain = np.array([(SYMBOL, 0, 1 << 20, 20)] * 1000, np.int64)
    words = np.empty(rc.capacity(1000), np.uint32)
    assert write_mixed(certain, words) == 0


@given(
    written=st.lists(st.sampled_from([0, 1, 7, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]), max_size=50),
    below_top=st.integers(0, 1 << 33),
    range_=st.integers(LEAST, (1 << 62) - 1),
    start=st.integers(0, 255),
)
def test_carries_run_through_words_of_ones(written, below_top, range_, start):
    """From any state the coder may be in: ``low`` just under a carry, words of ones before it."""
    low = FULL - below_top
    written = [3, *written]  # the message is below one: some word stops the carry
    words = np.array([*written, 0, 0, 0], np.uint32)
    pos, low_, span = rc.put(words, len(written), np.uint64(low), np.uint64(range_), start, 1, 8)
    twin = Writer()
    twin.low = sum(w << 32 * i for i, w in enumerate(reversed(written))) << 64 | low
    twin.range, twin.n_words = range_, len(written)
    twin.put(start, 1, 256)
    spelled = [int(w) for w in words[:pos]] + [int(low_) >> 32, int(low_) & 0xFFFFFFFF]
    assert sum(w << 32 * i for i, w in enumerate(reversed(spelled))) == twin.low
    assert (int(span), pos) == (twin.range, twin.n_words)
    data = rc.words_to_bytes(words, rc.finish(words, pos, np.uint64(low_), np.uint64(span)))
    assert data == twin.finish()


def test_a_carry_crosses_a_thousand_words():
    words = np.full(1004, 0xFFFFFFFF, np.uint32)
    words[0] = 41
    state = rc.put(words, 1001, np.uint64(FULL), np.uint64(1 << 40), 255, 1, 8)
    assert words[0] == 42
    assert not words[1:1001].any()
    assert int(state[1]) == ((1 << 32) * 255 - 1)


# Blocks with static tables


def tables_of(weights: list[list[int]], table_of: list[int]) -> Tables:
    sizes = np.array([len(weights[t]) for t in table_of], np.int64)
    counts = [np.array(w, np.int64) for w in weights]
    return Tables(sizes, counts, np.array(table_of, np.int64))


def cdf_of(tables: Tables, field: int) -> list[int]:
    cdf, cdf_start, *_ = tables._lookup
    first = int(cdf_start[field])
    return cdf[first : first + int(tables.alphabet_sizes[field]) + 1].tolist()


def decoded(tables: Tables, data: bytes, n: int) -> np.ndarray:
    dtype = np.uint8 if tables.alphabet_sizes.max() <= 256 else np.uint16
    out = np.full((n, len(tables.alphabet_sizes)), 77, dtype)
    tables.decode(data, out)
    return out


def twin_message(tables: Tables, symbols: np.ndarray) -> bytes:
    """All symbols, field after field, by the plain writer."""
    writer = Writer()
    for field in range(symbols.shape[1]):
        cdf = cdf_of(tables, field)
        for s in symbols[:, field].tolist():
            writer.put(cdf[s], cdf[s + 1] - cdf[s], cdf[-1])
    return writer.finish()


skewed = st.lists(
    st.sampled_from([0, 0, 1, 1, 2, 1000, 1 << 20]) | st.integers(0, 50), min_size=1, max_size=40
)


@given(st.lists(skewed, min_size=1, max_size=4), st.integers(0, 40), st.integers(0, 2**32))
def test_static_blocks_equal_plain_integers(weights, n, seed):
    rng = np.random.default_rng(seed)
    table_of = [*range(len(weights)), *rng.integers(0, len(weights), 2).tolist()]
    tables = tables_of(weights, table_of)
    symbols = (rng.random((n, len(table_of))) * tables.alphabet_sizes).astype(np.uint8)
    data = tables.encode(symbols)
    assert data == twin_message(tables, symbols)
    assert (decoded(tables, data, n) == symbols).all()
    reader = Reader(data)
    for field in range(len(table_of)):
        cdf = cdf_of(tables, field)
        assert [reader.get(cdf) for _ in range(n)] == symbols[:, field].tolist()


@pytest.mark.parametrize(("n", "n_fields"), [(4, 5000), (5462, 3), (8195, 2), (16387, 1)])
def test_lanes_equal_plain_integers(n, n_fields):
    rng = np.random.default_rng(n)
    weights = [[1, 5, 0, 10000], [3, 3, 3], [1] * 300]
    tables = tables_of(weights, [i % len(weights) for i in range(n_fields)])
    symbols = (rng.random((n, n_fields)) ** 2 * tables.alphabet_sizes).astype(np.uint16)
    symbols = symbols.astype(np.uint16 if n_fields > 2 else np.uint8)
    words = np.empty((blocks.LANES, rc.capacity(n * n_fields)), np.uint32)
    lengths = np.zeros(blocks.LANES, np.int64)
    blocks.encode_lanes(symbols, *tables._shares, tables.precision, words, lengths)
    q = n // blocks.LANES
    parts = [symbols[lane * q : (lane + 1) * q] for lane in range(blocks.LANES)]
    parts[0] = np.concatenate([parts[0], symbols[blocks.LANES * q :]])
    messages = [rc.words_to_bytes(words[i], int(lengths[i])) for i in range(blocks.LANES)]
    assert messages == [twin_message(tables, part) for part in parts]
    data = tables.encode(symbols)
    assert data.endswith(b"".join(messages))
    assert len(data) <= lengths.sum() + 6
    assert (decoded(tables, data, n) == symbols).all()


def test_least_likely_and_most_likely_symbols():
    """Sizes of 1 beside almost 2**precision, in runs, in alphabets from 1 to 65536."""
    for k in (1, 2, 3, 256, 257, 4097, 65536):
        tables = tables_of([[1 << 40] + [0] * (k - 1)], [0])
        rare, common = np.full(3000, k - 1), np.zeros(3000, np.int64)
        symbols = np.concatenate([common, rare, np.arange(k) % k, common])[:, None]
        symbols = symbols.astype(np.uint8 if k <= 256 else np.uint16)
        for block in (symbols, symbols[:1000], symbols[2990:4000]):
            data = tables.encode(block)
            assert (decoded(tables, data, len(block)) == block).all()
            assert len(data) * 8 <= tables.rate_bits(block) * 1.0002 + 64


@pytest.mark.parametrize("k", [2, 256, 5000])
def test_size_is_within_a_thousandth_of_the_entropy(k):
    """1M symbols under a skewed pmf, lengths and table rounding included."""
    rng = np.random.default_rng(k)
    pmf = np.exp(-np.abs(np.arange(k) - k / 3) / (k / 20 + 0.1))
    counts = rng.multinomial(1_000_000, pmf / pmf.sum())
    symbols = np.repeat(np.arange(k, dtype=np.uint16), counts)
    rng.shuffle(symbols)
    symbols = symbols.astype(np.uint8 if k <= 256 else np.uint16)[:, None]
    seen = counts[counts > 0]
    entropy = float(-(seen * np.log2(seen / 1e6)).sum())
    tables = tables_of([counts.tolist()], [0])
    data = tables.encode(symbols)
    assert len(data) * 8 <= entropy * 1.001
    assert len(data) * 8 >= entropy * (1 - 1e-6)
    assert (decoded(tables, data, len(symbols)) == symbols).all()


@settings(max_examples=60)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_decode_to_symbols_of_the_alphabet(data, large):
    n = 6000 if large else 50  # with lanes, and without
    tables = tables_of([[1, 0, 5], [1] * 20, [0, 1 << 30]], [0, 1, 2])
    try:
        symbols = decoded(tables, data, n)
    except ValueError:  # CorruptDataError, LimitError: lengths of the lanes
        assert large
        return
    assert (symbols < tables.alphabet_sizes).all()


def test_cut_messages_decode_without_a_crash():
    rng = np.random.default_rng(0)
    tables = tables_of([[5, 1, 1, 3]], [0])
    symbols = rng.integers(0, 4, (200, 1)).astype(np.uint8)
    data = tables.encode(symbols)
    for cut in range(len(data)):
        out = decoded(tables, data[:cut], 200)
        assert (out < 4).all()
        sure = max(0, cut * 8 // math.ceil(math.log2(10)) - 20)  # symbols before the cut survive
        assert (out[:sure] == symbols[:sure]).all()


def test_bytes_behind_the_message_do_not_matter():
    tables = tables_of([[5, 1, 1, 3]], [0])
    symbols = np.array([[0], [3], [1]], np.uint8)
    data = tables.encode(symbols)
    assert (decoded(tables, data + bytes(9), 3) == symbols).all()


def test_cdf_of_a_skewed_pmf_is_exact_where_it_can_be():
    assert cdf_from_counts([2, 1, 1], 2).tolist() == [0, 2, 3, 4]
    assert np.diff(cdf_from_counts([1 << 40, 0, 0], 20).astype(int)).tolist() == [
        (1 << 20) - 2,
        1,
        1,
    ]
