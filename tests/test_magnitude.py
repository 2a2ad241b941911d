"""Coding of integers of predictable magnitude: against a twin in plain Python, on any integers, and
on bytes that are no block."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_range_coder import Reader, Writer

from polarpack.entropy import _magnitude_kernels as kernels
from polarpack.entropy import magnitude as mg
from polarpack.entropy._numbers import fold, number
from polarpack.entropy._tables import LANES_FROM, level_weights
from polarpack.entropy.magnitude import (
    ESCAPE,
    MAX_INDEX,
    N_TABLES,
    PLAIN,
    MagnitudeModel,
    integers_from_bytes,
    integers_to_bytes,
)
from polarpack.errors import CorruptDataError, FormatError, InputError, LimitError
from polarpack.trellis import state_machine

MACHINES = {"plain": PLAIN, "4 states": state_machine(4), "64 states": state_machine(64)}
TOTAL = 1 << mg.PRECISION


# -- the twin: floats and Python integers, no tables ---------------------------------------------
def quarter_octaves(seen: int) -> int:
    return round(4 * math.log2(((seen >> 11) + 0.5) * 2048))


class Row:
    """The context of one row: which table comes next."""

    def __init__(self, model: MagnitudeModel, row_class: int) -> None:
        self.model = model
        self.expected = model.expected[row_class].tolist()
        self.field, self.state = 0, 0
        self.seen = self.usual = 8 << 16

    def rule(self) -> tuple[int, int, int]:
        """Quantizer, scale and shift of the next integer."""
        base = self.expected[self.field] - quarter_octaves(self.usual)
        scale = min(max((base + quarter_octaves(self.seen)) // 2, 0), 45)
        return int(self.model.quantizer[self.state]), scale, max(0, (scale - 18) // 2)

    def step(self, magnitude: int) -> None:
        expected = 2.0 ** ((self.expected[self.field] - 24) / 4)
        gain = math.floor(65536 / max(expected, 0.25) + 0.5)
        y = 2 * magnitude - int(self.model.quantizer[self.state]) if magnitude else 0
        self.seen += min(y * gain, 8 << 16) - self.seen // 32
        self.usual += math.floor(expected * gain + 0.5) - self.usual // 32
        self.state = int(self.model.next_state[self.state, magnitude % 2])
        self.field += 1


def cells(magnitude: int, q: int, shift: int) -> tuple[int, int, int]:
    """Symbol, as if there were no escapes, number of low bits, low bits."""
    if q == 0:
        moved = magnitude + (1 << shift) // 2
        symbol = moved // (1 << shift)
        if symbol == 0:
            return 0, max(shift - 1, 0), magnitude
        return symbol, shift, moved % (1 << shift)
    if magnitude == 0:
        return 0, 0, 0
    return 1 + (magnitude - 1) // (1 << shift), shift, (magnitude - 1) % (1 << shift)


def lanes_of(n: int, m: int) -> list[list[int]]:
    """The rows of each message of a block."""
    q = n // 4 if n * m >= LANES_FROM else 0
    if not q:
        return [list(range(n))]
    lanes = [list(range(lane * q, lane * q + q)) for lane in range(4)]
    lanes[0] += range(4 * q, n)
    return lanes


def cdfs(model: MagnitudeModel) -> tuple[list[int], list[list[int]]]:
    classes, magnitudes = model._coding_tables
    return classes.tolist(), magnitudes.reshape(2 * N_TABLES, -1).tolist()


def twin_encode(model: MagnitudeModel, row_class: np.ndarray, k: np.ndarray) -> bytes:
    class_cdf, tables = cdfs(model)
    messages = []
    for rows in lanes_of(*k.shape):
        writer = Writer()
        for i in rows:
            c = int(row_class[i])
            if model.n_classes > 1:
                writer.put(class_cdf[c], class_cdf[c + 1] - class_cdf[c], TOTAL)
            row = Row(model, c)
            for v in k[i].tolist():
                q, scale, shift = row.rule()
                cdf = tables[q * N_TABLES + scale - 2 * shift]
                full, n_low, low = cells(abs(v), q, shift)
                symbol = min(full, ESCAPE)
                writer.put(cdf[symbol], cdf[symbol + 1] - cdf[symbol], TOTAL)
                if symbol == ESCAPE:
                    rest = full - ESCAPE + 1
                    length = rest.bit_length() - 1
                    writer.put(length, 1, 16)
                    writer.put(rest - (1 << length), 1, 1 << length)
                writer.put(low, 1, 1 << n_low)
                if v:
                    writer.put(int(v < 0), 1, 2)
                row.step(abs(v))
        messages.append(writer.finish())
    if len(messages) == 1:
        return messages[0]
    a, b, c, _ = map(len, messages)
    return number(a) + number(fold(b - a)) + number(fold(c - b)) + b"".join(messages)


def twin_decode(model: MagnitudeModel, data: bytes, n: int) -> tuple[np.ndarray, np.ndarray]:
    """One message only."""
    class_cdf, tables = cdfs(model)
    reader = Reader(data)

    def symbol_of(cdf: list[int]) -> int:
        unit = reader.range // cdf[-1]
        value = min(reader.code // unit, cdf[-1] - 1)
        symbol = next(s for s in range(len(cdf) - 1) if value < cdf[s + 1])
        reader.narrow(unit * cdf[symbol], unit * (cdf[symbol + 1] - cdf[symbol]))
        return symbol

    def raw(n_bits: int) -> int:
        return symbol_of(list(range((1 << n_bits) + 1)))

    row_class = np.zeros(n, np.int64)
    k = np.zeros((n, model.expected.shape[1]), np.int16)
    for i in range(n):
        row_class[i] = symbol_of(class_cdf) if model.n_classes > 1 else 0
        row = Row(model, row_class[i])
        for j in range(k.shape[1]):
            q, scale, shift = row.rule()
            v = symbol_of(tables[q * N_TABLES + scale - 2 * shift])
            if v == ESCAPE:
                length = raw(4)
                v += (1 << length) - 1 + raw(length)
            if q == 0:
                v = ((v << shift) + raw(shift) - (1 << shift) // 2) if v else raw(max(shift - 1, 0))
            elif v:
                v = (v - 1 << shift) + raw(shift) + 1
            v = min(v, MAX_INDEX)
            k[i, j] = -v if v and raw(1) else v
            row.step(v)
    return row_class, k


# -- what to code --------------------------------------------------------------------------------
@st.composite
def models(draw: st.DrawFn, max_m: int = 12) -> MagnitudeModel:
    """Any model: profiles and tables need not have been learned from anything."""
    machine = MACHINES[draw(st.sampled_from(sorted(MACHINES)))]
    n_classes, m = draw(st.sampled_from([1, 1, 2, 3, 256])), draw(st.integers(1, max_m))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["any", "low", "high", "usual"]))
    low, high = {"any": (0, 88), "low": (0, 3), "high": (85, 88), "usual": (20, 40)}[kind]
    expected = rng.integers(low, high + 1, (n_classes, m)).astype(np.uint8)
    tables = rng.integers(0, mg.MAX_LEVEL + 1, (2, N_TABLES, mg.N_SYMBOLS)).astype(np.uint8)
    classes = rng.integers(0, mg.MAX_LEVEL + 1, n_classes).astype(np.uint8)
    own = draw(st.booleans())
    return MagnitudeModel(expected, *machine, tables if own else None, classes if own else None)


@st.composite
def rows(draw: st.DrawFn, model: MagnitudeModel, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row classes (n,) and integers (n, m), from all zeros to all as large as they get."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (n, model.expected.shape[1])
    spread = draw(st.sampled_from([0.0, 0.3, 2.0, 40.0, 3000.0, 1e6]))
    k = np.clip(np.rint(rng.laplace(0, spread, shape)), -MAX_INDEX, MAX_INDEX)
    k = np.where(rng.random(shape) < 0.05, MAX_INDEX * rng.choice([-1, 1], shape), k)
    return rng.integers(0, model.n_classes, n), k.astype(np.int16)


def laplacian(n: int, m: int, *, seed: int = 0, top: float = 8.0) -> np.ndarray:
    """Integers like those of a KLT: columns of falling size, rows of different strength."""
    rng = np.random.default_rng(seed)
    size = top * np.exp(-np.linspace(0, 4, m)) * rng.lognormal(0, 0.4, (n, 1))
    return np.clip(np.rint(rng.laplace(0, size)), -MAX_INDEX, MAX_INDEX).astype(np.int16)


@settings(max_examples=150)
@given(st.data(), st.integers(0, 9))
def test_round_trip_and_twin(data: st.DataObject, n: int):
    model = data.draw(models())
    row_class, k = data.draw(rows(model, n))
    symbols = model.join(row_class, k)
    assert symbols.dtype == np.uint16
    assert symbols.shape == (n, model.n_fields)
    assert (symbols < model.alphabet_sizes).all()
    again = model.split(symbols)
    assert np.array_equal(again[0], row_class)
    assert np.array_equal(again[1], k)
    block = model.encode(symbols)
    assert block == twin_encode(model, row_class, k)
    assert np.array_equal(model.decode(block, n), symbols)
    twin = twin_decode(model, block, n)
    assert np.array_equal(twin[0], row_class)
    assert np.array_equal(twin[1], k)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("extra_rows", range(4))
def test_blocks_of_four_messages(machine, extra_rows):
    n, m = 256 + extra_rows, 64
    k = laplacian(n, m, seed=extra_rows, top=60.0)
    row_class = np.arange(n) % 3
    model = MagnitudeModel.fit(k, *MACHINES[machine], row_class=row_class, n_classes=3)
    symbols = model.join(row_class, k)
    block = model.encode(symbols)
    assert len(lanes_of(n, m)) == 4
    assert block == twin_encode(model, row_class, k)
    assert np.array_equal(model.decode(memoryview(block), n), symbols)


@given(st.data())
def test_any_bytes_decode_like_the_twin(data: st.DataObject):
    model = data.draw(models(max_m=6))
    n = data.draw(st.integers(0, 5))
    block = data.draw(st.binary(max_size=60))
    symbols = model.decode(block, n)
    assert (symbols < model.alphabet_sizes).all()
    row_class, k = twin_decode(model, block, n)
    assert np.array_equal(symbols, model.join(row_class, k))


# -- rates ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("top", [0.4, 3.0, 60.0, 5000.0])
def test_size_is_close_to_the_rate(machine, top):
    k = laplacian(512, 128, top=top)
    row_class = np.arange(len(k)) % 5 % 2
    model = MagnitudeModel.fit(k, *MACHINES[machine], row_class=row_class, n_classes=2)
    symbols = model.join(row_class, k)
    # 5 bytes of lengths, and each message ends on a whole byte
    assert 0 <= len(model.encode(symbols)) - model.rate_bits(symbols) / 8 <= 9 + 1e-3 * k.size / 8


def test_rate_is_close_to_the_entropy_of_the_source():
    """For one field and rows of equal strength all that is left is the tables' precision."""
    rng = np.random.default_rng(0)
    p = 0.6
    k = (rng.geometric(p, (4000, 16)) - 1) * rng.choice([-1, 1], (4000, 16))
    model = MagnitudeModel.fit(k.astype(np.int16), *PLAIN)
    entropy = -math.log2(p) - (1 - p) / p * math.log2(1 - p) + (1 - p)
    rate = model.rate_bits(model.join(np.zeros(4000, np.int64), k.astype(np.int16))) / k.size
    assert rate == pytest.approx(entropy, rel=0.015)


