"""The encoder's search: which indices of a head cost least, by distortion and by bits.

``encode_pass`` is the encoder's twin of ``decode_pass``: a Viterbi search over one row of positions
at a time, whose rates are those of the adaptive model as it stands before the row. Contexts look at
coefficients that are not decided yet: the earlier ones of the head, the position on the left. There
the search takes what the best path of the moment says, for all paths. In float32; decoders do
without it.
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

u64: Any = np.uint64
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
def price(tables: Any, adaptive: Any, scratch: Any, trellis: Any, j: Any, most: Any) -> None:
    """Rates of coefficient j with either quantizer, in the contexts that ``scratch`` holds."""
    for odd in range(2 if tables.quantizer.size > 1 else 1):
        price_index(tables, adaptive, scratch, j, odd, most, trellis.rates[j, odd])


@inlined
def highest_bin(v: Any) -> Any:
    """The last bit of an index near v whose price matters: ``most`` of ``price_index``."""
    return min(int((abs(v) + np.float32(1.0)) * np.float32(0.5)) + 1, 3) if v != Z0 else 0


@inlined
def offer(rates: Any, v: Any, odd: Any, worth: Any, cost: Any, pick: Any) -> None:
    """The cheapest even and odd index of one quantizer near v = |coefficient|: into cost (4,), in
    bits, and pick (4,) at 2 odd + parity, with zero among the even ones."""
    k = int((v + np.float32(odd)) * np.float32(0.5))
    k = min(k, MAX_INDEX - 1)
    below = max(np.float32(2 * k - odd), Z0) if k > 0 else Z0
    above = np.float32(2 * k + 2 - odd)
    low = worth * (v - below) * (v - below) + rate_of(rates, k)
    high = worth * (v - above) * (v - above) + rate_of(rates, k + 1)
    even, parity = 2 * odd, k & 1
    cost[even + parity], pick[even + parity] = low, k
    cost[even + 1 - parity], pick[even + 1 - parity] = high, k + 1
    zero = worth * v * v + rates[0]
    if zero < cost[even]:
        cost[even], pick[even] = zero, 0


class Trellis(NamedTuple):
    """Room for the search along a row of positions, S states. There are several ways through the
    head of a position: *runs*, for instance one from each state where every path has means of its
    own."""

    cost: Array  # (2, S) float32: of the best path into each state, before and behind a position
    run: Array  # (columns, S) int8: the run that led there; -1: no index, the state stays
    back: Array  # (columns, runs, HEAD, S) uint8: the state before each coefficient
    taken: Array  # (columns, runs, HEAD, S) int16: and its index
    inner: Array  # (2, S) float32: costs within a head, before even and odd j
    some: Array  # (2, S) bool: whether the head's indices so far are not all 0
    means: Array  # (runs, HEAD) int64, in 1/16 step
    left: Array  # (HEAD,) float32: the target without the mean, in steps
    rates: Array  # (HEAD, 2, 5) float32: of ``price_index``
    branch: Array  # (4,) float32: costs by quantizer and parity
    pick: Array  # (4,) int64: and their |k|
    wanted: Array  # (columns, HEAD) int64: the indices of the best path


@kernel
def blank_trellis(columns: Any, n_runs: Any, n_states: Any) -> Any:
    """Room for a row."""
    return Trellis(
        np.zeros((2, n_states), np.float32),
        np.zeros((columns, n_states), np.int8),
        np.zeros((columns, n_runs, HEAD, n_states), np.uint8),
        np.zeros((columns, n_runs, HEAD, n_states), np.int16),
        np.zeros((2, n_states), np.float32),
        np.zeros((2, n_states), np.bool_),
        np.zeros((n_runs, HEAD), np.int64),
        np.zeros(HEAD, np.float32),
        np.zeros((HEAD, 2, 5), np.float32),
        np.full(4, HUGE, np.float32),  # a scalar quantizer has no odd multiples: theirs stay
        np.zeros(4, np.int64),
        np.zeros((columns, HEAD), np.int64),
    )


@inlined
def cheapest(costs: Any) -> Any:
    """The state where costs (S,) are the least."""
    best = i64(0)
    for s in range(1, costs.size):
        if costs[s] < costs[best]:
            best = i64(s)
    return best


@inlined
def begin_row(trellis: Any, state: Any) -> None:
    """All paths start in one state."""
    for s in range(trellis.cost.shape[1]):
        trellis.cost[0, s] = HUGE
    trellis.cost[0, state] = Z0


@inlined
def begin_position(trellis: Any) -> None:
    """No path has come through the position yet."""
    for s in range(trellis.cost.shape[1]):
        trellis.cost[1, s] = HUGE


@inlined
def end_position(trellis: Any) -> Any:
    """On to the next position, with costs above the best path's, whose state is returned."""
    best = cheapest(trellis.cost[1])
    for s in range(trellis.cost.shape[1]):
        trellis.cost[0, s] = trellis.cost[1, s] - trellis.cost[1, best]
    return best


