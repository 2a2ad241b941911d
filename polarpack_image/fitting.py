"""Fit a latent coder to a transform: prediction taps, magnitude taps, first states of counters.

Everything is learned from the latents of training photographs, in three steps, each on the result
of the one before: linear prediction of the coefficients; linear prediction of the magnitudes of
what is left, as the scale of a Laplacian (Wu 1997); then the counters and weights are simply what
they are after coding many tiles at many steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polarpack import kmeans

from ._coder_kernels import HEAD, LEVEL_BITS, MAGNITUDE_BITS, MEAN_BITS, Adaptive, Shape
from ._polar_kernels import CODEBOOK_BITS, CODEWORDS
from .bitstream import Quantizer
from .coder import (
    CAUSAL,
    COUNT_SHIPPED,
    RATE_WEIGHTS,
    LatentCoder,
    Predictor,
    blank,
    blank_polar,
    polar_prefix,
)
from .exact import ContextNetwork, HeadPredictor
from .transform import BLOCK, STEP_BITS, SYNTHESIS_BITS, LinearTransform

if TYPE_CHECKING:
    from .data import Pictures

Float32 = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]
log = logging.getLogger(__name__)

STATES = ("probabilities", "counts", "weights")  # that adapt
POLAR_GROUPS = 12  # of heads with codebooks of their own
POLAR_SPACING = 40  # of radii, in 1/16 step
# Another stage for so many times the radius: 6 bits are 0.75 for each of eight dimensions.
POLAR_STAGES, POLAR_DEPTH, POLAR_GROWTH = 12, 1.05, 1.6
AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
MEAN_TAPS, MAGNITUDE_TAPS, HEAD_TAPS = 24, 18, 18  # at most, for each channel or head
MEAN_STEP = 12.0  # of the quantization that prediction is learned behind
LEAST_GAIN = 0.002  # of the variance, that a tap of a prediction has to explain
SOURCE_HEADS = 3  # earlier heads that means are predicted from


def klt(tiles: Sequence[npt.NDArray[np.uint8]], size: int = 8) -> Float32:
    """Karhunen-Loève basis (size, size, 3, 3 size^2) of blocks of photographs, columns by falling
    variance; the mean (128) is left out, so that the first vectors carry the brightness."""
    n = 3 * size * size
    total = np.zeros((n, n))
    for tile in tiles:
        h, w = tile.shape[0] // size, tile.shape[1] // size
        blocks = tile[: h * size, : w * size].reshape(h, size, w, size, 3)
        x = blocks.transpose(0, 2, 1, 3, 4).reshape(h * w, n).astype(np.float32) - 128
        total += (x.T @ x).astype(np.float64) / len(x)
    vectors = np.linalg.eigh(total)[1][:, ::-1]
    return vectors.reshape(size, size, 3, n).astype(np.float32)


def _shifted(plane: npt.NDArray[Any], dy: int, dx: int) -> npt.NDArray[Any]:
    """plane[y + dy, x + dx] for every position, edges repeated; (h, w, ...)."""
    h, w = plane.shape[:2]
    rows = np.clip(np.arange(h) + dy, 0, h - 1)
    columns = np.clip(np.arange(w) + dx, 0, w - 1)
    return plane[rows][:, columns]


def _forward(gram: Any, cross: Any, variance: float, most: int, least: float) -> tuple[Any, Any]:
    """Greedy least squares on a Gram matrix: (chosen candidates, weights). Each round takes the
    candidate that explains most of what is left, given all taken before."""
    n = len(gram)
    scale = 1 / np.sqrt(np.diag(gram) + 1e-9)
    chosen: list[int] = []
    weights = np.zeros(0)
    # orthogonalise step by step (Cholesky of the chosen, projections of the others)
    residual = cross.astype(np.float64).copy()
    power = np.diag(gram).astype(np.float64).copy() + 1e-9
    rows: list[npt.NDArray[np.float64]] = []
    for _ in range(min(most, n)):
        gain = np.where(power > 1e-6 * (1 / scale) ** 2, residual**2 / power, 0)
        gain[chosen] = 0
        best = int(gain.argmax())
        if gain[best] <= least * variance:
            break
        row = gram[best].astype(np.float64).copy()
        for earlier in rows:
            row -= earlier[best] * earlier
        row /= np.sqrt(power[best])
        step = residual[best] / np.sqrt(power[best])
        residual -= step * row
        power = np.maximum(power - row**2, 1e-12)
        rows.append(row)
        chosen.append(best)
    if chosen:
        part = gram[np.ix_(chosen, chosen)] + np.diag(np.diag(gram)[chosen] * 1e-5 + 1e-6)
        weights = np.linalg.solve(part, cross[chosen])
    return chosen, weights


def fit_mean_taps(latents: Sequence[Float32]) -> npt.NDArray[np.int16]:
    """Taps of the linear prediction, from latents (h, w, C)."""
    n_channels = latents[0].shape[2]
    n_sources = min(SOURCE_HEADS * HEAD, n_channels)
    columns, targets = [], []
    for y in latents:
        rough = (np.rint(y / MEAN_STEP) * MEAN_STEP).astype(np.float32)
        inner = np.s_[1:-1, 1:-1]
        views = [
            _shifted(rough[:, :, :n_sources], dy, dx)[inner].reshape(-1, n_sources)
            for dy, dx in AROUND
        ]
        columns.append(np.concatenate(views, axis=1))
        targets.append(y[inner].reshape(-1, n_channels))
    x, t = np.concatenate(columns), np.concatenate(targets)
    gram, cross = (x.T @ x).astype(np.float64), (x.T @ t).astype(np.float64)
    variance = np.einsum("ij,ij->j", t, t, dtype=np.float64)
    names = [(c, dy, dx) for dy, dx in AROUND for c in range(n_sources)]
    taps = []
    for channel in range(n_channels):
        head = channel // HEAD
        usable = [
            i
            for i, (c, dy, dx) in enumerate(names)
            if c // HEAD < head or (head == 0 and c < HEAD and (dy, dx) in CAUSAL)
        ]
        chosen, weights = _forward(
            gram[np.ix_(usable, usable)], cross[usable, channel], variance[channel],
            MEAN_TAPS, LEAST_GAIN,
        )  # fmt: skip
        for i, weight in zip(chosen, weights, strict=True):
            source, dy, dx = names[usable[i]]
            integer = round(float(weight) * (1 << MEAN_BITS))
            if integer:
                taps.append((channel, source, dy, dx, np.clip(integer, -32767, 32767)))
    return np.array(taps, np.int16).reshape(-1, 5)


def _laplace_scale(x: Float32, target: Float32, most: int) -> tuple[Any, Any, float]:
    """Weights >= 0 and bias of the scale of a Laplacian: (chosen columns, weights, bias).
    Reweighted least squares (the weights 1 / scale^2 make it the maximum likelihood's normal
    equations), columns with negative weights dropped one by one."""
    n = x.shape[1]
    x1 = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
    scale = np.full(len(x), max(1e-3, float(target.mean())), np.float32)
    active = list(range(n))
    weights = np.zeros(n + 1)
    for round_ in range(4):
        w = 1 / (scale + 0.03) ** 2
        gram = ((x1 * w[:, None]).T @ x1).astype(np.float64)
        cross = (x1.T @ (w * target)).astype(np.float64)
        if round_ == 1:
            variance = float((w * target**2).sum())
            active, _ = _forward(gram[:n, :n], cross[:n], variance, most + 6, 1e-5)
        while True:
            keep = [*active, n]
            part = gram[np.ix_(keep, keep)]
            part = part + np.diag(np.diag(part)) * 1e-4 + np.eye(len(keep)) * 1e-6
            solved = np.linalg.solve(part, cross[keep])
            enough = round_ < 2 or len(active) <= most
            if enough and (len(active) == 0 or solved[:-1].min() >= 0):
                break
            worst = int(solved[:-1].argmin())
            active = [a for i, a in enumerate(active) if i != worst]
        weights = np.zeros(n + 1)
        weights[keep] = solved
        weights[n] = max(weights[n], 0.0005)
        scale = np.maximum((x1 @ weights.astype(np.float32)), 0.0005)
    return active, weights[active], float(weights[n])


def fit_magnitude_taps(magnitudes: Sequence[npt.NDArray[np.uint8]], n_candidates: int = 32,
                       n_samples: int = 25_000, seed: int = 0) -> Arrays:  # fmt: skip
    """Taps, biases and parents from magnitudes (h, w, C) of coded latents."""
    n_channels = magnitudes[0].shape[2]
    rng = np.random.default_rng(seed)
    tiles = [np.minimum(m, 40).astype(np.float32) for m in magnitudes]
    roots = [np.sqrt(m) for m in tiles]
    gram = {}
    for dy, dx in AROUND:
        gram[dy, dx] = sum(
            r.reshape(-1, n_channels).T @ _shifted(r, dy, dx).reshape(-1, n_channels) for r in roots
        )
    power = np.sqrt(np.diag(gram[0, 0]) + 1e-6)
    like = {k: v / power[:, None] / power[None, :] for k, v in gram.items()}
    share = min(1.0, n_samples / sum(m.shape[0] * m.shape[1] for m in tiles))
    picks = [rng.random(m.shape[:2]) < share for m in tiles]
    taps, biases, parents = [], [], np.zeros((n_channels, 2, 3), np.int16)
    for channel in range(n_channels):
        head = channel // HEAD
        found = [(channel, dy, dx) for dy, dx in sorted(CAUSAL)]
        scored = []
        for (dy, dx), matrix in like.items():
            for c in range(n_channels):
                known = c // HEAD < head or (
                    c // HEAD == head
                    and ((dy, dx) in CAUSAL or ((dy, dx) == (0, 0) and c < channel))
                )
                if known and (c, dy, dx) not in found:
                    scored.append((float(matrix[channel, c]), c, dy, dx))
        scored.sort(reverse=True)
        found += [(c, dy, dx) for _, c, dy, dx in scored[:n_candidates]]
        x = np.concatenate(
            [
                np.stack([_shifted(m[:, :, c], dy, dx)[p] for c, dy, dx in found], axis=1)
                for m, p in zip(tiles, picks, strict=True)
            ]
        )
        target = np.concatenate([m[:, :, channel][p] for m, p in zip(tiles, picks, strict=True)])
        active, weights, bias = _laplace_scale(x, target, MAGNITUDE_TAPS)
        order = np.argsort(-np.asarray(weights))
        for i in order:
            integer = round(float(weights[i]) * (1 << MAGNITUDE_BITS))
            if integer > 0:
                taps.append((channel, *found[active[i]], min(integer, 32767)))
        biases.append(min(round(bias * (1 << LEVEL_BITS)), 4095))
        # the two strongest sources outside of the channel itself also stand for themselves
        others = [found[active[i]] for i in order if found[active[i]][0] != channel]
        others += [(channel, -1, 0), (channel, 0, -1)]
        parents[channel] = others[:2]
    return {
        "magnitude_taps": np.array(taps, np.int16).reshape(-1, 5),
        "magnitude_bias": np.array(biases, np.int16),
        "parents": parents,
    }


def fit_head_taps(magnitudes: Sequence[npt.NDArray[np.uint8]]) -> Arrays:
    """Taps and biases of a head's sum of magnitudes."""
    sums = [m.astype(np.float32).reshape(*m.shape[:2], -1, HEAD).sum(axis=3) for m in magnitudes]
    n_heads = sums[0].shape[2]
    taps, biases = [], []
    for head in range(n_heads):
        found = [(head, dy, dx) for dy, dx in sorted(CAUSAL)]
        for h in range(head):
            near = AROUND if head - h <= 3 or h < 2 else [(0, 0)]
            found += [(h, dy, dx) for dy, dx in near]
        x = np.concatenate(
            [
                np.stack([_shifted(s[:, :, h], dy, dx).ravel() for h, dy, dx in found], axis=1)
                for s in sums
            ]
        )
        target = np.concatenate([s[:, :, head].ravel() for s in sums])
        keep = slice(None, None, max(1, len(x) // 25_000))
        active, weights, bias = _laplace_scale(
            np.minimum(x[keep], 300), np.minimum(target[keep], 300), HEAD_TAPS
        )
        for i, weight in zip(active, weights, strict=True):
            integer = round(float(weight) * (1 << MAGNITUDE_BITS))
            if integer > 0:
                taps.append((head, *found[i], min(integer, 32767)))
        biases.append(min(round(bias * (1 << LEVEL_BITS)), 4095))
    return {"head_taps": np.array(taps, np.int16).reshape(-1, 5),
            "head_bias": np.array(biases, np.int16)}  # fmt: skip


PredictorOf = Callable[[float], Predictor | None]  # of a step in grey levels


def no_predictor(step: float) -> None:
    """There is no network."""


def collect(
    coder: LatentCoder,
    latents: Sequence[Float32],
    steps: Sequence[float],
    rate_weight: float,
    predictor_of: PredictorOf = no_predictor,
) -> list[npt.NDArray[np.uint8]]:
    """Magnitudes (h, w, C) that coding the latents with these steps leaves."""
    out = []
    for y, step in zip(latents, steps, strict=True):
        planes = coder.encode_from(
            coder.start,
            y / np.float32(step),
            [coder.n_heads],
            rate_weight=rate_weight,
            predictor=predictor_of(step),
        )[1]
        out.append(coder.channels_last(planes.magnitude, Shape(*y.shape[:2])))
    return out


def train_states(
    coder: LatentCoder,
    latents: Sequence[Float32],
    steps: Sequence[float],
    rate_weight: float,
    predictor_of: PredictorOf = no_predictor,
) -> tuple[Arrays, float]:
    """First states of counters and weights: those after coding all the latents. Also the mean bits
    a position that this took."""
    state: Adaptive = coder.start
    n_bits, n_positions = 0, 0
    for i, (y, step) in enumerate(zip(latents, steps, strict=True)):
        messages, _, state = coder.encode_from(
            state,
            y / np.float32(step),
            [coder.n_heads],
            rate_weight=rate_weight,
            predictor=predictor_of(step),
            count_limit=1000,
        )
        n_bits += 8 * len(messages[0][0])
        n_positions += y.shape[0] * y.shape[1]
        if i % 50 == 49:
            log.info("%d tiles: %.2f bits a position", i + 1, n_bits / n_positions)
    return {
        "probabilities": np.clip(state.counters >> np.uint32(16), 1, 65535).astype(np.uint16),
        "counts": np.minimum(state.counters & np.uint32(1023), COUNT_SHIPPED).astype(np.uint8),
        "weights": state.weights.copy(),
    }, n_bits / n_positions


def spread_steps(
    n: int, rng: np.random.Generator, least: float = 3.0, most: float = 130.0
) -> list[float]:
    """n steps in grey levels, spread evenly over their logarithms, in random order."""
    grid = (np.arange(n) + rng.random(n)) / n
    rng.shuffle(grid)
    return [float(least * (most / least) ** g) for g in grid]


def head_vectors(
    coder: LatentCoder,
    latents: Sequence[Float32],
    steps: Sequence[float],
    rate_weight: float,
    predictor_of: PredictorOf = no_predictor,
) -> list[Float32]:
    """For each head the vectors (n, 8), in steps, of what means do not predict, where a trellis
    codes them as not all zero."""
    found: list[list[Float32]] = [[] for _ in range(coder.n_heads)]
    for y, step in zip(latents, steps, strict=True):
        wanted = y / np.float32(step)
        planes = coder.encode_from(
            coder.start, wanted, [coder.n_heads], rate_weight=rate_weight,
            predictor=predictor_of(step),
        )[1]  # fmt: skip
        shape = Shape(*y.shape[:2])
        index, size, recon = (
            coder.channels_last(plane, shape).astype(np.int32)
            for plane in (planes.indices, planes.magnitude, planes.recon)
        )
        left = wanted - (recon - 16 * np.sign(index) * size).astype(np.float32) / 16
        usable = (size < 255) & (np.abs(left) < 500)
        for head in range(coder.n_heads):
            part = np.s_[..., HEAD * head : HEAD * (head + 1)]
            chosen = (index[part] != 0).any(axis=2) & usable[part].all(axis=2)
            found[head].append(left[part][chosen])
    return [np.concatenate(vectors) for vectors in found]


def relearn(
    arrays: Arrays,
    latents: Sequence[Float32],
    quantizer: Quantizer,
    *,
    predictor_of: PredictorOf = no_predictor,
    seed: int = 0,
) -> Arrays:
    """A coder's arrays with the states that coding the latents with a quantizer leaves."""
    coder = LatentCoder(arrays, quantizer=quantizer)
    steps = spread_steps(len(latents), np.random.default_rng(seed))
    states, rate = train_states(coder, latents, steps, RATE_WEIGHTS[quantizer], predictor_of)
    log.info("%s: %.2f bits a position", quantizer.name, rate)
    found = dict(arrays)
    for name in STATES:
        n = len(arrays[name])
        found[name] = states[name][:n]
        if quantizer.is_polar:  # those of polar heads stand behind those of the trellis
            found[polar_prefix(quantizer) + name] = states[name][n:]
    return found


def fit_polar(
    arrays: Arrays,
    latents: Sequence[Float32],
    quantizer: Quantizer,
    *,
    predictor_of: PredictorOf = no_predictor,
    seed: int = 0,
) -> Arrays:
    """What a fitted coder needs for a polar quantizer: codebooks by k-means of the head vectors
    that the trellis leaves, stage after stage, then first states of counters. Needs faiss."""
    rng = np.random.default_rng(seed)
    switch = quantizer != Quantizer.POLAR
    some = latents[:: max(1, len(latents) // 60)]
    vectors = head_vectors(
        LatentCoder(arrays),
        some,
        spread_steps(len(some), rng),
        RATE_WEIGHTS[Quantizer.DQ8],
        predictor_of,
    )
    n_own = min(POLAR_GROUPS, len(vectors)) - 1
    groups = [*vectors[:n_own], np.concatenate(vectors[n_own:])]
    n_stages = 1 if switch else POLAR_STAGES
    depth = np.rint(POLAR_DEPTH * POLAR_GROWTH ** np.arange(n_stages)).astype(np.int16)
    depth = np.tile(depth, (len(groups), 1))
    books = np.zeros((len(groups), n_stages, CODEWORDS, HEAD), np.int16)
    for group, x in enumerate(groups):
        n = np.maximum(np.rint(np.sqrt((x**2).sum(axis=1)) * 16 / POLAR_SPACING), 1)
        left = x * 16 / (n * POLAR_SPACING)[:, None].astype(np.float32)
        for stage, least in enumerate(depth[group]):
            left, n = left[n >= least], n[n >= least]
            if not len(left):
                break
            words, chosen = kmeans(left, CODEWORDS, spherical=switch, seed=seed)
            books[group, stage] = np.clip(np.rint(words * (1 << CODEBOOK_BITS)), -32767, 32767)
            exact = books[group, stage].astype(np.float32) / (1 << CODEBOOK_BITS)
            left = left - exact[chosen]
    own = blank_polar(arrays, books, depth, POLAR_SPACING, quantizer)
    learned = relearn({**arrays, **own}, latents, quantizer, predictor_of=predictor_of, seed=seed)
    return {name: learned[name] for name in own}


def fit(
    latents: Sequence[Float32],
    *,
    least_step: float = 3.0,
    most_step: float = 130.0,
    rate_weight: float = 0.4,
    quantizer: Quantizer = Quantizer.DQ8,
    predictor_of: PredictorOf = no_predictor,
    seed: int = 0,
) -> Arrays:
    """All arrays of a ``LatentCoder`` from latents (h, w, C) of training photographs. About a
    minute for ten megapixels at stride 8."""
    rng = np.random.default_rng(seed)
    arrays = blank(latents[0].shape[2])
    some = latents[:: max(1, len(latents) // 60)]
    arrays["mean_taps"] = fit_mean_taps(latents)
    log.info("%d taps of the means", len(arrays["mean_taps"]))

    def steps(n: int) -> list[float]:
        return spread_steps(n, rng, least_step, most_step)

    coder = LatentCoder(arrays, quantizer=quantizer)
    for round_ in range(2):
        if round_:  # what a coder that knows something decides differs from the first one
            arrays |= train_states(coder, some, steps(len(some)), rate_weight, predictor_of)[0]
            coder = LatentCoder(arrays, quantizer=quantizer)
        magnitudes = collect(coder, some, steps(len(some)), rate_weight, predictor_of)
        arrays |= fit_magnitude_taps(magnitudes) | fit_head_taps(magnitudes)
        arrays |= {k: v for k, v in blank(latents[0].shape[2]).items()
                   if k in STATES}  # fmt: skip
        coder = LatentCoder(arrays, quantizer=quantizer)
        log.info("%d taps of the magnitudes", len(arrays["magnitude_taps"]))
    states, rate = train_states(coder, latents, steps(len(latents)), rate_weight, predictor_of)
    log.info("%.2f bits a position", rate)
    return arrays | states


def training_crops(
    pictures: Pictures, n: int, size: int, seed: int = 0
) -> list[npt.NDArray[np.uint8]]:
    """n crops (size, size, 3), pictures drawn by the bytes of their files, so that smooth skies do
    not outnumber everything else; multiples of 8 pixels from the picture's corner."""
    rng = np.random.default_rng(seed)
    share = pictures.file_bytes / pictures.file_bytes.sum()
    crops = []
    for i in rng.choice(len(pictures), n, p=share):
        picture = pictures[int(i)]
        height, width = (min(size, side // BLOCK * BLOCK) for side in picture.shape[:2])
        top = int(rng.integers((picture.shape[0] - height) // BLOCK + 1)) * BLOCK
        left = int(rng.integers((picture.shape[1] - width) // BLOCK + 1)) * BLOCK
        crops.append(np.ascontiguousarray(picture[top : top + height, left : left + width]))
    return crops


def brightness_first(
    analysis: Float32, synthesis: Float32, parity: npt.NDArray[np.int8]
) -> tuple[Float32, Float32, npt.NDArray[np.int8]]:
    """The kernels with the three channels of mean colour alone in the first head, five empty ones
    beside them: everything else is then predicted from mean colours on all sides."""
    n = synthesis.shape[3]
    means = np.abs(synthesis.astype(np.float64).sum(axis=(0, 1))).sum(axis=0)
    first = np.sort(np.argsort(-means, kind="stable")[:3])
    order = np.concatenate([first, np.setdiff1d(np.arange(n), first)])
    n_filled = -(-(n + 5) // HEAD) * HEAD

    def placed(kernel: npt.NDArray[Any]) -> npt.NDArray[Any]:
        out = np.zeros((*kernel.shape[:-1], n_filled), kernel.dtype)
        out[..., :3] = kernel[..., order[:3]]
        out[..., HEAD : HEAD + n - 3] = kernel[..., order[3:]]
        return out

    signs = placed(parity.T).T
    signs[signs == 0] = 1
    return placed(analysis), placed(synthesis), np.ascontiguousarray(signs)


def transform_arrays(analysis: Float32, synthesis: Float32, parity: npt.NDArray[np.int8]) -> Arrays:
    """The stored form of a linear transform: the synthesis in integers."""
    return {
        "analysis": analysis.astype(np.float32),
        "synthesis": np.rint(synthesis * (1 << SYNTHESIS_BITS)).astype(np.int16),
        "parity": parity.astype(np.int8),
    }


def build_from_files(
    transform: Path, network: Path | None, pictures: Pictures, n_crops: int
) -> Arrays:
    """``build`` from the ``arrays.npz`` that training runs leave."""
    with np.load(transform) as stored:
        kernels = {name.removeprefix("transform."): stored[name] for name in stored}
    synthesis = kernels["synthesis"].astype(np.float32)
    if kernels["synthesis"].dtype.kind == "i":
        synthesis /= np.float32(1 << SYNTHESIS_BITS)
    placed = brightness_first(
        kernels["analysis"].astype(np.float32), synthesis, kernels["parity"].astype(np.int8)
    )
    others: Arrays = {}
    if network is not None:
        with np.load(network) as stored:
            others = {name: stored[name] for name in stored if name.startswith("net.")}
    crops = training_crops(pictures, n_crops, 320)
    return build(transform_arrays(*placed), crops, others=others)


def build(
    transform: Arrays,
    crops: Sequence[npt.NDArray[np.uint8]],
    *,
    others: Arrays | None = None,
    quantizer: Quantizer = Quantizer.DQ8,
) -> Arrays:
    """All arrays of a weights file from a transform (``transform_arrays``) and training crops;
    ``others`` (of networks, with their prefixes) go along."""
    forward = LinearTransform(transform)
    latents = [forward.analysis(crop) for crop in crops]
    predictor_of: PredictorOf = no_predictor
    if others and "net.starts" in others:
        network = ContextNetwork(others)

        def predictor_of(step: float) -> Predictor:
            return HeadPredictor(network, round(step * (1 << STEP_BITS)))

    coder = fit(latents, quantizer=quantizer, predictor_of=predictor_of)
    for polar in (Quantizer.POLAR_DQ8, Quantizer.POLAR):
        coder |= fit_polar(coder, latents, polar, predictor_of=predictor_of)
    arrays = {f"transform.{name}": array for name, array in transform.items()}
    return arrays | {f"coder.{name}": array for name, array in coder.items()} | (others or {})