def test_strong_rows_and_strong_fields_are_foreseen():
    """Shuffling the integers keeps their histogram and loses what foretells them."""
    k = laplacian(500, 64)
    shuffled = np.random.default_rng(1).permutation(k.ravel()).reshape(k.shape)
    none = np.zeros(len(k), np.int64)
    known, lost = (MagnitudeModel.fit(a, *PLAIN) for a in (k, shuffled))
    assert known.rate_bits(known.join(none, k)) < 0.85 * lost.rate_bits(lost.join(none, shuffled))


@settings(max_examples=30)
@given(st.data())
def test_rates_for_a_search_add_up_to_the_rate(data: st.DataObject):
    model = data.draw(models())
    row_class, k = data.draw(rows(model, 3))
    rates, shifts = model.rates()
    bits = 0.0
    for c, integers in zip(row_class, k.tolist(), strict=True):
        row = Row(model, c)
        bits += mg._bits(model.class_levels)[c]
        for v in integers:
            q, scale, shift = row.rule()
            assert shift == shifts[scale]
            full = cells(abs(v), q, shift)[0]
            symbol = min(full, ESCAPE)
            bits += rates[q, scale, symbol + (v != 0)]
            if symbol == ESCAPE:
                bits += 4 + (full - ESCAPE + 1).bit_length() - 1
            row.step(abs(v))
    assert model.rate_bits(model.join(row_class, k)) == pytest.approx(bits, rel=1e-4)


