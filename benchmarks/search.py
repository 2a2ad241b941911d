"""How many of the ten nearest rows does a search of codes find, and how fast, beside faiss's?

Rows are searched for queries that are no rows. Recall@10 is the share of the ten best rows by exact
scores of the original vectors that a search names; queries a second are CPU seconds of one thread,
all queries in one call (``batch``) and one query a call (``single``), the index in memory. Every
index is checked before it is timed: it must answer with rows that exist, best first by its scores.

Contestants: our rows layout (bitshift codes) and archive layout (entropy coded), exact over decoded
rows and with a shortlist from the leading coefficients, and faiss's PQ and PQFastScan of the same
number of bytes, RaBitQ of 1 bit and of as many bits as ours (a row takes some bytes more),
RaBitQFastScan, and, on tables up to ``HNSW_ROWS`` rows, HNSW over 4-bit scalar codes, whose bytes
are those of codes and links. All are fitted on the same training rows (faiss PQ in 5 rounds).
``row_bytes`` are those that grow with the rows.

Tables: real ones (``tables.py``; SIFT by l2, others by inner product), and ``made``, as many rows
as asked for (1,000,000 x 384), made of real sentence embeddings, since no real table of this size
is at hand: a point between a row and one of its eight nearest, at random, plus half of a draw from
the Gaussian of the row's cluster (64 of k-means), set to norm 1. Its queries are real sentences
that no row was made from.

    python benchmarks/search.py build   --data FOLDER --work FOLDER [--rows 1000000] [--tables ..]
    python benchmarks/search.py measure --data FOLDER --work FOLDER [..]     writes the JSON
    python benchmarks/search.py plot                                         and draws it
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["POLARPACK_THREADS"] = "1"

import faiss
import numpy as np
from entropy_speed import cpu_name
from tables import Float32, load_tables

import polarpack as pp

RESULTS = Path(__file__).parent / "results" / "search.json"
SEED = 0
K = 10
QUERIES = 300
SINGLE = 10  # queries asked one by one
TRAIN_ROWS = 1 << 13
HNSW_ROWS = 100_000
CHUNK = 20_000
NEIGHBOURS = 8
CLUSTERS = 64
JITTER = 0.5
SHORTLIST = 100
OURS = ("polarpack rows", "polarpack archive")
MADE = "made"


# -- tables ----------------------------------------------------------------------------------------
def prepare(name: str, x: Float32, args: argparse.Namespace) -> None:
    """Write base rows (float16 or as they are), queries, and the true neighbours."""
    folder = args.work / name
    folder.mkdir(parents=True, exist_ok=True)
    n = len(x)
    order = np.arange(n) if name == "sift" else np.random.default_rng(SEED).permutation(n)
    asked, kept = x[order[n - QUERIES :]], x[np.sort(order[: n - QUERIES])]
    np.save(folder / "queries.npy", asked)
    if name == MADE:
        make_rows(kept, args.rows, folder / "base.npy")
    else:
        np.save(folder / "base.npy", kept)
    base = np.load(folder / "base.npy", mmap_mode="r")
    np.save(folder / "truth.npy", true_neighbours(base, asked, metric_of(name)))


def make_rows(x: Float32, n: int, path: Path) -> None:
    """``made`` (the module's text) from unit rows x, as float16."""
    rng = np.random.default_rng(SEED)
    near = np.empty((len(x), NEIGHBOURS + 1), np.int64)
    for start in range(0, len(x), 1000):
        scores = x[start : start + 1000] @ x.T
        near[start : start + 1000] = np.argpartition(-scores, NEIGHBOURS, axis=1)[
            :, : NEIGHBOURS + 1
        ]
    _, cluster = pp.kmeans(x, k=CLUSTERS, seed=SEED)
    factors = []
    for c in range(CLUSTERS):
        rows = x[cluster == c] - x[cluster == c].mean(axis=0)
        covariance = rows.T @ rows / max(1, len(rows)) + 1e-5 * np.eye(x.shape[1])
        factors.append(np.linalg.cholesky(covariance).astype(np.float32))
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n, x.shape[1]))
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        one = rng.integers(0, len(x), count)
        other = near[one, rng.integers(0, NEIGHBOURS + 1, count)]
        rows = x[one] + rng.random((count, 1), dtype=np.float32) * (x[other] - x[one])
        noise = rng.standard_normal(rows.shape, dtype=np.float32)
        for c in np.unique(cluster[one]):
            mine = cluster[one] == c
            rows[mine] += np.float32(JITTER) * (noise[mine] @ factors[c].T)
        out[start : start + count] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    out.flush()


def metric_of(name: str) -> str:
    """By which a table is searched."""
    return "l2" if name == "sift" else "ip"


