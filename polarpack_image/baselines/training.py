"""Training of the baselines: transform first, then the entropy model; stops and resumes exactly.

A run is a folder:

    state.pt     model, optimizer and step: where ``resume`` goes on
    model.pt     the model alone, for ``load``
    log.jsonl    one object every few steps: stage, step, seconds, figures
    curves.png   the log, drawn

All that is random in a step follows from the seed and the step's number, so a run that was stopped
and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polarpack.errors import CorruptDataError, InputError, MissingDependencyError
from polarpack.nn import AdaptiveFSQ

from ..data import CropSampler, Pictures
from .autoencoders import FSQVAE, RQVAE, VQVAE
from .base import Baseline, Symbols
from .hyperprior import HyperPrior
from .layers import to_unit
from .original import OriginalCodec
from .vqvae2 import VQVAE2

MODELS: dict[str, type[Baseline]] = {
    model.kind: model for model in (VQVAE, RQVAE, FSQVAE, VQVAE2, HyperPrior, OriginalCodec)
}
WARM_UP = 100  # steps
CLIP = 1.0  # of the gradient's norm
STAGES = ("transform", "prior")

logger = logging.getLogger(__name__)
Report = Callable[[str, int, int, dict[str, float]], None]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train.

    steps, batch, rate : of the transform. prior_steps, prior_batch, prior_rate : of the entropy
    model, on ``prior_patches`` patches coded once. minutes : stop in good order after so long.
    device : where to train; "auto" takes a GPU if there is one. Coding is always the CPU's.
    amp : the transform's forward pass in bfloat16 where torch deems it safe (codebooks never are);
        None: on a GPU only, where it is what makes a GPU fast.
    """

    steps: int = 4000
    batch: int = 8
    rate: float = 1e-3
    prior_steps: int = 2000
    prior_batch: int = 16
    prior_rate: float = 1e-3
    prior_patches: int = 1024
    seed: int = 0
    minutes: float | None = None
    device: Device = "auto"
    amp: bool | None = None
    log_every: int = 20
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("batch", "prior_batch", "prior_patches", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.steps < 0 or self.prior_steps < 0:
            raise InputError(f"expected steps >= 0, got {self.steps} and {self.prior_steps}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"expected device auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device='cuda': torch sees no GPU here; use 'auto' or 'cpu'")

    @property
    def torch_device(self) -> torch.device:
        """``device``, decided."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def uses_bfloat16(self) -> bool:
        """``amp``, decided."""
        return self.torch_device.type == "cuda" if self.amp is None else self.amp


class Trainer:
    """Trains one model on one collection of pictures into one folder.

    pictures : of which crops of the model's patch size are drawn, at full size down to half.
    report : called with stage, step, steps and figures every ``log_every`` steps.

    The model is on the config's device while it trains, and back on the CPU when ``run`` returns.
    Checkpoints do not say where they were made: a run may go on on another device.
    """

    def __init__(
        self,
        model: Baseline,
        pictures: Pictures,
        folder: str | Path,
        config: TrainConfig | None = None,
        report: Report | None = None,
    ) -> None:
        self.model, self.folder = model, Path(folder)
        self.config = TrainConfig() if config is None else config
        self.device = self.config.torch_device
        self.sampler = CropSampler(pictures, model.patch, self.device, min_scale=0.5)
        self.report = report
        self.stage, self.step = 0, 0
        self._optimizer_state: dict[str, Any] | None = None

    # ---------------------------------------------------------------------------------- running

    def run(self, *, resume: bool = False) -> bool:
        """Train; True when all is done, False when ``minutes`` ran out.

        resume: go on from the folder's state (InputError if it is of another model). Without it an
        existing state raises InputError rather than being overwritten.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / "state.pt"
        if resume:
            self._load(state)
        elif state.exists():
            raise InputError(f"{state} exists: resume that run, or name another folder")
        self._deadline = math.inf
        if self.config.minutes is not None:
            self._deadline = time.monotonic() + 60 * self.config.minutes
        self._started = time.monotonic()
        self.model.to(self.device)
        try:
            finished = True
            while finished and self.stage < len(STAGES):
                finished = self._train_transform() if self.stage == 0 else self._train_prior()
                if finished:
                    self.stage, self.step, self._optimizer_state = self.stage + 1, 0, None
        finally:
            self.model.cpu()
        self._save()
        draw_curves(self.folder)
        return finished

    def _train_transform(self) -> bool:
        c = self.config

        def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            self._set_progress(step / c.steps)
            rng = np.random.default_rng([c.seed, 0, step])
            x = to_unit(self.sampler.draw(c.batch, rng))
            with torch.autocast(x.device.type, torch.bfloat16, enabled=c.uses_bfloat16):
                return self.model.loss(x)

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        finished = self._loop(loss, parameters, c.steps, c.rate)
        if finished:
            self._set_progress(1.0)
        return finished

    def _train_prior(self) -> bool:
        """Code patches once, count, and train what predicts them."""
        c, model = self.config, self.model
        self._set_progress(1.0)
        model.eval()
        crops, symbols = self._coded_patches()
        if self.step == 0:
            model.start_prior()
            model.learn_counts(symbols)
        parameters = model.prior_parameters()
        if not parameters or not c.prior_steps:
            return True

        def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            rng = np.random.default_rng([c.seed, 1, step])
            drawn = rng.integers(len(crops), size=c.prior_batch)
            at = torch.from_numpy(drawn).to(crops.device)
            return model.prior_loss([s[at] for s in symbols], to_unit(crops[at].float()))

        return self._loop(loss, parameters, c.prior_steps, c.prior_rate, training=False)

    @torch.no_grad()
    def _coded_patches(self) -> tuple[Tensor, Symbols]:
        c = self.config
        crops: list[Tensor] = []
        coded: list[Symbols] = []
        for n, start in enumerate(range(0, c.prior_patches, c.prior_batch)):
            count = min(c.prior_batch, c.prior_patches - start)
            x = self.sampler.draw(count, np.random.default_rng([c.seed, 2, n]))
            crops.append(x.round().to(torch.uint8))
            coded.append(self.model.symbols(to_unit(x)))
        return torch.cat(crops), [torch.cat(parts) for parts in zip(*coded, strict=True)]

    def _loop(
        self,
        loss_of: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
        parameters: list[Any],
        steps: int,
        rate: float,
        *,
        training: bool = True,
    ) -> bool:
        optimizer = torch.optim.Adam(self._groups(parameters, rate), lr=rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        self.model.train(training)
        saved = time.monotonic()
        while self.step < steps:
            if time.monotonic() > self._deadline:
                return False
            torch.manual_seed(hash((self.config.seed, self.stage, self.step)) & 0x7FFFFFFF)
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * _schedule(self.step, steps)
            loss, figures = loss_of(self.step)
            if not torch.isfinite(loss):
                raise InputError(
                    f"loss is {float(loss.detach())} in step {self.step} of the "
                    f"{STAGES[self.stage]}: lower rate={rate}, or look for broken pictures"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            self.step += 1
            self._optimizer_state = optimizer.state_dict()
            if self.step % self.config.log_every == 0 or self.step == steps:
                self._log(steps, {k: float(v.detach()) for k, v in figures.items()})
            if time.monotonic() - saved > self.config.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        self.model.eval()
        return True

    def _groups(self, parameters: list[Any], rate: float) -> list[dict[str, Any]]:
        """Parameters with the learning rates their modules ask for."""
        special: list[dict[str, Any]] = []
        for module in self.model.modules():
            if isinstance(module, AdaptiveFSQ):
                special += module.parameter_groups(rate)
        taken = {id(p) for group in special for p in group["params"]}
        usual = [p for p in parameters if id(p) not in taken]
        return [{"params": usual, "lr": rate}, *special]

    def _set_progress(self, fraction: float) -> None:
        self.model.set_progress(fraction)

    # ----------------------------------------------------------------------------- the folder

    def _log(self, steps: int, figures: dict[str, float]) -> None:
        entry = {"stage": STAGES[self.stage], "step": self.step}
        seconds = round(time.monotonic() - self._started, 1)
        line = json.dumps({**entry, "seconds": seconds, **figures})
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        logger.info("%s", line)
        if self.report:
            self.report(STAGES[self.stage], self.step, steps, figures)

    def _save(self) -> None:
        """Write state and model, each to a sibling first: a kill leaves the old ones."""
        config = {"kind": self.model.kind, "model": self.model.get_config()}
        state = {
            "config": json.dumps({**config, "train": asdict(self.config)}),
            "stage": self.stage,
            "step": self.step,
            "state": self.model.state_dict(),
            "optimizer": self._optimizer_state,
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        self.model.save(self.folder / "model.tmp")
        os.replace(self.folder / "model.tmp", self.folder / "model.pt")

    def _load(self, path: Path) -> None:
        if not path.exists():
            raise InputError(f"nothing to resume: {path} does not exist")
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = json.loads(state["config"])
        own = {"kind": self.model.kind, "model": self.model.get_config()}
        if {k: stored[k] for k in own} != json.loads(json.dumps(own)):
            raise InputError(f"{path} is of another model: {stored['kind']} {stored['model']}")
        self._set_progress(0.0 if state["stage"] == 0 else 1.0)
        self.model.load_state_dict(state["state"])
        self.stage, self.step = state["stage"], state["step"]
        self._optimizer_state = state["optimizer"]


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warm = min(WARM_UP, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def load(path: str | Path) -> Baseline:
    """A model saved by ``Baseline.save`` or by a run; CorruptDataError for another file."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        config = json.loads(stored["config"])
        model = MODELS[config.pop("kind")].from_config(config)
        model.set_progress(1.0)
        model.load_state_dict(stored["state"])
    except (KeyError, TypeError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        if isinstance(error, InputError):
            raise
        raise CorruptDataError(f"{path} holds no baseline model: {error}") from error
    return model.eval()


def draw_curves(folder: str | Path) -> Path | None:
    """Draw a run's log; None without a log or without matplotlib."""
    folder = Path(folder)
    log = folder / "log.jsonl"
    if not log.exists():
        return None
    try:
        _draw(log, folder / "curves.png")
    except MissingDependencyError:
        return None
    return folder / "curves.png"


def _draw(log: Path, picture: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("curves need matplotlib") from error
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    series: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for entry in entries:
        for name in entry.keys() - {"stage", "step", "seconds"}:
            steps, values = series.setdefault((entry["stage"], name), ([], []))
            steps.append(entry["step"])
            values.append(entry[name])
    names = sorted(series)
    figure = Figure(
        figsize=(3.6 * min(3, len(names)), 2.7 * -(-len(names) // 3)), layout="constrained"
    )
    axes = figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, (stage, name) in zip(axes.flat, names, strict=False):
        steps, values = series[stage, name]
        axis.plot(steps, values, linewidth=1, color="#4477aa")
        axis.set_title(f"{stage}: {name}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        if name in ("mse", "commitment") and min(values) > 0:
            axis.set_yscale("log")
    figure.savefig(picture, dpi=110)