# -- learning ------------------------------------------------------------------------------------
@settings(max_examples=40)
@given(st.data(), st.integers(0, 6))
def test_lattice_and_histogram_against_the_twin(data: st.DataObject, n: int):
    model = data.draw(models())
    row_class, k = data.draw(rows(model, n))
    y = np.zeros(k.shape, np.int64)
    counts = np.zeros((2, N_TABLES, mg.N_SYMBOLS), np.int64)
    for i in range(n):
        row = Row(model, row_class[i])
        for j, v in enumerate(k[i].tolist()):
            q, scale, shift = row.rule()
            y[i, j] = 2 * v - q * ((v > 0) - (v < 0))
            counts[q, scale - 2 * shift, min(cells(abs(v), q, shift)[0], ESCAPE)] += 1
            row.step(abs(v))
    assert np.array_equal(kernels.lattice(k, model.next_state, model.quantizer), y)
    assert np.array_equal(model.histogram(row_class, k)[0], counts)
    sums = np.zeros(model.expected.shape, np.int64)
    kernels.totals(k, row_class, model.next_state, model.quantizer, sums)
    expected = [np.abs(y)[row_class == c].sum(axis=0) for c in range(model.n_classes)]
    assert np.array_equal(sums, expected)


def test_fit_learns_each_class_its_profile():
    rng = np.random.default_rng(2)
    size = np.array([[50.0, 1.0], [1.0, 50.0]])
    row_class = rng.integers(0, 2, 4000)
    k = np.rint(rng.laplace(0, size[row_class])).astype(np.int16)
    model = MagnitudeModel.fit(k, *PLAIN, row_class=row_class, n_classes=2)
    found = mg.expected_magnitude(model.expected)  # of |y| = 2 |k|
    for c in range(2):
        assert found[c] == pytest.approx(2 * np.abs(k[row_class == c]).mean(axis=0), rel=0.1)
    assert np.ptp(model.class_levels) == 0


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fit_on_hardly_any_rows(n):
    k = np.full((n, 3), -7, np.int16)
    model = MagnitudeModel.fit(k, *PLAIN, row_class=np.zeros(n, np.int64), n_classes=4)
    symbols = model.join(np.arange(n), k)
    assert np.array_equal(model.decode(model.encode(symbols), n), symbols)