def true_neighbours(base: Any, queries: Float32, metric: str) -> Any:
    """(n_queries, K) numbers of the rows with the best exact scores."""
    best = np.full((len(queries), K), -np.inf, np.float32)
    ids = np.zeros((len(queries), K), np.int64)
    for start in range(0, len(base), CHUNK):
        rows = np.asarray(base[start : start + CHUNK], np.float32)
        scores = queries @ rows.T
        if metric == "l2":
            scores -= np.einsum("ij,ij->i", rows, rows) / 2
        scores = np.concatenate([best, scores], axis=1)
        numbers = np.concatenate(
            [ids, np.tile(np.arange(start, start + len(rows)), (len(ids), 1))], 1
        )
        order = np.argpartition(-scores, K, axis=1)[:, :K]
        best, ids = (np.take_along_axis(a, order, axis=1) for a in (scores, numbers))
    return ids


# -- contestants -----------------------------------------------------------------------------------
def build(name: str, args: argparse.Namespace) -> None:
    """Fit and fill every index of a table, and write it."""
    folder = args.work / name
    base = np.load(folder / "base.npy", mmap_mode="r")
    some = np.sort(np.random.default_rng(SEED).permutation(len(base))[:TRAIN_ROWS])
    train = np.asarray(base[some], np.float32)
    for codec, fit in our_quantizers(train, args.bits).items():
        if codec == "polarpack archive" and name == MADE:
            continue  # the same search once its codes are in memory
        path = folder / f"{codec}.polar"
        if path.exists() or args.codecs not in codec:
            continue
        quantizer = fit()
        with pp.create(path, quantizer=quantizer) as file:
            for start in range(0, len(base), CHUNK):
                file.append("x", np.asarray(base[start : start + CHUNK], np.float32))
        print(f"{name}: {codec} built", flush=True)
    n, d = base.shape
    for codec, key in faiss_keys(d, args.bits, n).items():
        path = folder / f"{codec}.faiss"
        if path.exists() or args.codecs not in codec:
            continue
        metric = faiss.METRIC_L2 if metric_of(name) == "l2" else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(d, key, metric)
        if key.startswith("PQ"):
            index.pq.cp.niter, index.pq.cp.min_points_per_centroid = 5, 1
        index.train(train)
        for start in range(0, n, CHUNK):
            index.add(np.asarray(base[start : start + CHUNK], np.float32))
        faiss.write_index(index, str(path))
        print(f"{name}: {codec} built", flush=True)


def our_quantizers(train: Float32, bits: float) -> dict[str, Callable[[], pp.PolarQuantizer]]:
    """What to fit, by name."""
    return {
        "polarpack rows": lambda: pp.fit(train, bits=bits, layout="rows", seed=SEED),
        "polarpack archive": lambda: pp.fit(train, bits=bits, seed=SEED),
    }


def faiss_keys(d: int, bits: float, n: int) -> dict[str, str]:
    """faiss's indexes of as many bits a number, for its factory."""
    keys = {
        "faiss PQ": f"PQ{round(bits * d / 8)}x8",
        "faiss PQFastScan": f"PQ{round(bits * d / 4)}x4fs",
        "faiss RaBitQ 1": "RaBitQ",
        f"faiss RaBitQ {bits:g}": f"RaBitQ{bits:g}",
        f"faiss RaBitQFastScan {bits:g}": f"RaBitQfs{bits:g}",
    }
    return keys | ({"faiss HNSW SQ4": "HNSW32_SQ4"} if n <= HNSW_ROWS else {})


# -- measuring -------------------------------------------------------------------------------------
def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each contestant."""
    folder, metric = args.work / name, metric_of(name)
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    n, d = np.load(folder / "base.npy", mmap_mode="r").shape
    lines = []
    for codec in OURS:
        path = folder / f"{codec}.polar"
        if not path.exists():
            continue
        with pp.open(path) as file:
            t, info = file["x"], file.info()["tensors"]["x"]
            size = {"row_bytes": info["codes_bytes"] / n, "side_bytes": info["side_bytes"]}
            for shortlist in (None, SHORTLIST):

                def search(q: Float32, t: Any = t, shortlist: Any = shortlist) -> Any:
                    return t.search(q, K, metric, shortlist=shortlist)

                label = codec if shortlist is None else f"{codec}, shortlist of {shortlist}"
                lines.append({"codec": label} | size | timed(search, queries, truth, n, metric))
                report(name, lines[-1])
    for codec in faiss_keys(d, args.bits, n):
        path = folder / f"{codec}.faiss"
        if not path.exists():
            continue
        index = faiss.read_index(str(path))
        for setting in (16, 64, 256) if "HNSW" in codec else (0,):
            if setting:
                index.hnsw.efSearch = setting
            label = f"{codec}, ef {setting}" if setting else codec
            row_bytes = faiss.serialize_index(index).nbytes / n if setting else code_size(index)
            line = {"codec": label, "row_bytes": row_bytes, "side_bytes": None}

            def ask(q: Float32, index: Any = index) -> Any:
                return index.search(q, K)

            lines.append(line | timed(ask, queries, truth, n, metric))
            report(name, lines[-1])
        del index
    return [{"table": name, "n": n, "d": d, "metric": metric, "bits": args.bits} | r for r in lines]


def code_size(index: Any) -> float:
    """Bytes of a row of one of faiss's flat indexes."""
    return float(index.code_size if hasattr(index, "code_size") else index.sa_code_size())


