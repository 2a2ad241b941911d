"""Models: any symbols code and decode under each, models are stored and read back, and hostile
bytes end in a FormatError or in symbols of the alphabet."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_range_coder import Writer

from polarpack.entropy import (
    AdaptiveModel,
    StaticModel,
    UniformModel,
    cdf_from_counts,
    choose_model,
    decode_blocks,
    encode_blocks,
    model_from_bytes,
    model_to_bytes,
)
from polarpack.entropy import _block_kernels as kernels
from polarpack.entropy import model as models
from polarpack.entropy._numbers import Reader, fold, number, runs, unfold
from polarpack.entropy._tables import (
    PREDICTIONS,
    RESOLUTIONS,
    differences,
    level_weights,
    levels_from_counts,
    levels_from_differences,
)
from polarpack.errors import CorruptDataError, FormatError, InputError, LimitError

Array = np.ndarray[Any, Any]


def skewed_symbols(rng: np.random.Generator, n: int, sizes: Array) -> Array:
    """(n, n_fields): half of all symbols near 0, the others anywhere."""
    power = np.where(rng.random((n, len(sizes))) < 0.5, 6.0, 1.0)
    return (rng.random((n, len(sizes))) ** power * sizes).astype(np.int64)


def contexts_for(rng: np.random.Generator, n_fields: int) -> Array:
    return np.array([int(rng.integers(-1, f)) if f else -1 for f in range(n_fields)])


def models_for(symbols: Array, sizes: Array, rng: np.random.Generator) -> list[Any]:
    contexts = contexts_for(rng, len(sizes))
    return [
        UniformModel(sizes),
        StaticModel.fit(symbols, sizes, per_field=True),
        StaticModel.fit(symbols, sizes, per_field=False),
        StaticModel.fit(symbols, sizes, total_rows=3 * len(symbols)),
        AdaptiveModel(sizes),
        AdaptiveModel(sizes, contexts),
        AdaptiveModel(sizes, contexts, pooled=True),
    ]


alphabets = st.lists(
    st.sampled_from([1, 2, 3, 16, 17, 255, 256, 257, 4096, 4097]) | st.integers(1, 70),
    min_size=1,
    max_size=6,
)


# CDFs


@given(
    st.lists(st.integers(0, 9) | st.integers(0, (1 << 63) - 1), min_size=1, max_size=300),
    st.integers(0, 15),
)
def test_cdf_gives_every_symbol_a_share_and_the_rest_in_proportion(counts, more_bits):
    precision = min(24, (len(counts) - 1).bit_length() + more_bits)
    cdf = cdf_from_counts(np.array(counts, np.uint64), precision)
    sizes = np.diff(cdf.astype(np.int64))
    assert cdf.dtype == np.uint32
    assert (cdf[0], cdf[-1]) == (0, 1 << precision)
    assert sizes.min() >= 1
    order = np.argsort(counts, kind="stable")
    assert (np.diff(sizes[order]) >= -1).all()  # more counts, no less a share (but for one unit)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(2, 4))
def test_cdf_costs_nearly_what_the_best_costs(counts, precision):
    """Against all tables with that total: within the cost of moving one unit per symbol."""
    c = np.array(counts)
    total = 1 << precision

    def bits(sizes: Array) -> float:
        return float(-(c * np.log2(sizes / total)).sum())

    def splits(left: int, parts: int) -> list[list[int]]:
        if parts == 1:
            return [[left]]
        return [[s, *r] for s in range(1, left - parts + 2) for r in splits(left - s, parts - 1)]

    best = min(bits(np.array(sizes)) for sizes in splits(total, len(counts)))
    ours = bits(np.diff(cdf_from_counts(c, precision).astype(np.int64)))
    assert ours <= best * 1.06 + 1e-9


def test_cdf_examples():
    assert cdf_from_counts([0, 0, 0, 0], 3).tolist() == [0, 2, 4, 6, 8]
    assert cdf_from_counts([7], 0).tolist() == [0, 1]
    assert cdf_from_counts([6, 0, 2], 4).tolist() == [0, 11, 12, 16]
    flat = np.diff(cdf_from_counts(np.ones(65536, np.int64), 24).astype(np.int64))
    assert (flat == 256).all()


@pytest.mark.parametrize(
    ("counts", "precision"), [([], 4), ([1, -1], 4), ([1.0, 2.0], 4), ([1] * 5, 2), ([1], 25)]
)
def test_cdf_refuses(counts, precision):
    with pytest.raises(InputError):
        cdf_from_counts(counts, precision)


# Round trips


@settings(max_examples=30)
@given(alphabets, st.integers(0, 70), st.integers(0, 2**32))
def test_every_model_decodes_what_it_encoded(sizes, n, seed):
    rng = np.random.default_rng(seed)
    sizes = np.array(sizes)
    fitted, other = skewed_symbols(rng, n, sizes), skewed_symbols(rng, n, sizes)
    for model in models_for(fitted, sizes, rng):
        stored = model_to_bytes(model)
        again = model_from_bytes(stored)
        assert again == model
        assert repr(again) == repr(model)
        assert model_to_bytes(again) == stored
        assert again.alphabet_sizes.tolist() == sizes.tolist()
        assert again.n_fields == len(sizes)
        for symbols in (fitted, other, np.zeros_like(fitted), fitted * 0 + sizes - 1):
            data = model.encode(symbols)
            assert again.encode(symbols.astype(np.uint16)) == data
            back = again.decode(memoryview(data), n)
            assert back.dtype == (np.uint8 if sizes.max() <= 256 else np.uint16)
            assert back.shape == (n, len(sizes))
            assert (back == symbols).all()
            assert len(data) * 8 <= model.rate_bits(symbols) * 1.001 + 16


@pytest.mark.parametrize("n", [0, 1, 3000])
def test_the_largest_alphabet(n):
    sizes = np.array([65536, 1, 65536])
    symbols = skewed_symbols(np.random.default_rng(n), n, sizes)
    symbols[: n // 3, 0] = 65535
    for model in (
        UniformModel(sizes),
        StaticModel.fit(symbols, sizes),
        AdaptiveModel(sizes),
        AdaptiveModel(sizes, [-1, 0, 0], pooled=True),
    ):
        data = model.encode(symbols)
        again = model_from_bytes(model_to_bytes(model))
        assert (again.decode(data, n) == symbols).all()
        assert len(data) * 8 <= model.rate_bits(symbols) * 1.001 + 48


def test_blocks_with_lanes():
    rng = np.random.default_rng(5)
    sizes = np.array([256] * 40 + [10] * 3)
    symbols = skewed_symbols(rng, 513, sizes)
    for model in models_for(symbols, sizes, rng):
        data = model.encode(symbols)
        assert (model.decode(data, 513) == symbols).all()
        assert len(data) * 8 <= model.rate_bits(symbols) + 64


def test_uniform_costs_the_bits_of_the_alphabet():
    model = UniformModel([256, 4, 1])
    symbols = np.random.default_rng(0).integers(0, [256, 4, 1], (1000, 3))
    assert model.rate_bits(symbols) == 10_000
    assert len(model.encode(symbols)) in (1249, 1250, 1251)
    assert len(model_to_bytes(UniformModel([1024] * 10_000))) == 7


# The adaptive model against a plain one


def plain_adaptive(symbols: Array, sizes: Array, context_of: Array, pooled: bool) -> bytes:
    writer = Writer()
    trees: dict[Any, dict[Any, list[int]]] = {}
    for field, k in enumerate(sizes.tolist()):
        n_bits = max(1, (k - 1).bit_length())
        context = int(context_of[field])
        shift = n_trees = 0
        if context >= 0:
            shift = max(0, int(sizes[context] - 1).bit_length() - 4)
            n_trees = (int(sizes[context]) - 1 >> shift) + 1
        nodes = trees.setdefault((k, max(1, n_trees)) if pooled else field, {})
        for row in range(len(symbols)):
            if row % 1024 == 0:
                for counts in nodes.values():
                    if sum(counts) > 0x7FFF - 8 * 1024:
                        counts[:] = [c - c // 2 for c in counts]
            tree = int(symbols[row, context]) >> shift if context >= 0 else 0
            left = n_bits
            while left:
                width = (left - 1) % 4 + 1
                prefix = int(symbols[row, field]) >> left
                left -= width
                branch = int(symbols[row, field]) >> left & (1 << width) - 1
                if (tree, left, prefix) not in nodes:
                    first = [(prefix << width | b) << left for b in range(1 << width)]
                    nodes[tree, left, prefix] = [4 if s < k else 0 for s in first]
                counts = nodes[tree, left, prefix]
                writer.put(sum(counts[:branch]), counts[branch], sum(counts))
                counts[branch] += 8
    return writer.finish()


@settings(max_examples=30)
@given(alphabets, st.integers(0, 60), st.integers(0, 2**32), st.booleans())
def test_adaptive_equals_a_plain_one(sizes, n, seed, pooled):
    rng = np.random.default_rng(seed)
    sizes = np.array(sizes)
    symbols = skewed_symbols(rng, n, sizes)
    contexts = contexts_for(rng, len(sizes))
    model = AdaptiveModel(sizes, contexts, pooled=pooled)
    assert model.encode(symbols) == plain_adaptive(symbols, sizes, contexts, pooled)


def test_adaptive_counts_are_halved_alike():
    rng = np.random.default_rng(1)
    sizes = np.array([5, 40, 5])
    symbols = skewed_symbols(rng, 7000, sizes)  # a count passes 24575 twice
    symbols[3000:, 0] = 4
    contexts = np.array([-1, 0, -1])
    model = AdaptiveModel(sizes, contexts, pooled=True)
    data = model.encode(symbols)
    assert data == plain_adaptive(symbols, sizes, contexts, True)
    assert (model.decode(data, 7000) == symbols).all()


def test_adaptive_reaches_the_entropy():
    rng = np.random.default_rng(2)
    pmf = np.array([0.6, 0.25, 0.1, 0.05])
    symbols = rng.choice(4, (20_000, 1), p=pmf)
    entropy = -(pmf * np.log2(pmf)).sum() * 20_000
    assert len(AdaptiveModel([4]).encode(symbols)) * 8 < entropy * 1.01


def test_context_pays_where_fields_depend():
    rng = np.random.default_rng(3)
    a = rng.integers(0, 16, 4000)
    symbols = np.stack([a, (a + rng.integers(0, 2, 4000)) % 16], axis=1)
    alone, given_a = AdaptiveModel([16, 16]), AdaptiveModel([16, 16], [-1, 0])
    assert given_a.rate_bits(symbols) < 0.7 * alone.rate_bits(symbols)
    assert kernels.INCREMENT * kernels.SETTLE_EVERY + kernels.SETTLED < 1 << 15


# Static tables


def test_level_weights_are_powers_of_two_everywhere():
    for resolution in RESOLUTIONS:
        weights = level_weights(resolution)
        ideal = 2.0 ** (37 - np.arange(255) / resolution)
        assert (weights[1:] == np.floor(ideal + 1e-4)).mean() > 0.99
        assert weights[0] == 0
    assert level_weights(16)[[1, 2, 16, 17, 255]].tolist() == [
        137438953472, 131611992740, 71761947897, 68719476736, 2286960,
    ]  # fmt: skip


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.sampled_from(RESOLUTIONS))
def test_levels_are_the_nearest(counts, resolution):
    counts = np.array(counts)
    levels = levels_from_counts(counts, resolution)
    assert ((levels == 0) == (counts == 0)).all()
    seen = counts > 0
    if seen.any():
        octaves = np.minimum(np.log2(counts.max() / counts[seen]), 254 / resolution)
        assert np.abs((levels[seen] - 1.0) / resolution - octaves).max() <= 0.5 / resolution + 1e-9


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5))
def test_predictions_are_undone(tables):
    levels = [np.frombuffer(t, np.uint8) for t in tables]
    sizes = np.array([t.size for t in levels])
    for prediction in PREDICTIONS:
        back = levels_from_differences(differences(levels, prediction), sizes, prediction)
        assert [t.tolist() for t in back] == [t.tolist() for t in levels]


def test_pooling_shares_tables_where_that_is_cheaper():
    rng = np.random.default_rng(4)
    alike = rng.binomial(63, 0.2, (2000, 24))
    sizes = np.full(24, 64)
    model = StaticModel.fit(alike, sizes)
    assert len(model.levels) == 1
    unlike = alike.copy()
    unlike[:, 8:16] = 63 - unlike[:, 8:16]
    unlike[:, 16:] = rng.integers(0, 64, (2000, 8))
    pooled = StaticModel.fit(unlike, sizes)
    assert len(pooled.levels) in (3, 4)
    assert len(set(pooled.table_of[:8])) == len(set(pooled.table_of[8:16])) == 1

    def total(model: StaticModel) -> float:
        return len(model.to_bytes()) + model.rate_bits(unlike) / 8

    assert total(pooled) < total(StaticModel.fit(unlike, sizes, per_field=True))
    assert total(pooled) < total(StaticModel.fit(unlike, sizes, per_field=False))


def test_tables_are_stored_in_few_bytes():
    rng = np.random.default_rng(6)
    symbols = np.clip(rng.normal(128, 20, (100_000, 1)), 0, 255).astype(np.int64)
    model = StaticModel.fit(symbols, [256])
    counts = np.bincount(symbols[:, 0], minlength=256)
    seen = counts[counts > 0]
    entropy = -(seen * np.log2(seen / 100_000)).sum()
    assert len(model.to_bytes()) < 160
    assert model.rate_bits(symbols) < entropy * 1.001


def test_a_sample_leaves_room_for_what_it_lacks():
    rng = np.random.default_rng(7)
    pmf = 1.0 / np.arange(1, 301)
    sample, rest = (rng.choice(300, (n, 1), p=pmf / pmf.sum()) for n in (300, 20_000))
    exact = StaticModel.fit(sample, [300])
    careful = StaticModel.fit(sample, [300], total_rows=20_300)
    assert careful.rate_bits(rest) < 0.85 * exact.rate_bits(rest)


def test_fit_in_each_range_of_counts():
    for symbols in (np.zeros((0, 2), int), np.zeros((5, 2), int), np.full((5, 2), 2)):
        model = StaticModel.fit(symbols, [3, 3])
        assert (model.decode(model.encode(symbols), len(symbols)) == symbols).all()


def test_static_refuses():
    one = np.ones(4, np.uint8)
    with pytest.raises(InputError, match="resolution"):
        StaticModel([4], [one], [0], resolution=3)
    with pytest.raises(InputError, match="first use"):
        StaticModel([4, 4], [one, one], [1, 0])
    with pytest.raises(InputError, match="alphabet size"):
        StaticModel([4, 5], [one], [0, 0])
    with pytest.raises(InputError, match="one level per symbol"):
        StaticModel([5], [one], [0])
    with pytest.raises(LimitError):
        StaticModel([65536] * 65, [np.ones(65536, np.uint8)] * 65, range(65))


# Choosing


def test_choice_by_the_data():
    rng = np.random.default_rng(8)
    noise = rng.integers(0, 256, (2000, 8))
    assert isinstance(choose_model(noise, [256] * 8, 512), UniformModel)
    skewed = rng.binomial(255, 0.3, (20_000, 8))
    assert isinstance(choose_model(skewed, [256] * 8, 512), StaticModel)
    drifting = rng.binomial(15, np.repeat([[0.1], [0.9], [0.4], [0.7]], 2000, axis=0), (8000, 3))
    assert isinstance(choose_model(drifting, [16] * 3, 2000), AdaptiveModel)
    a = rng.integers(0, 8, 8000)
    dependent = np.stack([rng.integers(0, 3, 8000), a, 7 - a], axis=1)
    chosen = choose_model(dependent, [3, 8, 8], 4000)
    assert isinstance(chosen, AdaptiveModel)
    assert chosen.context_of.tolist() == [-1, -1, 1]
    assert isinstance(choose_model(noise[:0], [256] * 8, 512), UniformModel)


def test_choice_is_the_cheapest_in_bytes():
    rng = np.random.default_rng(9)
    sizes = np.array([64, 16, 16])
    symbols = skewed_symbols(rng, 3000, sizes)
    candidates = [*models_for(symbols, sizes, rng), choose_model(symbols, sizes, 700)]
    starts = range(0, 3000, 700)
    costs = [len(model_to_bytes(m)) + sum(map(len, encode_blocks(m, symbols, starts)))
             for m in candidates]  # fmt: skip
    assert costs[-1] <= min(costs) * 1.002


def test_large_alphabets_have_no_adaptive_candidate():
    symbols = np.zeros((4, 300), np.int64)
    assert choose_model(symbols, [65536] * 300, 2).n_fields == 300


def test_a_sample_is_not_trusted_with_large_tables():
    """Uniform noise in a small sample looks skewed; tables fitted on it would cost the rest."""
    sample = np.random.default_rng(10).integers(0, 256, (400, 4))
    assert isinstance(choose_model(sample, [256] * 4, 256, total_rows=10**6), UniformModel)


# Blocks


@pytest.mark.parametrize("threads", [None, 1, 4])
def test_parallel_equals_serial(threads):
    rng = np.random.default_rng(11)
    sizes = np.array([256] * 10)
    symbols = skewed_symbols(rng, 2500, sizes)
    starts, counts = [0, 512, 512, 1024, 1536, 2048], [512, 0, 512, 512, 512, 452]
    for model in models_for(symbols, sizes, rng):
        parts = encode_blocks(model, symbols, starts, threads=threads)
        assert parts == [
            model.encode(symbols[a : a + n]) for a, n in zip(starts, counts, strict=True)
        ]
        back = decode_blocks(model, parts, counts, threads=threads)
        assert back.dtype == np.uint8
        assert (back == symbols).all()


def test_no_blocks():
    model = UniformModel([7])
    assert decode_blocks(model, [], []).shape == (0, 1)
    assert encode_blocks(model, np.zeros((0, 1), int), [0]) == [b""]
    for starts in ([1], [0, 3, 2], [0, 9]):
        with pytest.raises(InputError):
            encode_blocks(model, np.zeros((4, 1), int), starts)
    with pytest.raises(InputError):
        decode_blocks(model, [b""], [])


# Refusals and hostile bytes


@pytest.mark.parametrize(
    "symbols",
    [np.array([[3, 0]]), np.array([[-1, 0]]), np.zeros((2, 3), int), np.zeros(2, int), [[0.5, 0]]],
)
def test_symbols_outside_are_refused(symbols):
    for model in (UniformModel([3, 4]), AdaptiveModel([3, 4])):
        with pytest.raises(InputError):
            model.encode(np.asarray(symbols))


@pytest.mark.parametrize("sizes", [[], [0], [65537], [2.5], [[3]], [-4]])
def test_alphabets_are_checked(sizes):
    for kind in (UniformModel, AdaptiveModel):
        with pytest.raises(InputError):
            kind(sizes)


def test_contexts_are_checked():
    for contexts in ([0, 0], [-1, 1], [-2, 0], [-1]):
        with pytest.raises(InputError):
            AdaptiveModel([3, 3], contexts)


def some_models() -> list[Any]:
    rng = np.random.default_rng(12)
    sizes = np.array([5, 5, 300, 2])
    return models_for(skewed_symbols(rng, 200, sizes), sizes, rng)


def test_cut_models():
    for model in some_models():
        data = model_to_bytes(model)
        for cut in range(len(data)):
            try:
                again = model_from_bytes(data[:cut])  # levels cut short read on as zeros
            except FormatError:
                continue
            assert isinstance(model, StaticModel)
            assert again.n_fields == model.n_fields


def test_flipped_models():
    for model in some_models():
        data = bytearray(model_to_bytes(model))
        for bit in range(8 * min(len(data), 60)):
            data[bit // 8] ^= 1 << bit % 8
            try:
                again = model_from_bytes(bytes(data))
                assert (again.decode(b"\x5a\xa5" * 9, 3) < again.alphabet_sizes).all()
            except FormatError:
                pass
            data[bit // 8] ^= 1 << bit % 8


@settings(max_examples=300)
@given(st.sampled_from([0, 1, 2, 3, 4]), st.lists(st.integers(0, 40), max_size=12), st.binary())
def test_any_model_bytes(kind, leading, trailing):
    try:
        model = model_from_bytes(bytes([kind, *leading]) + trailing)
    except FormatError:
        return
    symbols = model.decode(trailing, 5)
    assert (symbols < model.alphabet_sizes).all()
    assert model_from_bytes(model_to_bytes(model)) == model


def test_what_goes_beyond_the_limits():
    many = number(models.MAX_FIELDS + 1)
    wide = number(1) + number(models.MAX_ALPHABET + 1) + number(1)
    entries = number(100) + runs(np.full(100, 65536)) + number(0) + number(100)
    nodes = number(1000) + runs(np.full(1000, 65536)) + number(0) + number(0) + number(1000)
    sizes = np.arange(1, 4000)
    flat = number(sizes.size) + runs(sizes)
    for data in (b"\1" + many, b"\1" + wide, b"\2" + entries, b"\3" + nodes, b"\1" + flat):
        with pytest.raises(LimitError):
            model_from_bytes(data)
    with pytest.raises(LimitError):
        UniformModel([256] * 64).decode(b"", models.MAX_BLOCK_SYMBOLS // 64 + 1)
    with pytest.raises(LimitError):
        UniformModel([256]).decode(b"", -1)


@pytest.mark.parametrize(
    "data",
    [
        b"",  # no kind
        b"\0\1\5\1",  # unknown kind
        b"\1\0",  # no fields
        b"\1\2\5\1",  # runs end early
        b"\1\2\5\3",  # runs too long
        b"\1\2\5\1\5\1",  # run that goes on as the next
        b"\1\2\5\0\6\2",  # empty run
        b"\1\1\0\1",  # empty alphabet
        b"\1\1\5\1\0",  # bytes behind the end
        b"\1\1\x85\0\1",  # number longer than needed
        b"\1\xff\xff\xff\xff\xff\xff",  # number too long
        b"\2\1\5\1\5\1",  # resolution
        b"\2\1\5\1\0\0",  # no tables
        b"\2\1\5\1\0\2",  # more tables than fields
        b"\2\2\5\1\6\1\0\1",  # one table for unequal alphabets
        b"\2\1\5\1\0\1\3",  # prediction
        b"\2\3\5\3\0\2\0\0",  # map uses table 0 only
        b"\2\3\5\3\0\2\x09\0",  # map cut short
        b"\3\1\5\1\2\0\1",  # pooling
        b"\3\1\5\1\0\1\1",  # context before the first field
    ],
)
def test_corrupt_models(data):
    with pytest.raises(CorruptDataError):
        model_from_bytes(data)


def test_corrupt_lanes():
    model = UniformModel([256])
    symbols = np.random.default_rng(13).integers(0, 256, (20_000, 1))
    data = model.encode(symbols)
    for cut in (0, 1, 2, 4000):
        with pytest.raises(CorruptDataError):
            model.decode(data[:cut], 20_000)
    with pytest.raises(FormatError):
        model.decode(b"\xff" * 4 + b"\x0f" + data, 20_000)
    with pytest.raises(CorruptDataError):
        model.decode(number(5) + number(fold(-6)) + data, 20_000)


def test_only_known_models_are_stored():
    class Other(UniformModel):
        pass

    with pytest.raises(InputError):
        model_to_bytes(Other([4]))
    assert UniformModel([4]) != AdaptiveModel([4])
    assert len({UniformModel([4]), UniformModel([4]), AdaptiveModel([4])}) == 2


@given(st.integers(0, (1 << 35) - 1), st.integers(-(10**6), 10**6))
def test_numbers(value, signed):
    reader = Reader(number(value) + number(fold(signed)), "test")
    assert reader.number(1 << 35) == value
    assert unfold(reader.number(1 << 35)) == signed
    reader.end()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_runs(values):
    assert Reader(runs(np.array(values)), "test").runs(len(values), 3).tolist() == values


def test_importing_entropy_loads_no_numba():
    script = (
        "import sys, polarpack.entropy as e; "
        "e.UniformModel([3]).to_bytes(); "
        "assert 'numba' not in sys.modules; "
        "assert all(hasattr(e, name) for name in e.__all__)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