@inlined
def offer_nothing(trellis: Any, column: Any, s: Any, price: Any) -> None:
    """A head without an index, from state s, which stays."""
    c = trellis.cost[0, s] + price
    if c < trellis.cost[1, s]:
        trellis.cost[1, s] = c
        trellis.run[column, s] = -1


@inlined
def enter_head(trellis: Any, price: Any, first: Any, last: Any) -> None:
    """Costs before the head's first coefficient, of paths in the states first..last-1."""
    for s in range(trellis.cost.shape[1]):
        trellis.inner[0, s] = trellis.cost[0, s] + price if first <= s < last else HUGE
        trellis.some[0, s] = False


@compiled
def advance(tables: Any, trellis: Any, j: Any, worth: Any, back: Any, taken: Any) -> None:
    """One coefficient of a head: costs from ``inner[j & 1]`` to the other, and the way back.
    Without branches, and with unsigned indices, which need no test for counting from the end."""
    now, then = u64(j & 1), u64(1 - (j & 1))
    inner, some, ways = trellis.inner, trellis.some, tables.ways
    if trellis.left[j] == Z0:  # as in channels that a transform does not use
        for s in range(u64(ways.shape[0])):
            t = u64(tables.next_state[s, 0])
            inner[then, t] = inner[now, s] + trellis.rates[j, tables.quantizer[s], 0]
            some[then, t] = some[now, s]
            back[u64(j), t] = s
            taken[u64(j), t] = 0
        return
    v = min(abs(trellis.left[j]), FARTHEST)
    for odd in range(2 if tables.quantizer.size > 1 else 1):
        offer(trellis.rates[j, odd], v, odd, worth, trellis.branch, trellis.pick)
    negative = trellis.left[j] < Z0
    for t in range(u64(ways.shape[0])):
        s, kind, other, other_kind = ways[t, 0], ways[t, 1], ways[t, 2], ways[t, 3]
        c = inner[now, s] + trellis.branch[kind]
        other_c = inner[now, other] + trellis.branch[other_kind]
        better = other_c < c
        s = other if better else s
        k = trellis.pick[other_kind if better else kind]
        inner[then, t] = other_c if better else c
        some[then, t] = some[now, s] | (k > 0)
        back[u64(j), t] = s
        taken[u64(j), t] = -k if negative else k


@inlined
def leave_head(trellis: Any, column: Any, run: Any) -> None:
    """Behind a head: its paths where they are the best so far. Heads whose indices are all 0 are
    none: they would be coded without an index, and leave the state as it was."""
    for s in range(trellis.cost.shape[1]):
        c = trellis.inner[HEAD & 1, s]
        if c < trellis.cost[1, s] and trellis.some[HEAD & 1, s]:
            trellis.cost[1, s] = c
            trellis.run[column, s] = run


@compiled
def follow(trellis: Any, column: Any, state: Any) -> Any:
    """The indices of the path into a state behind a position, into ``wanted``; returns the state
    that it comes from."""
    run = trellis.run[column, state]
    for j in range(HEAD - 1, -1, -1):
        trellis.wanted[column, j] = 0
        if run >= 0:
            trellis.wanted[column, j] = trellis.taken[column, run, j, state]
            state = i64(trellis.back[column, run, j, state])
    return state


@compiled
def decide(trellis: Any) -> None:
    """The best path of a row, into ``wanted``."""
    state = cheapest(trellis.cost[0])
    for column in range(trellis.wanted.shape[0] - 1, -1, -1):
        state = follow(trellis, column, state)


