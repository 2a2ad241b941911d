"""Heads as radius and direction: the pure polar form, and the switch between polar and trellis.

The vector of a head without its means is ``radius * direction``, in 1/16 step

    part[j] = (n * spacing * sum of codewords[stage][j] + 2**11) >> 12        n = 1, 2, 3 ...

with one codeword of K for each of as many stages as n asks for. ``POLAR`` heads are nothing else;
``SWITCH`` heads (all but the first) are polar with an optional remainder, or indices alone:

    head flag | polar? (switch) | n > 1? > 2? ... | codewords, bit by bit | rest? (switch) | indices

All these bits are mixed like those of indices, in counters and weights of their own behind the
others. What indices, recon, magnitude and total are to a trellis head, the same planes are to a
polar one; ``symbols`` keeps its radius and its codewords.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from polarpack.entropy.range_coder import kernel

from ._coder_kernels import (
    HEAD,
    MAX_INDEX,
    N_BINS,
    N_INTRA,
    N_LEVELS,
    ONE,
    PAD,
    UNARY,
    Adaptive,
    Array,
    Planes,
    Scratch,
    Shape,
    Tables,
    code,
    code_head,
    code_index,
    code_tail,
    coefficient_contexts,
    compiled,
    extend_plane,
    extend_row,
    head_contexts,
    i64,
    inlined,
    learn,
    magnitude_level,
    mix,
    predict,
    put_head,
)
from ._search_kernels import (
    HUGE,
    Z0,
    advance,
    begin_position,
    begin_row,
    bits,
    blank_trellis,
    cheapest,
    end_position,
    enter_head,
    follow,
    highest_bin,
    leave_head,
    offer_nothing,
    price,
    through_head,
    without_mean,
)

CODEWORD_BITS = 6
CODEWORDS = 1 << CODEWORD_BITS  # K
MAX_STAGES = 14  # two to an int16 of ``symbols``
CODEBOOK_BITS = 12  # fraction of codewords
RADIUS_CLASSES = 4
IS_POLAR, HAS_REST, RADIUS = 0, 1, 2  # bins of a head's counters
REST_SIZES = 8
MAX_RECON = 1 << 21


class PolarTables(NamedTuple):
    """What polar heads need besides ``Tables``; G groups of heads, S stages."""

    codebook: (
        Array  # (G, S, K, HEAD) int64 in 2**-CODEBOOK_BITS; heads from G - 1 on share the last
    )
    depth: Array  # (G, S) int64, rising: the least n with so many stages; the first is 1
    spacing: Array  # (1,) int64: radius of n = 1, in 1/16 step
    start: Array  # (17,) int64: where the counters of each expert start
    sets: Array  # (6,) int64: likewise the weight sets
    symbols: Array  # int16, flat like ``Planes.indices``: n (0: not polar), pairs of codewords
    slots: Array  # (N_INPUTS,) int64, room
    saved: Array  # (HEAD,) uint8, room


@inlined
def radius_class(n: Any) -> Any:
    """0..3: n = 1, 2, 3 and 4, more."""
    return i64(n > 1) + i64(n > 2) + i64(n > 4)


@inlined
def n_stages(polar: Any, group: Any, n: Any) -> Any:
    """How many codewords a radius has."""
    count = i64(1)
    while count < polar.depth.shape[1] and polar.depth[group, count] <= n:
        count += 1
    return count


@inlined
def group_of(polar: Any, head: Any) -> Any:
    """The codebook of a head."""
    return min(i64(head), i64(polar.codebook.shape[0] - 1))


@compiled
def polar_slots(tables: Any, polar: Any, head_slots: Any, set0: Any, head: Any, at: Any,
                stride: Any) -> Any:  # fmt: skip
    """Slots of a head's polar bits, of bin 0, from those of its flag; its two weight sets."""
    for i in range(7):
        polar.slots[i] = polar.start[i] + (head_slots[i] - tables.base[7 + i]) * N_BINS
    near = i64(polar.symbols[(at - 1) * HEAD] > 0) + 2 * i64(
        polar.symbols[(at - stride) * HEAD] > 0
    )
    polar.slots[5] = polar.start[5] + (head * 4 + near) * N_BINS
    return polar.sets[0] + (set0 - tables.sets[2]), polar.sets[1] + head * N_BINS


