"""One table, many ways to store it: total bytes against quality, as rows of a table and as a plot.

``total_bytes`` counts everything that decoding needs: codes, codebooks, rotations, scales, headers.
All methods are fitted on the very table they store, as one does with a table of one's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import Array, Float32, as_float32
from .blocks import native_rows
from .codec import compress, decompress
from .errors import InputError, MissingDependencyError
from .metrics import bits_per_dimension, cosine, rate_distortion_bound, recall_at_k, snr_db
from .presets import FIXED_RATE, NAMES, preset

if TYPE_CHECKING:
    from rich.table import Table

OURS = "polarpack"
PRESET_FITS = 6  # of a preset, until its total meets the size
CLOSE = 0.98  # of the size asked for: near enough
PLOTTED_BITS = 9.0  # beyond, everything is nearly lossless and the rest would be squeezed
SAME_SIZE = 1.03  # totals within this ratio stand together in the table
GREY = "#767676"
BLUE = "#1f5fbf"  # ours
COLOURS = (
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
)


@dataclass(frozen=True)
class Result:
    """What one method reached at one size."""

    method: str
    setting: str  # of that method; methods of one name are joined in the plot
    total_bytes: int
    bits_per_float: float
    snr_db: float
    cosine: float  # mean over rows
    recall_at_10: float  # inner product, of the original's neighbours
    seconds: float

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method} {self.setting}".rstrip()


def measure(
    method: str, setting: str, x: Float32, y: Array, total_bytes: int, seconds: float
) -> Result:
    """The quality of decoded rows y (n, d) for rows x (n, d)."""
    return Result(
        method,
        setting,
        total_bytes,
        bits_per_dimension(total_bytes, x.shape),
        snr_db(x, y),
        float(np.mean(cosine(x, y))),
        recall_at_k(x, y, k=10),
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
    started = time.monotonic()
    blob = compress(x, size_bytes=total_bytes)
    seconds = time.monotonic() - started
    return measure(OURS, setting, x, decompress(blob), len(blob), seconds)


def preset_at(name: str, x: Float32, bits: float) -> Result | None:
    """A preset at ``bits`` per float in total, side information included; None where nothing of it
    fits. Presets of fixed rate come out at that rate whatever is asked."""
    started = time.monotonic()
    if name in FIXED_RATE:
        best: bytes | None = compress(x, quantizer=preset(name).fit(x))
    else:
        best = _largest_within(name, x, bits)
    if best is None:
        return None
    seconds = time.monotonic() - started
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


def float16_rows(x: Float32) -> Result:
    """Half precision."""
    started = time.monotonic()
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    seconds = time.monotonic() - started
    if not np.isfinite(halves).all():
        raise InputError("the table exceeds float16's range")
    return measure("float16", "", x, halves.astype(np.float32), halves.nbytes, seconds)


def int8_rows(x: Float32) -> Result:
    """8-bit integers with one float32 scale a row."""
    started = time.monotonic()
    scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
    codes = np.rint(x / np.where(scale > 0, scale, 1)).astype(np.int8)
    seconds = time.monotonic() - started
    return measure("int8 per row", "", x, codes * scale, codes.nbytes + scale.nbytes, seconds)


def faiss_pq(x: Float32, n_subquantizers: int, n_bits: int, seed: int = 1234) -> Result:
    """faiss's product quantizer, its codebooks counted (and used) in float16, half of what faiss
    itself stores. MissingDependencyError without faiss."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            'the product quantizer of faiss needs it: pip install "polarpack[faiss]"'
        ) from error
    started = time.monotonic()
    pq: Any = faiss.ProductQuantizer(x.shape[1], n_subquantizers, n_bits)
    pq.cp.min_points_per_centroid = 1  # fewer than it would like are no reason to warn
    pq.cp.seed = seed
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # where cores are busy its threads wait for each other, x 100
    try:
        pq.train(x)
        codebooks = faiss.vector_to_array(pq.centroids).astype(np.float16)
        faiss.copy_array_to_vector(codebooks.astype(np.float32), pq.centroids)
        codes = pq.compute_codes(x)
        decoded = pq.decode(codes)
    finally:
        faiss.omp_set_num_threads(threads)
    seconds = time.monotonic() - started
    setting = f"{n_subquantizers}x{n_bits}"
    return measure("faiss PQ", setting, x, decoded, codes.nbytes + codebooks.nbytes, seconds)