@compiled
def settle(
    tables: Any, planes: Any, trellis: Any, column: Any, state: Any, at: Any, means: Any
) -> None:
    """Put what a path says of the position ``at`` where contexts will look for it."""
    state = follow(trellis, column, state)
    total = i64(0)
    some = False
    for j in range(HEAD):
        some = some or trellis.wanted[column, j] != 0
    for j in range(HEAD):
        k = trellis.wanted[column, j]
        total += put_head(planes, at * HEAD, j, means[j], k, tables.quantizer[state])
        if some:
            state = tables.next_state[state, k & 1]
    planes.total[at] = min(total, 65535)


@compiled
def without_mean(
    tables: Any, planes: Any, trellis: Any, head: Any, at: Any, means: Any, target: Any,
    worth: Any,
) -> Any:  # fmt: skip
    """Means of a head, and what is ``left`` of its target (HEAD,): (the cost of zeros, how much
    indices can take off it at the very most: lattice points nearby, a bit for each sign)."""
    zeros = Z0
    gain = Z0
    for j in range(HEAD):
        means[j] = predict(tables, planes, head * HEAD + j, at * HEAD + j)
        v = target[j] - np.float32(means[j]) * np.float32(0.0625)
        trellis.left[j] = v
        v = min(abs(v), FARTHEST)
        rest = v - np.floor(v + np.float32(0.5))
        zeros += worth * v * v
        gain += max(worth * (v * v - rest * rest) - np.float32(1.0), Z0)
    return zeros, gain


@compiled
def through_head(
    tables: Any, adaptive: Any, planes: Any, scratch: Any, trellis: Any, head: Any, at: Any,
    stride: Any, column: Any, worth: Any, run: Any, known: Any,
) -> None:  # fmt: skip
    """All coefficients of a head at the prices of the moment, or at those ``known``."""
    back, taken = trellis.back[column, run], trellis.taken[column, run]
    for j in range(HEAD):
        spot = at * HEAD + j
        if not known:
            coefficient_contexts(tables, planes, scratch, j, head * HEAD + j, spot, stride * HEAD)
            price(tables, adaptive, scratch, trellis, j, highest_bin(trellis.left[j]))
        advance(tables, trellis, j, worth, back, taken)
        if not known:  # the next contexts see the best path
            state = cheapest(trellis.inner[1 - (j & 1)])
            size = 2 * abs(i64(taken[j, state])) - tables.quantizer[back[j, state]]
            planes.magnitude[spot] = min(max(size, 0), 255)


@compiled
def search_row(
    tables: Any, adaptive: Any, planes: Any, shape: Any, scratch: Any, trellis: Any, head: Any,
    row: Any, state: Any, target: Any, worth: Any,
) -> None:  # fmt: skip
    """Indices for a row of positions, into ``trellis.wanted``. target: (columns, HEAD)."""
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    means = trellis.means[0]
    n_states = tables.quantizer.size
    begin_row(trellis, state)
    for column in range(shape.columns):
        at = head * plane + (row + PAD) * stride + PAD + column
        extend_row(planes, head, at, row, column, shape.columns, stride)
        zeros, gain = without_mean(
            tables, planes, trellis, head, at, means, target[column], worth[column]
        )
        if gain == Z0:  # zeros for all paths: their order stays
            for s in range(n_states):
                trellis.run[column, s] = -1
            for j in range(HEAD):
                put_head(planes, at * HEAD, j, means[j], 0, 0)
            planes.total[at] = 0
            continue
        slots = scratch.slots[0]
        set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, 0)
        p = mix(tables, adaptive, scratch.inputs, slots, 0, set0, set1)
        none, some = bits(tables, ONE - p), bits(tables, p)
        begin_position(trellis)
        for s in range(n_states):
            offer_nothing(trellis, column, s, zeros + none)
        if some - gain < none:
            enter_head(trellis, some, 0, n_states)
            through_head(
                tables, adaptive, planes, scratch, trellis, head, at, stride, column,
                worth[column], 0, False,
            )  # fmt: skip
            leave_head(trellis, column, 0)
        settle(tables, planes, trellis, column, end_position(trellis), at, means)
    decide(trellis)


@compiled
def keep(planes: Any, at: Any, kept: Any) -> None:
    """What contexts see of a position, into kept (2 HEAD + 1,)."""
    for j in range(HEAD):
        kept[j] = planes.recon[at * HEAD + j]
        kept[HEAD + j] = planes.magnitude[at * HEAD + j]
    kept[2 * HEAD] = planes.total[at]


