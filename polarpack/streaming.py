"""Tables larger than memory to one file that meets a target: a sample, and a pass or two over rows.

    source ── sample ── planner ── quantizer ── every row, group by group ── file
                 └ what the file will take ┘           └ size and quality, as they come ┘

What is planned on a sample is measured on all rows while they are written; should it miss the
target, which takes an unlucky sample, the step is corrected and the rows are read once more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ._arrays import ITEM_BYTES, Array, TensorSpec, describe, to_numpy
from .batches import Rows
from .blocks import Layout, NonFinite, TensorCoding, check_max_error
from .errors import InputError
from .metrics import Closeness
from .planner import (
    Target,
    best_chain,
    guess_bits,
    meet_quality,
    objective_of,
    rows_of_quality,
)
from .polar import MAX_D, SIZED, PolarQuantizer
from .sources import draw_rows, rows_of
from .trellis import next_log_step
from .writing import StreamWriter

MAX_PASSES = 5  # over all rows
MAX_FITS = 8  # of the sample while closing in on a size
SIZE_MARGIN = 0.003  # of a size that is aimed at: what a sample may be wrong by
SNR_MARGIN = 0.02  # dB
HEAD_BYTES = 400  # of a file that is neither rows nor quantizer, about


@dataclass(frozen=True)
class Streamed:
    """What ``save_stream`` has made: the quantizer (None: rows are stored exactly), how close the
    rows are to the originals, and how many passes over the source it took to write them."""

    quantizer: PolarQuantizer | None
    closeness: Closeness
    n_rows: int
    n_passes: int


def save_stream(
    path: str | os.PathLike[str],
    source: Any,
    *,
    bits: float | None = None,
    size_bytes: float | None = None,
    snr_db: float | None = None,
    cosine: float | None = None,
    recall: float | None = None,
    max_error: float | None = None,
    quantizer: PolarQuantizer | None = None,
    name: str | None = None,
    key: str | None = None,
    layout: Layout | None = None,
    optimize: Literal["snr", "cosine", "recall"] | None = None,
    weights: npt.ArrayLike | None = None,
    nonfinite: NonFinite = "error",
    seed: int = 0,
    time_budget: float | None = None,
    sample_rows: int | None = None,
    progress: Callable[[str, float | None], None] | None = None,
) -> Streamed:
    """``save`` for one table (n, d) that need not fit in memory.

    source, key, sample_rows: as in ``fit``; a source that can be read but once (a generator, a
    record batch reader) needs a ``quantizer``. name: of the tensor (default: the source's, "x").
    Targets and other options as in ``save``, with the same promises: a size is never exceeded,
    snr_db and cosine are met on all rows, recall on the sample. progress: called with the work at
    hand and the share done (None: nobody knows).

    Reads the source once for the sample, and once, seldom more often, to write it. Memory: the
    sample, a batch, and some 2^22 numbers at work. The file appears under its name when it meets
    the target and is on the disk.

    Raises InputError for targets out of reach and bad batches, OSError for the paths.
    """
    show = progress or (lambda doing, done: None)
    rows = rows_of(source, key=key, name=name or "x")
    rows = rows if name is None else replace(rows, name=name)
    if quantizer is not None:
        if any(v is not None for v in (bits, size_bytes, snr_db, cosine, recall)):
            raise InputError("a quantizer fixes the rate: only max_error= goes with it")
        bound = check_max_error(max_error)
        if layout not in (None, quantizer.layout):
            raise InputError(f"expected layout {quantizer.layout!r}, the quantizer's")
        written = _Pass(path, rows, quantizer, bound, nonfinite)
        return written.publish(written.write(show), 1)
    target = Target.of(
        bits=bits, size_bytes=size_bytes, snr_db=snr_db, cosine=cosine, recall=recall,
        max_error=max_error,
    )  # fmt: skip
    if not rows.again:
        raise InputError(
            f"{rows.name} can be read but once: a target takes a sample first; give a quantizer, "
            "or a source that can be read again"
        )
    show(f"reading {rows.name}", None)
    started = time.monotonic()
    plan = _Plan(rows, target, layout or "archive", optimize, weights, nonfinite, seed)
    plan.fit(
        sample_rows,
        None if time_budget is None else started + time_budget,
        lambda: show(f"planning for {rows.name}", None),
    )
    for n_passes in range(1, MAX_PASSES + 1):
        written = _Pass(path, rows, plan.quantizer, plan.bound, nonfinite)
        size = written.write(show, plan.n_rows)
        if plan.is_met(size, written.closeness):
            return written.publish(size, n_passes)
        written.abort()
        plan.correct(size, written.closeness)
    raise InputError(f"{rows.name}: {target.kind}={target.value} is out of reach")


class _Pass:
    """Rows on their way to a file that appears under its name only once ``publish`` is called."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        rows: Rows,
        quantizer: PolarQuantizer | None,
        bound: float | None,
        nonfinite: NonFinite,
    ) -> None:
        self.rows, self.closeness = rows, Closeness()
        self.writer = StreamWriter(path, quantizer, max_error=bound, nonfinite=nonfinite)
        self.writer._compared = self.closeness.add
        self.quantizer, self.n_rows = quantizer, 0

    def write(self, show: Callable[[str, float | None], None], total: int | None = None) -> int:
        """All rows; the bytes of the file."""
        total = total or self.rows.n_rows
        try:
            for batch in self.rows.batches():
                self.writer.append(self.rows.name, batch)
                self.n_rows += len(batch)
                show(f"compressing {self.rows.name}", self.n_rows / total if total else None)
            if not self.n_rows:
                raise InputError(f"expected at least one row of {self.rows.name}, got none")
            return self.writer.flush()
        except BaseException:
            self.abort()
            raise

    def publish(self, size: int, n_passes: int) -> Streamed:
        """Let the file appear."""
        try:
            self.writer.close()
        except BaseException:
            self.abort()
            raise
        return Streamed(self.quantizer, self.closeness, self.n_rows, n_passes)

    def abort(self) -> None:
        """Leave no trace."""
        self.writer.discard()


