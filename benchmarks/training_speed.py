"""How many crops a second does the image codec's trainer take, and how much is there to train?

python benchmarks/training_speed.py --data photographs.tar    writes results/training_speed.json
python benchmarks/training_speed.py --write                   puts its table into docs/training.md

Each preset takes a few steps with the size of crops and batches it trains with (on a CPU: batches
of 4), after two steps that do not count (three where it is compiled). Weights are of the exported
arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from polarpack_image.data import CropSampler, Pictures, load_pictures, validation_crops
from polarpack_image.training import Run
from polarpack_image.training_presets import SETTINGS, make_task

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "training_speed.json"
PAGE = ROOT / "docs" / "training.md"
MARKERS = re.compile(
    r"(<!-- table training: benchmarks/training_speed\.py -->\n).*?(<!-- end -->)", re.DOTALL
)
PRESETS = ("lapped", "context", "post", "small", "full")


def measure(
    preset: str, pictures: Pictures, device: str, steps: int, start: Path
) -> dict[str, Any]:
    """Crops a second of one preset."""
    settings = replace(SETTINGS[preset], device=device)
    if device == "cpu":
        settings = replace(settings, compiled=False, bfloat16=False, batch=4)
    task = make_task(preset, pictures, start, settings)
    run = Run(task, settings)
    sampler = CropSampler(pictures, settings.crop, device, settings.min_scale)
    for _ in range(3 if settings.compiled else 2):
        loss = run.advance(sampler)
    float(loss)  # waits for the device
    began, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss = run.advance(sampler)
    float(loss)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {
        "preset": preset,
        "crop": settings.crop,
        "batch": settings.batch,
        "parameters": sum(p.numel() for group, _ in task.parameter_groups() for p in group),
        "weights_bytes": sum(a.nbytes for a in task.export().values()),
        "crops_per_second": steps * settings.batch / seconds,
        "cpu_seconds_per_crop": cpu / (steps * settings.batch),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    head = ["preset", "crops", "parameters that learn", "exported", "crops a second"]
    head += ["CPU seconds a crop"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head))]
    for row in results["rows"]:
        cells = [
            f"`{row['preset']}`",
            f"{row['crop']} x {row['crop']}, {row['batch']} a step",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['weights_bytes'] / 1e6:.1f} MB",
            f"{row['crops_per_second']:.1f}",
            f"{row['cpu_seconds_per_crop']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where = f"{results['device']}, {results['threads']} thread(s), torch {results['torch']}"
    return f"Measured on {where}, beside other work.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="*", default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.data:
        pictures = load_pictures(options.data).split()[0]
        cpu = options.device == "cpu"
        device = platform.machine() + " CPU" if cpu else torch.cuda.get_device_name()
        results: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rows": [],
        }
        start = RESULTS.with_name("training_start.npz")
        try:
            _save_start(pictures, start)
            for preset in PRESETS:
                row = measure(preset, pictures, options.device, options.steps, start)
                results["rows"].append(row)
                print(row)
        finally:
            start.unlink(missing_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if options.write:
        results = json.loads(RESULTS.read_text("utf-8"))
        text = PAGE.read_text("utf-8")
        PAGE.write_text(MARKERS.sub(lambda m: m[1] + table(results) + "\n" + m[2], text), "utf-8")


def _save_start(pictures: Pictures, path: Path) -> None:
    """A Karhunen-Loeve transform as a lapped run would leave it: all presets start from it."""
    import numpy as np

    from polarpack_image.lapped import karhunen_loeve

    kernels = karhunen_loeve(validation_crops(pictures, 100, 128, 1).astype(np.float32))
    np.savez(
        path,
        **{
            "transform.analysis": kernels.analysis,
            "transform.synthesis": kernels.synthesis,
            "transform.parity": kernels.parity,
        },
    )


if __name__ == "__main__":
    main()
