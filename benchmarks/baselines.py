"""How do the systems this project grew from compare, trained alike and measured in real bytes?

    python benchmarks/baselines.py train --data photographs/ --runs runs/      (resumable)
    python benchmarks/baselines.py evaluate --data photographs/ --runs runs/ --kodak kodak/

``train`` trains every model of the table below, or those of ``--only``; ``--scale`` multiplies all
steps. ``evaluate`` compresses every picture of ``--kodak`` by patches, decodes it, and writes the
table (PSNR, bits a pixel of the file, of the cross-entropy, and of the indices under zlib), plots,
and the ablation of FSQ (levels, annealing, adaptive levels, hierarchy) on held-out 32 x 32 crops.
The default codec's curve beside them is that of results/kodak.json.
Models are small and trained for minutes: the trend is the point, not the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from entropy_speed import cpu_name

import polarpack
from polarpack_image.baselines import FSQVAE, TrainConfig, Trainer, load
from polarpack_image.baselines.layers import to_unit
from polarpack_image.baselines.training import MODELS
from polarpack_image.data import load_pictures, picture_files, validation_crops

HERE = Path(__file__).parent / "results"
SEED = 0
WIDTHS = {"hidden_dims": [64, 128], "patch": 64}


@dataclass(frozen=True)
class Run:
    """One model of the table: what it is and how long it trains.

    steps, batch : of the transform; prior_steps : of the entropy model. shared : the run whose
    trained transform is taken over; then only the entropy model trains.
    """

    kind: str
    settings: dict[str, Any]
    steps: int = 0
    batch: int = 8
    prior_steps: int = 0
    shared: str | None = None


TRANSFORMER = {"variant": 3, "prior": "transformer"}
RUNS = {
    "vqvae2-1": Run("vqvae2", {"variant": 1}, 1000, prior_steps=200),
    "vqvae2-1-histogram": Run("vqvae2", {"variant": 1, "prior": "histogram"}, shared="vqvae2-1"),
    "vqvae2-3": Run("vqvae2", {"variant": 3}, prior_steps=300, shared="vqvae2-1"),
    "vqvae2-3-transformer": Run("vqvae2", TRANSFORMER, prior_steps=600, shared="vqvae2-1"),
    "vqvae2-3-transformer-adaptive": Run(
        "vqvae2", TRANSFORMER | {"adaptive": True}, 1000, prior_steps=600
    ),
    "vqvae2-2": Run("vqvae2", {"variant": 2}, 600, prior_steps=150),
    "hyperprior": Run("hyperprior", {"weight": 0.01}, 1500, prior_steps=200),
    "vqvae": Run("vqvae", WIDTHS, 1500),
    "rqvae": Run("rqvae", WIDTHS | {"num_embeddings": 256}, 1500),
    "original": Run("original", {"patch": 64}, 400, batch=4),
}
FSQ_STEPS, FSQ_BATCH = 800, 64
FSQ_RUNS: dict[str, dict[str, Any]] = {
    **{f"fsq-{n}": {"levels": n} for n in (3, 5, 8, 10)},
    **{f"fsq-{n}-annealed": {"levels": n, "bottleneck": "annealed"} for n in (3, 5, 8, 10)},
    "fsq-11-adaptive": {"levels": 11, "bottleneck": "adaptive"},
    "fsq-5-hierarchical": {"levels": 5, "bottleneck": "hierarchical"},
}


def train(args: argparse.Namespace) -> None:
    """Train what is missing."""
    pictures, _ = load_pictures(args.data, args.cache).split()
    jobs = {
        **RUNS,
        **{n: Run("fsqvae", c, FSQ_STEPS, FSQ_BATCH) for n, c in FSQ_RUNS.items()},
    }
    for name in args.only or jobs:
        job = jobs[name]
        folder = args.runs / name
        if (folder / "done").exists():
            continue
        torch.manual_seed(SEED)
        model = MODELS[job.kind].from_config(job.settings)
        if job.shared is not None:
            stored = load(args.runs / job.shared / "model.pt").state_dict()
            own = model.state_dict()
            alike = {k: v for k, v in stored.items() if k in own and own[k].shape == v.shape}
            taken = {k: v for k, v in alike.items() if "prior" not in k and "condition" not in k}
            model.load_state_dict(own | taken)
        config = TrainConfig(
            steps=int(job.steps * args.scale),
            batch=job.batch,
            prior_steps=int(job.prior_steps * args.scale),
            prior_batch=8,
            prior_patches=2048 if job.prior_steps > 200 else 512,
            seed=SEED,
            device=args.device,
        )
        start = time.process_time()
        resume = (folder / "state.pt").exists()
        Trainer(model, pictures, folder, config).run(resume=resume)
        (folder / "done").write_text(json.dumps({"cpu_seconds": time.process_time() - start}))
        print(f"{name}: {time.process_time() - start:.0f} CPU seconds", flush=True)


def kodak_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a model: means over the pictures. Rows are kept in the runs' folders, so that a
    measurement that was stopped goes on with the next model."""
    files = [data for _, data in picture_files([args.kodak])][: args.limit]
    rows = []
    for name, run in RUNS.items():
        if (args.only and name not in args.only) or not (args.runs / name / "done").exists():
            continue
        kept = args.runs / name / f"{args.kodak.name}-{len(files)}.json"
        if kept.exists():
            rows.append(json.loads(kept.read_text()))
            continue
        model = load(args.runs / name / "model.pt")
        start = time.process_time()
        measured = [model.measure(open_picture(data)) for data in files]
        seconds = (time.process_time() - start) / len(files)
        row: dict[str, Any] = {"model": name, "kind": run.kind, "settings": run.settings}
        row |= {"steps": run.steps, "prior_steps": run.prior_steps}
        row |= {key: round(float(np.mean([m[key] for m in measured])), 4) for key in measured[0]}
        row["over_entropy"] = round(row["payload_bpp"] / row["entropy_bpp"] - 1, 5)
        # the coder's least probability makes surprises cheaper than the model holds them to be
        if not -0.02 < row["over_entropy"] < 0.01:
            raise SystemExit(f"{name}: bytes are {row['over_entropy']:+.2%} off the cross-entropy")
        row["cpu_seconds_encode_and_decode"] = round(seconds, 2)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["pictures"] = len(files)
        kept.write_text(json.dumps(row))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def default_codec() -> list[dict[str, Any]]:
    """The default codec of ``polarpack_image`` on the same pictures: its files, as measured by
    benchmarks/kodak.py."""
    measured = json.loads((HERE / "kodak.json").read_text())["rows"]
    return [
        {"quality": r["setting"], "bpp": round(r["bpp"], 4), "psnr": round(r["psnr"], 4)}
        for r in measured
        if r["codec"] == "polarpack" and r["setting"] <= 80
    ]