def test_building_a_model_is_cheap():
    """Default tables are worked out once, CDFs when the first block is coded."""
    a, b = (MagnitudeModel(np.full((1, 4), e, np.uint8), *PLAIN) for e in (20, 30))
    assert "_coding_tables" not in a.__dict__
    assert mg.default_levels() is mg.default_levels()
    assert np.shares_memory(a._coding_tables[1], b._coding_tables[1])


# -- the same on every machine -------------------------------------------------------------------
def far_from_half(values: np.ndarray) -> float:
    """Distance of the nearest value to a rounding boundary."""
    return float(np.abs(values - np.floor(values) - 0.5).min())


def test_default_levels_are_far_from_rounding_boundaries():
    p = np.maximum(mg.default_frequencies(), 2.0**-mg.PRECISION)
    p = np.maximum(p / mg.default_frequencies().sum(axis=2, keepdims=True), 2.0**-mg.PRECISION)
    assert far_from_half(-8 * np.log2(p)) > 1e-6


def test_integer_tables_are_what_their_formulas_say():
    """Computed in integers; the formulas, in floats, agree wherever floats can be trusted."""
    e = np.arange(mg.MAX_E + 1)
    expected = mg.expected_magnitude(e)
    gain, counted = mg.field_rules()
    exact = 65536 / np.maximum(expected, 0.25)
    assert np.array_equal(gain, np.floor(exact + 0.5))
    assert np.array_equal(counted, np.floor(expected * gain + 0.5))
    assert far_from_half(exact) > 1e-6
    assert far_from_half(expected * gain) > 1e-6
    log = 4 * np.log2((np.arange(len(mg.seen_table())) + 0.5) * 2048)
    assert np.array_equal(mg.seen_table(), np.rint(log))
    assert far_from_half(log) > 1e-6
    assert np.array_equal(mg.magnitude_index(expected), e)


def test_weights_of_levels_are_integers_of_exact_arithmetic():
    with localcontext() as context:
        context.prec = 60
        for level in range(mg.MAX_LEVEL + 1):
            exact = Decimal(2) ** (Decimal(37) - Decimal(level) / 8)
            assert mg._weights()[level] == int(exact)
    assert np.array_equal(mg._weights(), level_weights(8)[1 : mg.MAX_LEVEL + 2])