@compiled
def mixed_bit(
    tables: Any, adaptive: Any, inputs: Any, slots: Any, step: Any, set0: Any, set1: Any,
    words: Any, coder: Any, bit: Any, decoding: Any,
) -> Any:  # fmt: skip
    """One mixed bit: (bit, coder)."""
    p = mix(tables, adaptive, inputs, slots, step, set0, set1)
    bit, coder = code(words, coder, p, bit, decoding)
    learn(tables, adaptive, inputs, slots, step, set0, set1, p, bit)
    return bit, coder


@compiled
def largest_two(tables: Any, planes: Any, polar: Any, head: Any, at: Any) -> Any:
    """The two coefficients whose predicted magnitudes are the largest, and the one with the largest
    level of the network; the first among equals. Nothing of the head itself is looked at."""
    first = at * HEAD
    for j in range(HEAD):
        polar.saved[j] = planes.magnitude[first + j]
        planes.magnitude[first + j] = 0
    one, two, best, second = i64(0), i64(0), i64(-1), i64(-1)
    net, most = i64(0), i64(-1)
    for j in range(HEAD):
        level = magnitude_level(tables, planes, head * HEAD + j, first + j)
        if level > best:
            two, second = one, best
            one, best = i64(j), level
        elif level > second:
            two, second = i64(j), level
        if i64(planes.level[first + j]) > most:
            net, most = i64(j), i64(planes.level[first + j])
    for j in range(HEAD):
        planes.magnitude[first + j] = polar.saved[j]
    return one, two, net


@compiled
def codeword_slots(
    polar: Any, head: Any, stage: Any, n: Any, near: Any, one: Any, two: Any, net: Any
) -> Any:
    """Slots of a codeword's bits, of node 0 of its tree; its weight sets but for the bit. near: the
    codeword that a context looks at, CODEWORDS for none."""
    later = min(i64(stage), i64(1))
    row = group_of(polar, head) * polar.codebook.shape[1] + stage
    slots, start = polar.slots, polar.start
    slots[0] = start[7] + row * CODEWORDS
    slots[1] = start[8] + (row * RADIUS_CLASSES + radius_class(n)) * CODEWORDS
    slots[2] = start[9] + (one * 2 + later) * CODEWORDS
    slots[3] = start[10] + (net * 2 + later) * CODEWORDS
    slots[4] = start[11] + (later * (CODEWORDS + 1) + near) * CODEWORDS
    slots[5] = start[12] + (head * 2 + later) * CODEWORDS
    slots[6] = start[13] + (one * HEAD + two) * CODEWORDS
    return (
        polar.sets[2] + min(i64(stage), i64(7)) * CODEWORD_BITS,
        polar.sets[3] + one * CODEWORD_BITS,
    )


@inlined
def west_codeword(polar: Any, at: Any) -> Any:
    """The first codeword of the position on the left, CODEWORDS if that is not polar."""
    west = (at - 1) * HEAD
    if polar.symbols[west] == 0:
        return i64(CODEWORDS)
    return i64(polar.symbols[west + 1]) & (CODEWORDS - 1)


