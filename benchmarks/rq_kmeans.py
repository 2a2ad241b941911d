"""How much faster is RQKMeans than a loop of scikit-learn's KMeans, at which error?

Both fit the same stages on the same rows with one start each, scikit-learn with its defaults
(k-means++, tol 1e-4, at most 300 iterations). CPU time; the error is the mean square of what the
last stage leaves of the training rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARPACK_THREADS", os.environ["OMP_NUM_THREADS"])

import numpy as np
from entropy_speed import cpu_name
from sklearn.cluster import KMeans

import polarpack
from polarpack.integrations.sklearn import RQKMeans

RESULTS = Path(__file__).parent / "results" / "rq_kmeans.json"
SEED = 0
N = 200_000


def loop(x: Any, k: int, stages: int, seed: int) -> float:
    """Residual k-means by scikit-learn; returns its error."""
    residual = x.copy()
    for _ in range(stages):
        model = KMeans(k, n_init=1, random_state=seed).fit(residual)
        residual -= model.cluster_centers_[model.labels_]
    return float(np.mean(residual.astype(np.float64) ** 2))


def tables(data: list[Path]) -> dict[str, Any]:
    """Rows to cluster, by name."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((500, 32)) * 2
    mixture = centres[rng.integers(500, size=N)] + rng.standard_normal((N, 32))
    found = {
        "mixture of 500 Gaussians": mixture.astype(np.float32),
        "independent Gaussian": rng.standard_normal((N, 16)).astype(np.float32),
    }
    return found | {path.stem: np.load(path).astype(np.float32) for path in data}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", default=[], help=".npy of (n, d)")
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found = tables(args.data)
    RQKMeans(n_clusters=8, n_stages=1).fit(found["independent Gaussian"][:5000])  # compiles
    rows = []
    for name, x in found.items():
        seconds: list[list[float]] = [[], []]
        errors: list[list[float]] = [[], []]
        for seed in range(args.repeats):
            start = time.process_time()
            model = RQKMeans(args.clusters, args.stages, random_state=seed).fit(x)
            middle = time.process_time()
            errors[1].append(loop(x, args.clusters, args.stages, seed))
            end = time.process_time()
            errors[0].append(float(model.stage_errors_[-1]))
            seconds[0].append(middle - start)
            seconds[1].append(end - middle)
        ratios = [b / a for a, b in zip(*seconds, strict=True)]
        rows.append(
            {
                "data": name,
                "shape": list(x.shape),
                "seconds": round(statistics.median(seconds[0]), 2),
                "seconds_scikit_learn": round(statistics.median(seconds[1]), 2),
                "times_faster": round(statistics.median(ratios), 1),
                "times_faster_range": [round(min(ratios), 1), round(max(ratios), 1)],
                "error": float(f"{statistics.mean(errors[0]):.5g}"),
                "error_scikit_learn": float(f"{statistics.mean(errors[1]):.5g}"),
            }
        )
        print(rows[-1])
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "clock": "CPU time of the process",
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "clusters": args.clusters,
        "stages": args.stages,
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "polarpack": polarpack.__version__,
            **{name: version(name) for name in ("numpy", "faiss-cpu", "scikit-learn")},
        },
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
