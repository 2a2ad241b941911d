"""pp.fit: from a target to the settings that meet it at the fewest bytes, judged on held-out rows.

For the archive layout all candidates end in the trellis, which nothing of fixed rate comes near;
what is open is what comes before it: the frame (native order, one KLT, one per class and how many
classes in how many leading axes). Rows go raw for an SNR, as radius and direction for cosine and
max_error. Frames are ranked by an estimate of what held-out rows would reach in them, the bytes of
the frame paid for; the best are then fitted in full and judged by what they do reach. For the rows
layout they end in bitshift codes instead, and codebooks and plain grids compete with them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arrays import Array
from .bitshift import MAX_BITS, STEPS
from .errors import InputError
from .frames import Frames
from .metrics import cosine as cosines
from .metrics import recall_at_k, relative_error, snr_db
from .polar import SIZED, PolarQuantizer, row_scale
from .rotation import Rotation
from .sources import draw_rows

Objective = Literal["snr", "cosine", "recall"]
OBJECTIVES: tuple[str, ...] = ("snr", "cosine", "recall")
TARGETS: tuple[str, ...] = ("bits", "size_bytes", "snr_db", "cosine", "recall", "max_error")
TRAIN_ROWS = 1 << 14  # rows candidates are fitted on
FIT_ROWS = 1 << 16  # and the one chosen is, at the end
BOUND_FLOATS = 1 << 21  # numbers on which frames are ranked
MAX_CODE_BITS = 15.0  # beyond, indices of 16 bits are as fine as they get
N_TRIALS = 2  # of the ranked frames are fitted in full, besides the plain ones
N_SINGLE, LOW_BITS = 3, 1.0  # so many of those without classes, too, up to so many bits
MAX_CLASSES = 64
STATE_BITS = 10  # of bitshift codes: one more doubles the time to encode for 0.1 dB
MOST_BITSHIFT_BITS = 7.0  # beyond, its components of at most 9 bits hold the strongest ones back
LEAST_GRID_BITS = 5.0
SAME_PLAN_BITS = 0.3  # rates nearer than that are served by the same frame
MOST_PQ_BITS = 3.0
BOOK_BITS, MOST_STAGES = 8, 4  # of codebooks of whole rows in the archive layout
JUDGE_ROWS = 1 << 12  # held-out rows they are judged on
N_STATES = 32  # 0.07 dB over 8 states for a third more encoding time; decoding costs the same
NEGLIGIBLE = 0.02  # decibels that are not worth an encoding that takes
MUCH_LONGER = 1.5  # times as long
SEARCH_WORK = 600  # products of a matrix product that go by while a component is searched and coded
MAX_KLT = 4096  # a KLT of more dimensions costs minutes
MOST_OVER = 1.1  # times the rate: candidates beyond that cannot be brought down to it
OUT_OF_REACH = 1000.0  # decibels taken off these
ROTATION_BITS = 5.0  # of one entry of a stored rotation


@dataclass(frozen=True)
class Target:
    """What the caller wants: exactly one of TARGETS, checked."""

    kind: str
    value: float

    @classmethod
    def of(cls, **given: float | None) -> Target:
        """The one target that is not None; InputError where there is none or more than one."""
        named = {kind: value for kind, value in given.items() if value is not None}
        if len(named) != 1:
            got = ", ".join(f"{k}={v}" for k, v in named.items()) or "none"
            raise InputError(f"expected exactly one of {', '.join(TARGETS)}, got {got}")
        kind, value = next(iter(named.items()))
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float | np.number)
            or not value == value
        ):
            raise InputError(f"expected a number for {kind}, got {value!r}")
        low, high = {
            "bits": (0.0, 64.0),
            "size_bytes": (0.0, np.inf),
            "snr_db": (-np.inf, 400.0),
            "cosine": (0.0, 1.0),
            "recall": (0.0, 1.0),
            "max_error": (-1e-300, np.inf),
        }[kind]
        if not low < value <= high:
            raise InputError(
                f"expected {kind} in ({max(low, 0.0) if kind != 'snr_db' else low}, {high}], "
                f"got {value}"
            )
        return cls(kind, float(value))


class Plan(NamedTuple):
    """Settings worth fitting, and the SNR in dB that an estimate gives them, if there is one."""

    settings: dict[str, Any]
    predicted: float | None


def fit(
    train: Any,
    *,
    bits: float | None = None,
    snr_db: float | None = None,
    cosine: float | None = None,
    recall: float | None = None,
    max_error: float | None = None,
    layout: Literal["archive", "rows"] = "archive",
    optimize: Objective | None = None,
    weights: npt.ArrayLike | None = None,
    row_weights: npt.ArrayLike | None = None,
    seed: int = 0,
    time_budget: float | None = None,
    key: str | None = None,
    sample_rows: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PolarQuantizer:
    """The planner: fit the chain of stages that meets one target at the fewest bytes.

    train: (n, d) float rows like those to be coded: an array, tensor or memory map; a path or a
    list of paths; an Arrow table, dataset or reader; or any iterable of batches (n_i, d), a
    generator too. Of what is not an array in memory a uniform sample is fitted on: of 65536 rows,
    or as many as take 256 MiB, or ``sample_rows``. It is drawn in one pass over batches, in memory
    of the sample and a batch; of a memory map the rows drawn are read alone. key: the tensor of a
    file, or the column of an Arrow table or of dicts of arrays.

    bits: *code* bits per float on such rows; side information (``q.report()["side_bytes"]``) comes
    on top. snr_db, cosine (mean over rows), recall (recall@10, inner product) are met on held-out
    rows; max_error: the step is chosen so that few rows have to be escaped when files are written
    with ``max_error=``. layout "rows" has fixed rate and access to any row. optimize: what
    to spend the bits on (default: what the target names, else "snr"). weights: (d,) importance of
    each dimension: what its squared errors count; row_weights: (n,) that of each row of an array,
    for targets of size and SNR, which is then that of the weighted rows, in the archive layout.
    ``encode`` and ``compress`` take them for the rows to be coded. time_budget: seconds after which
    no further candidate is tried; when half of them have gone, a stream is no longer read.
    checkpoint: a file in which a pass over batches is kept every minute and that goes when the fit
    is done; after a kill, a call with the same source and seed goes on from it.

    Takes a few encodings of at most 16384 rows for each candidate, and of 65536 for the best. Where
    candidates come out within 0.02 dB of the best, one that encodes much faster is taken.
    Raises InputError for bad rows or batches (which it names), several targets, or a quality out of
    reach (the message says what can be reached).
    """
    target = Target.of(bits=bits, snr_db=snr_db, cosine=cosine, recall=recall, max_error=max_error)
    objective = objective_of(target, optimize)
    if layout not in ("archive", "rows"):
        raise InputError(f"expected layout 'archive' or 'rows', got {layout!r}")
    started = time.monotonic()
    deadline = None if time_budget is None else started + time_budget
    rows = draw_rows(
        train,
        size=sample_rows,
        seed=seed,
        key=key,
        name="train",
        stop=None if time_budget is None else started + time_budget / 2,
        checkpoint=checkpoint,
    )
    scale = None
    if row_weights is not None:
        check_row_weighing(target, objective, layout)
        scale, factors = row_scale(row_weights, len(rows))
        rows = rows / factors[:, None]
    q = _fit_rows(rows, target, objective, layout, weights, seed, deadline)
    q = q if scale is None else q.scaled_by(scale)
    if checkpoint is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(checkpoint)
    return q


def _fit_rows(
    rows: Array,
    target: Target,
    objective: Objective,
    layout: Literal["archive", "rows"],
    weights: npt.ArrayLike | None,
    seed: int,
    deadline: float | None,
) -> PolarQuantizer:
    given: dict[str, Any] = {"weights": weights, "seed": seed, "deadline": deadline}
    if target.kind == "bits":
        return best_chain(rows, target.value, objective, layout=layout, **given)
    if layout == "rows":
        return rows_of_quality(rows, target, objective, **given)
    q = best_chain(rows, guess_bits(rows, target), objective, **given)
    return meet_quality(q, rows, target)


def check_row_weighing(target: Target, objective: Objective, layout: str | None) -> None:
    """InputError where rows cannot be weighted: cosine and max_error treat all alike, and so does a
    fixed rate."""
    if layout == "rows":
        raise InputError("row_weights go with layout='archive': of fixed rate all rows are alike")
    if target.kind in ("cosine", "max_error", "recall") or objective == "cosine":
        raise InputError(
            f"row_weights go with bits, size_bytes and snr_db, not with {target.kind} that is "
            f"spent on {objective}"
        )


def objective_of(target: Target, optimize: Objective | None) -> Objective:
    """What bits are spent on: the caller's word, else what the target names."""
    if optimize is not None:
        if optimize not in OBJECTIVES:
            raise InputError(
                f"expected optimize to be one of {', '.join(OBJECTIVES)}, got {optimize!r}"
            )
        return optimize
    return {"cosine": "cosine", "max_error": "cosine", "recall": "recall"}.get(target.kind, "snr")  # type: ignore[return-value]


