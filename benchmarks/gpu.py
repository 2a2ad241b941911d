"""How fast are k-means, encoding and decoding through torch, beside faiss and the numpy core?

On a GPU if there is one, whose name the result carries; else on torch's CPU device, which says only
that the code runs (the result is then named ``gpu_cpu.json``). k-means: many heads at once, as
product quantizers need them, beside faiss's k-means head by head (its GPU index where faiss has
one), both from the same rows to about the same error, which is printed. Coding: rows of 384
numbers, codes compared and decoded rows equal to the bit before anything is timed. The median of a
few calls, after one that warms up; the device is waited for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vectors_rd import cpu_name, provenance

RESULTS = Path(__file__).parent / "results"
SEED, D = 0, 384
SHAPES = ((1, 65_536, 384, 1024), (48, 65_536, 8, 256))  # heads, rows, numbers of a head, centroids


def timed(call: Callable[[], Any], repeats: int, wait: Callable[[], None]) -> float:
    """Median seconds of a call after one to warm up."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        call()
        wait()
        times += [time.perf_counter() - start] if i else []
    return statistics.median(times)


def error_of(x: Any, centroids: Any) -> float:
    """Mean squared distance of rows (n, d) to the nearest of the centroids."""
    from polarpack.clustering import nearest

    return float(nearest(x, centroids)[1].mean())


def clusterings(device: str, n_iter: int, repeats: int, wait: Callable[[], None]) -> list[Any]:
    """Seconds and errors of batched torch k-means and of faiss's."""
    import faiss
    import torch

    from polarpack import _cuda

    on_gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    lines = []
    for heads, n, d, k in SHAPES:
        rng = np.random.default_rng(SEED)
        spread = np.exp(0.5 * rng.standard_normal((heads, 1, d))).astype(np.float32)
        x = rng.standard_normal((heads, n, d), dtype=np.float32) * spread
        rows = torch.from_numpy(x).to(device)

        def ours(rows: Any = rows, k: int = k) -> Any:
            rng = np.random.default_rng(SEED)
            return _cuda.grow(rows, k, spherical=False, n_iter=n_iter, rng=rng)

        def theirs(x: Any = x, k: int = k, d: int = d) -> Any:
            found = []
            for head in x:
                job = faiss.Kmeans(d, k, niter=n_iter, gpu=on_gpu, seed=SEED)
                job.cp.max_points_per_centroid = len(head)
                job.train(head)
                found.append(job.centroids)
            return np.stack(found)

        for name, call in {"torch, all heads at once": ours, "faiss, head by head": theirs}.items():
            found = np.asarray(call().cpu()) if name.startswith("torch") else call()
            line = {"what": f"k-means, {name}", "heads": heads, "rows": n, "d": d, "k": k}
            line["device"] = device if name.startswith("torch") else ("cpu", "cuda")[on_gpu]
            line["error"] = round(error_of(x[0], found[0]), 5)
            line["seconds"] = round(timed(call, repeats, wait), 4)
            lines.append(line)
            print(json.dumps(line), flush=True)
    return lines


def codings(device: str, n: int, repeats: int, wait: Callable[[], None]) -> list[dict[str, Any]]:
    """Rows a second of coding on the device, and in the numpy core."""
    import torch

    import polarpack as pp
    from polarpack._cuda import OnDevice

    rng = np.random.default_rng(SEED)
    spread = (np.arange(1, D + 1) ** -0.6).astype(np.float32)
    train, x = (rng.standard_normal((m, D), dtype=np.float32) * spread for m in (8192, n))
    rows, lines = torch.from_numpy(x).to(device), []
    for name, bits in (("pq", 2.0), ("prq", 2.0), ("trellis", 2.0)):
        q = pp.preset(name, bits).fit(train)
        codes = q.encode(x)
        there, on = torch.from_numpy(codes.astype(np.int32)).to(device), OnDevice(q, device)
        if not np.array_equal(on.decode(there).cpu().numpy(), q.decode(codes)):
            raise SystemExit(f"{name}: decodes to other bits on {device}")
        calls = {
            "decode, torch": lambda on=on, there=there: on.decode(there),
            "decode, core": lambda q=q, codes=codes: q.decode(codes),
        }
        if q.fine == "codebook":
            same = (on.encode(rows).cpu().numpy() == codes).all(axis=1).mean()
            if same < 0.99:
                raise SystemExit(f"{name}: {same:.2%} of the rows have the core's codes")
            calls["encode, torch"] = lambda on=on: on.encode(rows)
            calls["encode, core"] = lambda q=q: q.encode(x)
        for what, call in calls.items():
            seconds = timed(call, repeats, wait)
            line = {"what": f"{name} {what}", "rows": n, "rows_per_second": round(n / seconds)}
            line["device"] = device if what.endswith("torch") else "cpu"
            lines.append(line)
            print(json.dumps(line), flush=True)
    return lines


def main() -> None:
    """Check, measure, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=65_536, help="to code")
    parser.add_argument("--iterations", type=int, default=10, help="of k-means")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    lines = clusterings(device, args.iterations, args.repeats, wait)
    lines += codings(device, args.rows, args.repeats, wait)
    result = provenance() | {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else f"none; {cpu_name()}",
        "torch": torch.__version__,
        "data": [{"name": "made", "shape": [args.rows, D], "dtype": "float32"}],
        "rows": lines,
    }
    out = args.out or RESULTS / ("gpu.json" if on_gpu else "gpu_cpu.json")
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