@compiled
def code_polar(
    tables: Any, adaptive: Any, planes: Any, scratch: Any, polar: Any, words: Any, coder: Any,
    head: Any, at: Any, set0: Any, set1: Any, wanted: Any, part: Any, decoding: Any,
) -> Any:  # fmt: skip
    """Radius and codewords, whose slots ``polar_slots`` has found: into ``part`` (HEAD,), in 1/16
    step, and into ``symbols``. wanted: (HEAD,) symbols when encoding. Returns coder."""
    inputs = scratch.inputs
    size = i64(wanted[0])
    n = i64(1)
    go_on = i64(1)
    while go_on == 1 and n < UNARY:
        bit = i64(1) if size > n else i64(0)
        bin_ = RADIUS - 1 + n
        go_on, coder = mixed_bit(
            tables, adaptive, inputs, polar.slots, bin_, set0 + bin_ * (N_LEVELS // 3), set1 + bin_,
            words, coder, bit, decoding,
        )  # fmt: skip
        n += go_on
    if n == UNARY:
        n, coder = code_tail(tables, adaptive, words, coder, polar.start[14], size, decoding)
    one, two, net = largest_two(tables, planes, polar, head, at)
    near = west_codeword(polar, at)
    group = group_of(polar, head)
    first = at * HEAD
    for j in range(HEAD):
        part[j] = 0
        polar.symbols[first + j] = 0
    polar.symbols[first] = n
    for stage in range(n_stages(polar, group, n)):
        set0, set1 = codeword_slots(polar, head, stage, n, near, one, two, net)
        word = (i64(wanted[1 + (stage >> 1)]) >> (CODEWORD_BITS * (stage & 1))) & (CODEWORDS - 1)
        node = i64(1)
        for i in range(CODEWORD_BITS):
            bit = (word >> (CODEWORD_BITS - 1 - i)) & 1
            bit, coder = mixed_bit(
                tables, adaptive, inputs, polar.slots, node, set0 + i, set1 + i,
                words, coder, bit, decoding,
            )  # fmt: skip
            node = node << 1 | bit
        near = node - CODEWORDS
        polar.symbols[first + 1 + (stage >> 1)] += near << (CODEWORD_BITS * (stage & 1))
        for j in range(HEAD):
            part[j] += polar.codebook[group, stage, near, j]
    for j in range(HEAD):
        part[j] = scaled(polar, n, part[j])
    return coder


@inlined
def scaled(polar: Any, n: Any, component: Any) -> Any:
    """A component of radius times direction, in 1/16 step."""
    return (n * polar.spacing[0] * component + (1 << (CODEBOOK_BITS - 1))) >> CODEBOOK_BITS


@compiled
def add_part(planes: Any, at: Any, j: Any, mean: Any, part: Any, k: Any, odd: Any) -> Any:
    """Store coefficient j of a head with its polar part; returns its magnitude."""
    put_head(planes, at, j, mean, k, odd)
    whole = part + i64(planes.recon[at + j])
    planes.recon[at + j] = min(max(whole, -MAX_RECON), MAX_RECON)
    size = (abs(whole - mean) + 8) >> 4
    planes.magnitude[at + j] = min(size, 255)
    return size


@compiled
def code_polar_head(
    tables: Any, adaptive: Any, planes: Any, scratch: Any, polar: Any, words: Any, coder: Any,
    head: Any, at: Any, stride: Any, plane: Any, wanted: Any, part: Any, decoding: Any,
) -> Any:  # fmt: skip
    """One head of the pure polar form."""
    slots = scratch.slots[0]
    set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, 0)
    bit = i64(1) if wanted[0] > 0 else i64(0)
    bit, coder = mixed_bit(
        tables, adaptive, scratch.inputs, slots, 0, set0, set1, words, coder, bit, decoding
    )
    first = at * HEAD
    for j in range(HEAD):
        part[j] = 0
        polar.symbols[first + j] = 0
    if bit:
        set0, set1 = polar_slots(tables, polar, slots, set0, head, at, stride)
        coder = code_polar(
            tables, adaptive, planes, scratch, polar, words, coder, head, at, set0, set1, wanted,
            part, decoding,
        )  # fmt: skip
    total = i64(0)
    for j in range(HEAD):
        mean = predict(tables, planes, head * HEAD + j, first + j)
        total += add_part(planes, first, j, mean, part[j], 0, 0)
    planes.total[at] = min(total, 65535)
    return coder


