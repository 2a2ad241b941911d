"""The latent coder: what goes in comes out as exact integers, whatever the tile's shape."""

import numpy as np
import pytest

from polarpack.errors import CorruptDataError, InputError
from polarpack_image import _coder_kernels as kernels
from polarpack_image import _search_kernels as search
from polarpack_image import fitting, weights
from polarpack_image.bitstream import Quantizer
from polarpack_image.codec import default_codec
from polarpack_image.coder import LatentCoder, blank, blank_polar, logistic_tables

N_CHANNELS = default_codec().transform.n_channels
N_HEADS = N_CHANNELS // 8


def latent(rows, columns, scale, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.laplace(size=(rows, columns, N_CHANNELS)) * scale / (1 + np.arange(N_CHANNELS) / 4)
    return y.astype(np.float32)


@pytest.fixture(scope="module")
def coder():
    return default_codec().coder()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 9)])
@pytest.mark.parametrize("scale", [0.0, 2.0, 300.0])
def test_round_trip(coder, shape, scale):
    y = latent(*shape, scale)
    messages, recon = coder.encode(y, [1, 6, N_HEADS], rate_weight=0.4)
    assert (coder.decode(messages, [1, 6, N_HEADS], *shape) == recon).all()
    assert np.abs(recon / 16 - y).max() < 4.5  # a zero costs least near zero; else half a step


@pytest.mark.parametrize("n_states", [1, 4, 8])
def test_machines_and_efforts(n_states):
    coder = default_codec().coder(Quantizer(n_states))
    y = latent(12, 16, 12.0)
    costs = []
    for effort in (1, 2, 3):
        messages, recon = coder.encode(y, [N_HEADS], rate_weight=0.4, effort=effort)
        assert (coder.decode(messages, [N_HEADS], 12, 16) == recon).all()
        costs.append(0.4 * 8 * len(messages[0][0]) + float(((recon / 16 - y) ** 2).sum()))
    assert costs[2] <= costs[0] and costs[1] < 1.01 * costs[0]


@pytest.mark.parametrize("n_states", [1, 4, 8])
def test_the_search_finds_the_cheapest_path(n_states):
    """Through one head, against all paths over the indices nearby."""
    tables = default_codec().coder(Quantizer(n_states))._tables_for(1, 1)
    rng = np.random.default_rng(n_states)
    trellis = search.blank_trellis(1, 1, n_states)
    search.begin_row(trellis, 0)
    search.enter_head(trellis, np.float32(0), 0, n_states)
    trellis.left[:] = rng.normal(size=8) * 3
    trellis.left[5] = 0
    trellis.rates[:] = np.cumsum(rng.random((8, 2, 5)), axis=2)
    worth = np.float32(2.5)
    for j in range(8):
        search.advance(tables, trellis, j, worth, trellis.back[0, 0], trellis.taken[0, 0])
    paths = [(0, 0.0)]  # state, cost
    for v, rates in zip(np.abs(trellis.left).tolist(), trellis.rates.tolist(), strict=True):
        longer = []
        for state, cost in paths:
            odd = int(tables.quantizer[state])
            near = int((v + odd) / 2)
            for k in {0, near, near + 1} if v else {0}:
                rate = rates[odd][k] if k < 4 else rates[odd][3] + (k - 3) * rates[odd][4]
                error = v - max(2 * k - odd, 0)
                longer.append((tables.next_state[state, k & 1], cost + 2.5 * error**2 + rate))
        paths = longer
    for end in range(n_states):
        least = min(cost for state, cost in paths if state == end)
        assert trellis.inner[0, end] == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("quantizer", [Quantizer.POLAR, Quantizer.POLAR_DQ8])
def test_polar_heads(quantizer):
    """Radii and codewords come back; what they cannot say, a remainder does."""
    coder = default_codec().coder(quantizer)
    assert coder.decode([], [N_HEADS], 2, 3).shape == (2, 3, N_CHANNELS)
    for scale in (0.0, 8.0, 300.0, 1e9):
        y = latent(5, 9, scale)
        messages, recon = coder.encode(y, [1, 6, N_HEADS], rate_weight=0.4)
        assert (coder.decode(messages, [1, 6, N_HEADS], 5, 9) == recon).all()
        assert np.abs(recon).max() <= 1 << 21
        if scale < 1e9:
            error = ((recon / 16 - y) ** 2).mean()
            assert error < (0.02 if quantizer == Quantizer.POLAR else 0.004) * scale**2 + 0.4
    (first, check), *others = messages
    for broken in (b"", first[::-1], b"\xff" * 999):  # radii without end
        with pytest.raises(CorruptDataError, match="heads 0..0: checksum"):
            coder.decode([(broken, check), *others], [1, 6, N_HEADS], 5, 9)


