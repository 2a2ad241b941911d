"""How fast do Ray workers code a table, beside a plain loop over the same blocks?

Rows of 768 float16 numbers at 2 bits each, a mixture of Gaussians with spectra that fall as
embeddings' do, in Arrow blocks. First the CPU seconds of one core for each step, in this process:
other work on the machine changes them little. Then whole pipelines, once their processes run: a
plain loop, ``encode_dataset`` and ``write_shards`` with one worker and with two, by turns; rows by
the clock, and by the CPU seconds of all processes together, Ray's own among them. Everything is
decoded and compared before it is timed. What ten billion such rows would take is worked out from
this by ``scale_plan.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vectors_rd import cpu_name, provenance

RESULTS = Path(__file__).parent / "results" / "ray_scaling.json"
SEED, D, BITS, GROUPS = 0, 768, 2.0, 32
WARM_BLOCKS = 3  # that come out before the clock starts


def made_rows(n: int) -> Any:
    """n x 768 float16: 32 groups around means of their own, spectra of their own."""
    rng = np.random.default_rng(SEED)
    axes = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
    spread = (np.arange(1, D + 1) ** -0.6).astype(np.float32)
    means = rng.standard_normal((GROUPS, D), dtype=np.float32) * spread * 0.7
    own = np.exp(0.8 * rng.standard_normal((GROUPS, D))).astype(np.float32) * spread
    group = rng.integers(0, GROUPS, n)
    x = np.empty((n, D), np.float16)
    for start in range(0, n, 1 << 14):
        g = group[start : start + (1 << 14)]
        rows = means[g] + rng.standard_normal((len(g), D), dtype=np.float32) * own[g]
        x[start : start + (1 << 14)] = rows @ axes.T
    return x


def blocks_of(x: Any, size: int) -> list[Any]:
    """Arrow tables of consecutive rows with their numbers."""
    import pyarrow as pa

    found = []
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)
        found.append(pa.table({"id": np.arange(start, start + len(rows)), "v": lists}))
    return found


def cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def steps_of_one_core(name: str, q: Any, block: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds a row of each step of the pipeline, and bytes a row."""
    import pyarrow as pa

    import polarpack as pp
    from polarpack.integrations.arrow import RowDecoder, RowEncoder

    x = block.column("v").combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, D)
    expected = q.decode_as(q.encode(x), np.dtype("float16"))
    shard, data = folder / "shard.polar", q.to_bytes()

    def write() -> None:
        with pp.create(shard, q, embed_quantizer=False) as file:
            file.append("v", x)

    def read() -> Any:
        with pp.open(shard, quantizer=q) as file:
            return file["v"][...]

    encode, decode = RowEncoder(q, "v"), RowDecoder(q, "v")
    write()
    coded = encode(block)
    back = decode(coded).column("v").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not (np.array_equal(read(), expected) and np.array_equal(back.reshape(-1, D), expected)):
        raise SystemExit(f"{name}: what comes back is not what the quantizer decodes")
    with pp.open(shard, quantizer=q) as file:
        codes_bytes = file.info()["tensors"]["v"]["codes_bytes"]
    column = coded.column("v").combine_chunks()
    value_bytes = column.get_total_buffer_size() / len(x)
    calls = {"write shard": write, "read shard": read, "encode column": lambda: encode(block)}
    calls["decode column"] = lambda: decode(coded)
    rates = {
        f"{what}, rows/s": round(len(x) / cpu_seconds(call, repeats))
        for what, call in calls.items()
    }
    load = cpu_seconds(lambda: pp.PolarQuantizer.from_bytes(data).encode(x[:1]), repeats)
    error = x.astype(np.float64) - expected
    snr = 10 * np.log10((x.astype(np.float64) ** 2).sum() / (error**2).sum())
    assert isinstance(coded, pa.Table)
    return {
        "codec": name,
        "chain": repr(q),
        "snr_db": round(float(snr), 2),
        "shard bytes/row": round(codes_bytes / len(x), 2),
        "column bytes/row": round(value_bytes, 2),
        "quantizer_bytes": len(data),
        "load_seconds": round(load, 3),
    } | rates