# -- no index out of range -----------------------------------------------------------------------
def test_every_table_index_is_in_range():
    """The running sum grows at most by CAP a component and shrinks by 1/32: whatever is decoded, it
    stays inside the table of logarithms, and each scale leads to a table."""
    log = mg.seen_table()
    seen = mg.PRIOR
    for _ in range(2000):  # the largest it can become: CAP each time
        seen += mg.CAP - (seen >> mg.MEMORY)
    assert seen == seen + mg.CAP - (seen >> mg.MEMORY)  # settled
    assert (seen >> mg.SEEN_SHIFT) < len(log)
    low = mg.PRIOR
    for _ in range(2000):  # the smallest: nothing each time
        low -= low >> mg.MEMORY
    assert 0 <= low == low - (low >> mg.MEMORY)
    gain, counted = mg.field_rules()
    assert gain.min() >= 1
    assert 2 * MAX_INDEX * int(gain.max()) < 1 << 62
    assert counted.min() >= 0
    assert counted.max() <= mg.CAP  # so ``usual`` stays where ``seen`` does
    bases = [e - int(v) for e in (0, mg.MAX_E) for v in (log.min(), log.max())]
    for base in range(min(bases), max(bases) + 1):
        for step in (0, int(low) >> mg.SEEN_SHIFT, int(seen) >> mg.SEEN_SHIFT, len(log) - 1):
            scale = kernels.scale_of(base, step << mg.SEEN_SHIFT, log)
            assert 0 <= scale < mg.N_SCALES
    for scale in range(mg.N_SCALES):
        shift = kernels.shift_of(scale)
        assert 0 <= scale - 2 * shift < N_TABLES
        assert 0 <= shift <= 13
        # the largest index: its symbol and what follows an escape fit their fields
        for q in range(2):
            rest = kernels.cut(MAX_INDEX, q, shift)[0] - ESCAPE + 1
            assert rest < 1 or rest.bit_length() - 1 < 1 << mg.ESCAPE_BITS


@given(st.data())
def test_lookup_leads_to_the_symbol(data: st.DataObject):
    model = data.draw(models(max_m=1))
    first = model._lookup.reshape(2 * N_TABLES, 1 << mg.BUCKET_BITS)
    _, tables = cdfs(model)
    width = 1 << mg.PRECISION - mg.BUCKET_BITS
    for table, cdf in zip(first, tables, strict=True):
        values = np.arange(len(table)) * width
        assert np.array_equal(table, np.searchsorted(cdf, values, side="right") - 1)


# -- side information ----------------------------------------------------------------------------
@given(st.data())
def test_a_model_travels(data: st.DataObject):
    model = data.draw(models())
    machine = model.next_state, model.quantizer
    travelled = MagnitudeModel.from_bytes(model.to_bytes(), *machine)
    assert travelled.to_bytes() == model.to_bytes()
    symbols = model.join(*data.draw(rows(model, 4)))
    assert travelled.encode(symbols) == model.encode(symbols)
    assert travelled.rate_bits(symbols) == model.rate_bits(symbols)


def valid_model() -> bytes:
    k = laplacian(300, 9)
    return MagnitudeModel.fit(k, *PLAIN, row_class=np.arange(300) % 2, n_classes=2).to_bytes()


@settings(max_examples=300)
@given(st.data())
@example(None)
def test_wrong_model_bytes_are_refused(data: Any):
    good = valid_model()
    if data is None:
        return
    bad = bytearray(good)
    cut = data.draw(st.integers(0, len(bad)))
    change = data.draw(st.sampled_from(["cut", "flip", "insert", "any"]))
    if change == "cut":
        bad = bad[:cut]
    elif change == "flip":
        bad[min(cut, len(bad) - 1)] ^= data.draw(st.integers(1, 255))
    elif change == "insert":
        bad[cut:cut] = data.draw(st.binary(min_size=1, max_size=4))
    else:
        bad = bytearray(data.draw(st.binary(max_size=80)))
    try:
        model = MagnitudeModel.from_bytes(bytes(bad), *PLAIN)
    except FormatError:
        return
    # deflate's own checksum catches nearly everything; what is left is a model all the same
    assert model.expected.max() <= mg.MAX_E
    assert (model.decode(b"\xa5" * 40, 3) < model.alphabet_sizes).all()


