"""Kernels of the latent coder: context mixing, and one pass of a tile as the decoder makes it.

A tile of the latent is coded head by head (8 channels at a time), each head at all positions in
raster order. A coefficient is a mean plus a lattice index, in steps; the index is coded as bits

    head flag | zero? sign | > 1? > 2? ... > 13? then Exp-Golomb                 (k = 0, 1, 2, ...)

and every bit but the sign and the tail is priced by *logistic mixing*: N_EXPERTS adaptive counters
are picked by different contexts (magnitudes of neighbours, of earlier heads, of the head's earlier
coefficients, the level a network predicted ...), their probabilities go to the logistic domain,
two sets of weights picked by two more contexts sum them, and the weights move along the gradient of
the coding cost (Mahoney, "Adaptive weighing of context models for lossless data compression",
2005). The contexts rest on a linear prediction of the magnitude from what is already decoded, after
Wu, "Lossless compression of continuous-tone images via context selection, quantization, and
modeling", IEEE Trans. IP 1997.

All arithmetic is in integers, so that every machine reads the same symbols. The encoder's search
stands in ``_search_kernels``, heads coded as radius and direction in ``_polar_kernels``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polarpack._numba import njit
from polarpack.entropy.range_coder import get_bit, kernel, put_bit

Array = npt.NDArray[Any]

HEAD = 8  # channels of a head
PAD = 2  # positions around a tile that contexts may look at
N_EXPERTS = 7
N_INPUTS = 8  # and a constant
N_BINS = 16  # counters of one context of a coefficient: zero?, > 1?, > 2? ...
UNARY = 14  # bits that are mixed; larger magnitudes have an Exp-Golomb tail
MAX_INDEX = 30000
MAX_MEAN = 1 << 20  # in 1/16 step; with the largest index |recon| stays below 2**21
N_LEVELS = 48  # of a predicted magnitude
N_LOCAL, N_INTRA, N_PARENT, N_NET = 12, 8, 20, 64

ONE = 1 << 16
TAIL_BITS = 16
STRETCH_LIMIT = 2815  # of the logistic domain, in 1/256: probabilities from 2**-16 on
WEIGHT_BITS = 16
MEAN_BITS = 12  # fraction of the weights of the prediction
MAGNITUDE_BITS = 12  # of those of the magnitude
LEVEL_BITS = 6  # fraction of a predicted magnitude
LEARN_SHIFT = 14

i64: Any = np.int64
inlined = njit(inline="always", error_model="numpy")
# Larger ones are typed once, and joined as machine code. Otherwise every call would hand over some
# fifty arrays; and since they borrow these and allocate nothing, they need not count references to
# them: both together took most of the time.
compiled = njit(nogil=True, error_model="numpy", forceinline=True, _nrt=False)


class Tables(NamedTuple):
    """What does not change while a tile is coded. C channels, H heads, T taps; offsets are into
    the flat padded arrays (H, h + 2 PAD, w + 2 PAD, HEAD) of ``Planes``."""

    mean_count: Array  # (C,) int64
    mean_offset: Array  # (C, T) int64
    mean_weight: Array  # (C, T) int64, in 2**-MEAN_BITS
    magnitude_count: Array  # (C,)
    magnitude_offset: Array
    magnitude_weight: Array  # in 2**-MAGNITUDE_BITS
    magnitude_bias: Array  # (C,) int64, in 2**-LEVEL_BITS
    head_count: Array  # (H,), offsets into (H, h + 2 PAD, w + 2 PAD)
    head_offset: Array
    head_weight: Array
    head_bias: Array
    parent: Array  # (C, 2) int64 offsets
    channel_class: Array  # (C,) int64: channels that share counters
    level: Array  # (4096,) uint8: predicted magnitude, in 2**-LEVEL_BITS -> 0..N_LEVELS - 1
    local: Array  # (1024,) uint8
    stretch: Array  # (4096,) int32
    squash: Array  # (2 STRETCH_LIMIT + 1,) int32
    reciprocal: Array  # (1024,) int64
    cost: Array  # (4096,) float32: bits of a probability in 1/4096
    next_state: Array  # (S, 2) int64
    quantizer: Array  # (S,) int64
    ways: Array  # (S, 4) uint64: ``polarpack.trellis.predecessors``
    base: Array  # (2 N_EXPERTS + 2,) int64: where the counters of each expert start
    sets: Array  # (4,) int64: where the four kinds of weight sets start
    limit: Array  # (1,) int64: counts at which counters stop to slow down


class Adaptive(NamedTuple):
    """What learns while a tile is coded."""

    counters: Array  # uint32: probability of a one in 22 bits, count in 10
    weights: Array  # (n_sets, N_INPUTS) int32


class Planes(NamedTuple):
    """The tile, padded by PAD, flat: index ((head * rows + row) * columns + column) * HEAD + j."""

    indices: Array  # int16: k
    recon: Array  # int32: mean + 16 q, in 1/16 step
    magnitude: Array  # uint8: |q|
    total: Array  # uint16, one for each head: sum of its magnitudes
    level: Array  # uint8: predicted by a network
    mean: Array  # int32: likewise, in 1/16 step


class Shape(NamedTuple):
    """Of a tile."""

    rows: int
    columns: int


class Scratch(NamedTuple):
    """Room that the kernels need, allocated once."""

    slots: Array  # (HEAD, N_INPUTS) int64: counters of each coefficient's experts, of bin 0
    chosen: Array  # (HEAD, 2) int64: weight sets
    inputs: Array  # (N_INPUTS,) int64
    means: Array  # (HEAD,) int64


@inlined
def mix(
    tables: Any, adaptive: Any, inputs: Any, slots: Any, step: Any, set0: Any, set1: Any
) -> Any:
    """Probability of a one, in 1..65535 of 65536, from the experts' counters at slots + step."""
    sum0 = i64(adaptive.weights[set0, N_EXPERTS]) << 8
    sum1 = i64(adaptive.weights[set1, N_EXPERTS]) << 8
    for i in range(N_EXPERTS):
        s = i64(tables.stretch[adaptive.counters[slots[i] + step] >> np.uint32(20)])
        inputs[i] = s
        sum0 += s * adaptive.weights[set0, i]
        sum1 += s * adaptive.weights[set1, i]
    mixed = (sum0 + sum1) >> (WEIGHT_BITS + 1)
    mixed = min(max(mixed, -STRETCH_LIMIT), STRETCH_LIMIT)
    return i64(tables.squash[mixed + STRETCH_LIMIT])