@compiled
def remainder_contexts(
    tables: Any, planes: Any, scratch: Any, polar: Any, j: Any, channel: Any, at: Any,
    row_stride: Any, part: Any, n: Any, before: Any,
) -> None:  # fmt: skip
    """``coefficient_contexts`` of what a polar part leaves; before: the sum of |k| so far."""
    coefficient_contexts(tables, planes, scratch, j, channel, at, row_stride)
    kind = tables.channel_class[channel]
    size = min((abs(part[j]) + 8) >> 4, REST_SIZES - 1)
    near = min(before, N_INTRA - 1)
    slots = scratch.slots[j]
    slots[6] = polar.start[15] + (kind * REST_SIZES + size) * 2 * N_BINS
    slots[1] = polar.start[16] + ((radius_class(n) * HEAD + j) * N_INTRA + near) * 2 * N_BINS
    scratch.chosen[j, 0] = polar.sets[4] + radius_class(n) * 16
    scratch.chosen[j, 1] = polar.sets[5] + kind * 4


@compiled
def code_switch_head(
    tables: Any, adaptive: Any, planes: Any, scratch: Any, polar: Any, words: Any, coder: Any,
    head: Any, at: Any, stride: Any, plane: Any, state: Any, wanted: Any, symbols: Any, part: Any,
    decoding: Any,
) -> Any:  # fmt: skip
    """One head of the switch: (state, coder)."""
    slots, inputs = scratch.slots[0], scratch.inputs
    odd = tables.quantizer[state]
    set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, odd)
    rest = i64(0)
    if not decoding:
        for j in range(HEAD):
            if wanted[j] != 0:
                rest = i64(1)
    is_polar = i64(1) if symbols[0] > 0 else i64(0)
    bit, coder = mixed_bit(
        tables, adaptive, inputs, slots, 0, set0, set1, words, coder, rest | is_polar, decoding
    )
    first = at * HEAD
    for j in range(HEAD):
        part[j] = 0
        polar.symbols[first + j] = 0
    if bit == 0:
        is_polar, rest = i64(0), i64(0)
    else:
        set0, set1 = polar_slots(tables, polar, slots, set0, head, at, stride)
        is_polar, coder = mixed_bit(
            tables, adaptive, inputs, polar.slots, IS_POLAR, set0, set1, words, coder, is_polar,
            decoding,
        )  # fmt: skip
        if is_polar:
            rest, coder = mixed_bit(
                tables, adaptive, inputs, polar.slots, HAS_REST, set0 + N_LEVELS // 3, set1 + 1,
                words, coder, rest, decoding,
            )  # fmt: skip
            coder = code_polar(
                tables, adaptive, planes, scratch, polar, words, coder, head, at, set0, set1,
                symbols, part, decoding,
            )  # fmt: skip
        else:
            rest = i64(1)
    total = i64(0)
    before = i64(0)
    n = i64(polar.symbols[first])
    for j in range(HEAD):
        channel = head * HEAD + j
        mean = predict(tables, planes, channel, first + j)
        k = i64(0)
        odd = i64(0)
        if rest:
            odd = tables.quantizer[state]
            if is_polar:
                remainder_contexts(
                    tables, planes, scratch, polar, j, channel, first + j, stride * HEAD, part, n,
                    before,
                )  # fmt: skip
            else:
                coefficient_contexts(tables, planes, scratch, j, channel, first + j, stride * HEAD)
            k, coder = code_index(
                tables, adaptive, planes, scratch, words, coder, j, channel, first + j,
                stride * HEAD, odd, wanted[j], decoding,
            )  # fmt: skip
            state = tables.next_state[state, k & 1]
            before += abs(k)
        total += add_part(planes, first, j, mean, part[j], k, odd)
    planes.total[at] = min(total, 65535)
    return state, coder