class _Plan:
    """From a target to the quantizer that meets it on a sample, corrected by what all rows say."""

    def __init__(
        self,
        rows: Rows,
        target: Target,
        layout: Layout,
        optimize: Literal["snr", "cosine", "recall"] | None,
        weights: npt.ArrayLike | None,
        nonfinite: NonFinite,
        seed: int,
    ) -> None:
        if layout not in ("archive", "rows"):
            raise InputError(f"expected layout 'archive' or 'rows', got {layout!r}")
        self.rows, self.target, self.layout = rows, target, layout
        self.objective = objective_of(target, optimize)
        self.weights, self.nonfinite, self.seed = weights, nonfinite, seed
        self.bound = target.value if target.kind == "max_error" else None
        self.quantizer: PolarQuantizer | None = None
        self.n_rows = 0
        self._share = 1.0  # of what the sample promises, that all rows turned out to leave

    def fit(
        self, sample_rows: int | None, deadline: float | None, planning: Callable[[], None]
    ) -> None:
        """Draw the sample, and make of it what is expected to meet the target."""
        seen = _Counted(self.rows)
        skip = self.nonfinite == "raw"
        self.sample = draw_rows(seen.rows(skip), size=sample_rows, seed=self.seed)
        self.n_rows = n = seen.n_rows
        planning()
        d = self.sample.shape[1]
        dtype = seen.dtype
        self.raw_bytes = n * d * ITEM_BYTES[dtype]
        self.spec = TensorSpec((n, d), dtype)
        kind, value = self.target.kind, self.target.value
        self.limit = {"bits": value * n * d / 8, "size_bytes": value}.get(kind)
        if (kind == "max_error" and value == 0) or d > MAX_D:
            return
        if self.limit is not None and self._exact_bytes() <= self.limit:
            return
        given: dict[str, Any] = {
            "paid_rows": n, "weights": self.weights, "seed": self.seed, "deadline": deadline,
        }  # fmt: skip
        try:
            self._fit(given)
        except InputError:  # out of reach of any code: met by the rows themselves
            if self.limit is not None:
                raise
            self.quantizer = None

    def _fit(self, given: dict[str, Any]) -> None:
        sample, kind = self.sample, self.target.kind
        if self.limit is not None:
            bits = 8 * self.limit / (self.n_rows * sample.shape[1])
            rate = max(bits * (1 - SIZE_MARGIN) - 8 * HEAD_BYTES / self.spec.n_rows, 0.6 * bits)
            q = best_chain(sample, rate, self.objective, layout=self.layout, **given)
            self.quantizer = self._sized(q)
            return
        aim = self.target
        if kind == "snr_db":
            aim = Target(kind, aim.value + SNR_MARGIN)
        elif kind == "cosine":
            aim = Target(kind, aim.value + 0.003 * (1 - aim.value))
        if self.layout == "rows":
            self.quantizer = rows_of_quality(sample, aim, self.objective, **given)
        else:
            q = best_chain(sample, guess_bits(sample, aim), self.objective, **given)
            self.quantizer = meet_quality(q, sample, aim)

    def _exact_bytes(self) -> float:
        """Bytes of a file of rows as they are, by the sample."""
        assert self.limit is not None
        if self.limit < self.raw_bytes / 8:
            return float("inf")
        blocks = TensorCoding(self._sample_spec(), None).encode_rows(self.sample)
        scale = self.n_rows / len(self.sample)
        return (1 + SIZE_MARGIN) * scale * sum(len(b) + 8 for b in blocks) + HEAD_BYTES

    def _sample_spec(self) -> TensorSpec:
        return TensorSpec(self.sample.shape, self.spec.dtype)

    def _expected(self, q: PolarQuantizer) -> float:
        """Bytes of the file of all rows, by the sample's."""
        coding = TensorCoding(self._sample_spec(), q, self.layout, nonfinite=self.nonfinite)
        blocks = coding.encode_rows(self.sample)
        scale = self.n_rows / len(self.sample)
        return scale * sum(len(block) + 8 for block in blocks) + len(q.to_bytes()) + HEAD_BYTES

    def _sized(self, q: PolarQuantizer) -> PolarQuantizer:
        """The same chain at the finest step, or the highest rate, whose file is expected to take
        no more than the limit, with a margin."""
        assert self.limit is not None
        aim = self.limit * (1 - SIZE_MARGIN) * self._share
        if self.layout == "rows":
            size = self._expected(q)
            row_bytes = int(aim / self.n_rows)
            for _ in range(MAX_FITS if q.fine in SIZED else 0):
                q = q.with_bits(self.sample, 8 * max(1, row_bytes) / q.d_)
                size = self._expected(q)
                if size <= aim or row_bytes <= 1:
                    break
                row_bytes = max(1, min(row_bytes - 1, int(row_bytes - (size - aim) / self.n_rows)))
            if size > self.limit:
                raise self._too_small(size)
            return q
        best: PolarQuantizer | None = None
        tried: list[tuple[float, float]] = []
        log_step = float(np.log2(q.fine_.step_))
        for _ in range(MAX_FITS):
            size = self._expected(q)
            tried.append((log_step, size))
            if size <= aim:
                best = q
                if size > aim * (1 - SIZE_MARGIN):
                    break
            slope = -0.9 * self.limit / max(8 * self.limit / (self.n_rows * q.d_), 0.5) / 2
            log_step = next_log_step(tried, aim * (1 - SIZE_MARGIN / 2), slope=slope)
            if any(abs(log_step - step) < 1e-4 for step, _ in tried):
                break
            q = q.with_step(self.sample, 2.0**log_step)
            log_step = float(np.log2(q.fine_.step_))
        if best is None:
            raise self._too_small(min(size for _, size in tried))
        return best

    def _too_small(self, least: float) -> InputError:
        return InputError(
            f"{self.rows.name}: {self.limit:.0f} bytes are out of reach, the least found is "
            f"{least:.0f}"
        )

    def is_met(self, size: int, closeness: Closeness) -> bool:
        """Whether all rows meet the target."""
        value = self.target.value
        if self.limit is not None:
            return bool(size <= self.limit)
        if self.target.kind == "snr_db":
            return bool(closeness.snr_db >= value)
        return bool(self.target.kind != "cosine" or closeness.mean_cosine >= value)

    def correct(self, size: int, closeness: Closeness) -> None:
        """Another step or rate, by how far all rows were from the target."""
        q, value = self.quantizer, self.target.value
        if q is None:
            raise InputError(f"{self.rows.name}: {self.target.kind}={value} is out of reach")
        if self.limit is not None:
            self._share *= (1 - SIZE_MARGIN) * self.limit / size
            self.quantizer = self._sized(q)
            return
        if self.target.kind == "snr_db":
            lacking = value - closeness.snr_db
        else:
            lacking = 10 * np.log10((1 - closeness.mean_cosine) / max(1 - value, 1e-12))
        lacking = float(lacking) + SNR_MARGIN
        if self.layout == "archive":
            self.quantizer = q.with_step(self.sample, q.fine_.step_ * 10 ** (-lacking / 20))
        elif q.fine in SIZED:
            more = max(lacking / 6.02, 1 / q.d_)
            self.quantizer = q.with_bits(self.sample, (q.bits or 0) + more)
        else:
            self.quantizer = None


class _Counted:
    """A table whose rows are counted, and their dtype noted, while they are read."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self.n_rows, self.dtype = rows, 0, "float32"

    def rows(self, skip_nonfinite: bool) -> Rows:
        """The table; ``skip_nonfinite``: without rows that hold NaN or infinity."""

        def read(start: int) -> Any:
            for batch in self._rows.batches(start):
                self.dtype = describe(batch).dtype
                self.n_rows += len(batch)
                if skip_nonfinite:
                    x: Array = to_numpy(batch)
                    batch = x[np.isfinite(x).all(axis=1)]
                yield batch

        return replace(self._rows, read=read)