def test_the_switch_takes_directions_where_they_are_cheaper():
    """Vectors that are codewords: radius and codeword cost less than eight indices."""
    coder = default_codec().coder(Quantizer.POLAR_DQ8)
    rng = np.random.default_rng(0)
    words = coder.arrays["switch.codebook"][3, 0] / 4096
    y = np.zeros((16, 16, N_CHANNELS), np.float32)
    y[:, :, 24:32] = 2.5 * rng.integers(3, 9, (16, 16, 1)) * words[rng.integers(0, 64, (16, 16))]
    sizes = {}
    for quantizer in (Quantizer.DQ8, Quantizer.POLAR_DQ8):
        coder = default_codec().coder(quantizer)
        messages, recon = coder.encode(y, [N_HEADS], rate_weight=0.4)
        sizes[quantizer] = len(messages[0][0]) * 8 + ((recon / 16 - y) ** 2).sum() / 0.4
    assert sizes[Quantizer.POLAR_DQ8] < 0.9 * sizes[Quantizer.DQ8]


def test_polar_heads_learn_what_there_is():
    """Vectors of 64 directions: fitted codebooks and counters code them with fewer bits, better."""
    rng = np.random.default_rng(0)
    words = rng.normal(size=(64, 8))
    words /= np.sqrt((words**2).sum(axis=1, keepdims=True))
    arrays = blank(16)

    def sample():
        y = np.zeros((24, 24, 16), np.float32)
        y[:, :, 8:] = 80 * rng.integers(1, 4, (24, 24, 1)) * words[rng.integers(0, 64, (24, 24))]
        return y

    own = fitting.fit_polar(arrays, [sample() for _ in range(4)], Quantizer.POLAR)
    assert own["polar.codebook"].shape[0] == 2
    y = sample() / np.float32(20)
    costs = []
    for part in (own, blank_polar(arrays, *untrained(own), 40, Quantizer.POLAR)):
        coder = LatentCoder(arrays | part, quantizer=Quantizer.POLAR)
        messages, recon = coder.encode(y, [2], rate_weight=0.3)
        costs.append(8 * len(messages[0][0]) * 0.3 + ((recon / 16 - y) ** 2).sum())
    assert costs[0] < 0.7 * costs[1]


def untrained(own):
    """A random codebook with the same stages."""
    book = np.random.default_rng(1).normal(size=own["polar.codebook"].shape)
    book *= 4096 / np.sqrt((book**2).sum(axis=3, keepdims=True))
    book *= 0.6 ** np.arange(book.shape[1])[:, None, None]
    return book.astype(np.int16), own["polar.depth"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"codebook": np.zeros((1, 1, 63, 8), np.int16)},
        {"codebook": np.zeros((1, 2, 64, 8), np.int16)},
        {"depth": np.full((1, 1), 2, np.int16)},
        {"spacing": np.zeros(1, np.int16)},
        {"probabilities": np.zeros(5, np.uint16)},
        {"weights": np.zeros((5, 8), np.int32)},
    ],
)
def test_polar_arrays_that_do_not_fit(wrong):
    arrays = blank(16)
    with pytest.raises(InputError, match="POLAR_DQ8"):
        LatentCoder(arrays, quantizer=Quantizer.POLAR_DQ8)
    book = np.zeros((1, 1, 64, 8), np.int16)
    own = blank_polar(arrays, book, np.ones((1, 1), np.int16), 40, Quantizer.POLAR_DQ8)
    LatentCoder(arrays | own, quantizer=Quantizer.POLAR_DQ8)
    own |= {f"switch.{name}": array for name, array in wrong.items()}
    with pytest.raises(InputError, match="POLAR_DQ8"):
        LatentCoder(arrays | own, quantizer=Quantizer.POLAR_DQ8)


