"""Trains networks on photographs: one loop for all of them, made for short, interruptible runs.

``train`` drives a ``Task`` (what learns, its loss, how it is judged) and cares for the rest:

- **Resume exactly.** Everything random is a function of the step's number, and a checkpoint holds
  weights, averaged weights and optimizer moments, so a run cut at any checkpoint goes on bit for
  bit as if it had not been (on the same machine and library; on a GPU up to cuDNN, some of whose
  gradients are not reproducible to the last bit).
- **End in time.** ``seconds`` is a wall-clock limit, checkpoints included; the learning rate
  follows the step's number, and the next run goes on along the same schedule.
- **Travel.** A checkpoint is split into files of at most 15 MiB; the moments are files of their
  own and may stay behind (the optimizer then starts afresh with a warm-up).
- **Tell.** ``log.jsonl`` gets a line for every interval: step, loss, images a second; and for every
  validation: rate and distortion at several steps and the BD-rate against JPEG on the same crops.
  ``progress.png`` draws them.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polarpack.errors import FormatError, InputError

from .data import CropSampler, Pictures, validation_crops

log = logging.getLogger(__name__)

PIECE_BYTES = 15 << 20
JPEG_QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
Curve = list[tuple[float, float]]  # bits per pixel and PSNR in dB, by rising rate


class Task(Protocol):
    """What is trained.

    module : all that learns, and what is needed beside it.
    """

    module: nn.Module

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters that learn, with the factor of their learning rate."""

    def enter(self, progress: float) -> None:
        """Before a step: the phase that belongs to ``progress``, 0 to 1 over the schedule."""

    def draw(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """All random numbers of the loss of crops x (n, 3, H, W) in 0..255."""

    def loss(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """A scalar; a pure function, so that it can be compiled."""

    def evaluate(self, x: Tensor) -> dict[str, Any]:
        """Figures of validation crops for the log; ``curve``, if there, is a ``Curve``."""

    def export(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays for the weights file."""


@dataclass(frozen=True)
class Settings:
    """Of a run. ``steps`` is the length of the schedule, ``seconds`` what a call may use of it."""

    steps: int
    seconds: float = math.inf
    batch: int = 8
    crop: int = 128
    peak: float = 1e-3
    warm_up: int = 100
    ema: float = 0.999
    clip: float = 1.0
    min_scale: float = 0.5
    device: str = "cpu"
    compiled: bool = False
    bfloat16: bool = False
    checkpoint_seconds: float = 120.0
    validation_crops: int = 48
    validation_seconds: float = 240.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "seconds", "batch", "crop", "peak", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"expected {name} > 0, got {getattr(self, name)}")
        if self.crop % 64:
            raise InputError(f"expected a crop of a multiple of 64 pixels, got {self.crop}")
        if not 0 <= self.ema < 1:
            raise InputError(f"expected ema in 0..1, got {self.ema}")

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to a hundredth."""
        warm = min(1.0, (step + 1) / self.warm_up)
        return self.peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


class Run:
    """State of training: module, averaged weights, optimizer, step."""

    def __init__(self, task: Task, settings: Settings):
        self.task, self.settings, self.step = task, settings, 0
        task.module.to(settings.device)
        if settings.device != "cpu":
            # float32 is asked for where bfloat16 is too coarse: cuDNN's default, TF32, is no better
            torch.backends.cudnn.allow_tf32 = False
            task.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = task.parameter_groups()
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "factor": factor} for parameters, factor in groups],
            lr=settings.peak,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        self.parameters: list[Tensor] = [p for parameters, _ in groups for p in parameters]
        self.average = [p.detach().clone() for p in self.parameters]
        self.fresh_at = 0  # the optimizer's first step: it warms up from there
        self._loss = torch.compile(task.loss) if settings.compiled else task.loss
        self._generator = torch.Generator(settings.device)

    def advance(self, sampler: CropSampler) -> Tensor:
        """One step; returns its loss, still on the device."""
        settings = self.settings
        x = sampler.draw(settings.batch, np.random.default_rng([settings.seed, self.step]))
        if settings.device != "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        self._generator.manual_seed(settings.seed * 1_000_003 + self.step)
        rate = settings.rate(self.step) * min(1.0, (self.step - self.fresh_at + 1) / 50)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        kind = torch.device(settings.device).type
        mixed = torch.autocast(kind, torch.bfloat16) if settings.bfloat16 else nullcontext()
        self.task.enter(self.step / settings.steps)
        drawn = self.task.draw(x, self._generator)
        with mixed:
            loss = self._loss(x, *drawn)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        if not torch.isfinite(norm):  # one bad batch must not end a run
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        self.step += 1
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return loss.detach()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module has its averaged weights."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    def save(self, folder: Path) -> None:
        """Write a checkpoint; the previous one stands until this one is whole."""
        weights = {
            "step": self.step,
            "settings": json.dumps(asdict(self.settings)),
            "module": self.task.module.state_dict(),
            "average": self.average,
        }
        _write_pieces(folder, "weights", self.step, weights)
        _write_pieces(folder, "moments", self.step, self.optimizer.state_dict())
        pointer = folder / "checkpoint.part"
        pointer.write_text(json.dumps({"step": self.step}), "utf-8")
        pointer.replace(folder / "checkpoint.json")
        for path in folder.glob("*-*.piece*"):
            if f"-{self.step}." not in path.name:
                path.unlink()

    def restore(self, folder: Path) -> bool:
        """Go on from the folder's checkpoint, if there is one."""
        pointer = folder / "checkpoint.json"
        if not pointer.is_file():
            return False
        step = int(json.loads(pointer.read_text("utf-8"))["step"])
        weights = _read_pieces(folder, "weights", step, self.settings.device)
        if weights is None:
            raise FormatError(f"{folder}: no weights of step {step}")
        self.task.module.load_state_dict(weights["module"])
        with torch.no_grad():
            torch._foreach_copy_(self.average, weights["average"])
        self.step = step
        moments = _read_pieces(folder, "moments", step, self.settings.device)
        if moments is None:
            log.warning("%s has no optimizer moments; they start afresh", folder)
            self.fresh_at = step
        else:
            self.optimizer.load_state_dict(moments)
        return True


def _write_pieces(folder: Path, name: str, step: int, state: object) -> None:
    """``torch.save`` into files of at most PIECE_BYTES."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    for i, start in enumerate(range(0, len(data), PIECE_BYTES)):
        (folder / f"{name}-{step}.piece{i:02d}").write_bytes(data[start : start + PIECE_BYTES])


def _read_pieces(folder: Path, name: str, step: int, device: str) -> Any:
    """The inverse; None where there are no such files. Tensors only, no pickled objects."""
    pieces = sorted(folder.glob(f"{name}-{step}.piece*"))
    if not pieces:
        return None
    data = b"".join(piece.read_bytes() for piece in pieces)
    try:
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise FormatError(f"{folder}: {name} of step {step} cannot be read: {error}") from error


def train(task: Task, pictures: Pictures, folder: Path, settings: Settings) -> bool:
    """Train ``task`` on ``pictures`` for ``settings.seconds`` at most, or go on where ``folder``
    stands. Returns whether the schedule is finished.

    Writes to ``folder``: checkpoint, ``log.jsonl``, ``progress.png`` (where matplotlib is there)
    and ``arrays.npz``, what the averaged weights export to, after every validation.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = pictures.split()
    sampler = CropSampler(training, settings.crop, settings.device, settings.min_scale)
    crops = validation_crops(held_out, settings.validation_crops, 2 * settings.crop)
    reference = _reference_curve(folder, crops)
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).float().to(settings.device)
    run = Run(task, settings)
    if run.restore(folder):
        log.info("goes on from step %d of %d", run.step, settings.steps)

    def validate() -> None:
        task.module.eval()
        with run.averaged(), torch.no_grad():
            found = task.evaluate(x)
            arrays = task.export()
        task.module.train()
        part = folder / "arrays.part.npz"
        np.savez(part, **arrays)  # type: ignore[arg-type]
        part.replace(folder / "arrays.npz")
        if "curve" in found:
            found["bd_rate_jpeg"] = bd_rate(reference, found["curve"])
        _append(folder, {"step": run.step, **found})
        draw_progress(folder)

    saved = validated = noted = time.monotonic()
    losses: list[Tensor] = []
    if not run.step:
        validate()
    while run.step < settings.steps:
        losses.append(run.advance(sampler))
        now = time.monotonic()
        if now - began > settings.seconds:  # after a step: every call gets somewhere
            break
        if len(losses) >= 50 or run.step == settings.steps:
            mean = float(torch.stack(losses).mean())  # waits for the device: so not at every step
            now = time.monotonic()
            pace = len(losses) * settings.batch / (now - noted)
            _append(folder, {"step": run.step, "loss": mean, "images_per_second": pace})
            losses, noted = [], now
        if now - saved > settings.checkpoint_seconds:
            run.save(folder)
            saved = time.monotonic()
        if now - validated > settings.validation_seconds:
            validate()
            validated = noted = time.monotonic()
    run.save(folder)
    validate()
    return run.step >= settings.steps


