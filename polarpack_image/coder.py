"""The latent coder: a tile of coefficients to bytes and back, through exact integers.

``LatentCoder`` holds what was fitted offline (taps, counters' first states) and codes tiles with
the kernels of ``_coder_kernels``. It knows neither pixels nor files: its input is a latent in
steps, (h, w, C) with C a multiple of 8, its output one message for each group of heads and the
integers that any decoder will find again.

    lattice      index k, state of the trellis -> q = 2k or 2k - sign(k), in steps
    recon        mean + 16 q, in 1/16 step; mean: taps over what is decoded, and a network's
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from polarpack.entropy.range_coder import (
    finish,
    start_reading,
    start_writing,
    words_from_bytes,
    words_to_bytes,
)
from polarpack.errors import CorruptDataError, InputError
from polarpack.trellis import predecessors, state_machine

from . import _coder_kernels as kernels
from . import _polar_kernels as polar_kernels
from . import _search_kernels as search
from ._coder_kernels import (
    HEAD,
    N_BINS,
    N_INPUTS,
    N_INTRA,
    N_LEVELS,
    N_LOCAL,
    N_NET,
    N_PARENT,
    PAD,
    STRETCH_LIMIT,
    TAIL_BITS,
    Adaptive,
    Planes,
    Scratch,
    Shape,
    Tables,
)
from ._polar_kernels import (
    CODEWORD_BITS,
    CODEWORDS,
    MAX_STAGES,
    RADIUS_CLASSES,
    REST_SIZES,
    PolarTables,
)
from .bitstream import Quantizer

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]


class Predictor(Protocol):
    """Predicts heads of a tile, one after the other, from what is decoded."""

    def wants(self, head: int) -> bool:
        """Whether ``recon`` is looked at when this head is asked for; else it may be empty."""

    def __call__(self, recon: Int32, head: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """recon (h, w, C), head -> mean (h, w, 8) int32 in 1/16 step, level (h, w, 8) uint8 below
        64."""


class Importance(NamedTuple):
    """How much errors count in a tile, relative to the mean: the product of the two."""

    heads: Float32  # (H,)
    places: Float32  # (h, w)


CAUSAL = {(0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0)}
# lambda of J = distortion + lambda * bits, in step^2 a bit, by quantizer; for the dependent ones
# 0.35 to 0.5 cost the same to 0.1%, the scalar one's lattice has twice the distance
RATE_WEIGHTS = {
    Quantizer.SCALAR: 0.5,
    Quantizer.DQ4: 0.4,
    Quantizer.DQ8: 0.4,
    Quantizer.POLAR: 0.3,
    Quantizer.POLAR_DQ8: 0.4,
}
# By effort, 1 to 3: how many heads are searched with prices of each path's own. The first ones hold
# most of the bits.
HEADS_APART = (0, 0, 5, 1 << 16)
COUNT_LIMIT = 250  # bits after which a counter stops to slow down
COUNT_SHIPPED = 30  # as if a shipped counter had seen at most so many: it still moves
LOCAL_EDGES = (1, 2, 3, 5, 7, 10, 14, 20, 29, 46, 81)  # of sums of magnitudes


def _machine(n_states: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Tables of the trellis, forwards and backwards; one state alone is a scalar quantizer, which
    has only the even multiples of the step."""
    if n_states == 1:
        return (
            np.zeros((1, 2), np.int64),
            np.zeros(1, np.int64),
            np.array([[0, 0, 0, 1]], np.uint64),
        )
    next_state, quantizer = state_machine(n_states)
    ways = predecessors(n_states).astype(np.uint64)
    return next_state.astype(np.int64), quantizer.astype(np.int64), ways


