"""The latent coder: what goes in comes out as exact integers, whatever the tile's shape."""

import numpy as np
import pytest

from polarpack.errors import CorruptDataError, InputError
from polarpack_image import _coder_kernels as kernels
from polarpack_image import weights
from polarpack_image.bitstream import Quantizer
from polarpack_image.codec import default_codec
from polarpack_image.coder import LatentCoder, blank, logistic_tables

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
def test_machines_and_rounds(n_states):
    coder = default_codec().coder(Quantizer(n_states))
    y = latent(6, 8, 12.0)
    sizes, errors = [], []
    for rounds in (1, 2):
        messages, recon = coder.encode(y, [N_HEADS], rate_weight=0.4, rounds=rounds)
        assert (coder.decode(messages, [N_HEADS], 6, 8) == recon).all()
        sizes.append(len(messages[0][0]))
        errors.append(float(((recon / 16 - y) ** 2).mean()))
    assert sizes[1] < 1.05 * sizes[0] and errors[1] < 1.1 * errors[0]


def test_a_coder_that_learned_nothing_works_too():
    coder = LatentCoder(blank(16), n_states=8)
    y = latent(4, 5, 30.0)[:, :, :16]
    messages, recon = coder.encode(y, [2], rate_weight=0.4)
    assert (coder.decode(messages, [2], 4, 5) == recon).all()


def test_the_size_is_the_models_cross_entropy(coder):
    """Range coding costs next to nothing above the probabilities: an incompressible sign a
    coefficient is the floor, and large indices cost about the logarithm of their range."""
    y = np.sign(latent(12, 12, 1.0)) * 40
    messages, _ = coder.encode(y, [N_HEADS], rate_weight=0.0)
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


def test_more_weight_on_the_rate_takes_fewer_bytes(coder):
    y = latent(8, 8, 10.0)
    sizes = [len(coder.encode(y, [N_HEADS], rate_weight=w)[0][0][0]) for w in (0.0, 0.4, 1.5)]
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
