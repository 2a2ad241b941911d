"""Finite scalar quantization: no codebook, each number of a latent rounded to one of a few levels.

    ``FSQ``              Mentzer et al., "Finite scalar quantization: VQ-VAE made simple", 2023,
                         arXiv 2309.15505; the one to take by default.
    ``AnnealedFSQ``      a temperature that falls, statistics by running means, an entropy term.
    ``AdaptiveFSQ``      as many levels as the input is complex.
    ``HierarchicalFSQ``  several FSQ after each other, weighted by learned importance.
    ``LFQ``              two levels and an entropy loss: Yu et al., "Language model beats
                         diffusion", 2023, arXiv 2310.05737.

All take (.., dim) and return (quantized, codes, loss); codes are (.., n_fields) int64, one field a
latent number, with ``alphabet_sizes``. ``encode`` and ``decode`` go by codes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..polar import PolarQuantizer
from .codebook import Float32Module, check_choice, check_count, check_number, is_distributed
from .convert import to_core
from .gradients import Nonfinite, check_codes, check_input, straight_through

Output = tuple[Tensor, Tensor, Tensor]
MAX_LEVELS = 1 << 12  # of one number
ADAPTIVE_RATE = 1e-4  # learning rate of the rule that chooses levels


def check_levels(levels: int | Sequence[int], dim: int | None) -> list[int]:
    """Levels of each number of the latent; InputError for fewer than 2 or more than 4096."""
    if isinstance(levels, int | np.integer) and not isinstance(levels, bool):
        if dim is None:
            raise InputError("expected levels for each number, or one number and dim")
        return [check_count("levels", levels, 2, MAX_LEVELS)] * check_count("dim", dim, 1)
    if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
        raise InputError(f"expected levels to be a number or a list of them, got {levels!r}")
    return [check_count("levels", n, 2, MAX_LEVELS) for n in levels]


class _Finite(Float32Module):
    """What the quantizers here share: projections to and from the latent, and usage counts."""

    hits: Tensor

    def __init__(self, levels: list[int], dim: int | None, nonfinite: str) -> None:
        super().__init__()
        self.levels = levels
        self.n_latent = len(levels)
        self.dim = len(levels) if dim is None else check_count("dim", dim, 1)
        self.nonfinite = check_choice("nonfinite", nonfinite, ("ignore", "raise"))
        projects = self.dim != self.n_latent
        self.project_in = nn.Linear(self.dim, self.n_latent) if projects else nn.Identity()
        self.project_out = nn.Linear(self.n_latent, self.dim) if projects else nn.Identity()

    def structure(self) -> dict[str, Any]:
        """Levels and width."""
        return {"kind": type(self).__name__, "levels": self.levels, "dim": self.dim}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (key := prefix + "_extra_state") in state_dict:
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _count_fields(self) -> None:
        sizes = self.alphabet_sizes
        self.register_buffer("hits", torch.zeros(len(sizes), max(sizes), dtype=torch.int64))

    @property
    def alphabet_sizes(self) -> list[int]:
        """How many values each field of the codes has."""
        return list(self.levels)

    def forward(self, inputs: Tensor) -> Output:
        """(quantized, codes, loss) of inputs (.., dim): quantized like them, codes (.., n_fields)
        int64, loss a float32 scalar. InputError for another width or dtype. O(n dim n_latent)."""
        check_input(inputs, self.dim, self.nonfinite)
        z = self._project(self.project_in, inputs)
        latent, codes, loss = self._quantize(z)
        if self.training:
            with torch.no_grad():
                self._count(codes)
        return self._project(self.project_out, latent).to(inputs.dtype), codes, loss

    def encode(self, inputs: Tensor) -> Tensor:
        """Codes (.., n_fields) int64 of inputs (.., dim)."""
        check_input(inputs, self.dim, self.nonfinite)
        with torch.no_grad():
            return self._quantize(self._project(self.project_in, inputs))[1]

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (.., dim) float32 of codes (.., n_fields). InputError for one out of range."""
        check_codes(codes, self.alphabet_sizes)
        return self._project(self.project_out, self._latent(codes.long()))

    def _project(self, projection: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return cast(Tensor, projection(x.float()))

    def _quantize(self, z: Tensor) -> Output:
        raise NotImplementedError

    def _latent(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _count(self, codes: Tensor) -> None:
        n_fields, width = self.hits.shape
        offset = torch.arange(n_fields, device=codes.device) * width
        flat = (codes.reshape(-1, n_fields) + offset).flatten()
        counts = torch.zeros_like(self.hits).view(-1).index_add_(0, flat, torch.ones_like(flat))
        if is_distributed():
            torch.distributed.all_reduce(counts)
        self.hits += counts.view_as(self.hits)

    def reset_usage(self) -> None:
        """Forget how often levels were used."""
        self.hits.zero_()

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"levels={self.levels}, dim={self.dim}"


class FSQ(_Finite):
    """Finite scalar quantization: bound each number, round it, let the gradient through.

    ::

        z_i ── b_i = h tanh(z_i + s) - o ── k_i = round(b_i) ── k_i / floor(L_i / 2)

    With L levels, h = (L - 1) (1 + eps) / 2; an even L needs the offset o = 1/2 and the shift
    s = atanh(o / h), which keeps 0 at 0. Nothing is learned but the network around it; no codeword
    can die. The implied codebook has prod(levels) entries.

    Parameters
    ----------
    levels : one number for each of the latent's, such as [8, 5, 5, 5]; or one for all ``dim``.
    dim : width of the vectors; linear maps lead to and from the latent where it is not
        len(levels), which is also its default.
    nonfinite : "raise" names the first NaN or infinity in the inputs.

    The loss is 0: there is nothing to commit to.

    >>> import torch
    >>> quantized, codes, loss = FSQ([8, 5, 5, 5], 16)(torch.randn(2, 7, 16))
    >>> quantized.shape, codes.shape
    (torch.Size([2, 7, 16]), torch.Size([2, 7, 4]))
    """

    def __init__(
        self,
        levels: int | Sequence[int],
        dim: int | None = None,
        *,
        nonfinite: Nonfinite = "ignore",
    ) -> None:
        super().__init__(check_levels(levels, dim), dim, nonfinite)
        sizes = torch.tensor(self.levels, dtype=torch.float32)
        half = (sizes - 1) * (1 + 1e-3) / 2
        offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
        self.register_buffer("extent", half, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", torch.atanh(offset / half), persistent=False)
        self.register_buffer("width", torch.floor(sizes / 2), persistent=False)
        self._count_fields()

    extent: Tensor
    offset: Tensor
    shift: Tensor
    width: Tensor

    def bound(self, z: Tensor) -> Tensor:
        """Latents (.., n_latent) within the range of their levels, before rounding."""
        return self.extent * torch.tanh(z + self.shift) - self.offset

    def _quantize(self, z: Tensor) -> Output:
        bounded = self.bound(z)
        rounded = straight_through(bounded, bounded.round())
        # a NaN has no level; 0 keeps its code in range, and the quantized NaN shows
        codes = (bounded.detach().nan_to_num().round() + self.width).long()
        return rounded / self.width, codes, z.new_zeros(())

    def _latent(self, codes: Tensor) -> Tensor:
        return (codes - self.width) / self.width

    @property
    def codebook_size(self) -> int:
        """Entries of the implied codebook: prod(levels)."""
        return math.prod(self.levels)

    def index(self, codes: Tensor) -> Tensor:
        """One number (..) in 0..codebook_size - 1 for codes (.., n_latent); the first field varies
        fastest. InputError where the codebook exceeds 2^63."""
        if self.codebook_size > 1 << 63:
            raise InputError(f"a codebook of {self.codebook_size} entries has no int64 index")
        check_codes(codes, self.levels)
        total = torch.zeros_like(codes[..., 0])
        for field in reversed(range(self.n_latent)):
            total = total * self.levels[field] + codes[..., field]
        return total

    def to_quantizer(self) -> PolarQuantizer:
        """A fitted ``polarpack.PolarQuantizer`` of one head a number, for *bounded* latents scaled
        to levels: ``q.encode(fsq.bound(z) / fsq.width)`` are the codes, ``q.decode`` gives the
        latent, both as here (a bound exactly between two levels aside). Levels are rounded to
        float16 there, so a number of levels over 2 should be odd or a power of two and at most
        2049 to be exact; InputError for others."""
        stages: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        size = max(self.levels)
        books = np.zeros((self.n_latent, size, 1), np.float32)
        for field, n in enumerate(self.levels):
            level = (np.arange(n) - n // 2) / np.float32(n // 2)
            exact = level.astype(np.float16).astype(np.float32) == level.astype(np.float32)
            if not exact.all():
                raise InputError(
                    f"expected levels that float16 can hold, as 2, 3, 4, 5, 8, 9, 16, 17 .. have; "
                    f"field {field} has {n}"
                )
            books[field, :, 0] = np.concatenate([level, np.repeat(level[-1:], size - n)])
        stages.append(books)
        return to_core(stages)


class AnnealedFSQ(_Finite):
    """FSQ with a temperature T that falls in training from coarse and smooth to fine and sharp.

    ::

        b = floor(L / 2) tanh(z / T),   quantized = round(b / T) T        (straight-through)
        loss = mean (z - quantized)^2 / T  -  entropy_weight * entropy of the levels, in bits

    Steps are T wide, so the number of levels, 2 floor(floor(L / 2) / T) + 1, *grows* as T falls:
    tenfold from 1.0 to 0.1. ``alphabet_sizes`` follows; to compare at equal rate, compare bits.
    The entropy is that of the batch's mean soft assignment to the present levels, which has a
    gradient; it spreads latents over levels.

    Parameters
    ----------
    levels, dim, nonfinite : as for ``FSQ``; L is the number of levels at T = 1 (an even L counts as
        the odd number above it, for the grid has 0 in its middle).
    temperature, final_temperature : T at the start and the end; exponential between, see
        ``set_progress``.
    decay : of the running counts, sums and means of each level.
    entropy_weight : 0 leaves the entropy out.

    Attributes
    ----------
    counts, sums : (n_latent, most levels), running means of how many latents took a level, and of
        their sum; ``means`` are the levels' centres of mass. At T = 1 only: other temperatures have
        other levels; they restart when T changes by a level.
    """

    counts: Tensor
    sums: Tensor
    temperature: Tensor
    extent: Tensor

    def __init__(
        self,
        levels: int | Sequence[int],
        dim: int | None = None,
        *,
        temperature: float = 1.0,
        final_temperature: float = 0.1,
        decay: float = 0.99,
        entropy_weight: float = 0.1,
        nonfinite: Nonfinite = "ignore",
    ) -> None:
        super().__init__(check_levels(levels, dim), dim, nonfinite)
        self.first = check_number("temperature", temperature, 1e-2, 1e2)
        self.last = check_number("final_temperature", final_temperature, 1e-2, self.first)
        self.decay = check_number("decay", decay, 0.0, 1.0)
        self.entropy_weight = check_number("entropy_weight", entropy_weight, 0.0)
        half = [n // 2 for n in self.levels]
        self.register_buffer("extent", torch.tensor(half, dtype=torch.float32), persistent=False)
        self.register_buffer("temperature", torch.tensor(self.last))
        self._now = self.last
        self._count_fields()
        self.register_buffer("counts", torch.zeros(self.hits.shape))
        self.register_buffer("sums", torch.zeros(self.hits.shape))
        self.set_progress(0.0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._now = float(self.temperature)

    def set_progress(self, fraction: float) -> None:
        """T for this fraction of training, 0..1: T_0 (T_1 / T_0)^fraction."""
        before = self._reach() if self._now else []
        fraction = check_number("fraction", fraction, 0.0, 1.0)
        self._now = self.first * (self.last / self.first) ** fraction
        self.temperature.fill_(self._now)
        if self._reach() != before:
            for statistic in (self.counts, self.sums, self.hits):
                statistic.zero_()

    def _reach(self) -> list[int]:
        # the half width is reached by the tanh only at infinity; 1e-6 forgives its rounding
        return [int(n // 2 / self._now + 1e-6) for n in self.levels]

    @property
    def alphabet_sizes(self) -> list[int]:
        """Levels of each number at the present temperature."""
        return [2 * reach + 1 for reach in self._reach()]

    def _count_fields(self) -> None:
        most = max(2 * int(n // 2 / self.last + 1e-6) + 1 for n in self.levels)
        self.register_buffer("hits", torch.zeros(self.n_latent, most, dtype=torch.int64))

    def _indices(self, bounded: Tensor) -> Tensor:
        reach = torch.tensor(self._reach(), device=bounded.device)
        k = (bounded.detach().nan_to_num() / self._now).round()
        return (k.clamp(min=-reach, max=reach) + reach).long()

    def _quantize(self, z: Tensor) -> Output:
        t = self._now
        bounded = self.extent * torch.tanh(z / t)
        codes = self._indices(bounded)
        latent = straight_through(bounded, self._latent(codes))
        loss = (z - latent.detach()).square().mean() / t
        if self.entropy_weight:
            loss = loss - self.entropy_weight * self.entropy(bounded)
        if self.training:
            with torch.no_grad():
                self._learn(bounded.detach(), codes)
        return latent, codes, loss

    def _latent(self, codes: Tensor) -> Tensor:
        reach = torch.tensor(self._reach(), device=codes.device)
        return (codes - reach).float() * self._now

    def entropy(self, bounded: Tensor) -> Tensor:
        """Bits a number that levels would cost, mean over the latent, by soft assignment of bounded
        latents (.., n_latent); at most log2 of the levels. O(n n_latent levels)."""
        rows = bounded.reshape(-1, self.n_latent, 1) / self._now
        reach = max(self._reach())
        level = torch.arange(-reach, reach + 1, device=bounded.device)
        p = torch.softmax(-2.0 * (rows - level).square(), dim=-1).mean(dim=0)
        return -_xlogx(p).sum(dim=-1).mean() / math.log(2)

    def _learn(self, bounded: Tensor, codes: Tensor) -> None:
        n, width = self.hits.shape
        flat = (codes.reshape(-1, n) + torch.arange(n, device=codes.device) * width).flatten()
        rows = torch.stack([torch.ones_like(bounded).flatten(), bounded.nan_to_num().flatten()])
        both = torch.zeros(2, n * width, device=codes.device).index_add_(1, flat, rows)
        if is_distributed():
            torch.distributed.all_reduce(both)
        self.counts.mul_(self.decay).add_(both[0].view(n, width), alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(both[1].view(n, width), alpha=1 - self.decay)

    @property
    def means(self) -> Tensor:
        """(n_latent, most levels): mean of the latents that took each level; 0 for unused ones."""
        return self.sums / self.counts.clamp(min=1e-12) * (self.counts > 0)


class AdaptiveFSQ(_Finite):
    """FSQ whose number of levels follows how complex each vector is.

    ::

        c = log of the spread of z,  a = sigmoid(gain (c - running mean of c) + bias)
        L = min_levels + round(a (max_levels - min_levels)),   then FSQ with L levels

    Flat vectors get few levels, busy ones many. gain and bias are learned: the half width of the
    bound is a smooth function of a, and rounding L lets the gradient through; a penalty
    ``rate_weight`` times the mean bits a number keeps L from growing always. Give them their own
    learning rate: ``optimizer = Adam(model.parameter_groups(1e-3))`` (1e-4 for these).

    The first field of the codes is L - min_levels, so a decoder knows it.
    """

    mean_complexity: Tensor

    def __init__(
        self,
        levels: tuple[int, int] = (3, 11),
        dim: int = 64,
        *,
        rate_weight: float = 0.01,
        decay: float = 0.99,
        nonfinite: Nonfinite = "ignore",
    ) -> None:
        low, high = check_levels(levels, None) if len(levels) == 2 else (0, 0)
        if not 2 <= low < high:
            raise InputError(f"expected levels (least, most) with 2 <= least < most, got {levels}")
        self.low, self.high = low, high
        super().__init__([high] * check_count("dim", dim, 1), dim, nonfinite)
        self.rate_weight = check_number("rate_weight", rate_weight, 0.0)
        self.decay = check_number("decay", decay, 0.0, 1.0)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("mean_complexity", torch.tensor(0.0))
        self._count_fields()

    def structure(self) -> dict[str, Any]:
        """Levels and width."""
        return super().structure() | {"least": self.low}

    @property
    def alphabet_sizes(self) -> list[int]:
        """The choices of L, then the most levels for each number."""
        return [self.high - self.low + 1, *self.levels]

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """For an optimizer: gain and bias at a learning rate of 1e-4, whatever ``rate`` is."""
        return [{"params": [self.gain, self.bias], "lr": min(rate, ADAPTIVE_RATE)}]

    def _half_and_levels(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of each vector (.., 1), as a number with a gradient."""
        complexity = torch.log(z.std(dim=-1, keepdim=True, correction=0) + 1e-6)
        if self.training:
            with torch.no_grad():
                mean = complexity.detach().nan_to_num().mean()
                if is_distributed():
                    torch.distributed.all_reduce(mean)
                    mean /= torch.distributed.get_world_size()
                self.mean_complexity.lerp_(mean, 1 - self.decay)
        share = torch.sigmoid(self.gain * (complexity - self.mean_complexity) + self.bias)
        wanted = self.low + share * (self.high - self.low)
        levels = straight_through(wanted, wanted.detach().nan_to_num(nan=self.low).round())
        return (levels - 1) * (1 + 1e-3) / 2, levels

    def _quantize(self, z: Tensor) -> Output:
        half, levels = self._half_and_levels(z)
        exact = levels.detach().round()
        offset = torch.where(exact % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half.detach())
        bounded = half * torch.tanh(z + shift) - offset
        width = torch.floor(exact / 2)
        rounded = straight_through(bounded, bounded.round())
        codes = (bounded.detach().nan_to_num().round() + width).long()
        choice = (exact - self.low).long()
        loss = self.rate_weight * torch.log2(levels).mean()
        return rounded / width, torch.cat([choice, codes], dim=-1), loss

    def _latent(self, codes: Tensor) -> Tensor:
        width = torch.div(codes[..., :1] + self.low, 2, rounding_mode="floor")
        return (codes[..., 1:] - width) / width


class HierarchicalFSQ(_Finite):
    """Several FSQ in turn, each on what the ones before left, weighted by learned importance.

    ::

        r_1 = tanh z,  q_i = round of r_i s_i to L levels in [-1, 1],  r_(i+1) = r_i - w_i q_i / s_i
        quantized = sum w_i q_i / s_i,   s_i = (L - 1)^(i - 1)

    Each level refines by the factor L - 1 that the one before left. The importance weights w = n
    softmax(a) start at 1 and are learned through the sum; what early levels lose, later ones see in
    their residual.
    """

    def __init__(
        self,
        levels: int,
        dim: int,
        n_hierarchy: int = 2,
        *,
        nonfinite: Nonfinite = "ignore",
    ) -> None:
        super().__init__(check_levels(levels, dim), dim, nonfinite)
        self.n_hierarchy = check_count("n_hierarchy", n_hierarchy, 1, 8)
        self.importance = nn.Parameter(torch.zeros(n_hierarchy))
        self._count_fields()

    def structure(self) -> dict[str, Any]:
        """Levels, width and depth."""
        return super().structure() | {"n_hierarchy": self.n_hierarchy}

    @property
    def alphabet_sizes(self) -> list[int]:
        """Levels of each number, for one level of the hierarchy after the other."""
        return self.levels * self.n_hierarchy

    def weights(self) -> Tensor:
        """(n_hierarchy,) importance weights, summing to their number."""
        return torch.softmax(self.importance, dim=0) * self.n_hierarchy

    def _quantize(self, z: Tensor) -> Output:
        n = self.levels[0]
        bounded = torch.tanh(z)
        total, weights = torch.zeros_like(bounded), self.weights()
        fields, scale = [], 1.0
        for i in range(self.n_hierarchy):
            residual = ((bounded - total.detach()) * scale).detach().nan_to_num()
            k = ((residual.clamp(-1, 1) + 1) * ((n - 1) / 2)).round()
            fields.append(k.long())
            total = total + weights[i] * (k * (2 / (n - 1)) - 1) / scale
            scale *= n - 1
        # to z straight through, and to the weights through the sum
        quantized = total + (bounded - bounded.detach())
        loss = (bounded.detach() - total).square().mean()
        return quantized, torch.cat(fields, dim=-1), loss

    def _latent(self, codes: Tensor) -> Tensor:
        n, scale = self.levels[0], 1.0
        weights = self.weights()
        total = torch.zeros(*codes.shape[:-1], self.n_latent, device=codes.device)
        for i, k in enumerate(torch.split(codes, self.n_latent, dim=-1)):
            total = total + weights[i] * (k.float() * (2 / (n - 1)) - 1) / scale
            scale *= n - 1
        return total


class LFQ(_Finite):
    """Lookup-free quantization: the sign of each number, and a loss on the entropy of the bits.

    ::

        q = sign(z),  p = sigmoid(2 z / T) for each bit
        loss = entropy_weight (mean H(p) - diversity_weight H(mean p)) + commitment |z - sg[q]|^2

    Each vector is to be sure of its bits, all vectors together to use both values. Bits are taken
    as independent, so entropies are sums over bits (the paper's factorised form): exact for one
    vector, an upper bound for the mean.

    Parameters
    ----------
    n_bits : numbers of the latent, each one bit; dim : width of the vectors.
    """

    def __init__(
        self,
        n_bits: int,
        dim: int | None = None,
        *,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        commitment_cost: float = 0.25,
        temperature: float = 1.0,
        nonfinite: Nonfinite = "ignore",
    ) -> None:
        super().__init__([2] * check_count("n_bits", n_bits, 1, 64), dim, nonfinite)
        self.entropy_weight = check_number("entropy_weight", entropy_weight, 0.0)
        self.diversity_weight = check_number("diversity_weight", diversity_weight, 0.0)
        self.commitment_cost = check_number("commitment_cost", commitment_cost, 0.0)
        self.temperature = check_number("temperature", temperature, 1e-6)
        self._count_fields()

    def _quantize(self, z: Tensor) -> Output:
        codes = (z.detach() > 0).long()
        signs = self._latent(codes)
        p = torch.sigmoid(2 * z / self.temperature).flatten(0, -2)
        sure, diverse = _bit_entropy(p).mean(dim=0).sum(), _bit_entropy(p.mean(dim=0)).sum()
        loss = self.entropy_weight * (sure - self.diversity_weight * diverse)
        loss = loss + self.commitment_cost * (z - signs).square().mean()
        return straight_through(z, signs), codes, loss

    def _latent(self, codes: Tensor) -> Tensor:
        return codes.float() * 2 - 1

    def index(self, codes: Tensor) -> Tensor:
        """One number (..) for codes (.., n_bits), n_bits <= 62; the first bit is the lowest."""
        if self.n_latent > 62:
            raise InputError(f"{self.n_latent} bits have no int64 index")
        check_codes(codes, self.levels)
        return (codes << torch.arange(self.n_latent, device=codes.device)).sum(dim=-1)


def _xlogx(p: Tensor) -> Tensor:
    """p log p, with a finite gradient at 0, to which a softmax or sigmoid can round."""
    return p * p.clamp(min=1e-12).log()


def _bit_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of bits that are 1 with probability p."""
    return -(_xlogx(p) + _xlogx(1 - p))