def logistic_tables() -> dict[str, npt.NDArray[Any]]:
    """The tables of logarithms that decoding rests on, for a weights file: a decoder reads them
    from there, because no two libraries need round a logarithm alike."""
    half = (np.arange(4096) + 0.5) / 4096
    stretch = np.clip(np.rint(256 * np.log(half / (1 - half))), -STRETCH_LIMIT, STRETCH_LIMIT)
    domain = np.arange(-STRETCH_LIMIT, STRETCH_LIMIT + 1)
    squash = np.clip(np.rint(65536 / (1 + np.exp(-domain / 256))), 1, 65535)
    level = np.minimum(5.2 * np.log2(1 + np.arange(4096) / 8), N_LEVELS - 1)
    return {
        "level": level.astype(np.uint8),
        "stretch": stretch.astype(np.int16),
        "squash": squash.astype(np.uint16),
    }


def counter_layout(n_classes: int, n_heads: int) -> tuple[npt.NDArray[np.int64], int]:
    """Where each expert's counters start, and how many there are in all."""
    of_index = [
        N_LEVELS,
        n_classes * N_LOCAL,
        n_classes * N_INTRA,
        N_LEVELS // 2 * N_LOCAL * N_INTRA,
        n_classes * N_PARENT,
        N_NET * N_LOCAL,
        n_classes * (N_LEVELS // 3),
    ]
    of_head = [
        n_heads * N_LEVELS,
        n_heads * 16 * 3,
        n_heads * 8 * 3,
        N_LEVELS * 16 * 5,
        n_heads * 5 * 3,
        N_NET * 5 * 3,
        n_heads * (N_LEVELS // 3) * 2,
    ]
    sizes = [2 * N_BINS * n for n in of_index] + of_head + [TAIL_BITS, 9 * n_classes]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return starts[:-1], int(starts[-1])


def weight_layout(n_classes: int, n_heads: int) -> tuple[npt.NDArray[np.int64], int]:
    """Where each kind of weight sets starts, and how many sets there are."""
    sizes = [N_LEVELS // 6 * 16, n_classes * 4, N_LEVELS // 3, n_heads]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return starts[:-1], int(starts[-1])


def blank(n_channels: int, n_classes: int | None = None) -> dict[str, npt.NDArray[Any]]:
    """A coder that has learned nothing: no taps, counters at one half, equal weights."""
    n_heads = n_channels // HEAD
    classes = n_classes or n_channels
    weights = np.full((weight_layout(classes, n_heads)[1], N_INPUTS), 20000, np.int32)
    weights[:, -1] = 0
    parents = np.zeros((n_channels, 2, 3), np.int16)
    parents[:, :, 0] = np.arange(n_channels)[:, None]
    parents[:, 0, 1] = parents[:, 1, 2] = -1
    return logistic_tables() | {
        "mean_taps": np.zeros((0, 5), np.int16),
        "magnitude_taps": np.zeros((0, 5), np.int16),
        "magnitude_bias": np.zeros(n_channels, np.int16),
        "head_taps": np.zeros((0, 5), np.int16),
        "head_bias": np.zeros(n_heads, np.int16),
        "parents": parents,
        "channel_class": (np.arange(n_channels) * classes // n_channels).astype(np.int16),
        "probabilities": np.full(counter_layout(classes, n_heads)[1], 1 << 15, np.uint16),
        "counts": np.zeros(counter_layout(classes, n_heads)[1], np.uint8),
        "weights": weights,
    }


def polar_layout(
    n_classes: int, n_heads: int, codebook: tuple[int, ...], switch: bool
) -> tuple[npt.NDArray[np.int64], int, npt.NDArray[np.int64], int]:
    """Where each expert's counters for polar heads start and how many there are; the same for
    weight sets. codebook: its shape (G, S, K, 8)."""
    rows = codebook[0] * codebook[1]
    of_head = [n_heads * N_LEVELS, n_heads * 16 * 3, n_heads * 8 * 3, N_LEVELS * 16 * 5,
               n_heads * 5 * 3, n_heads * 4, n_heads * (N_LEVELS // 3) * 2]  # fmt: skip
    of_word = [rows, rows * RADIUS_CLASSES, 2 * HEAD, 2 * HEAD, 2 * (CODEWORDS + 1), 2 * n_heads,
               HEAD * HEAD]  # fmt: skip
    of_rest = [n_classes * REST_SIZES, RADIUS_CLASSES * HEAD * N_INTRA]
    sizes = [n * N_BINS for n in of_head] + [n * CODEWORDS for n in of_word] + [TAIL_BITS]
    sizes += [2 * N_BINS * n * switch for n in of_rest]
    sets = [N_BINS * (N_LEVELS // 3), n_heads * N_BINS, HEAD * CODEWORD_BITS, HEAD * CODEWORD_BITS,
            RADIUS_CLASSES * 16 * switch, n_classes * 4 * switch]  # fmt: skip
    starts, set_starts = (
        np.concatenate([[0], np.cumsum(n)]).astype(np.int64) for n in (sizes, sets)
    )
    return starts[:-1], int(starts[-1]), set_starts[:-1], int(set_starts[-1])


def blank_polar(
    arrays: Arrays, codebook: npt.NDArray[np.int16], depth: npt.NDArray[np.int16],
    spacing: int,
    quantizer: Quantizer,
) -> dict[str, npt.NDArray[Any]]:  # fmt: skip
    """What a coder with ``arrays`` needs for polar heads, before it has learned anything: to be
    added under the prefix of ``polar_prefix``."""
    n_heads = len(arrays["magnitude_bias"]) // HEAD
    classes = int(arrays["channel_class"].max()) + 1
    switch = quantizer != Quantizer.POLAR
    _, n_counters, _, n_sets = polar_layout(classes, n_heads, codebook.shape, switch)
    sets = np.full((n_sets, N_INPUTS), 20000, np.int32)
    sets[:, -1] = 0
    own: dict[str, npt.NDArray[Any]] = {
        "codebook": codebook,
        "depth": depth,
        "spacing": np.array([spacing], np.int16),
        "probabilities": np.full(n_counters, 1 << 15, np.uint16),
        "counts": np.zeros(n_counters, np.uint8),
        "weights": sets,
    }
    return {polar_prefix(quantizer) + name: array for name, array in own.items()}


def polar_prefix(quantizer: Quantizer) -> str:
    """Of the names of a polar quantizer's arrays."""
    return "polar." if quantizer == Quantizer.POLAR else "switch."


class LatentCoder:
    """Codes tiles of a latent with C channels.

    arrays: what ``blank`` lists, from the weights file. Taps are rows (channel, source channel, dy,
    dx, weight); a head's taps speak of heads. A source is decoded earlier: an earlier head within
    the 5 x 5 positions around, the same head at W, N, NW, NE, WW or NN, or an earlier coefficient
    of the same head and position (magnitudes only).
    quantizer: the polar ones need arrays of their own (``blank_polar``).
    """

    def __init__(self, arrays: Arrays, *, quantizer: Quantizer = Quantizer.DQ8) -> None:
        self.arrays = dict(arrays)
        self.quantizer = quantizer
        self.n_channels = len(arrays["magnitude_bias"])
        self.n_heads = self.n_channels // HEAD
        self._machine = _machine(quantizer.n_states or 1)
        for name in ("mean_taps", "magnitude_taps", "head_taps"):
            self._check_taps(name)
        self._check_tables()
        self._causal = np.zeros(self.n_heads, bool)
        for channel, source, _, _, _ in self.arrays["mean_taps"]:
            self._causal[channel // HEAD] |= source // HEAD == channel // HEAD
        self._tables: dict[tuple[int, int], Tables] = {}
        self._n_classes = int(self.arrays["channel_class"].max()) + 1
        self.start = _adaptive(self.arrays)
        if quantizer.is_polar:
            prefix = polar_prefix(quantizer)
            own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            self._polar = self._polar_tables(own)
            behind = _adaptive(own)
            self.start = Adaptive(
                np.concatenate([self.start.counters, behind.counters]),
                np.concatenate([self.start.weights, behind.weights]),
            )

    def _polar_tables(self, own: Arrays) -> PolarTables:
        """Of the arrays of a polar quantizer, whose counters stand behind the others; no room."""
        if "codebook" not in own:
            raise InputError(f"these weights have nothing for quantizer {self.quantizer.name}")
        codebook, depth, spacing = own["codebook"], own["depth"], own["spacing"]
        switch = self.quantizer != Quantizer.POLAR
        starts, n_counters, sets, n_sets = polar_layout(
            self._n_classes, self.n_heads, codebook.shape, switch
        )
        wrong = (
            codebook.ndim != 4
            or codebook.shape[2:] != (CODEWORDS, HEAD)
            or not 1 <= codebook.shape[1] <= (1 if switch else MAX_STAGES)
            or depth.shape != codebook.shape[:2]
            or bool((depth[:, 0] != 1).any())
            or bool((np.diff(depth.astype(int)) <= 0).any())
            or spacing.shape != (1,)
            or spacing[0] < 1
            or len(own["probabilities"]) != n_counters
            or own["weights"].shape != (n_sets, N_INPUTS)
        )
        if wrong:
            raise InputError(f"arrays of quantizer {self.quantizer.name} do not fit together")
        return PolarTables(
            codebook=codebook.astype(np.int64),
            depth=depth.astype(np.int64),
            spacing=spacing.astype(np.int64),
            start=starts + len(self.start.counters),
            sets=sets + len(self.start.weights),
            symbols=np.zeros(0, np.int16),
            slots=np.zeros(N_INPUTS, np.int64),
            saved=np.zeros(HEAD, np.uint8),
        )

    def _check_taps(self, name: str) -> None:
        """Wrong taps would read outside of the planes, or what is not decoded yet."""
        group = 1 if name == "head_taps" else HEAD
        for target, source, dy, dx, _ in self.arrays[name].tolist():
            inside = 0 <= target < self.n_channels // (HEAD // group) and abs(dy) <= PAD
            before = source // group < target // group and abs(dx) <= PAD
            causal = source // group == target // group and (dy, dx) in CAUSAL
            intra = name == "magnitude_taps" and (dy, dx) == (0, 0) and source < target
            if not (inside and source >= 0 and (before or causal or intra)):
                raise InputError(f"{name}: ({target}, {source}, {dy}, {dx}) is not decoded before")

    def _check_tables(self) -> None:
        """Wrong tables would read outside of others."""
        for name, size, low, high in (
            ("level", 4096, 0, N_LEVELS - 1),
            ("stretch", 4096, -STRETCH_LIMIT, STRETCH_LIMIT),
            ("squash", 2 * STRETCH_LIMIT + 1, 1, 65535),
        ):
            table = self.arrays[name]
            if table.shape != (size,) or table.min() < low or table.max() > high:
                raise InputError(f"{name}: expected {size} numbers in {low}..{high}")

    def _tables_for(self, rows: int, columns: int) -> Tables:
        """The kernels' tables for a tile of this size."""
        known = self._tables.get((rows, columns))
        if known is not None:
            return known
        stride = columns + 2 * PAD
        plane = (rows + 2 * PAD) * stride

        def dense(name: str, n: int, group: int) -> tuple[Any, Any, Any]:
            taps = self.arrays[name].astype(np.int64)
            count = np.bincount(taps[:, 0], minlength=n).astype(np.int64)
            offset = np.zeros((n, max(1, int(count.max(initial=0)))), np.int64)
            weight = np.zeros_like(offset)
            place = np.zeros(n, np.int64)
            for target, source, dy, dx, w in taps.tolist():
                heads = source // group - target // group
                i = place[target]
                offset[target, i] = (heads * plane + dy * stride + dx) * group
                offset[target, i] += source % group - target % group
                weight[target, i] = w
                place[target] += 1
            return count, offset, weight

        channel = np.arange(self.n_channels)[:, None]
        source, dy, dx = np.moveaxis(self.arrays["parents"].astype(np.int64), -1, 0)
        parent = ((source // HEAD - channel // HEAD) * plane + dy * stride + dx) * HEAD
        parent += source % HEAD - channel % HEAD
        classes = self._n_classes
        taps: dict[str, Any] = {}
        for name, n, group in (
            ("mean", self.n_channels, HEAD),
            ("magnitude", self.n_channels, HEAD),
            ("head", self.n_heads, 1),
        ):
            parts = dense(f"{name}_taps", n, group)
            taps |= zip((f"{name}_count", f"{name}_offset", f"{name}_weight"), parts, strict=True)
        tables = Tables(
            **taps,
            magnitude_bias=self.arrays["magnitude_bias"].astype(np.int64),
            head_bias=self.arrays["head_bias"].astype(np.int64),
            parent=parent,
            channel_class=self.arrays["channel_class"].astype(np.int64),
            next_state=self._machine[0],
            quantizer=self._machine[1],
            ways=self._machine[2],
            base=counter_layout(classes, self.n_heads)[0],
            sets=weight_layout(classes, self.n_heads)[0],
            level=self.arrays["level"].astype(np.uint8),
            local=np.searchsorted(LOCAL_EDGES, np.arange(1024), "right").astype(np.uint8),
            stretch=self.arrays["stretch"].astype(np.int32),
            squash=self.arrays["squash"].astype(np.int32),
            reciprocal=np.int64(65536) * 2 // (2 * np.arange(1024) + 3),
            cost=-np.log2((np.arange(4096) + 0.5) / 4096).astype(np.float32),
            limit=np.array([COUNT_LIMIT], np.int64),
        )
        if len(self._tables) > 16:
            self._tables.clear()
        self._tables[rows, columns] = tables
        return tables

    def _blank_planes(self, rows: int, columns: int) -> Planes:
        n = self.n_heads * (rows + 2 * PAD) * (columns + 2 * PAD)
        return Planes(
            indices=np.zeros(n * HEAD, np.int16),
            recon=np.zeros(n * HEAD, np.int32),
            magnitude=np.zeros(n * HEAD, np.uint8),
            total=np.zeros(n, np.uint16),
            level=np.zeros(n * HEAD, np.uint8),
            mean=np.zeros(n * HEAD, np.int32),
        )

    def _inside(self, plane: npt.NDArray[Any], shape: Shape) -> npt.NDArray[Any]:
        """View (H, h, w, 8) of a padded flat plane."""
        rows, columns = shape
        full = plane.reshape(self.n_heads, rows + 2 * PAD, columns + 2 * PAD, HEAD)
        return full[:, PAD:-PAD, PAD:-PAD]

    def channels_last(self, plane: npt.NDArray[Any], shape: Shape) -> npt.NDArray[Any]:
        """(h, w, C) from a padded flat plane; copies."""
        inside = self._inside(plane, shape).transpose(1, 2, 0, 3)
        return np.ascontiguousarray(inside).reshape(*shape, self.n_channels)

    def _ask(self, predictor: Predictor | None, planes: Planes, shape: Shape, head: int) -> None:
        """Have the network's mean and level of a head, if there is a network, put into planes."""
        if predictor is None:
            return
        recon = np.empty((*shape, 0), np.int32)
        if predictor.wants(head):
            recon = self.channels_last(planes.recon, shape)
        mean, level = predictor(recon, head)
        self._inside(planes.mean, shape)[head] = mean
        self._inside(planes.level, shape)[head] = np.minimum(level, N_NET - 1)

    def _polar_room(self, rows: int, columns: int) -> PolarTables | None:
        """Tables of polar heads for one tile, None where there are no such heads."""
        if not self.quantizer.is_polar:
            return None
        n = self.n_heads * (rows + 2 * PAD) * (columns + 2 * PAD)
        return self._polar._replace(
            symbols=np.zeros(n * HEAD, np.int16),
            slots=np.zeros(N_INPUTS, np.int64),
            saved=np.zeros(HEAD, np.uint8),
        )

    def _begin(self, rows: int, columns: int) -> tuple[Tables, Adaptive, Planes, Shape, Scratch]:
        scratch = Scratch(
            np.zeros((HEAD, N_INPUTS), np.int64),
            np.zeros((HEAD, 2), np.int64),
            np.zeros(N_INPUTS, np.int64),
            np.zeros(HEAD, np.int64),
        )
        adaptive = Adaptive(self.start.counters.copy(), self.start.weights.copy())
        planes = self._blank_planes(rows, columns)
        return self._tables_for(rows, columns), adaptive, planes, Shape(rows, columns), scratch

    def encode(
        self,
        target: Float32,
        layers: Sequence[int],
        *,
        rate_weight: float,
        effort: int = 1,
        predictor: Predictor | None = None,
        importance: Importance | None = None,
    ) -> tuple[list[tuple[bytes, int]], Int32]:
        """Quantize and code a tile.

        target: (h, w, C) float32 coefficients in steps. layers: the heads at which messages end,
        increasing, the last one H. rate_weight: lambda > 0 in step^2 a bit. effort: 1..3, see
        HEADS_APART. predictor: a network's means and levels. importance: of errors. Returns a
        (message, checksum of its indices) for each layer and the reconstruction (h, w, C) int32 in
        1/16 step. O(h w C), about 0.1 us a coefficient.
        """
        messages, planes, _ = self.encode_from(
            self.start, target, layers, rate_weight=rate_weight, effort=effort,
            predictor=predictor, importance=importance,
        )  # fmt: skip
        return messages, self.channels_last(planes.recon, Shape(*target.shape[:2]))

    def encode_from(
        self,
        start: Adaptive,
        target: Float32,
        layers: Sequence[int],
        *,
        rate_weight: float,
        effort: int = 1,
        predictor: Predictor | None = None,
        importance: Importance | None = None,
        count_limit: int = COUNT_LIMIT,
    ) -> tuple[list[tuple[bytes, int]], Planes, Adaptive]:
        """``encode`` from other first states, for fitting: also all planes, and the states behind
        the tile. Counters slow down until they have seen ``count_limit`` <= 1023 bits."""
        rows, columns = target.shape[:2]
        tables, _, planes, shape, scratch = self._begin(rows, columns)
        tables = tables._replace(limit=np.array([count_limit], np.int64))
        adaptive = Adaptive(start.counters.copy(), start.weights.copy())
        polar = self._polar_room(rows, columns)
        messages: list[tuple[bytes, int]] = []
        words = np.zeros(rows * columns * HEAD * 20 + 64, np.uint32)
        worth = np.full((rows, columns), 1 / rate_weight, np.float32)
        if importance is not None:
            worth *= importance.places
        first = 0
        for end in layers:
            pieces = words
            pos, low, range_ = start_writing()
            for head in range(first, end):
                if pos + rows * columns * HEAD * 20 + 64 > len(pieces):
                    pieces = np.concatenate([pieces, np.zeros(len(words), np.uint32)])
                self._ask(predictor, planes, shape, head)
                wanted = np.ascontiguousarray(target[:, :, HEAD * head : HEAD * (head + 1)])
                mine = worth if importance is None else worth * importance.heads[head]
                tile = (tables, adaptive, planes, shape, scratch)
                state = pos, np.uint64(low), np.uint64(range_)
                if polar is None or (head == 0 and self.quantizer != Quantizer.POLAR):
                    pos, low, range_ = search.encode_pass(
                        *tile, pieces, *state, head, wanted, mine,
                        bool(self._causal[head]) or head < HEADS_APART[effort],
                        head >= HEADS_APART[effort],
                    )  # fmt: skip
                elif self.quantizer == Quantizer.POLAR:
                    pos, low, range_ = polar_kernels.encode_polar_pass(
                        *tile, polar, pieces, *state, head, wanted, mine
                    )
                else:
                    pos, low, range_ = polar_kernels.encode_switch_pass(
                        *tile, polar, pieces, *state, head, wanted, mine
                    )
            n_bytes = finish(pieces, pos, np.uint64(low), np.uint64(range_))
            checksum = self._checksum(planes, polar, shape, first, end)
            messages.append((words_to_bytes(pieces, n_bytes), checksum))
            first = end
        return messages, planes, adaptive

    def decode(
        self,
        messages: Sequence[tuple[bytes | memoryview, int]],
        layers: Sequence[int],
        rows: int,
        columns: int,
        predictor: Predictor | None = None,
    ) -> Int32:
        """Inverse of ``encode``: (rows, columns, C) int32. Fewer messages than layers give the
        coarse part of the tile; the other coefficients are what the taps predict. CorruptDataError
        where the indices have another checksum than the encoder's."""
        tables, adaptive, planes, shape, scratch = self._begin(rows, columns)
        polar = self._polar_room(rows, columns)
        first = 0
        for (message, checksum), end in zip(messages, layers, strict=False):
            words = words_from_bytes(message)
            pos, code, range_ = start_reading(words)
            for head in range(first, end):
                self._ask(predictor, planes, shape, head)
                tile = (tables, adaptive, planes, shape, scratch)
                state = pos, np.uint64(code), np.uint64(range_)
                if polar is None:
                    pos, code, range_ = kernels.decode_pass(*tile, words, *state, head)
                else:
                    switch = self.quantizer != Quantizer.POLAR
                    pos, code, range_ = polar_kernels.decode_polar_pass(
                        *tile, polar, words, *state, head, switch
                    )
            got = self._checksum(planes, polar, shape, first, end)
            if got != checksum:
                raise CorruptDataError(
                    f"indices of heads {first}..{end - 1}: checksum {got:08x} does not match "
                    f"{checksum:08x}"
                )
            first = end
        if first > 0:
            self._predict_rest(planes, shape, first)
        return self.channels_last(planes.recon, shape)

    def _predict_rest(self, planes: Planes, shape: Shape, first: int) -> None:
        """Give the heads from ``first`` on, which were not decoded, the means that the taps predict
        from those that were (without a network's)."""
        rows, columns = shape
        full = planes.recon.reshape(self.n_heads, rows + 2 * PAD, columns + 2 * PAD, HEAD)
        taps = self.arrays["mean_taps"].astype(np.int64)
        for head in range(first, self.n_heads):
            if self._causal[head]:
                continue
            total = np.full((rows, columns, HEAD), 1 << (kernels.MEAN_BITS - 1), np.int64)
            for channel, source, dy, dx, weight in taps[taps[:, 0] // HEAD == head].tolist():
                seen = full[source // HEAD, PAD + dy :, PAD + dx :, source % HEAD]
                total[:, :, channel % HEAD] += weight * seen[:rows, :columns].astype(np.int64)
            mean = np.clip(total >> kernels.MEAN_BITS, -kernels.MAX_MEAN, kernels.MAX_MEAN)
            full[head] = np.pad(mean, ((PAD, PAD), (PAD, PAD), (0, 0)), "edge")

    def _checksum(
        self, planes: Planes, polar: PolarTables | None, shape: Shape, first: int, end: int
    ) -> int:
        """CRC-32 of the indices (heads, rows, columns, 8) of some heads, as little-endian int16,
        and of the symbols of polar heads, likewise, behind them."""
        value = 0
        for plane in (planes.indices,) if polar is None else (planes.indices, polar.symbols):
            inside = self._inside(plane, shape)[first:end]
            value = zlib.crc32(np.ascontiguousarray(inside, "<i2").tobytes(), value)
        return value


def _adaptive(arrays: Arrays) -> Adaptive:
    """First states from what the weights file keeps of them."""
    return Adaptive(
        arrays["probabilities"].astype(np.uint32) << np.uint32(16)
        | arrays["counts"].astype(np.uint32),
        np.ascontiguousarray(arrays["weights"], np.int32),
    )
