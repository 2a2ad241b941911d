"""One table, many ways to store it: total bytes against quality, as rows of a table and as a plot.

``total_bytes`` counts everything that decoding needs: codes, codebooks, rotations, scales, headers.
All methods are fitted on the very table they store, as one does with a table of one's own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from . import peers
from ._arrays import Array, Float32, as_float32
from .blocks import native_rows
from .codec import compress, decompress
from .errors import InputError, MissingDependencyError
from .metrics import bits_per_dimension, cosine, rate_distortion_bound, recall_at_k, snr_db
from .presets import FIXED_RATE, NAMES, preset

if TYPE_CHECKING:
    from rich.table import Table

OURS = "polarpack"
METHODS: tuple[str, ...] = (OURS, *NAMES, *peers.PEERS)
MANY = 20_000  # rows that are compared, evenly chosen
K = 10  # of recall
N_QUERIES = 1000
PRESET_FITS = 6  # of a preset, until its total meets the size
CLOSE = 0.98  # of the size asked for: near enough
SAME_SIZE = 1.03  # totals within this ratio stand together in the table
NOTHING = 1e-6  # 1 - cosine below it is as good as none, and would squeeze the others
GREY = "#767676"
BLUE = "#1f5fbf"  # ours
COLOURS = (  # of the others; a preset and the peer of its name share one
    "#c4442a",
    "#2b8a5a",
    "#8650b0",
    "#b07910",
    "#17818f",
    "#b0356f",
    "#5b6b1f",
    "#7a4a30",
    "#3a3f9e",
    "#8a8a00",
    "#444444",
)


@dataclass(frozen=True)
class Result:
    """What one method reached at one size."""

    method: str
    setting: str  # of that method; methods of one name are joined in the plot
    total_bytes: int
    bits_per_float: float
    snr_db: float  # inf: exact; nan: it gives no rows back, only scores
    cosine: float  # mean over rows
    cosine_p01: float  # its 1st percentile
    recall_at_10: float  # inner product, of the original's neighbours
    seconds: float  # of CPU time, of all threads: fitting, encoding, and for a size finding it

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method} {self.setting}".rstrip()


@dataclass
class Comparison:
    """Results of ``compare``: ``rows``, one for each method and size, and what was left out."""

    title: str
    shape: tuple[int, int]
    rows: list[Result] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # the reason -> methods
    bound_bits: list[float] = field(default_factory=list)
    bound_db: list[float] = field(default_factory=list)  # Gaussian bound at these rates

    def table(self) -> str:
        """All rows as text, smallest first; what was left out below."""
        from rich.console import Console

        console = Console(width=110, force_terminal=False)
        with console.capture() as capture:
            console.print(table(self.rows, self.title))
        return "\n".join([capture.get().rstrip(), *self.notes()])

    def notes(self) -> list[str]:
        """A sentence for each reason why methods were left out."""
        return [f"left out: {', '.join(names)} ({why})" for why, names in self.left_out.items()]

    def to_json(self) -> str:
        """Everything as JSON; an SNR that is infinite (exact) or not known becomes null."""
        facts = {
            "title": self.title,
            "shape": list(self.shape),
            "results": as_json(self.rows),
            "bound": {"bits": self.bound_bits, "snr_db": self.bound_db},
            "left_out": self.left_out,
        }
        return json.dumps(facts, indent=1)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A PNG: SNR with the bound, cosine and recall against total bits per float.
        MissingDependencyError without matplotlib."""
        plot(self, path)


def compare(
    x: Any,
    *,
    bits: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    methods: Sequence[str] | None = None,
    max_rows: int = MANY,
    name: str = "x",
    on_result: Callable[[Result], None] | None = None,
) -> Comparison:
    """Store one table in every way at the same total sizes.

    x: (n, d) floats, numpy or torch; of more than ``max_rows`` rows so many are taken, evenly.
    bits: totals per float that no method may exceed. methods: some of ``METHODS`` (polarpack, the
    presets, faiss's codecs by names like "faiss PQ") instead of all. A
    method that fits no size is left out there; all of those that need a library that is not
    installed are named in ``left_out``, with what to install. on_result: called as they come.

    Presets and peers of one fixed rate come once, at that. Minutes for large tables: RQ, PRQ and
    LSQ train slowly. InputError for unknown methods, no rows, or rows that are not finite.

    >>> print(pp.compare(x, bits=[2.0], methods=["polarpack", "pq"]).table())   # doctest: +SKIP
    """
    wanted = list(dict.fromkeys(METHODS if methods is None else methods))
    if unknown := [m for m in wanted if m not in METHODS]:
        raise InputError(f"expected methods of {', '.join(METHODS)}, got {unknown[0]!r}")
    rates = sorted({float(b) for b in bits})
    if not rates or not all(0 < b <= 32 for b in rates):
        raise InputError(f"expected bits in (0, 32], got {list(bits)}")
    rows = rows_of(x, name, max_rows)
    if not rows.size:
        raise InputError(f"expected rows to compare, got shape {rows.shape}")
    out = of_results(f"{name}: {len(rows):,} rows of {rows.shape[1]}", rows)
    for method in wanted:
        seen: set[tuple[str, int]] = set()
        for rate in [FIXED_RATE[method]] if method in FIXED_RATE else rates:
            try:
                result = _result(method, rows, rate)
            except MissingDependencyError as error:
                out.left_out.setdefault(str(error), []).append(method)
                break
            if result is not None and (result.setting, result.total_bytes) not in seen:
                seen.add((result.setting, result.total_bytes))
                out.rows.append(result)
                if on_result is not None:
                    on_result(result)
    return out