@kernel
def decode_polar_pass(
    tables: Tables, adaptive: Adaptive, planes: Planes, shape: Shape, scratch: Scratch,
    polar: PolarTables, words: Array, pos: Any, code_: Any, range_: Any, head: int, switch: bool,
) -> Any:  # fmt: skip
    """Decode one head of a tile: (pos, code, range_) of the range coder afterwards."""
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    coder = (i64(pos), np.uint64(code_), np.uint64(range_))
    nothing = np.zeros(HEAD, np.int64)
    part = np.zeros(HEAD, np.int64)
    state = i64(0)
    for row in range(shape.rows):
        for column in range(shape.columns):
            at = head * plane + (row + PAD) * stride + column + PAD
            extend_row(planes, head, at, row, column, shape.columns, stride)
            if switch and head > 0:
                state, coder = code_switch_head(
                    tables, adaptive, planes, scratch, polar, words, coder, head, at, stride,
                    plane, state, nothing, nothing, part, True,
                )  # fmt: skip
            elif switch:
                state, coder = code_head(
                    tables, adaptive, planes, scratch, words, coder, head, at, stride, plane,
                    state, nothing, True,
                )  # fmt: skip
            else:
                coder = code_polar_head(
                    tables, adaptive, planes, scratch, polar, words, coder, head, at, stride,
                    plane, nothing, part, True,
                )  # fmt: skip
    extend_plane(planes, shape, head)
    return coder


# -- the encoder's search ------------------------------------------------------------------------