# -- the chain at a given rate -------------------------------------------------------------------
def best_chain(
    rows: Array,
    bits: float,
    objective: Objective,
    *,
    layout: Literal["archive", "rows"] = "archive",
    paid_rows: int | None = None,
    weights: npt.ArrayLike | None = None,
    seed: int = 0,
    deadline: float | None = None,
    codebooks: bool = False,
) -> PolarQuantizer:
    """The best chain at ``bits`` per float, fitted on all rows: it ends in a trellis, for the rows
    layout in what has a fixed rate.

    paid_rows: number of rows over which the side information is paid out of ``bits`` (a file's own
    table); None: it comes on top (a quantizer for many files). weights: of dimensions. codebooks:
    whether the chain may also end in a few codebooks, where rows are to take few bits.
    """
    n, bits = len(rows), min(bits, MAX_CODE_BITS)
    if paid_rows is not None and n <= TRAIN_ROWS:
        # the table itself is all that will be coded, and what was learned from it is paid for
        train, judge = rows, rows[:: max(1, -(-n // JUDGE_ROWS))]
    else:
        train, judge = split_rows(rows, seed)
    plans: list[Plan] = []
    if layout == "archive" or bits < MOST_BITSHIFT_BITS:
        common = _common(layout, bits, objective, paid_rows, rows.shape[1], seed)
        common |= {"weights": weights}
        plans = _frames_worth_trying(common, train, judge, bits, paid_rows, deadline)
    if codebooks and paid_rows is not None:
        few_bits = _residual_codebooks(rows.shape[1], bits, paid_rows, seed)
        plans += [Plan(settings | {"weights": weights}, None) for settings in few_bits]
    if layout == "rows":
        fixed = _fixed_rates(rows.shape[1], bits, objective, paid_rows, seed)
        plans += [Plan(settings | {"weights": weights}, None) for settings in fixed]
    tried: list[tuple[float, dict[str, Any]]] = []
    report: list[dict[str, Any]] = []
    for settings, predicted in plans:
        if tried and deadline is not None and time.monotonic() > deadline:
            break
        score, line = _judge(settings, train, judge, bits, objective, paid_rows)
        tried.append((score, settings))
        report.append(line | {"predicted_snr": predicted and round(predicted, 2)})
    best = int(np.argmax([score for score, _ in tried]))
    if paid_rows is None:  # a file is made once, a quantizer may encode for years
        best = _quicker_equal(tried, best, rows.shape[1])
    for i, line in enumerate(report):
        line["chosen"] = i == best
    settings = tried[best][1]
    few = rows[:: max(1, -(-n // FIT_ROWS))]
    n_train = len(train)
    del train, judge  # memory that the last fit can use
    if paid_rows is None and layout == "archive":
        # new rows cost more than those the frame was fitted to, the less the more these are
        excess = max(report[best]["code_bits"] / bits - 1, 0.0)
        bits /= 1 + min(excess, 0.25) * min(n_train / len(few), 1.0)
    q = _fit_paid(settings, few, bits, paid_rows)
    q.candidates = report
    return q


def _quicker_equal(tried: list[tuple[float, dict[str, Any]]], best: int, d: int) -> int:
    """Of the chains tried, (score in dB, settings), which to take in the place of the best: the
    quickest to encode within NEGLIGIBLE of it, if the best takes MUCH_LONGER."""
    least = tried[best][0] - NEGLIGIBLE
    works = [_encode_work(settings, d) for _, settings in tried]
    equal = [i for i, (score, _) in enumerate(tried) if score >= least]
    quickest = min(equal, key=lambda i: works[i])
    return quickest if works[best] >= MUCH_LONGER * works[quickest] else best


def _encode_work(settings: dict[str, Any], d: int) -> float:
    """How long a row takes to encode, about, in products of a matrix product. Of fixed rates, whose
    searches leave a rotation no part in it, all alike."""
    if settings["fine"] != "trellis":
        return float(SEARCH_WORK * d)
    m, k = settings.get("n_components", d), settings.get("n_classes", 1)
    work = m * (SEARCH_WORK + (d if settings["rotation"] != "none" else 0))
    if k > 1:  # a product in the class's frame, and about as much to find the class
        p = settings.get("n_leading", d)
        work += 2 * p * p + k * (m + p)
    return float(work)


def split_rows(rows: Array, seed: int) -> tuple[Array, Array]:
    """Rows to fit candidates on and rows to judge them on: disjoint where there are enough."""
    n = len(rows)
    held_out = min(n // 5, JUDGE_ROWS)
    if held_out < 32:
        return rows, rows
    order = np.random.default_rng(seed).permutation(n)
    return rows[np.sort(order[held_out:][:TRAIN_ROWS])], rows[np.sort(order[:held_out])]


def _common(
    layout: Literal["archive", "rows"],
    bits: float,
    objective: Objective,
    paid_rows: int | None,
    d: int,
    seed: int,
) -> dict[str, Any]:
    """Settings that all frames are tried with."""
    common: dict[str, Any] = {"fine": "trellis", "n_states": N_STATES}
    if layout == "rows":
        window = STATE_BITS if paid_rows is None else _state_bits(paid_rows * d, bits)
        common = {"fine": "bitshift", "layout": "rows", "state_bits": window}
    polar = objective == "cosine"
    radius_bits = int(np.clip(np.ceil(bits) + 4, 4, 14)) if polar else 0
    return common | {"radius_bits": radius_bits, "seed": seed}


def _frames_worth_trying(
    common: dict[str, Any],
    train: Array,
    judge: Array,
    bits: float,
    paid_rows: int | None,
    deadline: float | None = None,
) -> list[Plan]:
    """Settings in order of promise: what held-out rows would reach in their frames."""
    n, d = train.shape
    native = common | {"rotation": "none", "center": True}
    if d == 1 or n < 8 or d > MAX_KLT:
        return [Plan(native, None)]
    sample = train[:: max(1, -(-train.size // BOUND_FLOATS))]
    klts: dict[tuple[int | None, int, bool], Rotation] = {}
    frames: list[Plan] = []
    for family in _frame_families(common, len(sample), d, paid_rows):
        last = -np.inf
        for settings, side_bits in family:  # from few classes or axes to more, while it helps
            paid = side_bits / (paid_rows * d) if paid_rows else 0.0
            if not _has_room(settings, d, bits):
                continue
            if paid >= 0.7 * bits or (deadline is not None and time.monotonic() > deadline):
                break
            promise = _promise(settings, sample, judge, bits - paid, klts)
            frames.append(Plan(settings, promise))
            if promise < last:
                break
            last = promise
    frames.sort(key=lambda plan: -(plan.predicted or 0.0))
    best, rest = frames[:N_TRIALS], frames[N_TRIALS:]
    single = [plan for plan in rest if "n_classes" not in plan.settings]
    # at low rates axes that are left out are worth more than promised: their zeros are not free
    single = single[: N_SINGLE if bits <= LOW_BITS else 1]
    return [*best, *single, Plan(native, None)]


def _has_room(settings: dict[str, Any], d: int, bits: float) -> bool:
    """Whether the axes of a frame can take so many bits: a bitshift code has a limit for each."""
    m = settings.get("n_components", d)
    return bool(settings["fine"] != "bitshift" or MAX_BITS * m >= bits * d)


def _frame_families(
    common: dict[str, Any], n: int, d: int, paid_rows: int | None
) -> list[list[tuple[dict[str, Any], float]]]:
    """Frames that n training rows can support, each with the bits its side information takes:
    families within which the promise first rises and then falls."""
    klt: list[tuple[dict[str, Any], float]] = []
    for m in [d, *(d // f for f in (2, 4, 8) if paid_rows and d // f >= 8)]:
        exponent = rotation_exponent(d, m, paid_rows)
        settings = common | {"rotation": "klt", "rotation_exponent": exponent}
        klt.append(
            (settings | ({"n_components": m} if m < d else {}), d * m * entry_bits(exponent, d))
        )
    full, full_side = klt[0]
    families = [klt]
    if find_spec("faiss") is None:  # classes start from k-means
        return families
    for p in (64, 128, d) if d > 128 else (d // 4, d // 2, d):
        if p < 4:
            continue
        most = min(MAX_CLASSES, n // (2 * p)) if p < d or d <= 128 else min(8, n // d)
        classes = [k for k in (4, 8, 16, 32, 64) if k <= most]
        families.append(
            [
                (
                    full | {"n_classes": k, "n_leading": p},
                    full_side + k * p * p * ROTATION_BITS + 10.0 * k * d,
                )
                for k in classes
            ]
        )
    return families


def entry_bits(exponent: int, d: int) -> float:
    """Bits that an entry of a rotation of d dimensions takes when stored to 2**-exponent: the
    entropy of a rounded Gaussian of variance 1 / d."""
    return float(np.log2(1 + 4.13 * 2.0**exponent / np.sqrt(d)))


def rotation_exponent(d: int, m: int, paid_rows: int | None) -> int:
    """Precision of a (d, m) rotation that costs least: a coarser one saves side information, paid
    for by ``paid_rows`` rows at 6 dB a bit, and makes the axes oblique, which amplifies the noise
    by 1 + d 4^-e / 12 and mixes strong coefficients into weak ones. Where nothing is paid, fine
    enough not to matter."""
    finest = int(np.ceil(np.log2(np.sqrt(d) / 0.15)))
    if paid_rows is None:
        return finest

    def cost(e: int) -> float:
        oblique = d * 4.0**-e / 12  # and as much of the mean variance leaks into weak components
        lost = 10 * np.log10(1 + oblique) + 3.01 * np.log2(1 + 5 * oblique)
        return 6.02 * m * entry_bits(e, d) / paid_rows + float(lost)

    return min(range(max(2, finest - 3), finest + 1), key=cost)


def _promise(
    settings: dict[str, Any],
    train: Array,
    judge: Array,
    bits: float,
    klts: dict[tuple[int | None, int, bool], Rotation],
) -> float:
    """SNR in dB that held-out rows would have at ``bits`` per float in the frame of ``settings``,
    coded by a Gaussian code made for the training rows.

    At noise D a coefficient of expected variance v and actual w costs log2(1 + v/D)/2 +
    (w - v)/(v + D)/(2 ln 2) bits, the price of expecting wrongly included, and is decoded with the
    error of the Wiener estimate. ``klts`` keeps the KLTs fitted so far, by number of axes and
    precision. O(n d m + K n p^2).
    """
    q = PolarQuantizer(**settings, bits=max(bits, 0.05))
    # a single KLT is in the trellis's order, one that classes turn in decreasing variance
    key = settings.get("n_components"), settings["rotation_exponent"], "n_classes" in settings
    q.fit_frame(train, common=klts.get(key), n_rounds=2)
    klts[key] = q.rotation_.common if isinstance(q.rotation_, Frames) else q.rotation_
    at = q.spectrum(judge)
    naming = float(-(at.shares * np.log2(at.shares)).sum())
    v, w = np.maximum(at.expected, 1e-30), at.variances
    low, high = np.log2(v.min()) - 20, np.log2(max(v.max(), w.max())) + 10
    for _ in range(50):
        noise = 2.0 ** ((low + high) / 2)
        rate = 0.5 * np.log2(1 + v / noise) + (w - v) / (v + noise) / (2 * np.log(2))
        if float(at.shares @ rate.sum(axis=1)) + naming > bits * q.d_:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    keep = v / (v + noise)
    error = (1 - keep) ** 2 * w + keep**2 * noise
    distortion = float(at.shares @ error.sum(axis=1)) + at.left_out
    return float(10 * np.log10(max(at.energy, 1e-300) / max(distortion, 1e-300)))


def _judge(
    settings: dict[str, Any],
    train: Array,
    judge: Array,
    bits: float,
    objective: Objective,
    paid_rows: int | None,
) -> tuple[float, dict[str, Any]]:
    """Fit settings on ``train``; their score on ``judge``, and a line for the report."""
    started = time.monotonic()
    q = _fit_paid(settings, train, bits, paid_rows)
    codes = q.encode(judge)
    rate = q.rate_bits(codes) / judge.size
    side = len(q.to_bytes())
    total = rate + (8 * side / (paid_rows * q.d_) if paid_rows else 0.0)
    decoded = q.decode_as(codes, judge.dtype)
    factors = None if q.columns_ is None else np.exp2(q.columns_ / STEPS)
    x, y = (judge, decoded) if factors is None else (judge * factors, decoded * factors)
    value = quality(x, y, objective)
    # recall follows the SNR, of which so few rows tell more; and candidates miss the rate by a
    # little: count the difference at 6 dB a bit
    level = float(snr_db(x, y)) if objective == "recall" else _decibels(value, objective)
    over = total - bits
    if settings["fine"] == "codebook":  # what these leave over nothing else can use
        over = max(over, 0.0)
    score = level - 6.02 * over
    if paid_rows and total > MOST_OVER * bits:  # side information and classes leave no choice
        score -= OUT_OF_REACH * (total / bits)
    shown = {k: v for k, v in settings.items() if k not in ("fine", "seed", "n_states", "weights")}
    line = {
        "settings": shown,
        "asked_bits": round(float(bits), 4),
        "code_bits": round(float(rate), 4),
        "side_bytes": side,
        "total_bits": round(float(total), 4),
        objective: round(value, 5),
        "interval": round(_half_interval(x, y, objective, value), 5),
        "seconds": round(time.monotonic() - started, 2),
    }
    return score, line


def _fit_paid(
    settings: dict[str, Any], rows: Array, bits: float, paid_rows: int | None
) -> PolarQuantizer:
    """A quantizer whose codes take ``bits`` a float, its own bytes spread over ``paid_rows``."""
    d = rows.shape[1]
    floor = 0.02 + settings.get("radius_bits", 0) / d
    if not paid_rows:
        return PolarQuantizer(**settings, bits=max(bits, floor)).fit(rows)
    q = PolarQuantizer(**settings, bits=max(0.8 * bits, floor))
    v = q.fit_frame(rows)
    if settings["fine"] == "codebook" and q.layout == "archive":
        q.bits = _paid_book_bits(settings, len(q.to_bytes()) + 100, bits * d, paid_rows, d) / d
        return q.fit_codes(v, rows)
    side = 500 + len(q.to_bytes()) + _fine_bytes(settings, bits, d)
    q.bits = max(bits - 8 * side / (paid_rows * d), floor)
    return q.fit_codes(v, rows)


def _paid_book_bits(
    settings: dict[str, Any], head_bytes: int, row_bits: float, paid_rows: int, d: int
) -> int:
    """The most bits a row that residual codebooks can have if they are paid out of ``row_bits``."""
    stages = int(settings["stages"])
    most = stages * (settings["n_codewords"].bit_length() - 1)

    def paid(n_bits: int) -> float:
        books = 2.0 * d * stages * float(2.0 ** (n_bits / stages))
        return n_bits + 8 * (head_bytes + books) / paid_rows

    return max((n for n in range(1, most + 1) if paid(n) <= row_bits), default=1)


def _fine_bytes(settings: dict[str, Any], bits: float, d: int) -> float:
    """What a fine stage will store, about, beyond what a trellis does."""
    if settings["fine"] == "bitshift":
        return 1.4 * (4 + bits) * float(1 << settings["state_bits"])
    if settings["fine"] == "grid":
        return 8.0 * d
    if settings["fine"] == "codebook":
        return 2.0 * d * int(settings["n_codewords"]) * int(settings["stages"])
    return 0.0


def quality(x: Array, y: Array, objective: Objective) -> float:
    """The figure an objective names: SNR in dB, mean cosine, or recall@10."""
    if objective == "snr":
        return float(snr_db(x, y))
    if objective == "cosine":
        return float(np.mean(cosines(x, y)))
    return float(recall_at_k(x, y, k=min(10, max(1, len(x) - 1))))


def _half_interval(x: Array, y: Array, objective: Objective, value: float) -> float:
    """Half the width of the 95% confidence interval of a quality, rows taken as independent."""
    if objective == "snr":
        wide = x.astype(np.float64) - y
        wide /= max(float(np.abs(wide).max(initial=0.0)), 1e-300)  # squares of 1e300 overflow
        error = np.einsum("ij,ij->i", wide, wide)
        relative = float(error.std()) / max(float(error.mean()), 1e-300)
        return float(1.96 * 10 / np.log(10) * relative / np.sqrt(len(x)))
    spread = float(np.std(cosines(x, y))) if objective == "cosine" else (value * (1 - value)) ** 0.5
    return float(1.96 * spread / np.sqrt(len(x)))


def _decibels(value: float, objective: Objective) -> float:
    """A quality on a scale on which 6 dB are about one bit."""
    if objective == "snr":
        return value
    return float(-10 * np.log10(max(1.0 - value, 1e-9))) * (1.0 if objective == "cosine" else 2.0)


# -- quality targets ---------------------------------------------------------------------------
def guess_bits(rows: Array, target: Target) -> float:
    """A rate to start from for a quality target: it decides the frame, the step comes later."""
    if target.kind == "size_bytes":
        return float(np.clip(8 * target.value / max(1, rows.size), 0.05, 24.0))
    if target.kind == "snr_db":
        snr = target.value
    elif target.kind == "cosine":
        snr = -10 * np.log10(max(2 * (1 - target.value), 1e-9))
    elif target.kind == "recall":
        snr = 6.0 + 14.0 * target.value
    else:
        snr = -20 * np.log10(max(target.value, 1e-7)) + 2.0
    return float(np.clip(snr / 6.02 - 0.5, 0.3, 20.0))


def meet_quality(
    q: PolarQuantizer, rows: Array, target: Target, *, rounds: int = 10
) -> PolarQuantizer:
    """The same chain with the largest trellis step at which rows meet the target.

    Quality falls as the step grows, so a bracketing search closes in on it; max_error is met by
    99.5% of the rows (the others are escaped when a file is written). Judged on at most JUDGE_ROWS
    rows. InputError where no step reaches the target.
    """
    few = rows[:: max(1, len(rows) // JUDGE_ROWS)]
    log_step = float(np.log2(q.fine_.step_))
    inside: tuple[float, PolarQuantizer] | None = None  # the largest step known to meet the target
    outside: float | None = None
    best_seen = -np.inf
    for _ in range(rounds):
        trial = q.with_step(rows, 2.0**log_step)
        margin, seen = _margin(few, trial.decode_as(trial.encode(few), few.dtype), target)
        best_seen = max(best_seen, seen)
        if margin >= 0:
            inside = (log_step, trial)
        else:
            outside = log_step
        if inside is not None and outside is not None and abs(outside - inside[0]) < 0.01:
            break
        if inside is not None and outside is not None:
            log_step = (inside[0] + outside) / 2
        else:
            jump = float(np.clip(abs(margin) / 6.02, 0.05, 3.0))
            log_step += jump if margin >= 0 else -jump
    if inside is None:
        raise InputError(
            f"{target.kind}={target.value} is out of reach: the best found is {best_seen:.6g}"
        )
    return inside[1]


def meets(x: Array, y: Array, target: Target) -> bool:
    """Whether decoded rows y meet a quality target for rows x."""
    return _margin(x, y, target)[0] >= 0


def _margin(x: Array, y: Array, target: Target) -> tuple[float, float]:
    """By how many dB decoded rows exceed the target, and the quality itself."""
    if target.kind == "snr_db":
        value = float(snr_db(x, y))
        return value - target.value, value
    if target.kind == "max_error":
        value = float(np.quantile(relative_error(x, y), 0.995))
        return 20 * float(np.log10(max(target.value, 1e-12) / max(value, 1e-12))), value
    objective: Objective = "cosine" if target.kind == "cosine" else "recall"
    value = quality(x, y, objective)
    return _decibels(value, objective) - _decibels(target.value, objective), value


# -- rows layout -------------------------------------------------------------------------------
def _next_bits(bits: float, margin: float) -> float:
    """A rate to try after one that exceeded its target by ``margin`` dB. Quality rises by 6 dB a
    bit, but by less in a frame of few axes, or where bits go to ever weaker components."""
    if margin >= 0:
        return max(0.5 * bits, bits - margin / 6.02)
    return min(bits + 3.0, max(1.1 * bits, bits - 1.5 * margin / 6.02))


def _fixed_rates(
    d: int, bits: float, objective: Objective, paid_rows: int | None, seed: int
) -> list[dict[str, Any]]:
    """Settings of fixed rate besides bitshift codes: product quantization, good where columns
    depend on each other in no linear way, and plain numbers at high rates."""
    common: dict[str, Any] = {"radius_bits": 0, "layout": "rows", "seed": seed}
    out: list[dict[str, Any]] = []
    books = {"fine": "codebook", "stages": 1, "n_codewords": 256, "spherical": False}
    affordable = paid_rows is None or 0.3 * bits * paid_rows > 256 * 16  # codebooks in float16
    if bits <= MOST_PQ_BITS and affordable and find_spec("faiss") is not None:
        out.append(common | books)
    if bits >= 16:
        out.append(common | {"fine": "float16"})
    elif bits >= LEAST_GRID_BITS:
        out.append(common | {"fine": "grid", "scalar_bits": int(bits)})
        if objective == "cosine" and bits - 10 / d >= LEAST_GRID_BITS:
            row_scales = {"radius_bits": 10, "radius_norm": "max"}
            out.append(common | row_scales | {"fine": "grid", "scalar_bits": int(bits - 10 / d)})
    return out


def _residual_codebooks(d: int, bits: float, paid_rows: int, seed: int) -> list[dict[str, Any]]:
    """Settings of residual codebooks of whole rows. Where a row is to take less than about 32 bits
    no scalar code comes near them: there are no bits left to tell components apart."""
    if find_spec("faiss") is None:
        return []
    common = {"fine": "codebook", "spherical": False, "radius_bits": 0, "seed": seed}
    plans: list[dict[str, Any]] = []
    for n_bits in range(BOOK_BITS, 2, -1):
        book = common | {"n_codewords": 1 << n_bits, "stages": 1}
        each = 8 * _fine_bytes(book, bits, d) / paid_rows  # bits a row that such a book takes
        stages = max(1, math.ceil(bits * d / (n_bits + each)))
        if not plans and stages <= MOST_STAGES and stages * each <= 0.5 * bits * d:
            plans.append(book | {"stages": stages})
        if n_bits + each <= bits * d and each <= 0.5 * bits * d:  # or one, as large as can be
            return [*plans, book] if book not in plans else plans
    return plans


def _state_bits(n_numbers: float, bits: float) -> int:
    """Window of a bitshift code whose tables take about a sixtieth of what the codes take."""
    table_bits = 11 * (4 + bits)  # of an entry of each table: one for 1, 2, ... bits
    return int(np.clip(np.log2(max(n_numbers * bits / 60 / table_bits, 1.0)), 4, STATE_BITS))


def rows_of_quality(
    rows: Array,
    target: Target,
    objective: Objective,
    *,
    paid_rows: int | None = None,
    weights: npt.ArrayLike | None = None,
    seed: int = 0,
    deadline: float | None = None,
    rounds: int = 8,
) -> PolarQuantizer:
    """The chain of fixed rate at the least rate at which rows meet a quality target, within 1%.

    Judged on at most JUDGE_ROWS rows, held out where paid_rows is None. Beyond what bitshift codes
    reach: plain grids and float16. InputError where not even these do.
    """
    everything = rows
    if paid_rows is None:
        rows, few = split_rows(rows, seed)
    else:
        few = rows[:: max(1, len(rows) // JUDGE_ROWS)]
    best_seen = -np.inf

    def attempt(trial: PolarQuantizer) -> float:
        nonlocal best_seen
        margin, seen = _margin(few, trial.decode_as(trial.encode(few), few.dtype), target)
        best_seen = max(best_seen, seen)
        return margin

    bits = guess_bits(rows, target)
    byte = 8 / rows.shape[1]
    for _ in range(2):  # a frame is planned for a rate, and the first one is a guess
        planned = min(bits, MOST_BITSHIFT_BITS)
        q = best_chain(
            rows,
            planned,
            objective,
            layout="rows",
            paid_rows=paid_rows,
            weights=weights,
            seed=seed,
            deadline=deadline,
        )
        bits = _next_bits(planned, attempt(q))
        if abs(bits - planned) < SAME_PLAN_BITS:
            break
    inside: tuple[float, PolarQuantizer] | None = None
    outside = 0.0
    for _ in range(rounds if q.fine in SIZED else 0):
        trial = q.with_bits(rows, bits)
        margin = attempt(trial)
        if margin >= 0:
            inside = (bits, trial)
        else:
            outside = max(outside, bits)
        if inside is not None and inside[0] - outside <= max(0.01 * inside[0], byte):
            break
        bits = _next_bits(bits, margin)
        if inside is not None and not outside < bits < inside[0]:
            bits = (outside + inside[0]) / 2
        if inside is None and bits > MOST_BITSHIFT_BITS:
            if outside >= MOST_BITSHIFT_BITS:
                break
            bits = MOST_BITSHIFT_BITS
    found = None if inside is None else inside[1]
    for plain in (8, 10, 12, 16) if found is None else ():
        settings: dict[str, Any] = {"fine": "grid", "scalar_bits": plain}
        if plain == 16:
            settings = {"fine": "float16"}
        trial = PolarQuantizer(radius_bits=0, layout="rows", **settings).fit(rows)
        if attempt(trial) >= 0:
            found = trial
            break
    if found is not None:
        if len(everything) > len(rows):  # the rows held out may teach, too
            found = copy.copy(found).fit(everything[:: max(1, -(-len(everything) // FIT_ROWS))])
        found.candidates = q.candidates
        return found
    raise InputError(
        f"{target.kind}={target.value} is out of reach: the best found is {best_seen:.6g}"
    )