def of_results(title: str, x: Float32, results: Iterable[Result] = ()) -> Comparison:
    """A comparison of rows x (n, d) from results that are there already."""
    bits = [float(b) for b in np.round(np.geomspace(2**-4, 32, 109), 5)]
    bound = [float(b) for b in np.round(rate_distortion_bound(x, bits), 4)]
    return Comparison(title, (len(x), x.shape[1]), list(results), {}, bits, bound)


def _result(method: str, x: Float32, bits: float) -> Result | None:
    if method == OURS:
        try:
            return polarpack(x, bits * x.size / 8)
        except InputError:  # out of reach: a header and one row are more
            return None
    if method in peers.PEERS:
        return _peer(method, x, bits * x.size / 8)
    return preset_at(method, x, bits)


def measure(
    method: str, setting: str, x: Float32, y: Array, total_bytes: int, seconds: float
) -> Result:
    """The quality of decoded rows y (n, d) for rows x (n, d)."""
    cosines = cosine(x, y)
    return Result(
        method,
        setting,
        total_bytes,
        bits_per_dimension(total_bytes, x.shape),
        snr_db(x, y),
        float(np.mean(cosines)),
        float(np.quantile(cosines, 0.01)),
        recall_at_k(x, y, k=K, n_queries=N_QUERIES),
        seconds,
    )


