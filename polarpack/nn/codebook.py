"""The codebook under every trainable quantizer: search, learning, first values and revival.

A codebook is ``heads`` tables of ``size`` codewords, searched and learned in one batched operation,
so a product quantizer costs one matrix product however many heads it has. It is learned in one of
two ways:

    "ema"       a codeword is the running mean of the vectors it stood for: for each of them
                    n <- decay n + (1 - decay) (vectors of this step)
                    m <- decay m + (1 - decay) (their sum)
                    codeword = m / n          (n smoothed, so that an unused one stays finite)
                van den Oord et al., "Neural discrete representation learning", 2017, appendix A;
                this is k-means on a stream, and needs no optimizer.
    "gradient"  a codeword is a parameter that the loss |codeword - sg[x]|^2 pulls.

Codewords and running means are float32 whatever the model is cast to: bfloat16 has 8 bits, and a
step of 1% of the way would be rounded off. With torch.distributed running, statistics are summed
over processes, and random draws are those of process 0, so that all hold the same codebook.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._arrays import Float32
from ..clustering import nearest
from ..errors import InputError, NotFittedError

Learning = Literal["ema", "gradient"]
Initialisation = Literal["auto", "uniform", "normal", "orthogonal", "data", "kmeans"]
Transform = Literal["none", "linear"]

MAX_SCORES = 1 << 26  # scores held at a time, 256 MiB
KMEANS_ROWS = 64  # for each codeword, at initialisation
KMEANS_ROUNDS = 10
MAX_DRAW = 1 << 24  # vectors that multinomial can draw from
NORM_SLACK = 2.0**-9  # above what rounding to float16 does to a codeword's norm


class CodebookOptions(TypedDict, total=False):
    """How codebooks are learned; every module of this package takes these by keyword.

    learning : "ema" or "gradient" (see the module's text).
    initialisation : "uniform" in +-1/size; "normal" of standard deviation 1/sqrt(dim);
        "orthogonal" rows of unit norm; "data", rows of the first training batch; "kmeans" of it.
        The last two need at least ``size`` vectors in that batch. "auto" (the default) begins
        uniform, and at the first training batch takes its k-means if it is large enough.
    revive_below : codewords whose running count of vectors a step falls below this restart at a
        random vector of the batch; 0 never.
    orthogonal_weight : times the mean squared cosine between codewords, added to the loss
        (Shin et al., "Translation-equivariant image quantizer", 2021). Needs "gradient".
    transform : "linear": codewords are W c with c fixed at random and W learned, so one gradient
        moves them all and none dies (SimVQ: Zhu et al., arXiv 2411.02038). Needs "gradient".
    """

    learning: Learning
    initialisation: Initialisation
    revive_below: float
    orthogonal_weight: float
    transform: Transform


class Float32Module(nn.Module):
    """A module whose own float32 tensors keep that precision when a model is cast to a shorter one,
    and whose ``state_dict`` holds its structure, so that another one's is refused by name."""

    def structure(self) -> dict[str, Any]:
        """What a checkpoint must agree in, as JSON values."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """The structure as bytes in a tensor, which safetensors and ``weights_only`` can hold."""
        text = json.dumps(self.structure(), sort_keys=True).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Compare with the structure in a checkpoint; InputError names what differs."""
        try:
            stored = json.loads(bytes(cast(Tensor, state).cpu().tolist()))
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"checkpoint of {type(self).__name__}: {error}") from error
        own = json.loads(json.dumps(self.structure()))
        differing = sorted(k for k in own.keys() | stored.keys() if own.get(k) != stored.get(k))
        if differing:
            listed = ", ".join(f"{k} {stored.get(k)!r} (here {own.get(k)!r})" for k in differing)
            raise InputError(f"checkpoint of another {type(self).__name__}: {listed}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if t.dtype == torch.float32 != out.dtype else out

        module = super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return cast(Float32Module, module)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first_process(t: Tensor) -> Tensor:
    """t as process 0 has it."""
    if is_distributed():
        dist.broadcast(t, 0)
    return t


def check_count(name: str, value: Any, low: int, high: int = 1 << 16) -> int:
    """``value`` as int if it is one in low..high, else InputError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"expected {name} to be an integer, got {value!r}")
    if not low <= value <= high:
        raise InputError(f"expected {name} in {low}..{high}, got {value}")
    return int(value)


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> float:
    """``value`` as float if it is a number in [low, high], else InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InputError(f"expected {name} to be a number, got {value!r}")
    if not low <= value <= high:
        raise InputError(f"expected {name} in {low}..{high}, got {value}")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of the choices, else InputError."""
    if value not in choices:
        raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")
    return str(value)


class Codebook(Float32Module):
    """``heads`` tables of ``size`` codewords of ``dim`` numbers (see the module's text).

    norm : keep every codeword at this norm and search by inner product (a cosine codebook).
    zero_first : codeword 0 of every head stays zero ("nothing is added").

    Attributes
    ----------
    embedding : (heads, size, dim) float32, a buffer or a parameter. ``codewords()`` is what it
        stands for under norm, transform and zero_first.
    counts, sums : (heads, size), (heads, size, dim) float32, the running means of "ema".
    hits : (heads, size) int64, how often each codeword was used in training since ``reset_usage``.
    """

    embedding: Tensor
    counts: Tensor
    sums: Tensor
    hits: Tensor
    ready: Tensor

    def __init__(
        self,
        heads: int,
        size: int,
        dim: int,
        *,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        norm: float | None = None,
        zero_first: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.heads, self.size = check_count("heads", heads, 1), check_count("size", size, 1)
        self.dim = check_count("dim", dim, 1)
        self.decay = check_number("decay", decay, 0.0, 1.0)
        self.epsilon = check_number("epsilon", epsilon, 0.0)
        if unknown := set(options) - set(CodebookOptions.__annotations__):
            raise InputError(f"unknown options {sorted(unknown)}")
        self.learning = check_choice(
            "learning", options.get("learning", "ema"), ("ema", "gradient")
        )
        self.initialisation = check_choice(
            "initialisation",
            options.get("initialisation", "auto"),
            ("auto", "uniform", "normal", "orthogonal", "data", "kmeans"),
        )
        self.revive_below = check_number("revive_below", options.get("revive_below", 0.0), 0.0)
        self.orthogonal_weight = check_number(
            "orthogonal_weight", options.get("orthogonal_weight", 0.0), 0.0
        )
        self.transform = check_choice(
            "transform", options.get("transform", "none"), ("none", "linear")
        )
        if self.learning == "ema" and (self.orthogonal_weight or self.transform != "none"):
            raise InputError("orthogonal_weight and transform need learning='gradient'")
        self.norm, self.zero_first = norm, zero_first
        first = self._first_values()
        if self.transform == "linear":
            if self.initialisation in ("data", "kmeans"):
                raise InputError("transform='linear' needs an initialisation without data")
            self.register_buffer("embedding", torch.randn(heads, size, dim) * dim**-0.5)
            self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))
        elif self.learning == "gradient":
            self.embedding = nn.Parameter(first)
        else:
            self.register_buffer("embedding", first)
        ema = (heads, size) if self.learning == "ema" or self.revive_below else (heads, 0)
        self.register_buffer("counts", torch.ones(ema))
        self.register_buffer("sums", first.clone() if self.learning == "ema" else first[:, :0])
        self.register_buffer("hits", torch.zeros(heads, size, dtype=torch.int64))
        waits = self.initialisation in ("data", "kmeans", "auto") and self.transform == "none"
        self.register_buffer("ready", torch.tensor(not waits))
        self._is_ready = bool(self.ready)  # its copy in Python: asking a GPU would wait for it
        self._shape_codewords()

    def structure(self) -> dict[str, Any]:
        """Sizes and kind of the codebook."""
        names = ("heads", "size", "dim", "learning", "norm", "zero_first", "transform")
        return {name: getattr(self, name) for name in names}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if (key := prefix + "_extra_state") in state_dict:  # before torch's own words on sizes
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_ready = bool(self.ready)

    # ---------------------------------------------------------------------------- first values

    def _first_values(self) -> Tensor:
        shape = (self.heads, self.size, self.dim)
        if self.initialisation == "orthogonal":
            first = torch.empty(shape)
            for head in first:
                nn.init.orthogonal_(head)
            return first
        if self.initialisation in ("uniform", "auto") and self.norm is None:
            return torch.empty(shape).uniform_(-1.0 / self.size, 1.0 / self.size)
        return torch.randn(shape).mul_(self.dim**-0.5)  # uniform directions, under a norm

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """First codewords from vectors x (heads, n, dim), if these are asked for and still due."""
        rows = _gathered(x.float())
        rows = rows[:, torch.isfinite(rows.sum(dim=(0, 2)))]
        n = rows.shape[1]
        if n < self.size and self.initialisation == "auto":
            self._set_ready(n > 0)
            return
        if n < self.size:
            raise InputError(
                f"initialisation={self.initialisation!r} of {self.size} codewords needs at least "
                f"as many vectors in the first training batch, got {n}; use a larger batch, or "
                "initialisation='uniform'"
            )
        order = torch.stack([torch.randperm(n, device=x.device) for _ in range(self.heads)])
        order = order[:, : KMEANS_ROWS * self.size, None].expand(-1, -1, self.dim)
        rows = rows.gather(1, order)
        words = rows[:, : self.size].clone()
        counts = torch.ones(self.heads, self.size, device=x.device)
        if self.initialisation != "data":
            for _ in range(KMEANS_ROUNDS):
                codes = _search(rows, self._shaped(words))
                counts, sums = self._sums(codes, rows, None)
                nearest_words = words.gather(1, codes[..., None].expand_as(rows))
                errors = (rows - nearest_words).square().sum(dim=-1)
                errors = (errors / errors.amax(dim=1, keepdim=True)).nan_to_num(nan=1.0)
                words = sums / counts.clamp(min=1.0)[..., None]
                # an empty cluster restarts at a vector drawn in proportion to its error
                draw = torch.multinomial(errors[:, :MAX_DRAW] + 1e-20, self.size, replacement=True)
                random = rows.gather(1, draw[..., None].expand_as(words))
                words = torch.where(counts[..., None] > 0, words, random)
        words = from_first_process(self._shaped(words).contiguous())
        self.embedding.data.copy_(words)
        if self.learning == "ema":
            # Worth one vector each: a network's latents move, and what the first batch needed is
            # soon to be outvoted, or seen to be dead.
            counts = torch.ones_like(counts)
            self.counts.copy_(counts)
            self.sums.copy_(self.embedding * counts[..., None])
        self._set_ready(True)

    def _set_ready(self, is_ready: bool) -> None:
        self.ready.fill_(is_ready)
        self._is_ready = is_ready

    # ------------------------------------------------------------------------------- codewords

    def _shaped(self, words: Tensor) -> Tensor:
        """words under the constraints of norm and zero_first."""
        if self.norm is not None:
            words = nn.functional.normalize(words, dim=-1) * self.norm
        if self.zero_first:
            words = torch.cat([torch.zeros_like(words[:, :1]), words[:, 1:]], dim=1)
        return words

    @torch.no_grad()
    def _shape_codewords(self) -> None:
        if self.norm is not None or self.zero_first:
            self.embedding.data.copy_(self._shaped(self.embedding))

    def codewords(self) -> Tensor:
        """(heads, size, dim) float32, the codewords in use; with a gradient if they learn by it."""
        if self.transform == "linear":
            return self._shaped(self.embedding @ self.weight)
        if self.learning == "ema":
            return self.embedding  # shaped when it was learned
        words = self.embedding
        if self.norm is not None:  # codewords rounded for a file stay as they are
            length = words.detach().norm(dim=-1, keepdim=True)
            near = (length / self.norm - 1).abs() < NORM_SLACK
            words = torch.where(near, words, nn.functional.normalize(words, dim=-1) * self.norm)
        if self.zero_first:
            words = torch.cat([torch.zeros_like(words[:, :1]), words[:, 1:]], dim=1)
        return words

    def set_codewords(self, words: Tensor) -> None:
        """Take over (heads, size, dim) codewords as they are; running means restart at them."""
        if self.transform == "linear":
            raise InputError("codewords under a linear transform cannot be set one by one")
        if words.shape != self.embedding.shape:
            raise InputError(
                f"expected codewords {tuple(self.embedding.shape)}, got {tuple(words.shape)}"
            )
        if self.zero_first and bool(words[:, 0].any()):
            raise InputError("expected codeword 0 of every head to be zero: it stands for no stage")
        with torch.no_grad():
            self.embedding.data.copy_(words)
            if self.learning == "ema":
                self.counts.fill_(1.0)
                self.sums.copy_(self.embedding)
            self._set_ready(True)

    # ---------------------------------------------------------------------------------- search

    def assign(self, x: Tensor) -> Tensor:
        """Index of the nearest codeword of every vector, (heads, n, dim) -> (heads, n) int64.

        Squared distance is |x|^2 - 2 (<x, c> - |c|^2 / 2): one matrix product in float32 and the
        largest of each row. O(heads n size dim) time; at most 256 MiB of scores.
        NotFittedError where first values from data are due.
        """
        self._check_ready()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return _search(x.detach().float(), self.codewords().detach())

    def assign_exactly(self, x: Tensor) -> Tensor:
        """``assign`` as the numpy core does it, which decides near ties in float64: the same codes
        as its quantizers, for tensors on the CPU; elsewhere ``assign``. No gradient."""
        self._check_ready()
        if x.device.type != "cpu":
            return self.assign(x)
        rows = np.ascontiguousarray(x.detach().float().numpy())
        words: Float32 = self.codewords().detach().numpy()
        codes = [nearest(r, np.ascontiguousarray(w))[0] for r, w in zip(rows, words, strict=True)]
        return torch.from_numpy(np.stack(codes))

    def look_up(self, codes: Tensor) -> Tensor:
        """(heads, n) codes -> (heads, n, dim) codewords, with their gradient if they have one."""
        words = self.codewords()
        if self.heads == 1:
            return nn.functional.embedding(codes[0], words[0])[None]
        return words.gather(1, codes[..., None].expand(-1, -1, self.dim))

    def _check_ready(self) -> None:
        if not self._is_ready and self.initialisation != "auto":
            raise NotFittedError(
                f"initialisation={self.initialisation!r} takes the first codewords from the first "
                "batch in training mode, and none has come yet"
            )

    # --------------------------------------------------------------------------------- learning

    def _sums(self, codes: Tensor, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """For every codeword the number of vectors (heads, size) and their sum (.., dim)."""
        places = (codes + self._offsets(codes)).flatten()
        ones = torch.ones_like(x[..., 0]) if kept is None else kept.to(x.dtype).expand(codes.shape)
        counts = x.new_zeros(self.heads * self.size).index_add_(0, places, ones.flatten())
        sums = x.new_zeros(self.heads * self.size, self.dim)
        if self.learning == "ema" or not self._is_ready:
            rows = x if kept is None else torch.where(kept[..., None], x, torch.zeros_like(x))
            sums.index_add_(0, places, rows.flatten(0, 1))
        return counts.view(self.heads, self.size), sums.view(self.heads, self.size, self.dim)

    def _offsets(self, codes: Tensor) -> Tensor:
        return torch.arange(self.heads, device=codes.device)[:, None] * self.size

    @torch.no_grad()
    def learn(self, x: Tensor, codes: Tensor, kept: Tensor | None = None) -> Tensor:
        """One training step: statistics, running means and revival.

        x (heads, n, dim) with its codes (heads, n); kept: (heads or 1, n) bool, False where a
        vector counts for nothing. Vectors that are not finite never count: one NaN would stay in
        the running means for good. Returns how often each codeword was used, (heads, size) float32.
        """
        x = x.detach().float()
        finite = torch.isfinite(x.sum(dim=-1))
        kept = finite if kept is None else finite & kept
        counts, sums = self._sums(codes, x, kept)
        if is_distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.hits += counts.long()
        if self.learning == "ema":
            self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            total = self.counts.sum(dim=-1, keepdim=True)
            smoothed = (self.counts + self.epsilon) / (total + self.size * self.epsilon) * total
            self.embedding.copy_(self._shaped(self.sums / smoothed.clamp(min=1e-30)[..., None]))
        elif self.revive_below:
            self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        if self.revive_below and self.transform == "none":
            self._revive(x, kept)
        return counts

    def _revive(self, x: Tensor, kept: Tensor) -> None:
        """Move codewords that are hardly used to random vectors of the batch. Every step, masked:
        asking whether there are any would make a GPU wait."""
        chances = kept.float() + 1e-20  # all equal where nothing is kept; then nothing moves either
        chances = chances.expand(self.heads, -1)
        draw = torch.multinomial(chances[:, :MAX_DRAW], self.size, replacement=True)
        rows = x.gather(1, draw[..., None].expand(-1, -1, self.dim))
        rows = from_first_process(self._shaped(rows).contiguous())
        usable = from_first_process(kept.any(dim=-1, keepdim=True).expand(self.heads, 1).clone())
        dead = (self.counts < self.revive_below) & usable
        if self.zero_first:
            dead[:, 0] = False
        self.embedding.data.copy_(torch.where(dead[..., None], rows, self.embedding))
        self.counts.copy_(torch.where(dead, self.revive_below, self.counts))
        if self.learning == "ema":
            fresh = rows * self.revive_below
            self.sums.copy_(torch.where(dead[..., None], fresh, self.sums))

    def orthogonal_loss(self) -> Tensor:
        """``orthogonal_weight`` times the mean squared cosine between different codewords."""
        words = nn.functional.normalize(self.codewords(), dim=-1)
        cosines = words @ words.mT
        off = cosines - torch.eye(self.size, device=words.device)
        return self.orthogonal_weight * off.square().sum() / (self.heads * self.size**2)

    def reset_usage(self) -> None:
        """Forget how often codewords were used."""
        self.hits.zero_()

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"heads={self.heads}, size={self.size}, dim={self.dim}, learning={self.learning!r}"


def _search(x: Tensor, words: Tensor) -> Tensor:
    bias = -0.5 * words.square().sum(dim=-1)
    step = max(1, MAX_SCORES // (words.shape[0] * words.shape[1]))
    if x.shape[1] <= step:
        return _best(x, words, bias)
    return torch.cat([_best(part, words, bias) for part in torch.split(x, step, dim=1)], dim=1)


def _best(x: Tensor, words: Tensor, bias: Tensor) -> Tensor:
    if words.shape[0] == 1:
        return torch.addmm(bias[0], x[0], words[0].T).argmax(dim=-1)[None]
    return torch.baddbmm(bias[:, None], x, words.mT).argmax(dim=-1)


def _gathered(x: Tensor) -> Tensor:
    """x (heads, n, dim) of all processes, equally many vectors of each."""
    if not is_distributed():
        return x
    n = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(n, dist.ReduceOp.MIN)
    mine = x[:, : int(n)].contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts, dim=1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of usage counts (.., size), in codewords: size if all are used alike."""
    p = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return torch.exp(-torch.special.xlogy(p, p).sum(dim=-1))