@compiled
def price_polar(
    tables: Any, adaptive: Any, scratch: Any, polar: Any, head: Any, set0: Any, set1: Any,
    n: Any, word: Any, ways: Any,
) -> Any:  # fmt: skip
    """Bits of a radius and of its first codeword, whose slots ``polar_slots`` has found. ways: of
    ``largest_two`` and ``west_codeword``."""
    price = Z0
    for level in range(1, min(n, UNARY - 1) + 1):
        bin_ = RADIUS - 1 + level
        p = mix(tables, adaptive, scratch.inputs, polar.slots, bin_,
                set0 + bin_ * (N_LEVELS // 3), set1 + bin_)  # fmt: skip
        price += bits(tables, p) if n > level else bits(tables, ONE - p)
    rest = n - UNARY + 1
    while rest > 1:
        price += np.float32(2.0)
        rest >>= 1
    return price + price_codeword(
        tables, adaptive, scratch, polar, head, i64(0), n, ways[3], word, ways
    )


@compiled
def price_codeword(
    tables: Any, adaptive: Any, scratch: Any, polar: Any, head: Any, stage: Any, n: Any,
    near: Any, word: Any, ways: Any,
) -> Any:  # fmt: skip
    """Bits of one codeword; the slots of the radius are lost."""
    set0, set1 = codeword_slots(polar, head, stage, n, near, ways[0], ways[1], ways[2])
    price = Z0
    node = i64(1)
    for i in range(CODEWORD_BITS):
        bit = (word >> (CODEWORD_BITS - 1 - i)) & 1
        p = mix(tables, adaptive, scratch.inputs, polar.slots, node, set0 + i, set1 + i)
        price += bits(tables, p) if bit else bits(tables, ONE - p)
        node = node << 1 | bit
    return price


@compiled
def nearest_codeword(polar: Any, group: Any, stage: Any, wanted: Any) -> Any:
    """The codeword with the least |wanted - codeword|^2, (HEAD,) float32 in 2**-CODEBOOK_BITS."""
    best, word = HUGE, i64(0)
    for c in range(CODEWORDS):
        distance = Z0
        for j in range(HEAD):
            d = wanted[j] - np.float32(polar.codebook[group, stage, c, j])
            distance += d * d
        if distance < best:
            best, word = distance, i64(c)
    return word


@kernel
def encode_polar_pass(
    tables: Tables, adaptive: Adaptive, planes: Planes, shape: Shape, scratch: Scratch,
    polar: PolarTables, words: Array, pos: Any, low: Any, range_: Any, head: int,
    target: Array, worth: Array,
) -> Any:  # fmt: skip
    """Choose radius and codewords of one head of a tile, position by position, and code them:
    (pos, low, range_) afterwards. Arguments as those of ``encode_pass``."""
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    coder = (i64(pos), np.uint64(low), np.uint64(range_))
    group = group_of(polar, head)
    means = np.zeros(HEAD, np.int64)
    part = np.zeros(HEAD, np.int64)
    total = np.zeros(HEAD, np.int64)
    v = np.zeros(HEAD, np.float32)
    left = np.zeros(HEAD, np.float32)
    symbols = np.zeros(HEAD, np.int64)
    best_symbols = np.zeros(HEAD, np.int64)
    ways = np.zeros(4, np.int64)
    unit = np.float32(1 << CODEBOOK_BITS)
    for row in range(shape.rows):
        for column in range(shape.columns):
            at = head * plane + (row + PAD) * stride + column + PAD
            extend_row(planes, head, at, row, column, shape.columns, stride)
            norm = Z0
            for j in range(HEAD):
                means[j] = predict(tables, planes, head * HEAD + j, at * HEAD + j)
                left[j] = target[row, column, j] - np.float32(means[j]) * np.float32(0.0625)
                v[j] = min(max(left[j], np.float32(-60000.0)), np.float32(60000.0))
                norm += v[j] * v[j]
            best_symbols[:] = 0
            size = np.sqrt(norm) * np.float32(16.0) / np.float32(polar.spacing[0])
            nearest = min(int(size + np.float32(0.5)), MAX_INDEX)
            if nearest > 0:
                slots = scratch.slots[0]
                set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, 0)
                p = mix(tables, adaptive, scratch.inputs, slots, 0, set0, set1)
                best = worth[row, column] * norm + bits(tables, ONE - p)
                toll = bits(tables, p)
                ways[0], ways[1], ways[2] = largest_two(tables, planes, polar, head, at)
                ways[3] = west_codeword(polar, at)
                for n in range(max(nearest - 1, 1), min(nearest + 2, MAX_INDEX + 1)):
                    radius = np.float32(n * polar.spacing[0]) * np.float32(0.0625)
                    for j in range(HEAD):
                        left[j] = v[j] / radius * unit
                        total[j] = 0
                        symbols[j] = 0
                    symbols[0] = n
                    price = Z0
                    near = ways[3]
                    for stage in range(n_stages(polar, group, n)):
                        word = nearest_codeword(polar, group, stage, left)
                        for j in range(HEAD):
                            left[j] -= np.float32(polar.codebook[group, stage, word, j])
                            total[j] += polar.codebook[group, stage, word, j]
                        symbols[1 + (stage >> 1)] += word << (CODEWORD_BITS * (stage & 1))
                        if stage == 0:
                            first0, first1 = polar_slots(
                                tables, polar, slots, set0, head, at, stride
                            )
                            price += price_polar(
                                tables, adaptive, scratch, polar, head, first0, first1, n, word,
                                ways,
                            )  # fmt: skip
                        else:
                            price += price_codeword(
                                tables, adaptive, scratch, polar, head, stage, n, near, word, ways,
                            )  # fmt: skip
                        near = word
                    distortion = Z0
                    for j in range(HEAD):
                        d = v[j] - np.float32(scaled(polar, n, total[j])) * np.float32(0.0625)
                        distortion += d * d
                    cost = worth[row, column] * distortion + toll + price
                    if cost < best:
                        best = cost
                        best_symbols[:] = symbols
            coder = code_polar_head(
                tables, adaptive, planes, scratch, polar, words, coder, head, at, stride, plane,
                best_symbols, part, False,
            )  # fmt: skip
    extend_plane(planes, shape, head)
    return coder


@compiled
def best_direction(polar: Any, group: Any, left: Any) -> Any:
    """The codeword with the largest product with left (HEAD,), -1 if none is positive, and the
    multiple of ``spacing`` that is nearest to that product."""
    dot, word = Z0, i64(-1)
    for c in range(CODEWORDS):
        product = Z0
        for j in range(HEAD):
            product += left[j] * np.float32(polar.codebook[group, 0, c, j])
        if product > dot:
            dot, word = product, i64(c)
    size = dot * np.float32(16.0 / (1 << CODEBOOK_BITS)) / np.float32(polar.spacing[0])
    return word, int(min(size, np.float32(MAX_INDEX)) + np.float32(0.5))


@compiled
def settle_switch(
    tables: Any, planes: Any, polar: Any, trellis: Any, head: Any, column: Any, state: Any,
    at: Any, means: Any, found: Any,
) -> None:  # fmt: skip
    """``settle`` for a head that may be polar; found: n << CODEWORD_BITS | codeword, or 0."""
    n, word = found >> CODEWORD_BITS, found & (CODEWORDS - 1)
    polar.symbols[at * HEAD], polar.symbols[at * HEAD + 1] = n, word
    state = follow(trellis, column, state)
    some = False
    for j in range(HEAD):
        some = some or trellis.wanted[column, j] != 0
    total = i64(0)
    for j in range(HEAD):
        part = scaled(polar, n, polar.codebook[group_of(polar, head), 0, word, j])
        k = trellis.wanted[column, j]
        total += add_part(planes, at * HEAD, j, means[j], part, k, tables.quantizer[state])
        if some:
            state = tables.next_state[state, k & 1]
    planes.total[at] = min(total, 65535)


@compiled
def search_switch_row(
    tables: Any, adaptive: Any, planes: Any, shape: Any, scratch: Any, polar: Any, trellis: Any,
    head: Any, row: Any, state: Any, target: Any, worth: Any, part: Any, ways: Any, found: Any,
    symbols: Any,
) -> None:  # fmt: skip
    """``search_row`` with the switch: run 0 is indices alone, run 1 what a polar part leaves. part:
    (HEAD,), room. ways: (4,), room. found: (columns, S), room for radius and codeword of the paths.
    symbols: (columns, HEAD), those of the best one."""
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    n_states = tables.quantizer.size
    group = group_of(polar, head)
    means, left, slots = trellis.means[0], trellis.left, scratch.slots[0]
    begin_row(trellis, state)
    for column in range(shape.columns):
        at = head * plane + (row + PAD) * stride + PAD + column
        here = worth[column]
        extend_row(planes, head, at, row, column, shape.columns, stride)
        zeros, gain = without_mean(tables, planes, trellis, head, at, means, target[column], here)
        set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, 0)
        p = mix(tables, adaptive, scratch.inputs, slots, 0, set0, set1)
        none, some = bits(tables, ONE - p), bits(tables, p)
        begin_position(trellis)
        for s in range(n_states):
            found[column, s] = 0
            offer_nothing(trellis, column, s, zeros + none)
        if gain > Z0:
            set0, set1 = polar_slots(tables, polar, slots, set0, head, at, stride)
            p = mix(tables, adaptive, scratch.inputs, polar.slots, IS_POLAR, set0, set1)
            plain, toll = some + bits(tables, ONE - p), some + bits(tables, p)
            enter_head(trellis, plain, 0, n_states)
            through_head(
                tables, adaptive, planes, scratch, trellis, head, at, stride, column, here, 0,
                False,
            )  # fmt: skip
            leave_head(trellis, column, 0)
            word, nearest = best_direction(polar, group, left)
            for n in range(max(nearest - 1, 1), nearest + 1 if word >= 0 else 0):
                set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, 0)
                set0, set1 = polar_slots(tables, polar, slots, set0, head, at, stride)
                p = mix(
                    tables, adaptive, scratch.inputs, polar.slots, HAS_REST,
                    set0 + N_LEVELS // 3, set1 + 1,
                )  # fmt: skip
                alone, more = bits(tables, ONE - p), bits(tables, p)
                ways[0], ways[1], ways[2] = largest_two(tables, planes, polar, head, at)
                ways[3] = west_codeword(polar, at)
                cost = toll + price_polar(
                    tables, adaptive, scratch, polar, head, set0, set1, n, word, ways
                )
                distortion = Z0
                for j in range(HEAD):
                    part[j] = scaled(polar, n, polar.codebook[group, 0, word, j])
                    d = left[j] - np.float32(part[j]) * np.float32(0.0625)
                    distortion += here * d * d
                for s in range(n_states):
                    c = trellis.cost[0, s] + distortion + cost + alone
                    if c < trellis.cost[1, s]:
                        trellis.cost[1, s] = c
                        trellis.run[column, s] = -1
                        found[column, s] = n << CODEWORD_BITS | word
                if n < nearest or distortion < np.float32(1.0):
                    continue  # a remainder is tried at the nearest radius only
                before = i64(0)
                enter_head(trellis, cost + more, 0, n_states)
                for j in range(HEAD):
                    remainder_contexts(
                        tables, planes, scratch, polar, j, head * HEAD + j, at * HEAD + j,
                        stride * HEAD, part, n, before,
                    )  # fmt: skip
                    left[j] -= np.float32(part[j]) * np.float32(0.0625)
                    before += int(abs(left[j]) * np.float32(0.5) + np.float32(0.3))
                    price(tables, adaptive, scratch, trellis, j, highest_bin(left[j]))
                    advance(
                        tables, trellis, j, here, trellis.back[column, 1], trellis.taken[column, 1]
                    )
                leave_head(trellis, column, 1)
                for s in range(n_states):
                    if trellis.run[column, s] == 1:
                        found[column, s] = n << CODEWORD_BITS | word
        s = end_position(trellis)
        settle_switch(tables, planes, polar, trellis, head, column, s, at, means, found[column, s])
    s = cheapest(trellis.cost[0])
    for column in range(shape.columns - 1, -1, -1):
        symbols[column, 0] = found[column, s] >> CODEWORD_BITS
        symbols[column, 1] = found[column, s] & (CODEWORDS - 1)
        s = follow(trellis, column, s)


