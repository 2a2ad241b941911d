"""Numbers stored exactly: every word comes back, in fewer bytes where anything is predictable."""

from contextlib import suppress
from functools import cache

import numpy as np
import pytest
from format_reader import Words
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import vectors
from tables import correlated

from polarpack.entropy import words
from polarpack.entropy._numbers import number
from polarpack.entropy.words import MAX_KEYS, Split, WordModel
from polarpack.errors import CorruptDataError, FormatError, LimitError

EXPONENT = {"float16": 5, "float32": 8, "float64": 11}
DTYPE = {16: "float16", 32: "float32", 64: "float64"}


def words_of(x):
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def fit(x, **options):
    return WordModel.fit(words_of(x), EXPONENT[x.dtype.name], **options)


def size_bits(model, x):
    """Bits a number takes, the model's own included."""
    return 8 * (len(model.encode(words_of(x))) + len(model.to_bytes())) / x.size


def check(model, x):
    """The words come back, from the model as read back and from a plain reader too."""
    data = model.encode(x)
    n_bits, d = model.split.n_bits, x.shape[1]
    twin = WordModel.from_bytes(model.to_bytes(), n_bits, d)
    assert twin == model
    assert twin.encode(x) == data
    back = twin.decode(data, len(x))
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)
    if x.size <= 60:
        plain = Words(model.to_bytes(), {"dtype": DTYPE[n_bits]}).decode(data, len(x))
        assert plain == x.astype(f"<u{n_bits // 8}").tobytes()


@settings(max_examples=300)
@given(vectors(min_n=1, max_n=24, max_d=16))
def test_rows_of_every_kind_come_back(x):
    """Under a model of one of the splits that ``fit`` weighs: all of them take long."""
    splits = words._splits(words_of(x), EXPONENT[x.dtype.name], len(x))
    split = splits[x.size % len(splits)]
    check(WordModel._of_split(words_of(x), split, len(x)), words_of(x))


@cache
def model_of_rows(dtype, d, moved):
    x = correlated(60, d) * (np.exp2(np.arange(60) % 9)[:, None] if moved else 1)
    n_bits, n_key = 8 * np.dtype(dtype).itemsize, EXPONENT[dtype] + 4
    split = Split(n_bits, n_bits - n_key, 1 if moved else None)
    return WordModel._of_split(words_of(x.astype(dtype)), split, 100)