def parquet_step(block: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds a row of reading the vectors themselves from Parquet, as they come."""
    import pyarrow.parquet as pq

    path = folder / "v.parquet"
    pq.write_table(block, path, compression="none", use_dictionary=False)
    seconds = cpu_seconds(lambda: pq.read_table(path, use_threads=False), repeats)
    return {"codec": "Parquet, float16", "read, rows/s": round(len(block) / seconds)}


def cpu_of_all() -> dict[int, int]:
    """Ticks of CPU so far of this process and of each that descends from it: Ray's workers, too."""
    parents, spent = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                spent[int(entry.name)] = int(fields[11]) + int(fields[12])
    mine = {}
    for process in spent:
        ancestor = process
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid():
            mine[process] = spent[process]
    return mine


def cpu_since(before: dict[int, int]) -> float:
    """CPU seconds of the processes that still run (workers outlive what is timed)."""
    ticks = sum(now - before.get(process, 0) for process, now in cpu_of_all().items())
    return ticks / os.sysconf("SC_CLK_TCK")


def steady(blocks: Iterator[Any]) -> tuple[float, float]:
    """Rows a second, and a CPU second, from the block after WARM_BLOCKS to the last."""
    n = 0
    for i, block in enumerate(blocks):
        n += len(block) if i >= WARM_BLOCKS else 0
        if i == WARM_BLOCKS - 1:
            start, used = time.perf_counter(), cpu_of_all()
        elif i >= WARM_BLOCKS:  # actors end with the stream: look while they are there
            seconds, spent, counted = time.perf_counter() - start, cpu_since(used), n
    return counted / seconds, counted / spent


def pipelines(
    q: Any, x: Any, size: int, folder: Path
) -> dict[str, Callable[[], tuple[float, float]]]:
    """Calls that run a pipeline and say its rows a second, and a CPU second."""
    import ray.data

    import polarpack as pp
    from polarpack.integrations.arrow import RowEncoder
    from polarpack.integrations.ray import encode_dataset, write_shards

    blocks, encode = blocks_of(x, size), RowEncoder(q, "v")

    def columns(workers: int) -> tuple[float, float]:
        ds = encode_dataset(ray.data.from_arrow(blocks), q, "v", workers=workers)
        return steady(ds.iter_batches(batch_format="pyarrow", batch_size=None))

    def shards(workers: int) -> tuple[float, float]:
        path = folder / "shards"
        shutil.rmtree(path, ignore_errors=True)
        start, used = time.perf_counter(), cpu_of_all()
        done = write_shards(ray.data.from_arrow(blocks), q, path, "v", workers=workers)
        n = sum(done.n_rows)
        return n / (time.perf_counter() - start), n / cpu_since(used)

    def loop_of_shards() -> tuple[float, float]:
        def written() -> Iterator[Any]:
            for i, block in enumerate(blocks):
                with pp.create(folder / f"{i}.polar", q, embed_quantizer=False) as file:
                    file.append("v", x[i * size : (i + 1) * size])
                yield block

        return steady(written())

    return {
        "column of codes, plain loop": lambda: steady(encode(block) for block in blocks),
        "column of codes, Ray, 1 worker": lambda: columns(1),
        "column of codes, Ray, 2 workers": lambda: columns(2),
        "shards, plain loop": loop_of_shards,
        "shards, Ray, 1 worker": lambda: shards(1),
        "shards, Ray, 2 workers": lambda: shards(2),
    }


def now() -> str:
    """The time, as results have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def main() -> None:
    """Check, measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16_384, help="in a pipeline")
    parser.add_argument("--block-rows", type=int, default=1024)
    parser.add_argument("--train-rows", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=Path, help="take what one core does from this result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "POLARPACK_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    import ray.data

    import polarpack as pp

    x = made_rows(args.train_rows + args.rows)
    train, x = x[: args.train_rows], x[args.train_rows :]
    small = pp.preset("trellis", BITS, seed=SEED).fit(train)
    load, steps, steps_when = os.getloadavg()[0], [], now()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.steps is not None:
            known = json.loads(args.steps.read_text("utf-8"))
            steps, steps_when = known["steps"], known.get("steps_when", known["when"])
        else:
            quantizers = {
                "archive": pp.fit(train, bits=BITS, seed=SEED),
                "archive, 8 states": small,
                "rows of codebooks": pp.preset("pq", BITS, seed=SEED).fit(train),
            }
            (block,) = blocks_of(x[: args.block_rows], args.block_rows)
            for codec, q in quantizers.items():
                steps.append(steps_of_one_core(codec, q, block, folder, args.repeats))
                print(json.dumps(steps[-1], indent=1), flush=True)
            steps.append(parquet_step(block, folder, args.repeats))
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        calls = pipelines(small, x, args.block_rows, folder)
        calls["shards, Ray, 2 workers"]()  # starts the processes that tasks run in
        measured: dict[str, list[tuple[float, float]]] = {what: [] for what in calls}
        for _ in range(args.repeats):
            for what, call in calls.items():
                measured[what].append(call())
        ray.shutdown()
    lines = []
    for what, values in measured.items():
        wall, cpu = ([round(v) for v in way] for way in zip(*values, strict=True))
        line = {"what": what, "rows_per_second": int(statistics.median(wall))}
        line |= {"rows_per_cpu_second": int(statistics.median(cpu))}
        line |= {"range": [min(wall), max(wall)], "cpu_range": [min(cpu), max(cpu)]}
        print(
            f"{what:34}{line['rows_per_second']:8,} rows/s{line['rows_per_cpu_second']:8,} rows in "
            f"a CPU second ({min(cpu):,} to {max(cpu):,})"
        )
        lines.append(line)
    result = provenance() | {
        "question": (__doc__ or "").splitlines()[0],
        "when": now(),
        "steps_when": steps_when,
        "threads": 1,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(load, 1),
        "cpu": cpu_name(),
        "data": [{"name": "made", "shape": [len(x), D], "dtype": "float16", "bits": BITS,
                  "block_rows": args.block_rows}],
        "steps": steps,
        "rows": lines,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
