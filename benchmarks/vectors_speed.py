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

Beside that, each with a codebook of faiss's of equal code bits in the same alternation:
growth     of rates with the number of rows, their dimension and the bits (``--grow-...``)
scaling    of one thread to two, both by wall-clock seconds, in turn, beside what the machine gives
           any two threads: the same arithmetic on each, matrix products, copies of memory
machine    bytes per second of copying memory, and of zstd on the same rows
kmeans     ``pp.kmeans`` and faiss's called directly: CPU seconds and error, nearest rows included
fits       CPU seconds of ``pp.fit`` (``--fit-rows``)

``--parts`` measures some of these anew, and keeps the others as the result has them.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from vectors_rd import cpu_name, provenance

RESULTS = Path(__file__).parent / "results" / "vectors_speed.json"
SEED = 0
D = 384
GROWTH_TRAIN = 3000  # rows that codecs are fitted on while n, d and bits grow
GROWTH_D = 96  # while n grows
MOST_MADE = 1 << 18  # rows made for it
GROWTH_FLOATS = 1 << 21  # while d and bits grow
PARTS = ("speed", "machine", "growth", "scaling", "kmeans", "fits")
SCALING_TIMES = 2  # the rows are coded, so often
LOOP = 60_000_000  # rounds of arithmetic that each of two threads is given
PRODUCT_SIDE, COPY_BYTES, COPIES = 1000, 1 << 25, 10  # of what else they are
KMEANS = ((65_536, 8, 256), (16_384, 96, 1024), (8192, D, 256))  # rows, numbers a row, centroids
KMEANS_ITERATIONS = 25
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


