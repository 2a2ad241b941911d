"""What memory and time does a table larger than memory take, and does a kill change a byte of it?

Rows are made as they are read (``--gigabytes`` of float32, 10 MB at a time), so that only the file
that is written lies on the disk. Each step runs in a process of its own and reports its peak of
resident memory, interpreter and libraries included:

fit        ``pp.fit`` from the stream: one pass, a sample of 65536 rows or 256 MiB
memory     ``pp.compress(quantizer=)`` of 200 MB in memory: the rate to compare with, of the fastest
           of three
stream     ``pp.create(...).extend``: the whole table, without interruption
killed     the same, stopped by SIGKILL at random moments of the whole (``--kills``) and resumed
           each time; ``resumed_at_rows`` is where, by what the file held
sample     whether a larger sample would have made a better quantizer: SNR of rows that none saw, of
           three seeds, here and on rows of ``--data`` (.npy of (n, d), n well above 131072)

Rates are megabytes of float32 a CPU second of one thread, without the time to make rows. The file
of the killed run must have the bytes of the other one, and decode to rows as close.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vectors_rd import cpu_name, provenance

RESULTS = Path(__file__).parent / "results" / "streaming.json"
BATCH_BYTES = 10_000_000
MEMORY_BYTES = 200_000_000
SAMPLES = (1 << 14, 1 << 16, 1 << 17)
SAMPLE_D = 96
SAMPLE_SEEDS = 3
JUDGED = 1 << 14


class Made:
    """A table of n rows of d numbers that are made when they are read: rows of a pool of groups
    with falling spectra, in random order, each with a gain and a sign of its own."""

    def __init__(self, n: int, d: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.d, self.step = n, d, max(1, BATCH_BYTES // (4 * d))
        spread = np.arange(1, d + 1) ** -0.6
        pool = []
        for _ in range(8):
            axes = np.linalg.qr(rng.standard_normal((d, d)))[0]
            rows = rng.standard_normal((self.step, d)) * spread * np.exp(rng.standard_normal(d))
            pool.append((rows @ axes.T + rng.standard_normal(d) * 0.3).astype(np.float32))
        self.pool = np.concatenate(pool)
        self.seconds = 0.0  # CPU time that making rows took

    def batch(self, i: int) -> Any:
        """Rows i * step and following."""
        started = time.process_time()
        rng = np.random.default_rng([1, i])
        n = min(self.step, self.n - i * self.step)
        gain = np.exp(0.1 * rng.standard_normal(n)) * rng.choice([-1.0, 1.0], n)
        rows = self.pool[rng.integers(0, len(self.pool), n)] * gain[:, None].astype(np.float32)
        rows += 0.02 * rng.standard_normal((n, self.d), dtype=np.float32)
        self.seconds += time.process_time() - started
        return rows

    def read(self, start: int) -> Iterator[Any]:
        """Batches from a row on."""
        for i in range(start // self.step, -(-self.n // self.step)):
            rows = self.batch(i)
            yield rows[max(0, start - i * self.step) :]


def peak_megabytes() -> float | None:
    """Most resident memory of this process so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def step(what: str, folder: Path, n: int, d: int, bits: float, data: list[Path]) -> dict[str, Any]:
    """One measurement, in this process."""
    import polarpack as pp
    from polarpack.batches import Rows
    from polarpack.metrics import snr_db

    if what == "sample":
        return samples(bits, data)
    table = Made(n, d)
    rows = Rows("x", table.read, n)
    if what == "fit":
        before, started = table.seconds, time.process_time()
        q = pp.fit(rows, bits=bits)
        seconds = time.process_time() - started - (table.seconds - before)
        (folder / "quantizer").write_bytes(q.to_bytes())
        return {"cpu_seconds": round(seconds, 1), "peak_megabytes": peak_megabytes()}
    q = pp.PolarQuantizer.from_bytes((folder / "quantizer").read_bytes())
    few = table.batch(0)
    pp.compress(few[:2000], quantizer=q)  # kernels are loaded
    if what == "memory":
        wanted = max(1, MEMORY_BYTES // (4 * d * table.step))
        x = np.concatenate([table.batch(i) for i in range(min(wanted, -(-n // table.step)))])
        times = []
        for _ in range(3):
            started = time.process_time()
            blob = pp.compress(x, quantizer=q)
            times.append(time.process_time() - started)
        seconds = min(times)
        facts = {"rows": len(x), "snr_db": round(snr_db(x, pp.decompress(blob)), 3)}
        return facts | {"megabytes_per_second": round(x.nbytes / 1e6 / seconds, 1)}
    before, started = table.seconds, time.process_time()
    with pp.create(folder / f"{what}.polar", quantizer=q, resume=what == "killed") as f:
        already = f.n_rows("x")
        print(already, flush=True)  # for whoever kills this
        f.extend("x", rows)
    seconds = time.process_time() - started - (table.seconds - before)
    megabytes = (n - already) * d * 4 / 1e6
    return {
        "rows": n - already,
        "megabytes_per_second": round(megabytes / seconds, 1),
        "peak_megabytes": peak_megabytes(),
    }


def samples(bits: float, data: list[Path]) -> dict[str, Any]:
    """SNR of held-out rows by the number of rows that a quantizer was fitted on, mean, least and
    most of the seeds; what the rate is off by counts 6.02 dB a bit."""
    import polarpack as pp
    from polarpack import planner
    from polarpack.metrics import snr_db

    planner.FIT_ROWS = most = max(SAMPLES)
    tables = {"made": np.concatenate(list(Made(most + JUDGED, SAMPLE_D).read(0)))}
    for path in data:
        rows = np.load(path, mmap_mode="r")
        few = np.random.default_rng(0).permutation(len(rows))[: most + JUDGED]
        tables[path.stem] = np.asarray(rows[few], np.float32)
    found = []
    for name, x in tables.items():
        judge = x[most:]
        for n in SAMPLES:
            line: dict[str, Any] = {"table": name, "d": x.shape[1], "rows": n}
            for layout in ("archive", "rows"):
                reached = []
                for seed in range(SAMPLE_SEEDS):
                    q = pp.fit(x[:n], bits=bits, layout=layout, seed=seed)
                    codes = q.encode(judge)
                    over = float(q.rate_bits(codes)) / judge.size - bits
                    reached.append(snr_db(judge, q.decode(codes)) - 6.02 * over)
                line[f"{layout}_snr_db"] = round(float(np.mean(reached)), 3)
                line[f"{layout}_seeds"] = [round(min(reached), 3), round(max(reached), 3)]
            print(json.dumps(line), file=sys.stderr, flush=True)
            found.append(line)
    return {"seeds": SAMPLE_SEEDS, "fits": found}


def command(what: str, args: argparse.Namespace, folder: Path) -> list[str]:
    given = [args.rows, args.d, args.bits, *args.data]
    return [sys.executable, __file__, "--step", what, str(folder), *map(str, given)]


def child(what: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A measurement in a process of its own."""
    started = time.monotonic()
    run = command(what, args, folder)
    done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{what:8}{json.dumps(facts)}", flush=True)
    return facts | {"wall_seconds": round(time.monotonic() - started, 1)}


def killed(args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """The stream, stopped at moments drawn from all the time it takes, then finished."""
    rng = random.Random(args.seed)
    moments = sorted(rng.uniform(0, seconds) for _ in range(args.kills))
    held = []  # rows in the file, as each run found it
    for before, moment in zip([0.0, *moments], moments, strict=False):
        running = subprocess.Popen(
            command("killed", args, folder), stdout=subprocess.PIPE, text=True
        )
        try:
            running.wait(moment - before)
            raise SystemExit("finished before the last kill: fewer kills, or a larger table")
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
        said = running.communicate()[0].split()
        held += [int(rows) for rows in said]  # nothing, if it died before it looked
        print(f"killed after {moment:.1f} s of {seconds:.1f}", flush=True)
    last = child("killed", args, folder)
    held.append(args.rows - last["rows"])
    if not held[-1]:
        raise SystemExit("no run found anything to go on from: a larger table")
    facts = {"killed_after_seconds": [round(v, 1) for v in moments], "resumed_at_rows": held}
    return last | facts


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    if sys.argv[1:2] == ["--step"]:
        what, folder, n, d, bits, *data = sys.argv[2:]
        facts = step(what, Path(folder), int(n), int(d), float(bits), [*map(Path, data)])
        print(json.dumps(facts))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of float32 rows")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--data", type=Path, action="append", default=[], help="for sample")
    parser.add_argument("--no-sample", action="store_true", help="leave that step out")
    parser.add_argument("--folder", type=Path, help="where files go for the time being")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.rows = int(args.gigabytes * 1e9 / (4 * args.d))
    os.environ |= {"POLARPACK_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    folder = Path(tempfile.mkdtemp(prefix="polarpack-streaming-", dir=args.folder))
    free = shutil.disk_usage(folder).free
    if free < args.gigabytes * 1e9 * (args.bits + 1) / 32 * 2:
        raise SystemExit(f"{folder}: {free / 1e9:.0f} GB are free, two files do not fit")
    try:
        found = {what: child(what, args, folder) for what in ("fit", "memory", "stream")}
        found["killed"] = killed(args, folder, found["stream"]["wall_seconds"])
        same = digest(folder / "stream.polar") == digest(folder / "killed.polar")
        size = (folder / "stream.polar").stat().st_size
        if not args.no_sample:
            found["sample"] = child("sample", args, folder)
    finally:
        shutil.rmtree(folder)
    if not same:
        raise SystemExit("the killed run's file differs from the uninterrupted one's")
    rate = found["stream"]["megabytes_per_second"] / found["memory"]["megabytes_per_second"]
    print(f"stream / memory: {rate:.2f} (aim: 0.8 or more); killed runs' bytes are the same")
    made = provenance() | {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load": os.getloadavg()[0],
        "shape": [args.rows, args.d],
        "gigabytes": round(args.rows * args.d * 4 / 1e9, 2),
        "bits": args.bits,
        "file_bytes": size,
        "file_bits_per_float": round(8 * size / (args.rows * args.d), 4),
        "killed_file_is_the_same": same,
        "stream_rate_of_memory_rate": round(rate, 3),
        "steps": found,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