@inlined
def count(tables: Any, adaptive: Any, slot: Any, bit: Any) -> None:
    """Move a counter towards the bit, the slower the more it has seen."""
    value = i64(adaptive.counters[slot])
    seen = value & 1023
    p = value >> 10
    p += (((bit << 22) - bit - p) * tables.reciprocal[seen]) >> 16
    adaptive.counters[slot] = np.uint32(p << 10 | min(seen + 1, tables.limit[0]))


@inlined
def learn(
    tables: Any, adaptive: Any, inputs: Any, slots: Any, step: Any, set0: Any, set1: Any,
    p: Any, bit: Any,
) -> None:  # fmt: skip
    """After a bit: counters and both weight sets move."""
    error = (bit << 16) - p
    for i in range(N_EXPERTS):
        change = (inputs[i] * error + (1 << (LEARN_SHIFT - 1))) >> LEARN_SHIFT
        adaptive.weights[set0, i] += change
        adaptive.weights[set1, i] += change
        count(tables, adaptive, slots[i] + step, bit)
    change = (256 * error + (1 << (LEARN_SHIFT - 1))) >> LEARN_SHIFT
    adaptive.weights[set0, N_EXPERTS] += change
    adaptive.weights[set1, N_EXPERTS] += change


@inlined
def code(words: Any, coder: Any, p: Any, bit: Any, decoding: Any) -> Any:
    """Write the bit, or read one: (bit, coder)."""
    pos, a, range_ = coder
    p = min(max(p, 24), ONE - 24)
    if decoding:
        got, pos, a, range_ = get_bit(words, pos, a, range_, ONE - p)
        return i64(got), (pos, a, range_)
    pos, a, range_ = put_bit(words, pos, a, range_, ONE - p, bit)
    return i64(bit), (pos, a, range_)


@inlined
def code_counted(
    tables: Any, adaptive: Any, words: Any, coder: Any, slot: Any, bit: Any, decoding: Any
) -> Any:
    """The same with the probability of one counter, unmixed."""
    p = i64(adaptive.counters[slot] >> np.uint32(16))
    bit, coder = code(words, coder, p, bit, decoding)
    count(tables, adaptive, slot, bit)
    return bit, coder


