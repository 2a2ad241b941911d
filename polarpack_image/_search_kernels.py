"""The encoder's search: which indices of a head cost least, by distortion and by bits.

``encode_pass`` is the encoder's twin of ``decode_pass``: a Viterbi search over one row of positions
at a time, whose rates are those of the adaptive model as it stands before the row. In float32;
decoders do without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from polarpack.entropy.range_coder import kernel

from ._coder_kernels import (
    HEAD,
    MAX_INDEX,
    N_BINS,
    ONE,
    PAD,
    Adaptive,
    Array,
    Planes,
    Scratch,
    Shape,
    Tables,
    code_head,
    coefficient_contexts,
    compiled,
    extend_plane,
    extend_row,
    head_contexts,
    i64,
    inlined,
    mix,
    predict,
    put_head,
    weight_sets,
)

Z0 = np.float32(0.0)
HUGE = np.float32(1e30)
FARTHEST = np.float32(50000.0)  # a target beyond it is taken for it


@inlined
def bits(tables: Any, p: Any) -> Any:
    """Cost in bits of what has probability p in 65536."""
    return tables.cost[min(max(p, 8), ONE - 8) >> 4]


@inlined
def price_index(
    tables: Any, adaptive: Any, scratch: Any, j: Any, odd: Any, most: Any, rates: Any
) -> None:
    """rates (5,): bits of |k| = 0, 1, 2, 3 (with sign) and of each one more, in the contexts at
    hand, up to ``most`` which is asked for (the others are extrapolated)."""
    slots, inputs = scratch.slots[j], scratch.inputs
    so_far = np.float32(1.0)
    step_cost = np.float32(1.5)
    for b in range(4):
        if b <= most:
            set0, set1 = weight_sets(scratch, j, b, odd)
            p = mix(tables, adaptive, inputs, slots, odd * N_BINS + b, set0, set1)
            stop = bits(tables, ONE - p)
            step_cost = bits(tables, p)
        else:
            stop = np.float32(1.0)
        rates[b] = stop + so_far if b > 0 else stop
        so_far += step_cost
    rates[4] = max(step_cost, np.float32(0.3))


@inlined
def rate_of(rates: Any, k: Any) -> Any:
    """Bits of |k| from ``price_index``."""
    return rates[k] if k < 4 else rates[3] + np.float32(k - 3) * rates[4]


@inlined
def offer(rates: Any, v: Any, odd: Any, worth: Any, cost: Any, pick: Any) -> None:
    """The cheapest even and odd index of one quantizer near v = |coefficient|: into cost (2,), in
    bits, and pick (2,), with zero among the even ones."""
    k = int((v + np.float32(odd)) * np.float32(0.5))
    k = min(k, MAX_INDEX - 1)
    below = max(np.float32(2 * k - odd), Z0) if k > 0 else Z0
    above = np.float32(2 * k + 2 - odd)
    low = worth * (v - below) * (v - below) + rate_of(rates, k)
    high = worth * (v - above) * (v - above) + rate_of(rates, k + 1)
    parity = k & 1
    cost[parity], pick[parity] = low, k
    cost[1 - parity], pick[1 - parity] = high, k + 1
    zero = worth * v * v + rates[0]
    if zero < cost[0]:
        cost[0], pick[0] = zero, 0


class Trellis(NamedTuple):
    """Room for the search through one head, S states."""

    inner: Array  # (2, S) float32: bits of the best path into each state, of even and odd j
    back: Array  # (HEAD, S) int64: the state it came from
    taken: Array  # (HEAD, S) int64: and its index
    trial: Array  # (2, HEAD) int64: indices of one path, and their multiples of the step
    branch: Array  # (2, 2) float32: bits by quantizer and parity
    pick: Array  # (2, 2) int64: and indices


@kernel
def blank_trellis(n_states: Any) -> Any:
    """Room for ``n_states`` states."""
    return Trellis(
        np.zeros((2, n_states), np.float32),
        np.zeros((HEAD, n_states), np.int64),
        np.zeros((HEAD, n_states), np.int64),
        np.zeros((2, HEAD), np.int64),
        np.zeros((2, 2), np.float32),
        np.zeros((2, 2), np.int64),
    )


@compiled
def through_head(tables: Any, signed: Any, rates: Any, worth: Any, trellis: Any) -> None:
    """Viterbi through the eight coefficients of a head: from the costs in ``inner[0]`` to those in
    ``inner[HEAD & 1]``, with the ways back. signed: (HEAD,) float32, what is left of the target
    without the mean, in steps; rates: of ``price_index``; worth: bits a squared step."""
    n_states = tables.quantizer.size
    inner, branch, pick = trellis.inner, trellis.branch, trellis.pick
    for j in range(HEAD):
        now, then = j & 1, 1 - (j & 1)
        v = min(abs(signed[j]), FARTHEST)
        for odd in range(2 if n_states > 1 else 1):
            offer(rates[j, odd], v, odd, worth, branch[odd], pick[odd])
        for s in range(n_states):
            inner[then, s] = HUGE
        for s in range(n_states):
            if inner[now, s] >= HUGE:
                continue
            odd = tables.quantizer[s]
            for parity in range(2):
                t = tables.next_state[s, parity]
                c = inner[now, s] + branch[odd, parity]
                if c < inner[then, t]:
                    inner[then, t] = c
                    trellis.back[j, t] = s
                    k = pick[odd, parity]
                    trellis.taken[j, t] = -k if signed[j] < 0 else k


@compiled
def walk_back(tables: Any, state: Any, trellis: Any) -> Any:
    """The path that ends in a state, into ``trial``: (the state it began in, whether any of its
    indices is not 0)."""
    some = False
    for j in range(HEAD - 1, -1, -1):
        k = trellis.taken[j, state]
        state = trellis.back[j, state]
        q = 2 * k
        if k > 0:
            q -= tables.quantizer[state]
        elif k < 0:
            q += tables.quantizer[state]
        trellis.trial[0, j], trellis.trial[1, j] = k, q
        some = some or k != 0
    return state, some


@inlined
def v_of(target: Any, means: Any, row: Any, column: Any, j: Any) -> Any:
    """What is left of a coefficient without its mean, in steps."""
    return target[row, column, j] - np.float32(means[j]) * np.float32(0.0625)


@compiled
def preliminary_row(
    tables: Any, planes: Any, head: Any, row_at: Any, row: Any, columns: Any, stride: Any,
    target: Any,
) -> None:  # fmt: skip
    """A first decision for a row, which leaves magnitudes and reconstructions for the contexts."""
    for column in range(columns):
        at = row_at + column
        extend_row(planes, head, at, row, column, columns, stride)
        total = i64(0)
        for j in range(HEAD):
            spot = at * HEAD + j
            mean = predict(tables, planes, head * HEAD + j, spot)
            v = target[row, column, j] - np.float32(mean) * np.float32(0.0625)
            size = int(abs(v) + np.float32(0.5)) if abs(v) > np.float32(1.3) else 0
            size = min(size, MAX_INDEX)
            planes.magnitude[spot] = min(size, 255)
            planes.recon[spot] = mean + 16 * (size if v > 0 else -size)
            total += size
        planes.total[at] = min(total, 65535)


@inlined
def offer_all_zero(price: Any, cost: Any, after: Any, come: Any, paths: Any) -> None:
    """A head without an index leaves every path in its state; the first offer at a position."""
    for s in range(cost.size):
        after[s] = cost[s] + price
        come[s] = s
        for j in range(HEAD):
            paths[s, j] = 0


@kernel
def encode_pass(
    tables: Tables, adaptive: Adaptive, planes: Planes, shape: Shape, scratch: Scratch,
    words: Array, pos: Any, low: Any, range_: Any, head: int,
    target: Array, worth: Array, rounds: int, causal: bool,
) -> Any:  # fmt: skip
    """Choose the indices of one head of a tile and code them: (pos, low, range_) afterwards.

    target: (rows, columns, HEAD) float32, coefficients in steps. worth: (rows, columns) float32,
    bits that a squared step is worth there: the cost, in bits, is worth * distortion + rate.
    rounds: of pricing and searching in each row.
    causal: the means depend on the head's own west neighbour, so each survivor has its own.

    Viterbi over a row at a time: rates come from the adaptive model as it stands before the row, in
    the contexts of a preliminary decision (then of the last round's).
    """
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    n_states = tables.quantizer.size
    columns = shape.columns
    coder = (i64(pos), np.uint64(low), np.uint64(range_))
    wanted = np.zeros((columns, HEAD), np.int64)
    paths = np.zeros((columns, n_states, HEAD), np.int16)
    come = np.zeros((columns, n_states), np.int64)
    cost = np.zeros(n_states, np.float32)
    after = np.zeros(n_states, np.float32)
    trellis = blank_trellis(n_states)
    rates = np.zeros((HEAD, 2, 5), np.float32)
    signed = np.zeros(HEAD, np.float32)
    west = np.zeros((n_states, HEAD), np.int64)
    west_after = np.zeros((n_states, HEAD), np.int64)
    means = np.zeros(HEAD, np.int64)
    flag = np.zeros(2, np.float32)
    state = i64(0)
    for row in range(shape.rows):
        row_at = head * plane + (row + PAD) * stride + PAD
        preliminary_row(tables, planes, head, row_at, row, columns, stride, target)
        for _ in range(rounds):
            cost[:] = HUGE
            cost[state] = Z0
            for s in range(n_states):
                for j in range(HEAD):
                    west[s, j] = planes.recon[(row_at - 1) * HEAD + j]
            for column in range(columns):
                at = row_at + column
                first = at * HEAD
                here = worth[row, column]
                after[:] = HUGE
                priced = False
                n_runs = n_states if causal else 1
                for run in range(n_runs):
                    if causal:
                        if cost[run] >= HUGE:
                            continue
                        for j in range(HEAD):
                            planes.recon[first - HEAD + j] = west[run, j]
                        extend_row(planes, head, at, row, column, columns, stride)
                    largest = Z0
                    zero_cost = Z0
                    for j in range(HEAD):
                        means[j] = predict(tables, planes, head * HEAD + j, first + j)
                        v = abs(v_of(target, means, row, column, j))
                        largest = max(largest, v)
                        zero_cost += v * v
                    if not priced:
                        slots = scratch.slots[0]
                        set0, set1 = head_contexts(
                            tables, planes, slots, head, at, stride, plane, 0
                        )
                        p = mix(tables, adaptive, scratch.inputs, slots, 0, set0, set1)
                        flag[0], flag[1] = bits(tables, ONE - p), bits(tables, p)
                        if largest >= np.float32(1.0):
                            for j in range(HEAD):
                                coefficient_contexts(
                                    tables, planes, scratch, j, head * HEAD + j, first + j,
                                    stride * HEAD,
                                )  # fmt: skip
                                v = abs(v_of(target, means, row, column, j))
                                most = min(int(v * np.float32(0.5)) + 1, 3) if not causal else 3
                                for odd in range(2 if n_states > 1 else 1):
                                    price_index(
                                        tables, adaptive, scratch, j, odd, most, rates[j, odd]
                                    )
                            priced = True
                    # all zero: the state stays
                    for s in range(n_states):
                        if causal and s != run:
                            continue
                        c = cost[s] + here * zero_cost + flag[0]
                        if c < after[s]:
                            after[s] = c
                            come[column, s] = s
                            for j in range(HEAD):
                                paths[column, s, j] = 0
                                west_after[s, j] = means[j]
                    if largest < np.float32(1.0) or not priced:
                        continue
                    for s in range(n_states):
                        trellis.inner[0, s] = cost[s] + flag[1] if not causal or s == run else HUGE
                    for j in range(HEAD):
                        signed[j] = v_of(target, means, row, column, j)
                    through_head(tables, signed, rates, here, trellis)
                    for s in range(n_states):
                        c = trellis.inner[HEAD & 1, s]
                        if c >= after[s]:
                            continue
                        t, some = walk_back(tables, s, trellis)
                        if not some:  # would be coded as all zero, and leave the state as it is
                            continue
                        after[s] = c
                        come[column, s] = t
                        for j in range(HEAD):
                            paths[column, s, j] = trellis.trial[0, j]
                            west_after[s, j] = means[j] + 16 * trellis.trial[1, j]
                cost[:] = after
                if causal:
                    west[:] = west_after
            best = 0
            for s in range(1, n_states):
                if cost[s] < cost[best]:
                    best = s
            s = best
            for column in range(columns - 1, -1, -1):
                for j in range(HEAD):
                    wanted[column, j] = paths[column, s, j]
                s = come[column, s]
            # what the next round's contexts see
            s = state
            for column in range(columns):
                at = row_at + column
                extend_row(planes, head, at, row, column, columns, stride)
                total = i64(0)
                any_ = False
                for j in range(HEAD):
                    if wanted[column, j] != 0:
                        any_ = True
                for j in range(HEAD):
                    mean = predict(tables, planes, head * HEAD + j, at * HEAD + j)
                    odd = tables.quantizer[s]
                    total += put_head(planes, at * HEAD, j, mean, wanted[column, j], odd)
                    if any_:
                        s = tables.next_state[s, wanted[column, j] & 1]
                planes.total[at] = min(total, 65535)
        for column in range(columns):
            at = row_at + column
            extend_row(planes, head, at, row, column, columns, stride)
            state, coder = code_head(
                tables, adaptive, planes, scratch, words, coder, head, at, stride, plane, state,
                wanted[column], False,
            )  # fmt: skip
    extend_plane(planes, shape, head)
    return coder