@kernel
def encode_switch_pass(
    tables: Tables, adaptive: Adaptive, planes: Planes, shape: Shape, scratch: Scratch,
    polar: PolarTables, words: Array, pos: Any, low: Any, range_: Any, head: int,
    target: Array, worth: Array,
) -> Any:  # fmt: skip
    """``encode_pass`` for a head with the switch, whose means do not depend on the head itself."""
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    n_states = tables.quantizer.size
    coder = (i64(pos), np.uint64(low), np.uint64(range_))
    trellis = blank_trellis(shape.columns, 2, n_states)
    found = np.zeros((shape.columns, n_states), np.int64)
    symbols = np.zeros((shape.columns, HEAD), np.int64)
    part = np.zeros(HEAD, np.int64)
    ways = np.zeros(4, np.int64)
    state = i64(0)
    for row in range(shape.rows):
        search_switch_row(
            tables, adaptive, planes, shape, scratch, polar, trellis, head, row, state, target[row],
            worth[row], part, ways, found, symbols,
        )  # fmt: skip
        for column in range(shape.columns):
            at = head * plane + (row + PAD) * stride + column + PAD
            extend_row(planes, head, at, row, column, shape.columns, stride)
            state, coder = code_switch_head(
                tables, adaptive, planes, scratch, polar, words, coder, head, at, stride, plane,
                state, trellis.wanted[column], symbols[column], part, False,
            )  # fmt: skip
    extend_plane(planes, shape, head)
    return coder