def open_picture(data: bytes) -> Any:
    """PIL image of bytes."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data))


def fsq_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Error, fixed rate and entropy of every FSQ-VAE on the same held-out crops."""
    _, held = load_pictures(args.data, args.cache).split()
    crops = torch.from_numpy(validation_crops(held, 1024, 32, SEED)).permute(0, 3, 1, 2)
    x = to_unit(crops.float())
    rows = []
    for name, settings in FSQ_RUNS.items():
        if not (args.runs / name / "done").exists():
            continue
        model = load(args.runs / name / "model.pt")
        assert isinstance(model, FSQVAE)
        with torch.inference_mode():
            symbols = model.symbols(x)
            target = x + 0.5
            restored = model.image(symbols) + 0.5
            nats = torch.nn.functional.binary_cross_entropy(
                restored.clamp(1e-6, 1 - 1e-6), target, reduction="sum"
            ) / len(x)
            floor = torch.nn.functional.binary_cross_entropy(
                target.clamp(1e-6, 1 - 1e-6), target, reduction="sum"
            ) / len(x)
        mse = float((restored - target).square().mean())
        bits = model.prior.bits(symbols[0]) / len(x)
        rows.append(
            {
                "model": name,
                **settings,
                "psnr": round(-10 * math.log10(mse), 3),
                "bce": round(float(nats), 2),
                "bce_over_its_least": round(float(nats - floor), 2),
                "fixed_bits": round(sum(math.log2(n) for n in model.quantizer.alphabet_sizes), 1),
                "entropy_bits": round(bits, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777"]


def draw(
    table: list[dict[str, Any]], ablation: list[dict[str, Any]], default: list[dict[str, Any]]
) -> None:
    """The tables as pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(table):
        colour, marker = COLOURS[i % 7], "os"[i // 7]
        axis.plot([row["bpp"], row["zlib_bpp"]], [row["psnr"]] * 2, color=colour, linewidth=0.7)
        axis.plot(row["bpp"], row["psnr"], marker, color=colour, label=row["model"])
        axis.plot(row["zlib_bpp"], row["psnr"], "|", color=colour)
    rates, quality = [r["bpp"] for r in default], [r["psnr"] for r in default]
    axis.plot(rates, quality, ":", color="black", label="polarpack_image, default codec")
    axis.set_xlabel("bits a pixel: file (marker) to zlib of the indices (tick)")
    axis.set_ylabel("PSNR, dB")
    axis.set_title("Kodak, by patches")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(HERE / "baselines_kodak.png", dpi=110)

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_levels, by_bits = figure.subplots(1, 2)
    for n, (kind, marker) in enumerate({"fsq": "o", "annealed": "s"}.items()):
        found = [r for r in ablation if r.get("bottleneck", "fsq") == kind]
        levels = [r["levels"] for r in found]
        label = "FSQ" if kind == "fsq" else "annealed"
        losses = [r["bce_over_its_least"] for r in found]
        by_levels.plot(levels, losses, marker + "-", color=COLOURS[n], label=label)
    by_levels.set_xlabel("levels")
    by_levels.set_ylabel("loss above its least, nats")
    by_levels.set_xticks([3, 5, 8, 10])
    by_levels.legend(fontsize=8)
    for n, kind in enumerate(("fsq", "annealed", "adaptive", "hierarchical")):
        found = [r for r in ablation if r.get("bottleneck", "fsq") == kind]
        bits, quality = [r["entropy_bits"] for r in found], [r["psnr"] for r in found]
        by_bits.plot(bits, quality, "osD^"[n], color=COLOURS[n], label=kind)
        for r in found:
            place = {"xytext": (3, -11), "textcoords": "offset points", "fontsize": 8}
            by_bits.annotate(str(r["levels"]), (r["entropy_bits"], r["psnr"]), **place)
    by_bits.legend(fontsize=8, loc="lower right")
    by_bits.set_xlabel("bits of a 32 x 32 picture (entropy)")
    by_bits.set_ylabel("PSNR, dB")
    figure.suptitle("FSQ-VAE on held-out crops of photographs")
    figure.savefig(HERE / "baselines_fsq.png", dpi=110)


def evaluate(args: argparse.Namespace) -> None:
    """Measure everything that is trained; write JSON and plot."""
    torch.set_num_threads(1)
    table = kodak_table(args)
    if args.only:
        return
    ablation = fsq_table(args)
    default = default_codec()
    draw(table, ablation, default)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "threads": 1,
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "polarpack": polarpack.__version__,
            "torch": version("torch"),
        },
        "data": {"pictures": args.kodak.name, "patches": "of 32, 64 or 128 pixels a side"},
        "rows": table,
        "default_codec": default,
        "fsq": ablation,
    }
    (HERE / "baselines.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for command, function in (("train", train), ("evaluate", evaluate)):
        sub = commands.add_parser(command)
        sub.add_argument("--data", type=Path, action="append", required=True)
        sub.add_argument("--cache", type=Path)
        sub.add_argument("--runs", type=Path, required=True)
        sub.set_defaults(function=function)
        sub.add_argument("--only", nargs="*", help="these models (evaluate: without the table)")
        if command == "train":
            sub.add_argument("--scale", type=float, default=1.0)
            sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        else:
            sub.add_argument("--kodak", type=Path, required=True)
            sub.add_argument("--limit", type=int)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