def test_a_coder_that_learned_nothing_works_too():
    coder = LatentCoder(blank(16))
    y = latent(4, 5, 30.0)[:, :, :16]
    messages, recon = coder.encode(y, [2], rate_weight=0.4)
    assert (coder.decode(messages, [2], 4, 5) == recon).all()


def test_the_size_is_the_models_cross_entropy(coder):
    """Range coding costs next to nothing above the probabilities: an incompressible sign a
    coefficient is the floor, and large indices cost about the logarithm of their range."""
    y = np.sign(latent(12, 12, 1.0)) * 40
    messages, _ = coder.encode(y, [N_HEADS], rate_weight=1e-6)
    assert len(messages[0][0]) * 8 > y.size


def test_extreme_coefficients_do_not_overflow(coder):
    y = np.full((3, 4, N_CHANNELS), 1e9, np.float32)
    y[::2] *= -1
    messages, recon = coder.encode(y, [N_HEADS], rate_weight=0.4)
    assert (coder.decode(messages, [N_HEADS], 3, 4) == recon).all()
    assert np.abs(recon).max() < 1 << 21


def test_wrong_bytes_are_named(coder):
    messages, _ = coder.encode(latent(5, 6, 20.0), [1, N_HEADS], rate_weight=0.4)
    (first, check), second = messages
    for broken in (b"", bytes(len(first)), first[:-3], first[::-1], b"\xff" * 999):
        with pytest.raises(CorruptDataError, match="heads 0..0: checksum"):
            coder.decode([(broken, check), second], [1, N_HEADS], 5, 6)


def test_fewer_messages_are_a_coarse_tile(coder):
    y = latent(5, 6, 20.0)
    messages, recon = coder.encode(y, [1, N_HEADS], rate_weight=0.4)
    coarse = coder.decode(messages[:1], [1, N_HEADS], 5, 6)
    assert (coarse[:, :, :8] == recon[:, :, :8]).all()
    assert not (coarse == recon).all()
    # the rest is what taps predict, edges repeated; a plain twin for the second head
    padded = np.pad(coarse, ((2, 2), (2, 2), (0, 0)), "edge").astype(np.int64)
    expected = np.full((5, 6, 8), 1 << 11)
    for channel, source, dy, dx, weight in coder.arrays["mean_taps"].tolist():
        if 8 <= channel < 16:
            expected[:, :, channel - 8] += weight * padded[2 + dy :, 2 + dx :, source][:5, :6]
    assert (coarse[:, :, 8:16] == expected >> 12).all() and (coarse[:, :, 8:16] != 0).any()
    assert (coder.decode([], [1, N_HEADS], 5, 6) == 0).all()


def test_more_weight_on_the_rate_takes_fewer_bytes(coder):
    y = latent(8, 8, 10.0)
    sizes = [len(coder.encode(y, [N_HEADS], rate_weight=w)[0][0][0]) for w in (1e-6, 0.4, 1.5)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_tables_come_from_the_weights():
    """They are rounded logarithms: decoding must not ask this machine's library for them."""
    shipped = default_codec().coder().arrays
    for name, table in logistic_tables().items():
        assert np.abs(shipped[name].astype(int) - table).max() <= 1, name
        for wrong in (table[:-1], np.full(table.shape, -3000, np.int16)):
            with pytest.raises(InputError, match=name):
                LatentCoder(blank(16) | {name: wrong})


@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("mean_taps", (0, 8, 0, 0, 1)),  # a later head
        ("mean_taps", (3, 2, 0, 0, 1)),  # the same position
        ("mean_taps", (3, 2, 1, 0, 1)),  # the row below
        ("magnitude_taps", (3, 3, 0, 0, 1)),  # itself
        ("magnitude_taps", (9, 1, 3, 0, 1)),  # too far
        ("head_taps", (1, 1, 0, 1, 1)),  # on the right
    ],
)
def test_taps_reach_only_what_is_decoded(name, tap):
    arrays = blank(16) | {name: np.array([tap], np.int16)}
    with pytest.raises(InputError, match=name):
        LatentCoder(arrays)


def test_shipped_weights_are_small_and_named_by_their_hash():
    arrays, name = weights.load()
    assert weights.DEFAULT.stat().st_size <= 20 << 20
    assert len(name) == weights.HASH_BYTES
    assert arrays["coder.weights"].shape[1] == kernels.N_INPUTS
