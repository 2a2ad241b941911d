"""What ``polarpack-image train`` runs: sizes, schedules and starting points by name.

=========  ====================================================================================
lapped     the linear transform of the shipped codec
post       its post-filter, behind a finished transform (``start``)
context    its entropy network, likewise
small      a learned codec for CPUs: small analysis, linear synthesis, hyperprior
full       the whole design, for a GPU
tiny       the same classes at a size for tests
original   the first prototype, by the trainer of ``baselines``
=========  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polarpack.errors import InputError

from .baselines.original import OriginalCodec
from .baselines.training import TrainConfig, Trainer
from .data import Pictures, load_pictures, validation_crops
from .fitting import brightness_first
from .lapped import LappedKernels, karhunen_loeve
from .networks import PRESETS, Codec
from .training import Settings, Task, train
from .training_codec import CodecTask
from .training_lapped import ContextTask, LappedTask, PostFilterTask

CONTEXT_STARTS = (1, 2, 4, 8, 25)  # head 0, the mean colours, is left to the coder's own contexts

SETTINGS = {
    "lapped": Settings(steps=5000, peak=2e-3),
    "post": Settings(steps=20000, peak=5e-4),
    "context": Settings(steps=10000, peak=6e-4),
    "small": Settings(steps=10000, peak=5e-4, warm_up=200),
    "full": Settings(
        steps=40000,
        batch=64,
        crop=256,
        peak=4e-4,
        warm_up=500,
        device="cuda",
        compiled=True,
        bfloat16=True,
        validation_crops=32,
        validation_seconds=180.0,
    ),
    "tiny": Settings(steps=20, batch=2, crop=64, warm_up=5, validation_crops=2),
}
N_START = 400  # crops from which Karhunen-Loeve transforms are taken


def kernels_from(path: Path) -> LappedKernels:
    """Transform kernels of a finished run: its ``arrays.npz``."""
    with np.load(path) as arrays:
        missing = [name for name in ("analysis", "synthesis", "parity")
                   if f"transform.{name}" not in arrays]  # fmt: skip
        if missing:
            raise InputError(f"{path} has no arrays {', '.join(missing)} of a transform")
        return LappedKernels(
            arrays["transform.analysis"].astype(np.float32),
            arrays["transform.synthesis"].astype(np.float32),
            arrays["transform.parity"].astype(np.int8),
        )


def make_task(preset: str, pictures: Pictures, start: Path | None, settings: Settings) -> Task:
    """The task of a preset, from its linear starting point: ``start`` or a Karhunen-Loeve
    transform of training crops. Weights that start at random follow ``settings.seed``."""
    if preset not in SETTINGS:
        raise InputError(f"no preset {preset!r}; there are {', '.join(SETTINGS)}")
    if preset in ("post", "context") and start is None:
        raise InputError(f"preset {preset} needs start=, the arrays.npz of a lapped run")
    torch.manual_seed(settings.seed)
    size = min(128, settings.crop)
    crops = validation_crops(pictures.split()[0], N_START, size, 1).astype(np.float32)
    kernels = karhunen_loeve(crops) if start is None else kernels_from(start)
    if preset == "lapped":
        return LappedTask(kernels)
    if preset == "post":
        return PostFilterTask(kernels)
    if preset == "context":
        parts = (kernels.analysis, kernels.synthesis, kernels.parity)
        return ContextTask(LappedKernels(*brightness_first(*parts)), CONTEXT_STARTS)
    codec = Codec(PRESETS[preset], kernels)
    codec.fit_merge(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous())
    return CodecTask(codec)


def _train_original(
    pictures: Pictures,
    folder: Path,
    seconds: float,
    steps: int | None,
    batch: int | None,
    device: str | None,
) -> bool:
    """Its own curriculum over ``steps``; leaves ``model.pt``, for ``compress --weights``."""
    asked: dict[str, Any] = {"steps": steps, "batch": batch, "device": device}
    config = TrainConfig(
        minutes=None if math.isinf(seconds) else seconds / 60,
        **{name: value for name, value in asked.items() if value is not None},
    )
    trainer = Trainer(OriginalCodec(), pictures.split()[0], folder, config)
    return trainer.run(resume=(folder / "state.pt").exists())


def run_preset(
    preset: str,
    data: Sequence[Path],
    folder: Path,
    *,
    seconds: float = math.inf,
    start: Path | None = None,
    cache: Path | None = None,
    steps: int | None = None,
    batch: int | None = None,
    device: str | None = None,
) -> bool:
    """Train a preset on picture files (tar files, folders, or one folder of ``Pictures.save``) for
    at most so many seconds; call again with the same arguments to go on. Returns whether the
    schedule is finished. ``steps``, ``batch`` and ``device`` override the preset's: on "cpu" there
    is neither bfloat16 nor compilation."""
    if preset == "original":
        if start is not None:
            raise InputError("preset original starts from nothing; drop start=")
        return _train_original(load_pictures(data, cache), folder, seconds, steps, batch, device)
    if preset not in SETTINGS:
        raise InputError(f"no preset {preset!r}; there are {', '.join(SETTINGS)}, original")
    settings = replace(SETTINGS[preset], seconds=seconds)
    settings = replace(
        settings,
        steps=settings.steps if steps is None else steps,
        batch=settings.batch if batch is None else batch,
        device=settings.device if device is None else device,
    )
    if settings.device == "cpu":
        settings = replace(settings, compiled=False, bfloat16=False)
    elif not torch.cuda.is_available():
        raise InputError(f"device {settings.device} is not available; pass device='cpu'")
    pictures = load_pictures(data, cache)
    return train(make_task(preset, pictures, start, settings), pictures, folder, settings)