def contestants(
    train: Any, rows: Any, bits: float, *, slow: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Calls to time by name, and what each codec reaches: checked here. slow: faiss PRQ, too."""
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
    theirs = {"faiss PQ": faiss.ProductQuantizer(D, heads, 8)}
    theirs["faiss PQ"].cp.min_points_per_centroid = 1  # no warnings about small tables
    if slow:
        theirs["faiss PRQ"] = faiss.ProductResidualQuantizer(D, heads // 12, 12, 8)
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


# -- growth, threads, and what the machine does with plain bytes -----------------------------------
def grown(n: int, d: int, bits: float, repeats: int) -> list[dict[str, Any]]:
    """Rates for n rows of d numbers at these bits, of codecs without a planner, beside faiss."""
    import faiss

    import polarpack as pp
    from polarpack.metrics import snr_db

    # groups of the same mixture: as many leading columns, or as many tables side by side; beyond
    # MOST_MADE rows the same ones again. Each number is then changed by a tenth of it, at random.
    some = made_rows(min(n + GROWTH_TRAIN, MOST_MADE))
    some = np.concatenate([some] * -(-d // D), axis=1)[:, :d].copy()
    x, rng = np.empty((n + GROWTH_TRAIN, d), np.float32), np.random.default_rng(SEED)
    for start in range(0, len(x), len(some)):
        block = x[start : start + len(some)]
        rng.standard_normal(dtype=np.float32, out=block)
        block *= 0.1
        block += 1
        block *= some[: len(block)]
    del some
    train, rows = x[:GROWTH_TRAIN], x[GROWTH_TRAIN:]
    calls: dict[str, Callable[[], Any]] = {}
    quality: dict[str, float] = {}
    for name, preset in {"archive": "trellis", "rows": "pq"}.items():
        q = pp.preset(preset, bits, seed=SEED).fit(train)
        blob = pp.compress(rows, quantizer=q)
        quality[name] = snr_db(rows, pp.decompress(blob))
        calls[f"{name} encode"] = lambda q=q: pp.compress(rows, quantizer=q)
        calls[f"{name} decode"] = lambda blob=blob: pp.decompress(blob)
    theirs = faiss.ProductQuantizer(d, max(1, round(bits * d / 8)), 8)
    theirs.cp.min_points_per_centroid = 1
    theirs.train(train)
    codes = theirs.compute_codes(rows)
    quality["faiss PQ"] = snr_db(rows, theirs.decode(codes))
    calls["faiss PQ encode"] = lambda: theirs.compute_codes(rows)
    calls["faiss PQ decode"] = lambda: theirs.decode(codes)
    facts = {"n": n, "d": d, "bits": bits}
    lines = measure(calls, rows, repeats, 1)
    return [
        facts | line | {"snr_db": round(quality[line["what"].rpartition(" ")[0]], 2)}
        for line in lines
    ]


def of_any_threads() -> dict[str, Callable[[], None]]:
    """What any two threads gain on this machine: calls that share two equal pieces of work among
    POLARPACK_THREADS threads."""
    import numba
    from threadpoolctl import threadpool_limits

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def loop(n: int) -> int:
        x = total = np.uint64(88172645463325252)
        for _ in range(n):
            x ^= x << np.uint64(13)
            x ^= x >> np.uint64(7)
            x ^= x << np.uint64(17)
            total += x
        return total  # type: ignore[no-any-return]

    loop(1)
    square = np.random.default_rng(SEED).standard_normal((PRODUCT_SIDE,) * 2, dtype=np.float32)
    sources = [np.ones(COPY_BYTES, np.uint8) for _ in range(2)]
    targets = [np.zeros(COPY_BYTES, np.uint8) for _ in range(2)]

    def copy(i: int) -> None:
        for _ in range(COPIES):
            np.copyto(targets[i], sources[i])

    works: dict[str, Callable[[int], Any]] = {
        "machine: arithmetic": lambda i: loop(LOOP),
        "machine: matrix products": lambda i: [square @ square for _ in range(10)],
        "machine: copies of memory": copy,
    }

    def share(work: Callable[[int], Any]) -> None:
        threads = int(os.environ["POLARPACK_THREADS"])
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(2)))

    return {name: lambda work=work: share(work) for name, work in works.items()}  # type: ignore[misc]


def scaling(calls: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Wall-clock seconds of one thread and of two, taken in turn: the shortest of each, which other
    work on the machine disturbs least, and the median; and the CPU seconds of two over those of
    one, which tell the work that is done in vain."""
    import faiss

    ways = range(1, 3)
    seconds: dict[str, Any] = {name: {threads: [] for threads in ways} for name in calls}
    spent: dict[str, Any] = {name: {threads: [] for threads in ways} for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            for threads in ways:
                os.environ["POLARPACK_THREADS"] = str(threads)
                faiss.omp_set_num_threads(threads)
                start, used = time.perf_counter(), time.process_time()
                call()
                seconds[name][threads].append(time.perf_counter() - start)
                spent[name][threads].append(time.process_time() - used)
    faiss.omp_set_num_threads(1)
    return [
        {
            "what": name,
            "seconds_1": round(min(seconds[name][1]), 4),
            "seconds_2": round(min(seconds[name][2]), 4),
            "ratio": round(min(seconds[name][1]) / min(seconds[name][2]), 2),
            "ratio_of_medians": round(
                statistics.median(seconds[name][1]) / statistics.median(seconds[name][2]), 2
            ),
            "cpu_ratio": round(min(spent[name][2]) / min(spent[name][1]), 2),
        }
        for name in calls
    ]


def clusterings(repeats: int) -> list[dict[str, Any]]:
    """CPU seconds and mean squared error of ``pp.kmeans``, of as many of its iterations as reach
    faiss's error, and of faiss's, in turn."""
    import faiss

    import polarpack as pp

    def theirs(x: Any, k: int) -> Any:
        job = faiss.Kmeans(x.shape[1], k, niter=KMEANS_ITERATIONS, seed=SEED)
        job.cp.min_points_per_centroid = 1
        job.train(x)
        return job.centroids, job.index.search(x, 1)[1][:, 0]

    def error_of(x: Any, centroids: Any, nearest: Any) -> float:
        return float(((x - centroids[nearest]) ** 2).sum(axis=1).mean())

    out = []
    for n, d, k in KMEANS:
        x = np.ascontiguousarray(made_rows(n)[:, :d])
        aim = error_of(x, *theirs(x, k))
        tried = range(1, KMEANS_ITERATIONS)
        few = (i for i in tried if error_of(x, *pp.kmeans(x, k, n_iter=i, seed=SEED)) <= aim)
        as_good = next(few, KMEANS_ITERATIONS)
        ways = {
            "polarpack": lambda x, k: pp.kmeans(x, k, n_iter=KMEANS_ITERATIONS, seed=SEED),
            "as_good": lambda x, k, n=as_good: pp.kmeans(x, k, n_iter=n, seed=SEED),
            "faiss": theirs,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        errors = {}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.process_time()
                centroids, nearest = way(x, k)
                times[name].append(time.process_time() - start)
                errors[name] = error_of(x, centroids, nearest)
        line: dict[str, Any] = {"rows": n, "d": d, "k": k, "as_good_iterations": as_good}
        for name, values in times.items():
            line[f"{name}_seconds"] = round(statistics.median(values), 3)
            line[f"{name}_error"] = float(f"{errors[name]:.5g}")
        out.append(line)
    return out


def machine(rows: Any, repeats: int) -> list[dict[str, Any]]:
    """Rates of plain bytes, MB a CPU second: a copy, and zstd at levels 1 and 3."""
    import imagecodecs

    data = rows.tobytes()
    target = np.empty_like(rows)
    calls: dict[str, Callable[[], Any]] = {"memcpy": lambda: np.copyto(target, rows)}
    sizes = {}
    for level in (1, 3):
        packed = imagecodecs.zstd_encode(data, level)
        if imagecodecs.zstd_decode(packed) != data:
            raise SystemExit("zstd does not give the bytes back")
        sizes[f"zstd -{level}"] = round(8 * len(packed) / rows.size, 2)
        calls[f"zstd -{level} encode"] = lambda level=level: imagecodecs.zstd_encode(data, level)
        calls[f"zstd -{level} decode"] = lambda packed=packed: imagecodecs.zstd_decode(packed)
    lines = measure(calls, rows, repeats, 1)
    return [line | {"bits": sizes.get(line["what"].rpartition(" ")[0])} for line in lines]


def growth_cases(args: argparse.Namespace) -> list[tuple[int, int, float]]:
    """(n, d, bits): each varied while the others stay."""
    cases = [(n, GROWTH_D, args.bits) for n in args.grow_rows]
    cases += [(max(256, GROWTH_FLOATS // d), d, args.bits) for d in args.grow_d]
    cases += [(GROWTH_FLOATS // D, D, bits) for bits in args.grow_bits]
    return list(dict.fromkeys(cases))


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
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--grow-rows", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--grow-d", type=int, nargs="*", default=[8, 32, 128, 384, 768, 1536, 4096])
    parser.add_argument("--grow-bits", type=float, nargs="*", default=[1.0, 2.0, 4.0, 8.0])
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
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.parts:
        load = os.getloadavg()[0]
        found = run(part, train, rows, args)
        times = {"when": now(), "load": round(load, 2)}
        known["parts"] = known.get("parts", {}) | {part: times}
        known |= found
        if part == "speed":
            known |= {
                "when": now(),
                "threads": args.threads,
                "load": load,
                "clock": "CPU seconds" if args.threads == 1 else "wall-clock seconds",
                "data": [{"name": "made" if args.data is None else args.data.stem,
                          "shape": [*x.shape], "dtype": "float32", "coded_rows": args.rows,
                          "bits": args.bits}],
            }  # fmt: skip
        known |= provenance()
        known |= {"question": (__doc__ or "").splitlines()[0], "cpu": cpu_name()}
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(known, indent=1) + "\n")


def now() -> str:
    """The time, as results have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run(part: str, train: Any, rows: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one part, print it, and say what it found by the keys of the result."""
    if part == "speed":
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
            print(f"{name}: {value} (target {TARGETS[name]})", flush=True)
        return {"targets": TARGETS, "reached": reached, "quality": quality, "rows": lines}
    if part == "machine":
        plain = machine(rows, args.repeats)
        for r in plain:
            print(f"{r['what']:36}{r['megabytes_per_second']:9.1f} MB/s", flush=True)
        return {"machine": plain}
    if part == "growth":
        growth = []
        for n, d, bits in growth_cases(args):
            growth += grown(n, d, bits, args.repeats if n <= 10**6 else 2)
            rates = ", ".join(f"{r['what']} {r['megabytes_per_second']:.0f}" for r in growth[-6:])
            print(f"{n} x {d} at {bits} bits, MB/s: {rates}", flush=True)
        return {"growth": growth}
    if part == "scaling":
        more = np.concatenate([rows] * SCALING_TIMES)
        calls = of_any_threads() | contestants(train, more, args.bits, slow=False)[0]
        two = scaling(calls, 3 * args.repeats)
        os.environ["POLARPACK_THREADS"] = str(args.threads)
        for r in two:
            print(f"{r['what']:36}1 -> 2 threads: {r['ratio']:.2f} (CPU {r['cpu_ratio']:.2f})")
        return {"scaling": two, "scaling_rows": len(more)}
    if part == "kmeans":
        lines = clusterings(args.repeats)
        for r in lines:
            print(json.dumps(r), flush=True)
        return {"kmeans": lines}
    fits = [fit_time(n, args.bits) for n in args.fit_rows]
    for fit in fits:
        print(f"{fit['what']}: {fit['cpu_seconds']} CPU seconds", flush=True)
    return {"fits": fits}


if __name__ == "__main__":
    main()
