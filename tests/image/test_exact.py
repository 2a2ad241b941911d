"""Integer networks: equal to int64 arithmetic on every path, bounds checked, exports faithful."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polarpack.errors import FormatError
from polarpack_image.exact import (
    EXACT_FLOAT32,
    ContextNetwork,
    HeadPredictor,
    IntegerLayer,
    PostFilter,
    companding_table,
    companding_thresholds,
    features,
    shuffled,
    step_feature,
    unshuffled,
)
from polarpack_image.networks import ContextModel, IntegerConv, companded, set_integer
from polarpack_image.networks import PostFilter as TrainedPostFilter


def layer_of(rng, k, n_in, n_out, largest=255, low=0, high=255):
    """A random layer that uses much of the exact range."""
    top = 127 if k < 5 else 50
    weight = rng.integers(-top, top + 1, (k, k, n_in, n_out)).astype(np.int8)
    bias = rng.integers(-100_000, 100_000, n_out).astype(np.int32)
    shift = rng.integers(0, 16, n_out).astype(np.uint8)
    return IntegerLayer(weight, bias, shift, low, high, largest)


def in_int64(layer, x):
    """The plain twin: loops over the kernel, int64 sums."""
    k = layer.weight.shape[0]
    x = np.pad(x.astype(np.int64), ((k // 2, k // 2), (k // 2, k // 2), (0, 0)), "edge")
    rows, columns = x.shape[0] - k + 1, x.shape[1] - k + 1
    total = np.zeros((rows, columns, layer.weight.shape[3]), np.int64) + layer.bias
    for dy in range(k):
        for dx in range(k):
            for c in range(layer.weight.shape[2]):
                seen = x[dy : dy + rows, dx : dx + columns, c, None]
                total += seen * layer.weight[dy, dx, c].astype(np.int64)
    shift = layer.shift.astype(np.int64)
    return np.clip((total + ((1 << shift) >> 1)) >> shift, layer.low, layer.high)


@settings(max_examples=30, deadline=None)
@given(
    k=st.sampled_from([1, 3, 5]),
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 9),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_layers_equal_int64(k, n_in, n_out, rows, columns, seed):
    rng = np.random.default_rng(seed)
    layer = layer_of(rng, k, n_in, n_out, low=-(1 << 23), high=1 << 23)
    x = rng.integers(-255, 256, (rows, columns, n_in)).astype(np.float32)
    expected = in_int64(layer, x)
    np.testing.assert_array_equal(layer(x), expected)
    in_torch = layer.in_torch(torch.from_numpy(x.transpose(2, 0, 1).copy())[None])
    np.testing.assert_array_equal(in_torch[0].permute(1, 2, 0), expected)


def test_the_bound_is_tight_and_checked():
    """Sums just under 2**24 are exact in every order; a layer that could pass it is refused."""
    n = EXACT_FLOAT32 // (255 * 127)
    weight = np.full((1, 1, n, 1), 127, np.int8)
    layer = IntegerLayer(weight, np.zeros(1, np.int32), np.zeros(1, np.uint8), 0, 1 << 24, 255)
    assert EXACT_FLOAT32 - 255 * 127 < layer.bound() < EXACT_FLOAT32
    x = np.full((1, 1, n), 255, np.float32)
    for order in (np.arange(n), np.random.default_rng(0).permutation(n)):
        assert layer(x[..., order])[0, 0, 0] == 255 * 127 * n
    with pytest.raises(FormatError, match="not exact in float32"):
        IntegerLayer(
            np.concatenate([weight, weight[:, :, :1]], 2), *(layer.bias, layer.shift), 0, 255, 255
        )
    with pytest.raises(FormatError, match="not exact in float32"):  # the bias counts too
        IntegerLayer(weight, np.full(1, 255 * 127, np.int32), layer.shift, 0, 255, 255)
    with pytest.raises(FormatError, match="do not fit together"):
        IntegerLayer(weight, np.zeros(2, np.int32), layer.shift, 0, 255, 255)


@pytest.fixture(scope="module")
def network():
    """A context network with a hyper-latent, random weights, and its integer form."""
    torch.manual_seed(0)
    model = ContextModel((0, 1, 4), 24, n_hyper=8)
    with torch.no_grad():
        for group in model.groups:
            group[-1].conv.weight.mul_(10)
    set_integer(model, True)
    return model, ContextNetwork(model.export())


def latent(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    size = rng.laplace(0, 60, (rows, columns, 32)) * np.exp(-np.arange(32) / 8)
    z = rng.integers(-20, 20, (-(-rows // 4), -(-columns // 4), 8))
    return np.rint(size).astype(np.int32), z.astype(np.int32)


def test_export_computes_what_training_computed(network):
    model, exact = network
    rec, z = latent(12, 8)
    mean, scale = model(
        torch.from_numpy(rec / 16).float().permute(2, 0, 1)[None],
        torch.tensor([5.0]),
        torch.from_numpy(z).float().permute(2, 0, 1)[None],
    )
    hyper = exact.hyper_features(z)
    ends = {0: (0, 8), 1: (8, 32)}
    for group, (first, after) in ends.items():
        means, levels = exact.predict(rec, group, step_feature(32 << 8), hyper)
        expected = (mean[0, first:after] * 16).permute(1, 2, 0).detach().numpy()
        np.testing.assert_array_equal(means, expected)
        expected = (scale[0, first:after] * 4 + 16).permute(1, 2, 0).detach().numpy()
        np.testing.assert_array_equal(levels, np.clip(expected, 0, 63))
    assert means.std() > 1
    assert len(np.unique(levels)) > 4


def test_the_same_on_all_threads_and_libraries(network):
    """numpy, and torch with one and two threads, oneDNN on and off, other batch orders."""
    _, exact = network
    rec, z = latent(20, 28, 1)
    reference = exact.predict(rec, 1, 40, exact.hyper_features(z))
    x = np.concatenate([features(rec[..., :8], exact.table, 40), exact.hyper_features(z)], 2)
    start = torch.from_numpy(x.transpose(2, 0, 1).copy())
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            for onednn in (True, False):
                torch.backends.mkldnn.set_flags(onednn)
                batch = torch.stack([start.flip(1), start])
                for layer in exact.layers[1]:
                    batch = layer.in_torch(batch)
                found = batch[1].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(found[..., :24], reference[0])
                # the trained module's own convolutions, with which training validates
                direct = network[0].groups[1]((start / 8)[None])[0].permute(1, 2, 0)
                np.testing.assert_array_equal(16 * direct[..., :24].detach(), reference[0])
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.set_flags(True)


def test_tiles_see_only_their_neighbourhood(network):
    """Far enough from its edge, a window of the latent gives what the whole one gives."""
    _, exact = network
    rec, _ = latent(24, 24, 2)
    hyper = np.zeros((24, 24, exact.layers[0][0].weight.shape[2] - 1), np.float32)
    whole, _ = exact.predict(rec, 1, 40, hyper)
    part, _ = exact.predict(rec[4:20, 6:22], 1, 40, hyper[4:20, 6:22])
    np.testing.assert_array_equal(part[2:-2, 2:-2], whole[6:18, 8:20])


def test_head_predictor_reads_only_what_is_decoded(network):
    _, exact = network
    rec, z = latent(8, 8, 3)
    hyper = exact.hyper_features(z)
    predictor = HeadPredictor(exact, 32 << 8, hyper)
    found = [predictor(np.where(np.arange(32) < 8 * head, rec, 0), head) for head in range(4)]
    for head, (mean, level) in enumerate(found):
        group = int(head > 0)
        expected = exact.predict(rec, group, step_feature(32 << 8), hyper)
        part = slice(0, 8) if head == 0 else slice(8 * (head - 1), 8 * head)
        np.testing.assert_array_equal(mean, expected[0][..., part])
        np.testing.assert_array_equal(level, expected[1][..., part])
        assert mean.dtype == np.int32
        assert level.dtype == np.uint8
        assert level.max() < 64
    unpredicted = HeadPredictor(ContextNetwork(ContextModel((1, 2), 8).export()), 256)
    assert not any(a.any() for a in unpredicted(rec, 0))


def test_a_network_may_speak_of_levels_only():
    torch.manual_seed(0)
    model = ContextModel((1, 2, 4), 16, means=False)
    set_integer(model, True)
    rec, _ = latent(8, 8, 4)
    y = torch.from_numpy(rec / 16).float().permute(2, 0, 1)[None]
    mean, scale = model(y, torch.tensor([4.0]))
    assert mean.shape == scale.shape == (1, 24, 8, 8)
    assert not mean.any()
    means, levels = ContextNetwork(model.export()).predict(rec, 1, step_feature(16 << 8))
    assert not means.any()
    assert means.dtype == np.int32
    expected = (scale[0, 8:] * 4 + 16).permute(1, 2, 0).detach().numpy()
    np.testing.assert_array_equal(levels, np.clip(expected, 0, 63))


def test_wrong_arrays_of_a_network_are_refused(network):
    arrays = network[0].export()
    arrays["net.starts"] = np.array([0, 2, 4], np.int32)
    with pytest.raises(FormatError, match="entropy network"):
        ContextNetwork(arrays)


def test_features_are_monotone_and_odd():
    thresholds = companding_thresholds()
    assert (np.diff(thresholds) >= 0).all()
    rec = np.arange(-40000, 40001, dtype=np.int32).reshape(1, -1, 1)
    found = features(rec, companding_table(thresholds), 3)
    plain = (np.abs(rec)[0] >= thresholds).sum(axis=1)
    np.testing.assert_array_equal(found[0, :, 1], plain)
    assert found.shape == (1, 80001, 3)
    np.testing.assert_array_equal(found[0, :, 0], -found[0, ::-1, 0])
    assert (np.diff(found[0, :, 0]) >= 0).all()
    np.testing.assert_array_equal(np.abs(found[..., 0]), found[..., 1])
    assert found[..., :2].max() <= 127
    # close to the definition, and to what training computes
    expected = companded(torch.from_numpy(rec / 16).float().permute(2, 0, 1)[None], True)
    np.testing.assert_array_equal(found[0, :, 0], 8 * expected[0, 0, 0])


def test_shuffles_are_torchs():
    x = np.random.default_rng(0).integers(0, 9, (4, 6, 12)).astype(np.float32)
    expected = torch.pixel_shuffle(torch.from_numpy(x.transpose(2, 0, 1).copy()), 2)
    np.testing.assert_array_equal(shuffled(x, 2), expected.permute(1, 2, 0))
    np.testing.assert_array_equal(unshuffled(shuffled(x, 2), 2), x)


@pytest.mark.parametrize("step", [1801, 9217, 32771])
def test_post_filter_in_integers_is_the_trained_one(step):
    """Input features are rounded from floats in training, from a ratio of integers here: where
    they fall on another side of a half the outputs may differ, rarely and little."""
    torch.manual_seed(0)
    trained = TrainedPostFilter(width=16, depth=3)
    with torch.no_grad():
        trained.layers[-1].conv.weight.normal_(0, 0.02)
    set_integer(trained, True)
    fixed = np.random.default_rng(0).integers(0, 255 << 6, (24, 32, 3)).astype(np.int32)
    exact = PostFilter(trained.export())
    found = exact(fixed, step)
    x_hat = torch.from_numpy(fixed / 64).float().permute(2, 0, 1)[None]
    expected = trained(x_hat, torch.tensor([np.log2(step / 256)]).float())
    expected = expected[0].permute(1, 2, 0).detach().numpy()
    assert np.abs(found - fixed).max() > 20
    close = np.abs(found / 64 - expected) <= 1 / 64 + 1e-3
    assert close.mean() > 0.99
    # and a window gives what the whole gives
    part = exact(fixed[4:24, 8:32], step)
    halo = exact.halo
    assert halo == 12
    np.testing.assert_array_equal(part[halo:, halo:], found[4 + halo :, 8 + halo :])


def test_an_untrained_post_filter_changes_nothing():
    fixed = np.random.default_rng(0).integers(0, 255 << 6, (8, 8, 3)).astype(np.int32)
    found = PostFilter(TrainedPostFilter(8, 3).export())(fixed, 5000)
    np.testing.assert_array_equal(found, fixed)
    with pytest.raises(FormatError, match="post-filter"):
        PostFilter({})


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 30.0), seed=st.integers(0, 100))
def test_every_trained_layer_exports_exactly(scale, seed):
    """However large weights have grown, the export holds its bound and computes the same."""
    torch.manual_seed(seed)
    conv = IntegerConv(30, 5, 3, in_bits=5, largest=255)
    with torch.no_grad():
        conv.conv.weight.mul_(scale)
        conv.conv.bias.normal_(0, scale)
    conv.integer = True
    layer = conv.export()
    assert layer.bound() < EXACT_FLOAT32
    x = np.random.default_rng(seed).integers(0, 256, (5, 6, 30)).astype(np.float32)
    expected = conv(torch.from_numpy(x.transpose(2, 0, 1).copy())[None] / 32) * 32
    np.testing.assert_array_equal(layer(x), expected[0].permute(1, 2, 0).detach())