def rows_of(tensor: Any, name: str, most: int) -> Float32:
    """At most so many rows (n, d) of a tensor, evenly chosen; InputError unless they are finite."""
    _, rows = native_rows(tensor, name)
    n = min(most, len(rows))
    return as_float32(rows[np.arange(n) * len(rows) // max(1, n)], name=name)


# -- methods ---------------------------------------------------------------------------------------
def polarpack(x: Float32, total_bytes: float, setting: str = "") -> Result:
    """``compress`` at no more than so many bytes."""
    started = time.process_time()
    blob = compress(x, size_bytes=total_bytes)
    seconds = time.process_time() - started
    return measure(OURS, setting, x, decompress(blob), len(blob), seconds)


def preset_at(name: str, x: Float32, bits: float) -> Result | None:
    """A preset at ``bits`` per float in total, side information included; None where nothing of it
    fits. Presets of fixed rate come out at that rate whatever is asked."""
    started = time.process_time()
    if name in FIXED_RATE:
        best: bytes | None = compress(x, quantizer=preset(name).fit(x))
    else:
        best = _largest_within(name, x, bits)
    if best is None:
        return None
    seconds = time.process_time() - started
    return measure(name, "", x, decompress(best), len(best), seconds)


def _largest_within(name: str, x: Float32, bits: float) -> bytes | None:
    """The largest blob of a preset within ``bits`` per float that a few fits find. Side information
    depends on the rate in steps, so the rate is bracketed and interpolated."""
    limit, aim = bits * x.size / 8, 0.5 * (1 + CLOSE) * bits * x.size / 8
    rate, best = bits, None
    below: tuple[float, int] | None = None  # rates and sizes next to the limit
    above: tuple[float, int] | None = None
    for _ in range(PRESET_FITS):
        blob = compress(x, quantizer=preset(name, rate).fit(x))
        if len(blob) > limit:
            above = (rate, len(blob))
        else:
            below = (rate, len(blob))
            best = blob if best is None or len(blob) > len(best) else best
            if len(blob) > CLOSE * limit:
                break
        if below and above:
            share = (aim - below[1]) / max(1, above[1] - below[1])
            rate = below[0] + min(max(share, 0.1), 0.9) * (above[0] - below[0])
        else:
            rate = max(rate + 8 * (aim - len(blob)) / x.size, rate / 2)
        if rate * x.shape[1] < 1:
            break
    return best


def _peer(method: str, x: Float32, most: float) -> Result | None:
    """A peer within so many bytes; None where nothing of it fits."""
    started = time.process_time()
    stored = peers.PEERS[method](x, most)
    return None if stored is None else of_peer(method, x, stored, time.process_time() - started)


def of_peer(method: str, x: Float32, stored: peers.Stored, seconds: float) -> Result:
    """What a peer stored, judged: by its rows, or by its scores where it gives no rows back."""
    if stored.decoded is not None:
        return measure(method, stored.setting, x, stored.decoded, stored.total_bytes, seconds)
    assert stored.scores is not None
    bits, unknown = bits_per_dimension(stored.total_bytes, x.shape), float("nan")
    recall = _recall_of_scores(x, stored.scores)
    row = (unknown, unknown, unknown, recall, seconds)
    return Result(method, stored.setting, stored.total_bytes, bits, *row)


def _recall_of_scores(x: Float32, scores: Callable[[Float32], Array]) -> float:
    """``recall_at_k`` for somebody else's scores of the same queries."""
    n = len(x)
    own = np.random.default_rng(0).permutation(n)[:N_QUERIES]  # as recall_at_k draws them
    k, hits = min(K, n - 1), 0
    if not k:
        return 1.0
    for start in range(0, len(own), 64):
        asked = own[start : start + 64]
        line = np.arange(len(asked))
        true, theirs = x[asked] @ x.T, scores(x[asked])
        true[line, asked] = theirs[line, asked] = -np.inf
        found = np.argpartition(-theirs, k - 1, axis=1)[:, :k]
        worst = np.partition(true, n - k, axis=1)[:, n - k]
        hits += int((true[line[:, None], found] >= worst[:, None]).sum())
    return hits / (k * len(own))


def float16_rows(x: Float32) -> Result:
    """Half precision; InputError beyond its range."""
    started = time.process_time()
    stored = peers.float16(x)
    if stored is None:
        raise InputError("the table exceeds float16's range")
    return of_peer("float16", x, stored, time.process_time() - started)


def int8_rows(x: Float32) -> Result:
    """8-bit integers with one float32 scale a row."""
    started = time.process_time()
    stored = peers.int8_rows(x)
    return of_peer("int8 per row", x, stored, time.process_time() - started)


def faiss_pq(x: Float32, n_subquantizers: int, n_bits: int) -> Result:
    """faiss's product quantizer in one setting. MissingDependencyError without faiss."""
    started = time.process_time()
    stored = peers.pq_of(x, n_subquantizers, n_bits)
    return of_peer("faiss PQ", x, stored, time.process_time() - started)


# -- showing ---------------------------------------------------------------------------------------
def table(results: Iterable[Result], title: str | None = None) -> Table:
    """Results as a table for the terminal, smallest first, a line between groups of one size."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    shown = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=HORIZONTALS,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("method", no_wrap=True)
    heads = ("total bytes", "bits/float", "SNR dB", "cosine", "1st perc.", "recall@10", "CPU time")
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    ordered = sorted(results, key=lambda r: (r.total_bytes, r.snr_db))
    for r, after in zip(ordered, [*ordered[1:], None], strict=True):
        shown.add_row(
            r.name,
            f"{r.total_bytes:,}",
            f"{r.bits_per_float:.2f}",
            *(_figure(v, form) for v, form in ((r.snr_db, ".2f"), (r.cosine, ".4f"))),
            _figure(r.cosine_p01, ".4f"),
            f"{r.recall_at_10:.3f}",
            f"{r.seconds:.1f} s",
            style="bold" if r.method == OURS else None,
            end_section=after is not None and after.total_bytes > SAME_SIZE * r.total_bytes,
        )
    return shown


def _figure(value: float, form: str) -> str:
    return "-" if np.isnan(value) else "exact" if np.isinf(value) else f"{value:{form}}"


def as_json(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results as JSON values; an SNR that is infinite or not known becomes null."""
    return [
        {k: None if v in (np.inf, -np.inf) or v != v else v for k, v in asdict(r).items()}
        for r in results
    ]


def plot(shown: Comparison, path: str | os.PathLike[str]) -> None:
    """``Comparison.plot``: four panels beside one legend, ours in front."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'the plot needs matplotlib: pip install "polarpack[bench]"'
        ) from error
    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    (snr, recall), (mean, worst) = figure.subplots(2, 2, sharex=True)
    right = max([r.bits_per_float for r in shown.rows if np.isfinite(r.snr_db)], default=8.0) * 1.1
    left = min([r.bits_per_float for r in shown.rows], default=0.5) / 1.15
    inside = [b for b in shown.bound_bits if left <= b <= right]
    bound = np.interp(inside, shown.bound_bits, shown.bound_db)
    snr.plot(inside, bound, color=GREY, linestyle=(0, (4, 3)), linewidth=1.4, label="bound*")
    methods = sorted(dict.fromkeys(r.method for r in shown.rows), key=lambda m: m != OURS)
    colours, marks = cycle(COLOURS), cycle("sD^v<>pX*P")
    for method in methods:
        ours = method == OURS
        rows = sorted((r for r in shown.rows if r.method == method), key=lambda r: r.bits_per_float)
        look = {
            "color": BLUE if ours else next(colours),
            "marker": "o" if ours else next(marks),
            "markersize": 7 if ours else 5,
            "linewidth": 2.8 if ours else 1.2,
            "linestyle": "--" if method in peers.PEERS and not ours else "-",
            "zorder": 5 if ours else 3,
            "alpha": 1.0 if ours else 0.85,
        }
        for axes, values in (
            (snr, [r.snr_db for r in rows]),
            (mean, [1 - r.cosine for r in rows]),
            (worst, [1 - r.cosine_p01 for r in rows]),
            (recall, [r.recall_at_10 for r in rows]),
        ):
            pairs = zip([r.bits_per_float for r in rows], values, strict=True)
            points = [(b, v) for b, v in pairs if np.isfinite(v) and (v > NOTHING or axes is snr)]
            label = method if axes is recall else None  # the one panel that has them all
            axes.plot(*(zip(*points, strict=True) if points else ([], [])), label=label, **look)
    for axes in (mean, worst):
        axes.set_yscale("log")
        axes.invert_yaxis()
        axes.set_xlabel("total bits per float: codes, codebooks, rotations, scales, headers")
    titles = (
        (snr, "signal-to-noise ratio, dB"),
        (mean, "1 - cosine, mean over rows"),
        (worst, "1 - cosine, 1st percentile of the cosine"),
        (recall, f"recall@{K}, inner product"),
    )
    for axes, title in titles:
        axes.set_xscale("log", base=2)
        axes.set_xlim(left, right)
        ticks = [2.0**e for e in range(-3, 6) if left <= 2.0**e <= right]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{shown.title}: size against quality (higher is better)", x=0.01, ha="left")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    note = "* reverse water-filling with one covariance; tables that are not Gaussian can beat it"
    figure.supxlabel("\n".join([note, *shown.notes()]), fontsize=8, color=GREY, x=0.01, ha="left")
    figure.savefig(path, format="png")


def plot_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """A PNG of ``PolarQuantizer.report()``: each candidate's quality, as predicted and as measured
    with its 95% confidence interval, and the bits per float it took beside those asked for.

    InputError for a report without candidates, of a quantizer that the planner did not choose.
    MissingDependencyError without matplotlib.
    """
    tried = list(report.get("candidates", ()))
    if not tried:
        raise InputError(
            "expected the report of a quantizer that fit chose, this has no candidates"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'the plot needs matplotlib: pip install "polarpack[bench]"'
        ) from error
    measure = next(name for name in ("snr", "cosine", "recall") if name in tried[0])
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(tried)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    quality, size = figure.subplots(1, 2, sharey=True)
    for y, line in enumerate(tried):
        look = {"color": BLUE if line["chosen"] else GREY, "markersize": 7, "linestyle": "none"}
        quality.errorbar(line[measure], y, xerr=line["interval"], marker="o", capsize=3, **look)
        if measure == "snr" and line["predicted_snr"] is not None:
            quality.plot(line["predicted_snr"], y, marker="|", markeredgewidth=2, **look)
        size.plot(line["total_bits"], y, marker="o", **look)
    size.axvline(tried[0]["asked_bits"], color=GREY, linestyle=(0, (4, 3)), linewidth=1.4)
    quality.set_yticks(range(len(tried)), [_described(line) for line in tried])
    quality.set_ylim(len(tried) - 0.5, -0.5)
    name = {"snr": "SNR, dB (bar: predicted)", "cosine": "mean cosine", "recall": "recall@10"}
    quality.set_title(f"{name[measure]}, held-out rows", loc="left", fontsize=11)
    size.set_title("bits per float (dashed: asked for)", loc="left", fontsize=11)
    for axes in (quality, size):
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.suptitle("What the planner tried, the one chosen in blue", x=0.01, ha="left")
    figure.savefig(path, format="png")


def _described(line: Mapping[str, Any]) -> str:
    """A candidate in a few words."""
    settings = line["settings"]
    if "n_classes" in settings:
        frame = f"{settings['n_classes']} KLTs in {settings['n_leading']} axes"
    elif settings.get("rotation") == "klt":
        frame = "one KLT"
        if settings.get("n_components"):
            frame += f" of {settings['n_components']} axes"
    else:
        frame = "native order"
    if "state_bits" in settings:
        return f"bitshift, {frame}"
    if "stages" in settings:
        return "codebooks"
    return f"{settings['scalar_bits']}-bit grid" if "scalar_bits" in settings else frame