@pytest.mark.parametrize(
    ("n_classes", "m", "error"),
    [
        (0, 5, CorruptDataError),
        (5, 0, CorruptDataError),
        (257, 5, LimitError),
        (1, (1 << 16) + 1, LimitError),
        (256, 1 << 15, LimitError),
        (2, 9, CorruptDataError),
    ],
)
def test_declared_sizes_are_checked(n_classes, m, error):
    with pytest.raises(error, match="magnitude model"):
        MagnitudeModel.from_bytes(number(n_classes) + number(m) + b"\x00", *PLAIN)


def test_tables_out_of_range_are_refused():
    k = laplacian(300, 9)
    model = MagnitudeModel.fit(k, *PLAIN)
    for name, value in (("expected", 89), ("table_levels", 121), ("class_levels", 121)):
        bad = MagnitudeModel.from_bytes(model.to_bytes(), *PLAIN)
        wrong = getattr(bad, name).copy()
        wrong.flat[-1] = value
        setattr(bad, name, wrong)
        with pytest.raises(CorruptDataError, match="out of range"):
            MagnitudeModel.from_bytes(bad.to_bytes(), *PLAIN)


@settings(max_examples=60)
@given(st.binary(max_size=400), st.integers(0, 2**32 - 1))
def test_wrong_blocks_of_four_messages(data: bytes, seed: int):
    n, m = 130, 128
    model = MagnitudeModel(np.full((1, m), 88 if seed % 2 else 30, np.uint8), *PLAIN)
    noise = np.random.default_rng(seed).bytes(3000)
    for block in (data, data + noise, b"\xe8\x07\x00\x00" + noise):
        try:
            symbols = model.decode(block, n)
        except FormatError:
            continue
        assert (symbols < model.alphabet_sizes).all()


def test_a_cut_block_is_refused_or_within_the_alphabets():
    k = laplacian(140, 128)
    model = MagnitudeModel.fit(k, *PLAIN)
    block = model.encode(model.join(np.zeros(140, np.int64), k))
    for cut in [*range(12), 1000, len(block) // 2, len(block) - 1]:
        try:
            symbols = model.decode(block[:cut], 140)
        except CorruptDataError:
            continue
        assert (symbols < model.alphabet_sizes).all()
    with pytest.raises(CorruptDataError, match="block"):
        model.decode(block[:100], 140)


def test_symbols_outside_their_alphabet_are_refused():
    model = MagnitudeModel(np.full((2, 3), 30, np.uint8), *PLAIN)
    good = np.zeros((2, 4), np.uint16)
    model.encode(good)
    for field, value in ((0, 2), (1, 2 * MAX_INDEX + 1)):
        bad = good.copy()
        bad[1, field] = value
        with pytest.raises(InputError, match=f"field {field}"):
            model.encode(bad)
    for bad in (good[:, 1:], good[0], good - 1.0):
        with pytest.raises(InputError):
            model.encode(bad)


# -- integer matrices ----------------------------------------------------------------------------
@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 2**32 - 1), st.floats(0, 1e4))
def test_integer_matrices_travel(n: int, m: int, seed: int, spread: float):
    rng = np.random.default_rng(seed)
    a = np.clip(np.rint(rng.normal(0, spread, (n, m))), -MAX_INDEX, MAX_INDEX).astype(np.int16)
    assert np.array_equal(integers_from_bytes(integers_to_bytes(a), a.shape), a)


def test_integer_matrices_take_about_their_entropy():
    a = np.rint(np.random.default_rng(0).normal(0, 7.0, (200, 200))).astype(np.int16)
    entropy = math.log2(7.0 * math.sqrt(2 * math.pi * math.e))
    assert 8 * len(integers_to_bytes(a)) / a.size == pytest.approx(entropy, rel=0.03)


def test_the_one_integer_without_a_code_is_refused():
    with pytest.raises(InputError, match="-32767"):
        integers_to_bytes(np.array([[-32768]], np.int16))


@given(st.binary(max_size=60), st.integers(0, 4), st.integers(1, 4))
def test_wrong_integer_matrices_are_refused(data: bytes, n: int, m: int):
    a = np.arange(n * m, dtype=np.int16).reshape(n, m)
    good = integers_to_bytes(a)
    for bad in (data, good[: len(data)], good + data):
        try:
            found = integers_from_bytes(bad, (n, m))
        except FormatError:
            continue
        assert found.shape == (n, m)
        assert np.abs(found.astype(int)).max(initial=0) <= MAX_INDEX
    with pytest.raises(CorruptDataError, match="columns"):
        integers_from_bytes(good, (n, m + 1))
