"""How fast does polarpack code vectors next to faiss at equal code bits, and in how much memory?

Rows of 384 numbers at 2 bits each (``--bits``), from a table given by ``--data`` or made here: a
mixture of 64 Gaussians with spectra that fall as embeddings' do. All contestants are fitted on
the same rows and code the same others; every result is decoded and checked before anything is
timed, and repeats alternate. Times of one thread are CPU seconds of the process, which other work
on the machine changes little; of more threads (``--threads``), wall-clock seconds.

archive    ``compress(quantizer=)`` and ``decompress``: search, entropy coding, file and checks
rows       the same in the layout of fixed rate
encode     ``q.encode`` alone: rows to codes
faiss      ``compute_codes`` and ``decode``: rows to packed codes and back

Memory is the peak of resident memory above what it was before the call, result included.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vectors_rd import cpu_name, provenance

RESULTS = Path(__file__).parent / "results" / "vectors_speed.json"
SEED = 0
D = 384
TARGETS = {  # of issue and README: what the figure is, and at least how much
    "archive encode / faiss PQ encode": 0.4,
    "archive encode / faiss PRQ encode": 5.0,
    "archive decode, MB/s": 80.0,
    "rows decode of codebooks, MB/s": 400.0,
}


def made_rows(n: int) -> Any:
    """n x 384: 64 groups around means of their own, each with a falling spectrum in axes of its own
    within the common ones."""
    rng = np.random.default_rng(SEED)
    common = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
    spread = (np.arange(1, D + 1) ** -0.6).astype(np.float32)
    group = rng.integers(0, 64, n)
    means = rng.standard_normal((64, D), dtype=np.float32) * spread * 0.7
    x = np.empty((n, D), np.float32)
    for g in range(64):
        mine = np.flatnonzero(group == g)
        own = spread * np.exp(0.8 * rng.standard_normal(D)).astype(np.float32)
        x[mine] = means[g] + rng.standard_normal((len(mine), D), dtype=np.float32) * own
    return x @ common.T


class Peak:
    """Peak of resident memory over calls, in MB; None where the system does not tell."""

    def __init__(self) -> None:
        self.known = Path("/proc/self/clear_refs").exists()

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def of(self, call: Callable[[], Any]) -> float | None:
        """MB above what was in use before."""
        if not self.known:
            return None
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # what was freed earlier would be used again unseen
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
        before = self._status("VmRSS:")
        kept = call()
        peak = self._status("VmHWM:") - before
        del kept
        return round(peak / 1024, 1)


def contestants(train: Any, rows: Any, bits: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Calls to time by name, and what each codec reaches: checked here."""
    import faiss

    import polarpack as pp
    from polarpack.metrics import snr_db

    calls: dict[str, Callable[[], Any]] = {}
    quality = []

    def add(name: str, code_bits: float, decoded: Any, fit_seconds: float) -> None:
        if decoded.shape != rows.shape or not np.isfinite(decoded).all():
            raise SystemExit(f"{name} decodes to {decoded.shape}")
        quality.append(
            {
                "codec": name,
                "code_bits": round(code_bits, 3),
                "snr_db": round(snr_db(rows, decoded), 2),
                "fit_seconds": round(fit_seconds, 1),
            }
        )

    ours = {
        "archive": lambda: pp.fit(train, bits=bits, seed=SEED),
        "archive, 8 states": lambda: pp.preset("trellis", bits, seed=SEED).fit(train),
        "rows": lambda: pp.fit(train, bits=bits, layout="rows", seed=SEED),
        "rows of codebooks": lambda: pp.preset("pq", bits, seed=SEED).fit(train),
    }
    for name, fit in ours.items():
        start = time.process_time()
        q = fit()
        seconds = time.process_time() - start
        blob = pp.compress(rows, quantizer=q)
        decoded, codes = pp.decompress(blob), q.encode(rows)
        if not np.array_equal(decoded, q.decode(codes)):
            raise SystemExit(f"{name}: the file does not decode as the quantizer does")
        codes_bytes = pp.open(blob).info()["tensors"]["x"]["codes_bytes"]
        add(name, 8 * codes_bytes / rows.size, decoded, seconds)
        calls[f"{name} encode"] = lambda q=q: pp.compress(rows, quantizer=q)
        calls[f"{name} decode"] = lambda blob=blob: pp.decompress(blob)
        calls[f"{name} encode to codes"] = lambda q=q: q.encode(rows)
        calls[f"{name} decode of codes"] = lambda q=q, codes=codes: q.decode(codes)
    heads = round(bits * D / 8)
    theirs = {
        "faiss PQ": faiss.ProductQuantizer(D, heads, 8),
        "faiss PRQ": faiss.ProductResidualQuantizer(D, heads // 12, 12, 8),
    }
    theirs["faiss PQ"].cp.min_points_per_centroid = 1  # no warnings about small tables
    for i in range(heads // 12):
        part = faiss.downcast_AdditiveQuantizer(theirs["faiss PRQ"].subquantizer(i))
        part.cp.min_points_per_centroid = 1
    for name, q in theirs.items():
        start = time.process_time()
        q.train(train)
        seconds = time.process_time() - start
        codes = q.compute_codes(rows)
        add(name, 8 * codes.shape[1] / D, q.decode(codes), seconds)
        calls[f"{name} encode"] = lambda q=q: q.compute_codes(rows)
        calls[f"{name} decode"] = lambda q=q, codes=codes: q.decode(codes)
    return calls, quality


def measure(calls: dict[str, Any], rows: Any, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Median and quartiles of seconds a call, as vectors and MB of float32 a second."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    peak = Peak()
    memory = {name: peak.of(call) for name, call in calls.items()}  # this warms caches, too
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    out = []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        out.append(
            {
                "what": name,
                "threads": threads,
                "seconds": round(median, 4),
                "seconds_quartiles": [round(low, 4), round(high, 4)],
                "vectors_per_second": round(len(rows) / median),
                "megabytes_per_second": round(rows.nbytes / median / 1e6, 1),
                "peak_extra_megabytes": memory[name],
            }
        )
    return out


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that have a target."""
    speed = {r["what"]: r["megabytes_per_second"] for r in rows}
    return {
        "archive encode / faiss PQ encode": speed["archive encode"] / speed["faiss PQ encode"],
        "archive encode / faiss PRQ encode": speed["archive encode"] / speed["faiss PRQ encode"],
        "archive decode, MB/s": speed["archive decode"],
        "rows decode of codebooks, MB/s": speed["rows of codebooks decode of codes"],
    }


def fit_time(n: int, bits: float) -> dict[str, Any]:
    """``pp.fit`` on n rows: CPU seconds of all threads."""
    import polarpack as pp

    x = made_rows(n)
    start = time.process_time()
    q = pp.fit(x, bits=bits, seed=SEED)
    seconds = round(time.process_time() - start, 1)
    return {"what": f"pp.fit on {n} x {D}", "cpu_seconds": seconds, "chain": repr(q)}


def main() -> None:
    """Check, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="a .npy file of (n, 384); its last rows are coded"
    )
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=12_288, help="coded")
    parser.add_argument("--train-rows", type=int, default=3000)
    parser.add_argument("--fit-rows", type=int, nargs="*", default=[12_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "POLARPACK_THREADS"):
        os.environ[name] = str(args.threads)
    import faiss

    faiss.omp_set_num_threads(args.threads)
    x = made_rows(args.train_rows + args.rows) if args.data is None else np.load(args.data)
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 2 or x.shape[1] != D or len(x) <= args.rows:
        parser.error(f"expected a table of more than {args.rows} rows of {D}, got {x.shape}")
    train, rows = x[: len(x) - args.rows][: args.train_rows], x[len(x) - args.rows :]
    calls, quality = contestants(train, rows, args.bits)
    for line in quality:
        print(
            f"{line['codec']:20}{line['code_bits']:7.3f} code bits{line['snr_db']:8.2f} dB"
            f"{line['fit_seconds']:9.1f} s to fit",
            flush=True,
        )
    lines = measure(calls, rows, args.repeats, args.threads)
    for r in lines:
        low, high = r["seconds_quartiles"]
        print(
            f"{r['what']:36}{r['vectors_per_second']:9,} vectors/s"
            f"{r['megabytes_per_second']:9.1f} MB/s  ({low:.3f} to {high:.3f} s)"
            f"{r['peak_extra_megabytes'] or 0:8.1f} MB"
        )
    reached = {name: round(value, 2) for name, value in ratios(lines).items()}
    for name, value in reached.items():
        print(f"{name}: {value} (target {TARGETS[name]})")
    fits = [fit_time(n, args.bits) for n in args.fit_rows]
    for fit in fits:
        print(f"{fit['what']}: {fit['cpu_seconds']} CPU seconds")
    made = provenance() | {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": args.threads,
        "load": os.getloadavg()[0],
        "cpu": cpu_name(),
        "clock": "CPU seconds" if args.threads == 1 else "wall-clock seconds",
        "data": [{"name": "made" if args.data is None else args.data.stem, "shape": [*x.shape],
                  "dtype": "float32", "coded_rows": args.rows, "bits": args.bits}],
        "targets": TARGETS,
        "reached": reached,
        "quality": quality,
        "fits": fits,
        "rows": lines,
    }  # fmt: skip
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