def _append(folder: Path, line: Mapping[str, object]) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    log.info("%s", line)


def _reference_curve(folder: Path, crops: npt.NDArray[np.uint8]) -> Curve:
    """JPEG's curve on the validation crops, measured once and kept in ``jpeg.json``."""
    path = folder / "jpeg.json"
    if not path.is_file():
        path.write_text(json.dumps(jpeg_curve(crops)), "utf-8")
    return [(float(rate), float(psnr)) for rate, psnr in json.loads(path.read_text("utf-8"))]


def jpeg_curve(crops: npt.NDArray[np.uint8]) -> Curve:
    """Rate and mean PSNR of JPEG 4:2:0 (Pillow, optimized) on crops (n, s, s, 3), s a multiple of
    16, side by side in one picture, so that one header serves all."""
    from PIL import Image

    n, size = crops.shape[:2]
    strip = np.ascontiguousarray(crops.transpose(1, 0, 2, 3)).reshape(size, n * size, 3)
    curve = []
    for quality in JPEG_QUALITIES:
        file = io.BytesIO()
        Image.fromarray(strip).save(file, "JPEG", quality=quality, optimize=True, subsampling=2)
        decoded = np.asarray(Image.open(file), np.float64).reshape(size, n, size, 3)
        mse = ((decoded - crops.transpose(1, 0, 2, 3)) ** 2).mean((0, 2, 3))
        psnr = float((10 * np.log10(255**2 / np.maximum(mse, 1e-3))).mean())
        curve.append((8 * file.tell() / (n * size * size), psnr))
    return curve