@compiled
def restore(planes: Any, at: Any, kept: Any) -> None:
    """The inverse of ``keep``."""
    for j in range(HEAD):
        planes.recon[at * HEAD + j] = kept[j]
        planes.magnitude[at * HEAD + j] = kept[HEAD + j]
    planes.total[at] = kept[2 * HEAD]


@compiled
def search_row_apart(
    tables: Any, adaptive: Any, planes: Any, shape: Any, scratch: Any, trellis: Any, head: Any,
    row: Any, state: Any, target: Any, worth: Any, kept: Any, share: Any,
) -> None:  # fmt: skip
    """``search_row`` where the means depend on the position on the left, that is on the path: a run
    from each state. kept: (S, 2 HEAD + 1), room for what each path says of that position. share:
    all runs take the prices of the best path's."""
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    n_states = tables.quantizer.size
    none, some = Z0, Z0
    begin_row(trellis, state)
    best = i64(state)
    for column in range(shape.columns):
        at = head * plane + (row + PAD) * stride + PAD + column
        begin_position(trellis)
        flagged = priced = False
        for i in range(n_states):
            run = (best + i) % n_states
            if trellis.cost[0, run] >= HUGE:
                continue
            if column > 0:
                restore(planes, at - 1, kept[run])
            extend_row(planes, head, at, row, column, shape.columns, stride)
            means = trellis.means[run]
            zeros, gain = without_mean(
                tables, planes, trellis, head, at, means, target[column], worth[column]
            )
            if not (share and flagged):
                slots = scratch.slots[0]
                set0, set1 = head_contexts(tables, planes, slots, head, at, stride, plane, 0)
                p = mix(tables, adaptive, scratch.inputs, slots, 0, set0, set1)
                none, some = bits(tables, ONE - p), bits(tables, p)
                flagged = True
            offer_nothing(trellis, column, run, zeros + none)
            if some - gain < none:
                enter_head(trellis, some, run, run + 1)
                through_head(
                    tables, adaptive, planes, scratch, trellis, head, at, stride, column,
                    worth[column], run, share and priced,
                )  # fmt: skip
                leave_head(trellis, column, run)
                priced = True
        best = end_position(trellis)
        for i in range(n_states):
            s = (best + 1 + i) % n_states  # the best one last: it stays
            if trellis.cost[0, s] < HUGE:
                run = i64(trellis.run[column, s])
                means = trellis.means[run if run >= 0 else s]
                settle(tables, planes, trellis, column, s, at, means)
                keep(planes, at, kept[s])
    decide(trellis)


@kernel
def encode_pass(
    tables: Tables, adaptive: Adaptive, planes: Planes, shape: Shape, scratch: Scratch,
    words: Array, pos: Any, low: Any, range_: Any, head: int,
    target: Array, worth: Array, apart: bool, share: bool,
) -> Any:  # fmt: skip
    """Choose the indices of one head of a tile and code them: (pos, low, range_) afterwards.

    target: (rows, columns, HEAD) float32, coefficients in steps. worth: (rows, columns) float32,
    bits that a squared step is worth there: the cost, in bits, is worth * distortion + rate. apart:
    each path has contexts and means of its own; it must where means depend on the head's own west
    neighbour. share: but all take the prices of the best path.
    """
    stride = shape.columns + 2 * PAD
    plane = stride * (shape.rows + 2 * PAD)
    n_states = tables.quantizer.size
    coder = (i64(pos), np.uint64(low), np.uint64(range_))
    trellis = blank_trellis(shape.columns, n_states if apart else 1, n_states)
    kept = np.zeros((n_states, 2 * HEAD + 1), np.int64)
    state = i64(0)
    for row in range(shape.rows):
        if apart:
            search_row_apart(
                tables, adaptive, planes, shape, scratch, trellis, head, row, state, target[row],
                worth[row], kept, share,
            )  # fmt: skip
        else:
            search_row(
                tables, adaptive, planes, shape, scratch, trellis, head, row, state, target[row],
                worth[row],
            )  # fmt: skip
        for column in range(shape.columns):
            at = head * plane + (row + PAD) * stride + column + PAD
            extend_row(planes, head, at, row, column, shape.columns, stride)
            state, coder = code_head(
                tables, adaptive, planes, scratch, words, coder, head, at, stride, plane, state,
                trellis.wanted[column], False,
            )  # fmt: skip
    extend_plane(planes, shape, head)
    return coder