def timed(
    search: Callable[[Float32], Any], queries: Float32, truth: Any, n: int, metric: str
) -> dict[str, Any]:
    """Recall, and queries a second; the first call, which fills caches, apart."""
    start = time.process_time()
    scores, ids = search(queries[:1])
    first = time.process_time() - start
    scores, ids = search(queries)
    ordered = np.diff(scores, axis=1)
    if ids.shape != (len(queries), K) or ids.min() < 0 or ids.max() >= n:
        raise SystemExit(f"rows {ids.min()} to {ids.max()} of {n}")
    if (ordered < -1e-6).any() if metric == "l2" else (ordered > 1e-6).any():
        raise SystemExit("scores are out of order")
    hits = [len(set(a) & set(b)) for a, b in zip(ids.tolist(), truth.tolist(), strict=True)]
    batch = []
    for _ in range(2):
        start = time.process_time()
        search(queries)
        batch.append(time.process_time() - start)
    single = []
    for i in range(SINGLE):
        start = time.process_time()
        search(queries[i : i + 1])
        single.append(time.process_time() - start)
    return {
        "recall10": round(sum(hits) / (K * len(hits)), 4),
        "batch_queries_per_second": round(len(queries) / min(batch), 1),
        "single_queries_per_second": round(1 / statistics.median(single), 1),
        "first_query_seconds": round(first, 3),
    }


def report(name: str, line: dict[str, Any]) -> None:
    """A line on the screen."""
    print(
        f"{name:12}{line['codec']:40}{line['row_bytes']:8.1f} B{line['recall10']:8.3f}"
        f"{line['batch_queries_per_second']:10.1f}/s{line['single_queries_per_second']:10.1f}/s",
        flush=True,
    )


# -- plot ------------------------------------------------------------------------------------------
def plot(results: dict[str, Any], folder: Path) -> None:
    """Recall over queries a second, a panel for each table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["table"] for r in results["rows"]))
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        lines = [r for r in results["rows"] if r["table"] == name]
        for r in lines:
            ours = r["codec"].startswith("polarpack")
            at = r["batch_queries_per_second"], r["recall10"]
            axis.plot(*at, "o" if ours else "s", color="tab:blue" if ours else "tab:gray")
            text = f"{r['codec'].removeprefix('faiss ').removeprefix('polarpack ')}"
            axis.annotate(
                f"{text}, {r['row_bytes']:.0f} B", at, textcoords="offset points", xytext=(3, 5),
                fontsize=7, rotation=35, color="tab:blue" if ours else "black",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        axis.margins(x=0.35, y=0.5)
        axis.set_title(f"{name}: {lines[0]['n']:,} x {lines[0]['d']}, {lines[0]['metric']}")
        axis.set_xlabel("queries a second in one batch, one thread")
        axis.set_ylabel("recall@10")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "search.png", dpi=130)


def main() -> None:
    """Build, measure or draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "measure", "plot"])
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--work", type=Path, default=Path("search_work"))
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the made table")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--codecs", default="", help="build those whose names hold this")
    parser.add_argument("--tables", nargs="*", default=["sentences", "sift", MADE])
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    if args.what == "build":
        for name in args.tables:
            if not (args.work / name / "truth.npy").exists():
                source = "sentences" if name == MADE else name
                for table in load_tables([source], args.data):
                    prepare(name, table.x, args)
            build(name, args)
    elif args.what == "measure":
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
        lines = [r for r in known["rows"] if r["table"] not in args.tables]
        for name in args.tables:
            lines += measure(name, args)
        made = {
            "question": (__doc__ or "").splitlines()[0],
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seed": SEED,
            "threads": 1,
            "clock": "CPU seconds",
            "load": os.getloadavg()[0],
            "cpu": cpu_name(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("numpy", "numba", "faiss-cpu")}
            | {"polarpack": pp.__version__},
            "queries": QUERIES,
            "bits": args.bits,
            "data": [
                {"name": name, "shape": [r["n"], r["d"]], "dtype": "float32"}
                for name, r in {r["table"]: r for r in lines}.items()
            ],
            "rows": lines,
        }
        RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    if args.what != "build":
        plot(json.loads(RESULTS.read_text()), RESULTS.parent)


if __name__ == "__main__":
    main()
