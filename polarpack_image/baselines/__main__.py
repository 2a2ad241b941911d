"""Command line of the baselines: ``python -m polarpack_image.baselines --help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polarpack.errors import InputError, PolarPackError

from ..data import load_pictures, picture_files
from .training import MODELS, TrainConfig, Trainer, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 3 for a
    training run that ran out of its minutes and can be resumed."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.command(args))
    except (PolarPackError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m polarpack_image.baselines", description=__doc__
    )
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train a model on a folder of pictures")
    train.add_argument("kind", choices=sorted(MODELS))
    train.add_argument("--data", type=Path, action="append", required=True, help="folder or tar")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--cache", type=Path, help="keep decoded pictures here")
    train.add_argument("--resume", action="store_true")
    train.add_argument("--config", type=json.loads, default={}, help="JSON of the constructor")
    defaults = TrainConfig()
    for name in ("steps", "batch", "prior_steps", "prior_batch", "prior_patches", "seed"):
        flag = "--" + name.replace("_", "-")
        train.add_argument(flag, type=int, default=getattr(defaults, name))
    train.add_argument("--rate", type=float, default=defaults.rate)
    train.add_argument("--prior-rate", type=float, default=defaults.prior_rate)
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default=defaults.device)
    train.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 where it is safe; by default on a GPU only",
    )
    train.add_argument("--minutes", type=float, help="stop, resumable, after so long")
    train.set_defaults(command=_train)
    for name, help_text in (
        ("compress", "picture -> bytes"),
        ("decompress", "bytes -> picture"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("input", type=Path)
        command.add_argument("output", type=Path)
        command.set_defaults(command=_compress if name == "compress" else _decompress)
    measure = commands.add_parser("measure", help="rates and PSNR over a folder of pictures")
    measure.add_argument("--model", type=Path, required=True)
    measure.add_argument("pictures", type=Path)
    measure.add_argument("--limit", type=int)
    measure.add_argument("--json", action="store_true")
    measure.set_defaults(command=_measure)
    return parser


def _train(args: argparse.Namespace) -> int:
    pictures, _ = load_pictures(args.data, args.cache).split()
    if not len(pictures):
        raise InputError("no pictures are left after holding out one in twenty; add more")
    try:
        model = MODELS[args.kind].from_config(args.config)
    except TypeError as error:
        raise InputError(f"--config: {error}") from error
    names = TrainConfig.__dataclass_fields__.keys() & vars(args).keys()
    config = TrainConfig(**{name: getattr(args, name) for name in names})
    done = Trainer(model, pictures, args.out, config, _progress).run(resume=args.resume)
    print(f"\n{args.out}: {'done' if done else 'stopped; go on with --resume'}", file=sys.stderr)
    return 0 if done else 3


def _progress(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"\r{stage} {step}/{steps}  {shown}\033[K", end="", file=sys.stderr, flush=True)


def _compress(args: argparse.Namespace) -> int:
    args.output.write_bytes(load(args.model).compress(args.input))
    return 0


def _decompress(args: argparse.Namespace) -> int:
    from PIL import Image

    Image.fromarray(load(args.model).decompress(args.input.read_bytes())).save(args.output)
    return 0


def _measure(args: argparse.Namespace) -> int:
    import io

    from PIL import Image

    model = load(args.model)
    rows: list[dict[str, Any]] = []
    for name, data in picture_files([args.pictures]):
        if args.limit is not None and len(rows) >= args.limit:
            break
        with Image.open(io.BytesIO(data)) as picture:
            rows.append({"name": name, **model.measure(picture)})
    if not rows:
        raise InputError(f"no pictures in {args.pictures}")
    keys = [key for key in rows[0] if key != "name"]
    rows.append({"name": "mean", **{k: float(np.mean([row[k] for row in rows])) for k in keys}})
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'':24s}" + "".join(f"{key:>14s}" for key in keys))
    for row in rows:
        print(f"{row['name'][:23]:24s}" + "".join(f"{row[key]:14.4f}" for key in keys))
    return 0


if __name__ == "__main__":
    sys.exit(main())