@settings(max_examples=300)
@given(st.sampled_from(list(EXPONENT)), st.booleans(), st.data())
def test_any_words_come_back_under_a_model_of_others(dtype, moved, data):
    """NaN payloads, infinities, denormals and negative zeros among them."""
    model = model_of_rows(dtype, data.draw(st.sampled_from([1, 3, 8])), moved)
    shape = st.tuples(st.integers(0, 9), st.just(model.d))
    check(model, data.draw(hnp.arrays(np.dtype(f"u{model.split.n_bits // 8}"), shape)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_blocks_of_four_messages_and_every_split(dtype):
    x = (correlated(1400, 12) * np.exp2(np.arange(1400) % 9)[:, None]).astype(dtype)
    rows, n_exponent = words_of(x), EXPONENT[dtype]
    n_bits = 8 * x.itemsize
    for n_key in (2, n_exponent, n_exponent + 2, n_exponent + 5):
        for log2_unit in (None, 0, 2):
            if log2_unit is None or log2_unit < n_key - 1:
                model = WordModel._of_split(rows, Split(n_bits, n_bits - n_key, log2_unit), 1400)
                check(model, rows)
                check(model, rows[:5])


def test_long_plain_bits():
    """More than 32 plain bits a number, and words without a key of theirs."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**64, (40, 5), np.uint64)
    model = WordModel._of_split(x[:3], Split(64, 60, None), 40)
    check(model, x)
    check(WordModel._of_split(x[:3], Split(64, 44, None), 40), x)


# -- what is gained --------------------------------------------------------------------------------
def test_equal_noise_costs_its_mantissa():
    """For normal numbers: 1 bit of sign, 2.1 of exponent and leading bits; the rest is noise."""
    x = np.random.default_rng(0).standard_normal((4000, 16)).astype(np.float32)
    assert size_bits(fit(x), x) < 32 - 8 - 1 + 1 + 2.55


def test_columns_and_rows_of_unequal_strength_cost_no_more():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 16))
    alike = size_bits(fit(x.astype(np.float32)), x.astype(np.float32))
    columns = (x * np.exp2(2.3 * np.arange(16) % 11)).astype(np.float32)
    rows = (x * np.exp2(rng.uniform(-4, 4, (4000, 1)))).astype(np.float32)
    assert size_bits(fit(columns), columns) < alike + 0.25
    model = fit(rows)
    assert model.split.log2_unit is not None
    assert size_bits(model, rows) < alike + 0.7  # of which a row's move takes 5 / 16 bit


def test_rounded_numbers_cost_what_is_left_of_them():
    x = np.random.default_rng(0).standard_normal((4000, 16)).astype(np.float32)
    half = x.astype(np.float16)
    wide = half.astype(np.float32)
    assert size_bits(fit(wide), wide) < size_bits(fit(half), half) + 0.1
    some = np.where(np.arange(4000)[:, None] % 4 == 0, half, x)
    saved = size_bits(fit(x), x) - size_bits(fit(some), some)
    assert saved > 0.25 * 13 - 0.3  # a quarter of the rows do without 13 bits
    counts = np.random.default_rng(0).integers(0, 50, (4000, 16)).astype(np.float64)
    assert size_bits(fit(counts), counts) < np.log2(50) + 0.1


def test_repeated_and_constant_rows_cost_next_to_nothing():
    x = np.full((5000, 8), -1.1, np.float64)
    assert size_bits(fit(x), x) < 0.1 + 64 / 5000
    x[:, 3] = np.linspace(1, 2, 5000)
    assert size_bits(fit(x), x) < 0.1 + 64 / 8 + 64 / 5000
    x = x[::10].repeat(10, axis=0)
    assert size_bits(fit(x), x) < 0.1 + 64 / 80 + 0.5


def test_a_sample_leaves_room_for_what_it_lacks():
    x = correlated(3000, 8)
    model = fit(x[:300], total_rows=3000)
    assert size_bits(model, x) < size_bits(fit(x), x) + 0.5


# -- bytes that are wrong --------------------------------------------------------------------------
MODEL = fit(correlated(50, 6))


def test_damaged_models_are_refused_or_decode_something():
    data = MODEL.to_bytes()
    block = MODEL.encode(words_of(correlated(9, 6)))
    for i in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[i // 8] ^= 1 << i % 8
        with suppress(FormatError):
            WordModel.from_bytes(bytes(wrong), 32, 6).decode(block, 9)
    for cut in range(len(data)):
        with suppress(FormatError):
            WordModel.from_bytes(data[:cut], 32, 6).decode(block, 9)


def test_damaged_blocks_are_refused_or_decode_something():
    block = MODEL.encode(words_of(correlated(9, 6)))
    for i in range(8 * len(block)):
        wrong = bytearray(block)
        wrong[i // 8] ^= 1 << i % 8
        with suppress(CorruptDataError):
            assert MODEL.decode(bytes(wrong), 9).shape == (9, 6)
    for cut in range(len(block)):
        with pytest.raises(CorruptDataError):
            MODEL.decode(block[:cut], 9)
    with pytest.raises(CorruptDataError):
        MODEL.decode(block + b"\0", 9)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ([31, 0, 0, 0], CorruptDataError),  # low bits
        ([5, 0, 0, 0], CorruptDataError),  # a key of 27 bits
        ([20, 12, 0, 0], CorruptDataError),  # unit beyond the magnitude
        ([20, 0, 0, MAX_KEYS + 1], LimitError),
        ([20, 0, 0, 2, 4095, 1, 1, 1], CorruptDataError),  # keys beyond 2^12
        ([20, 0, 0, 3, 5, 1, 0, 2], CorruptDataError),  # keys that do not ascend
        ([20, 0, 0, 2, 5, 1, 4, 1], CorruptDataError),  # tables of other alphabets
    ],
)
def test_lying_models(fields, error):
    tables = MODEL.symbols.to_bytes()
    with pytest.raises(error):
        WordModel.from_bytes(b"".join(map(number, fields)) + tables, 32, 6)


def test_models_of_another_width_or_size_of_words():
    data = MODEL.to_bytes()
    for n_bits, d in ((32, 5), (32, 7), (16, 6), (64, 6)):
        with pytest.raises(CorruptDataError):
            WordModel.from_bytes(data, n_bits, d)


# -- odd shapes ------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 50_000), (3, 20_000), (80, 9000), (20_000, 1)])
def test_wide_and_narrow_tables_are_no_trouble(shape):
    """Few rows tell nothing about columns, and one column makes no row: tables are shared."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = fit(x)
    assert len(model.symbols.levels) <= 3
    assert size_bits(model, x) < 26.7
    np.testing.assert_array_equal(model.decode(model.encode(words_of(x)), shape[0]), words_of(x))