def compare(x: Float32, bits: Sequence[float], methods: Sequence[str] = ()) -> Iterable[Result]:
    """polarpack and every preset at each total of ``bits`` per float, and what has but one size.

    methods: some of ``presets.NAMES`` and "polarpack" instead of all. Yields results as they come;
    a preset that does not fit a size is left out there. InputError for an unknown method.
    """
    wanted = list(methods) or [OURS, *NAMES]
    unknown = [name for name in wanted if name not in (OURS, *NAMES)]
    if unknown:
        raise InputError(f"expected methods of {', '.join((OURS, *NAMES))}, got {unknown[0]!r}")
    for rate in bits:
        for name in wanted:
            if name == OURS:
                yield polarpack(x, rate * x.size / 8)
            elif name not in FIXED_RATE:
                result = preset_at(name, x, rate)
                if result is not None:
                    yield result
    for name in wanted:
        if name in FIXED_RATE:
            result = preset_at(name, x, FIXED_RATE[name])
            if result is not None:
                yield result


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
    for head in ("total bytes", "bits/float", "SNR dB", "cosine", "recall@10", "time"):
        shown.add_column(head, justify="right", no_wrap=True)
    ordered = sorted(results, key=lambda r: (r.total_bytes, r.snr_db))
    for r, after in zip(ordered, [*ordered[1:], None], strict=True):
        shown.add_row(
            r.name,
            f"{r.total_bytes:,}",
            f"{r.bits_per_float:.2f}",
            f"{r.snr_db:.2f}" if np.isfinite(r.snr_db) else "exact",
            f"{r.cosine:.4f}",
            f"{r.recall_at_10:.3f}",
            f"{r.seconds:.1f} s",
            style="bold" if r.method == OURS else None,
            end_section=after is not None and after.total_bytes > SAME_SIZE * r.total_bytes,
        )
    return shown


def as_json(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results as JSON values; an SNR that is infinite becomes null."""
    return [
        {k: None if v in (np.inf, -np.inf) else v for k, v in asdict(r).items()} for r in results
    ]


def plot(results: Sequence[Result], x: Float32, path: str | os.PathLike[str], title: str) -> None:
    """A PNG of SNR against total bits per float, one line a method, with the bound of a Gaussian.

    Sizes beyond ``PLOTTED_BITS`` are named below the plot instead. MissingDependencyError without
    matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'the plot needs matplotlib: pip install "polarpack[bench]"'
        ) from error
    inside = [r for r in results if r.bits_per_float <= PLOTTED_BITS and np.isfinite(r.snr_db)]
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    right = max([r.bits_per_float for r in inside], default=1.0) * 1.02
    rates = np.linspace(0, right, 200)
    bound = rate_distortion_bound(x, rates)
    axes.plot(rates, bound, color=GREY, linestyle=(0, (4, 3)), linewidth=1.3, zorder=1)
    labels = [(float(rates[-1]), float(bound[-1]), "Gaussian bound*", GREY)]
    others = cycle(COLOURS)
    for name in sorted({r.method for r in inside}, key=lambda name: (name != OURS, name)):
        colour = BLUE if name == OURS else next(others)
        points = sorted((r.bits_per_float, r.snr_db) for r in inside if r.method == name)
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker="o" if name == OURS else "s",
            markersize=6 if name == OURS else 4.5,
            linewidth=2.4 if name == OURS else 1.4,
            zorder=4 if name == OURS else 3,
        )
        labels.append((*points[-1], name, colour))
    top = 1.04 * max([float(bound[-1]), *(r.snr_db for r in inside)])
    axes.set_xlim(0, right)
    axes.set_ylim(min([0.0, *(r.snr_db for r in inside)]), top)
    _label_lines(axes, labels, right, top)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("total bits per float: codes, codebooks, rotations, scales and headers")
    axes.set_ylabel("signal-to-noise ratio, dB (higher is better)")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    note = "* reverse water-filling with one covariance; tables that are not Gaussian can beat it"
    beyond = [
        f"{r.name} ({r.bits_per_float:.3g} bits, {_decibels(r)})"
        for r in results
        if r not in inside
    ]
    if beyond:
        note += "\nnot shown: " + ", ".join(beyond)
    figure.supxlabel(note, fontsize=8, color=GREY, x=0.01, ha="left")
    figure.savefig(path, format="png")


def _decibels(r: Result) -> str:
    return f"{r.snr_db:.1f} dB" if np.isfinite(r.snr_db) else "exact"


def _label_lines(
    axes: Any, labels: Sequence[tuple[float, float, str, str]], right: float, top: float
) -> None:
    """Each line's name to the right of its last point. Lines that end at about the same rate have
    their names in one column, moved up where they would overlap."""
    columns: list[list[tuple[float, float, str, str]]] = []
    for label in sorted(labels):
        if columns and label[0] - columns[-1][-1][0] < 0.1 * right:
            columns[-1].append(label)
        else:
            columns.append([label])
    for column in columns:
        left, at = column[-1][0] + 0.02 * right, -np.inf
        for x, y, name, colour in sorted(column, key=lambda label: label[1]):
            at = max(y, at + 0.04 * top)
            axes.annotate(
                name,
                (x, y),
                xytext=(left, at),
                color=colour,
                fontsize=10,
                fontweight="bold" if name == OURS else None,
                va="center",
                annotation_clip=False,
                zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
            )