@inlined
def predict(tables: Any, planes: Any, channel: Any, at: Any) -> Any:
    """Mean of a coefficient in 1/16 step: the network's, and taps over what is decoded."""
    total = i64(1 << (MEAN_BITS - 1))
    for t in range(tables.mean_count[channel]):
        total += tables.mean_weight[channel, t] * planes.recon[at + tables.mean_offset[channel, t]]
    return min(max((total >> MEAN_BITS) + planes.mean[at], -MAX_MEAN), MAX_MEAN)


@inlined
def magnitude_level(tables: Any, planes: Any, channel: Any, at: Any) -> Any:
    """Level of the magnitude that the neighbours let expect."""
    total = tables.magnitude_bias[channel] << (MAGNITUDE_BITS - LEVEL_BITS)
    for t in range(tables.magnitude_count[channel]):
        total += tables.magnitude_weight[channel, t] * i64(
            planes.magnitude[at + tables.magnitude_offset[channel, t]]
        )
    return i64(tables.level[min(max(total >> (MAGNITUDE_BITS - LEVEL_BITS), 0), 4095)])


@inlined
def coefficient_contexts(
    tables: Any, planes: Any, scratch: Any, j: Any, channel: Any, at: Any, row_stride: Any
) -> None:
    """Slots and weight sets of coefficient j of a head, for the even quantizer and bin 0; the odd
    quantizer's slots follow N_BINS later."""
    m = planes.magnitude
    level = magnitude_level(tables, planes, channel, at)
    near = 2 * (i64(m[at - HEAD]) + m[at - row_stride])
    near += i64(m[at - row_stride - HEAD]) + m[at - row_stride + HEAD]
    local = i64(tables.local[min(near, 1023)])
    intra = i64(0)
    for i in range(1, j + 1):
        intra += m[at - i] if i > 2 else 2 * i64(m[at - i])
    intra = i64(tables.local[min(intra, 1023)])
    intra = min(intra, N_INTRA - 1)
    first = min(i64(m[at + tables.parent[channel, 0]]), 4)
    second = min(i64(m[at + tables.parent[channel, 1]]), 3)
    kind = tables.channel_class[channel]
    slots = scratch.slots[j]
    base = tables.base
    slots[0] = base[0] + level * 2 * N_BINS
    slots[1] = base[1] + (kind * N_LOCAL + local) * 2 * N_BINS
    slots[2] = base[2] + (kind * N_INTRA + intra) * 2 * N_BINS
    slots[3] = base[3] + ((level >> 1) * N_LOCAL + local) * N_INTRA * 2 * N_BINS
    slots[3] += intra * 2 * N_BINS
    slots[4] = base[4] + (kind * N_PARENT + first * 4 + second) * 2 * N_BINS
    slots[5] = base[5] + (i64(planes.level[at]) * N_LOCAL + local) * 2 * N_BINS
    slots[6] = base[6] + (kind * (N_LEVELS // 3) + level // 3) * 2 * N_BINS
    scratch.chosen[j, 0] = tables.sets[0] + (level // 6) * 16
    scratch.chosen[j, 1] = tables.sets[1] + kind * 4


@inlined
def weight_sets(scratch: Any, j: Any, bin_: Any, odd: Any) -> Any:
    """Weight sets of one bit of coefficient j."""
    return scratch.chosen[j, 0] + min(bin_, 7) * 2 + odd, scratch.chosen[j, 1] + min(bin_, 3)


@inlined
def head_contexts(
    tables: Any, planes: Any, slots: Any, head: Any, at: Any, stride: Any, plane: Any, odd: Any
) -> Any:
    """Slots of a head's flag; returns its weight sets."""
    t = planes.total
    expected = tables.head_bias[head] << (MAGNITUDE_BITS - LEVEL_BITS)
    for i in range(tables.head_count[head]):
        expected += tables.head_weight[head, i] * i64(t[at + tables.head_offset[head, i]])
    level = i64(tables.level[min(max(expected >> (MAGNITUDE_BITS - LEVEL_BITS), 0), 4095)])
    around = i64(t[at - 1] > 0) + 2 * i64(t[at - stride] > 0)
    around += 4 * i64(t[at - stride - 1] > 0) + 8 * i64(t[at - stride + 1] > 0)
    near = min(i64(t[at - 1]) + t[at - stride], 1023)
    near = min(i64(tables.local[near]), 7)
    before = i64(0)
    ahead = i64(0)
    for i in range(1, min(head, 4) + 1):
        before += i64(t[at - i * plane] > 0)
    if head > 0:
        ahead = i64(t[at - plane + 1] > 0) + i64(t[at - plane + stride] > 0)
    recent = min(i64(t[at - plane]), 2) if head > 0 else i64(0)
    base = tables.base
    slots[0] = base[7] + head * N_LEVELS + level
    slots[1] = base[8] + (head * 16 + around) * 3 + ahead
    slots[2] = base[9] + (head * 8 + near) * 3 + recent
    slots[3] = base[10] + (level * 16 + around) * 5 + before
    slots[4] = base[11] + (head * 5 + before) * 3 + ahead
    slots[5] = base[12] + (i64(planes.level[at * HEAD]) * 5 + before) * 3 + ahead
    slots[6] = base[13] + (head * (N_LEVELS // 3) + level // 3) * 2 + odd
    return tables.sets[2] + level // 3, tables.sets[3] + head


@compiled
def code_tail(
    tables: Any, adaptive: Any, words: Any, coder: Any, slot: Any, size: Any, decoding: Any
) -> Any:
    """A size of UNARY or more, at most MAX_INDEX: the length of size - UNARY + 1 in unary, with a
    counter each from ``slot`` on, then its other bits. Returns (size, coder)."""
    rest = size - UNARY + 1
    length = i64(0)
    more = i64(1)
    while more == 1 and length < TAIL_BITS - 1:
        bit = i64(1) if rest >> (length + 1) > 0 else i64(0)
        more, coder = code_counted(tables, adaptive, words, coder, slot + length, bit, decoding)
        length += more
    value = i64(1)
    for i in range(length - 1, -1, -1):
        bit, coder = code(words, coder, i64(ONE // 2), (rest >> i) & 1, decoding)
        value = value << 1 | bit
    return min(value + UNARY - 1, MAX_INDEX), coder


@compiled
def code_index(
    tables: Any, adaptive: Any, planes: Any, scratch: Any, words: Any, coder: Any,
    j: Any, channel: Any, at: Any, row_stride: Any, odd: Any, k: Any, decoding: Any,
) -> Any:  # fmt: skip
    """One index: (k, coder)."""
    slots, inputs = scratch.slots[j], scratch.inputs
    size = abs(k)
    found = i64(0)
    go_on = i64(1)
    while go_on == 1 and found < UNARY:
        set0, set1 = weight_sets(scratch, j, found, odd)
        step = odd * N_BINS + found
        p = mix(tables, adaptive, inputs, slots, step, set0, set1)
        bit = i64(1) if size > found else i64(0)
        go_on, coder = code(words, coder, p, bit, decoding)
        learn(tables, adaptive, inputs, slots, step, set0, set1, p, go_on)
        found += go_on
    if found == 0:
        return i64(0), coder
    if found == UNARY:
        found, coder = code_tail(tables, adaptive, words, coder, tables.base[14], size, decoding)
    west, north = i64(planes.indices[at - HEAD]), i64(planes.indices[at - row_stride])
    west = i64(west > 0) - i64(west < 0)
    north = i64(north > 0) - i64(north < 0)
    slot = tables.base[15] + (tables.channel_class[channel] * 9 + (west + 1) * 3 + north + 1)
    bit = i64(1) if k < 0 else i64(0)
    bit, coder = code_counted(tables, adaptive, words, coder, slot, bit, decoding)
    return -found if bit else found, coder


@inlined
def put_head(planes: Any, at: Any, j: Any, mean: Any, k: Any, odd: Any) -> Any:
    """Store coefficient j of a head; returns its magnitude."""
    q = 2 * k
    if k > 0:
        q -= odd
    elif k < 0:
        q += odd
    planes.indices[at + j] = k
    planes.recon[at + j] = mean + 16 * q
    size = abs(q)
    planes.magnitude[at + j] = min(size, 255)
    return size


@compiled
def extend_row(planes: Any, head: Any, at: Any, row: Any, column: Any, columns: Any,
               stride: Any) -> None:  # fmt: skip
    """Before a position is coded, give it neighbours where the tile has none: above the first row
    stands what is on the left, left of the first column what is above, and right of the last one
    its own column."""
    if column == 0 and row > 0:
        for i in range(1, PAD + 1):
            for j in range(HEAD):
                above = (at - stride) * HEAD + j
                planes.recon[(at - i) * HEAD + j] = planes.recon[above]
                planes.magnitude[(at - i) * HEAD + j] = planes.magnitude[above]
            planes.total[at - i] = planes.total[at - stride]
    if row == 0 and column == 0:
        for i in range(1, PAD + 1):
            for r in range(-1, 2):
                for j in range(HEAD):
                    planes.recon[(at - i * stride + r) * HEAD + j] = 0
                    planes.magnitude[(at - i * stride + r) * HEAD + j] = 0
                planes.total[at - i * stride + r] = 0
    if row == 0 and column > 0:
        for i in range(1, PAD + 1):
            for r in range(-1, 2):
                for j in range(HEAD):
                    there = (at - i * stride + r) * HEAD + j
                    planes.recon[there] = planes.recon[(at - 1) * HEAD + j]
                    planes.magnitude[there] = planes.magnitude[(at - 1) * HEAD + j]
                planes.total[at - i * stride + r] = planes.total[at - 1]
    if row > 0 and column == columns - 1:
        for r in range(1, PAD + 1):
            for j in range(HEAD):
                there = (at - stride + r) * HEAD + j
                planes.recon[there] = planes.recon[(at - stride) * HEAD + j]
                planes.magnitude[there] = planes.magnitude[(at - stride) * HEAD + j]
            planes.total[at - stride + r] = planes.total[at - stride]


@compiled
def extend_plane(planes: Any, shape: Any, head: Any) -> None:
    """After a head's pass, repeat its edges all around for the heads that follow."""
    stride = shape.columns + 2 * PAD
    height = shape.rows + 2 * PAD
    for row in range(height):
        source_row = min(max(row, PAD), shape.rows + PAD - 1)
        for column in range(stride):
            source = min(max(column, PAD), shape.columns + PAD - 1)
            if source == column and source_row == row:
                continue
            to = (head * height + row) * stride + column
            come = (head * height + source_row) * stride + source
            planes.total[to] = planes.total[come]
            for j in range(HEAD):
                planes.recon[to * HEAD + j] = planes.recon[come * HEAD + j]
                planes.magnitude[to * HEAD + j] = planes.magnitude[come * HEAD + j]


@compiled
def code_head(
    tables: Any, adaptive: Any, planes: Any, scratch: Any, words: Any, coder: Any,
    head: Any, at: Any, stride: Any, plane: Any, state: Any, wanted: Any, decoding: Any,
) -> Any:  # fmt: skip
    """Code the head at flat position ``at``: (state, coder). ``wanted`` (HEAD,) holds the indices
    when encoding."""
    slots = scratch.slots[0]
    odd = tables.quantizer[state]
    set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, odd)
    p = mix(tables, adaptive, scratch.inputs, slots, 0, set0, set1)
    bit = i64(0)
    if not decoding:
        for j in range(HEAD):
            if wanted[j] != 0:
                bit = i64(1)
    bit, coder = code(words, coder, p, bit, decoding)
    learn(tables, adaptive, scratch.inputs, slots, 0, set0, set1, p, bit)
    total = i64(0)
    first = at * HEAD
    for j in range(HEAD):
        channel = head * HEAD + j
        mean = predict(tables, planes, channel, first + j)
        k = i64(0)
        odd = i64(0)
        if bit:
            odd = tables.quantizer[state]
            coefficient_contexts(tables, planes, scratch, j, channel, first + j, stride * HEAD)
            k, coder = code_index(
                tables, adaptive, planes, scratch, words, coder, j, channel, first + j,
                stride * HEAD, odd, wanted[j], decoding,
            )  # fmt: skip
            state = tables.next_state[state, k & 1]
        total += put_head(planes, first, j, mean, k, odd)
    planes.total[at] = min(total, 65535)
    return state, coder


@kernel
def decode_pass(
    tables: Tables, adaptive: Adaptive, planes: Planes, shape: Shape, scratch: Scratch,
    words: Array, pos: Any, code_: Any, range_: Any, head: int,
) -> Any:  # fmt: skip
    """Decode one head of a tile: (pos, code, range_) of the range coder afterwards."""
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    coder = (i64(pos), np.uint64(code_), np.uint64(range_))
    nothing = np.zeros(HEAD, np.int64)
    state = i64(0)
    for row in range(shape.rows):
        for column in range(shape.columns):
            at = head * plane + (row + PAD) * stride + column + PAD
            extend_row(planes, head, at, row, column, shape.columns, stride)
            state, coder = code_head(
                tables, adaptive, planes, scratch, words, coder, head, at, stride, plane, state,
                nothing, True,
            )  # fmt: skip
    extend_plane(planes, shape, head)
    return coder