def bd_rate(anchor: Sequence[tuple[float, float]], curve: Sequence[tuple[float, float]]) -> float:
    """Mean difference of rate at equal PSNR over the common range, in percent of the anchor's;
    log-rates between the points are interpolated linearly. NaN where the ranges do not meet."""
    logs = []
    ranges = []
    for points in (anchor, curve):
        psnr, rate = zip(*sorted((p, r) for r, p in points), strict=True)
        logs.append((np.array(psnr), np.log(np.array(rate))))
        ranges.append((psnr[0], psnr[-1]))
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if low >= high:
        return math.nan
    at = np.linspace(low, high, 200)
    difference = np.interp(at, *logs[1]) - np.interp(at, *logs[0])
    return float(100 * (np.exp(difference.mean()) - 1))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def draw_progress(folder: Path) -> None:
    """``progress.png``: loss and BD-rate over steps, and the last curve beside JPEG's."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_log(folder)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    judged = [line for line in lines if "curve" in line]
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    if losses:
        left.plot(*zip(*losses, strict=True))
    left.set(title="loss", xlabel="step")
    bd = [(line["step"], line["bd_rate_jpeg"]) for line in judged]
    if bd:
        middle.plot(*zip(*bd, strict=True), marker=".")
    middle.set(title="BD-rate against JPEG, %", xlabel="step")
    if judged:
        right.plot(*zip(*judged[-1]["curve"], strict=True), marker=".", label="last")
    jpeg = json.loads((folder / "jpeg.json").read_text("utf-8"))
    right.plot(*zip(*jpeg, strict=True), label="JPEG")
    right.set(title="validation crops", xlabel="bits per pixel", ylabel="PSNR, dB", xscale="log")
    right.legend()
    figure.savefig(folder / "progress.png", dpi=80)
