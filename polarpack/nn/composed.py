"""Codebooks put together: one after the other (residual), side by side (product), and polar."""

from __future__ import annotations

import math
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import InputError
from ..polar import PolarQuantizer
from .codebook import (
    Codebook,
    CodebookOptions,
    Float32Module,
    check_choice,
    check_count,
    check_number,
    from_first_process,
    is_distributed,
)
from .convert import from_core, round_codebooks, to_core
from .gradients import (
    Gradient,
    Nonfinite,
    check_codes,
    check_input,
    check_mask,
    mean_square,
    pass_gradient,
)

Output = tuple[Tensor, Tensor, Tensor]
QUANTILE_ROWS = 1 << 14  # radii that place the first levels
LEFT_OUT = -1  # the code of a stage that dropout left out


class _Composed(nn.Module):
    """What the modules here share: (.., dim) in; (quantized, codes (.., n_fields), loss) out."""

    dim: int

    def __init__(self, dim: int, commitment_cost: float, gradient: str, nonfinite: str) -> None:
        super().__init__()
        self.dim = check_count("dim", dim, 1, 1 << 20)
        self.commitment_cost = check_number("commitment_cost", commitment_cost, 0.0)
        self.gradient = check_choice("gradient", gradient, ("straight_through", "rotation"))
        self.nonfinite = check_choice("nonfinite", nonfinite, ("ignore", "raise"))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Output:
        """(quantized, codes, loss) of inputs (.., dim).

        quantized is like the inputs; codes (.., n_fields) are int64; loss is a float32 scalar, the
        sum over stages of what ``VectorQuantizer`` would say. mask: bool (..), False where a vector
        counts neither in the loss nor for the codebooks. InputError for another width, dtype or
        mask; NotFittedError in evaluation before a first batch the initialisation waits for.
        """
        check_input(inputs, self.dim, self.nonfinite)
        rows = inputs.reshape(-1, self.dim)
        kept = check_mask(mask, inputs.shape[:-1])
        words, codes, loss = self._quantize(rows, kept)
        quantized = pass_gradient(rows, words, self.gradient)
        return quantized.view(inputs.shape), codes.view(*inputs.shape[:-1], -1), loss

    def encode(self, inputs: Tensor) -> Tensor:
        """Codes (.., n_fields) int64 of inputs (.., dim), as ``to_quantizer`` finds them."""
        check_input(inputs, self.dim, self.nonfinite)
        with torch.no_grad():
            codes = self._encode(inputs.detach().float().reshape(-1, self.dim))
        return codes.view(*inputs.shape[:-1], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (.., dim) float32 of codes (.., n_fields). InputError for one out of range."""
        sizes = self.alphabet_sizes
        check_codes(codes, sizes, self._least_code)
        return self._decode(codes.reshape(-1, len(sizes)).long()).view(*codes.shape[:-1], self.dim)

    _least_code = 0

    @property
    def alphabet_sizes(self) -> list[int]:
        """How many values each field of the codes has."""
        raise NotImplementedError

    def _quantize(self, x: Tensor, kept: Tensor | None) -> Output:
        raise NotImplementedError

    def _encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _stage(
        self, book: Codebook, x: Tensor, kept: Tensor | None, scale: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One codebook on x (heads, n, width): codewords, codes (heads, n), and the loss times
        scale; learns in training."""
        if self.training and not book._is_ready:
            book.initialise(x if kept is None else x[:, kept])
        codes = book.assign(x)
        words = book.look_up(codes)
        loss = self._loss(book, x, words, kept, scale)
        if self.training:
            book.learn(x, codes, None if kept is None else kept[None])
        return words, codes, loss

    def _loss(
        self, book: Codebook, x: Tensor, words: Tensor, kept: Tensor | None, scale: float = 1.0
    ) -> Tensor:
        every = None if kept is None else kept.repeat(book.heads)
        a, b = x.flatten(0, 1), words.flatten(0, 1)
        loss = scale * self.commitment_cost * mean_square(a, b.detach(), every)
        if book.learning == "gradient":
            loss = loss + scale * mean_square(b, a.detach(), every)
            if book.orthogonal_weight:
                loss = loss + book.orthogonal_loss()
        return loss


class ResidualVQ(_Composed):
    """Each stage quantizes what the stages before it have left.

    ::

        r_1 = x,   r_(s+1) = r_s - e_s(r_s),   quantized = sum of e_s

    Parameters
    ----------
    dim, codebook_size, num_quantizers : vectors, codewords of a stage, stages.
    shared_codebook : all stages use, and teach, one codebook.
    stage_dropout : in training, the chance that a batch uses only its first stages, a random number
        of them; any prefix of the codes is then worth decoding (Zeghidour et al., "SoundStream",
        2021, section III-C). Codes of stages left out are -1, which ``decode`` takes too.
    commitment_cost, gradient, nonfinite : as for ``VectorQuantizer``. options: ``CodebookOptions``.

    Cost of a forward: O(n num_quantizers codebook_size dim).

    Source: Lee et al., "Autoregressive image generation using residual quantization", CVPR 2022.

    >>> import torch
    >>> quantized, codes, loss = ResidualVQ(8, 16, 3)(torch.randn(2, 5, 8))
    >>> quantized.shape, codes.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 5, 3]))
    """

    _least_code = LEFT_OUT

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_quantizers: int,
        *,
        shared_codebook: bool = False,
        stage_dropout: float = 0.0,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        gradient: Gradient = "straight_through",
        nonfinite: Nonfinite = "ignore",
        **options: Unpack[CodebookOptions],
    ) -> None:
        super().__init__(dim, commitment_cost, gradient, nonfinite)
        self.num_quantizers = check_count("num_quantizers", num_quantizers, 1, 1 << 10)
        self.codebook_size = check_count("codebook_size", codebook_size, 1)
        self.shared_codebook = bool(shared_codebook)
        self.stage_dropout = check_number("stage_dropout", stage_dropout, 0.0, 1.0)
        n_books = 1 if shared_codebook else num_quantizers
        self.codebooks = nn.ModuleList(
            Codebook(1, codebook_size, dim, decay=decay, epsilon=epsilon, **options)
            for _ in range(n_books)
        )

    def _books(self) -> list[Codebook]:
        books: list[Any] = list(self.codebooks)
        return books * (self.num_quantizers if self.shared_codebook else 1)

    @property
    def alphabet_sizes(self) -> list[int]:
        """``codebook_size`` for each stage."""
        return [self.codebook_size] * self.num_quantizers

    def _n_used(self, x: Tensor) -> int:
        """Stages of this batch: the same in all processes, which sum their statistics."""
        if not (self.training and self.stage_dropout):
            return self.num_quantizers
        draw = torch.rand(2, device=x.device if is_distributed() else "cpu")
        drop, share = from_first_process(draw).tolist()
        n_first = 1 + min(int(share * self.num_quantizers), self.num_quantizers - 1)
        return n_first if drop < self.stage_dropout else self.num_quantizers

    def _quantize(self, x: Tensor, kept: Tensor | None) -> Output:
        n_used = self._n_used(x)
        total = torch.zeros_like(x, dtype=torch.float32)
        loss = total.new_zeros(())
        codes: list[Tensor] = []
        for stage, book in enumerate(self._books()):
            if stage >= n_used:
                codes.append(torch.full_like(codes[0], LEFT_OUT))
                continue
            words, code, its_loss = self._stage(book, (x.float() - total.detach())[None], kept)
            total, loss = total + words[0], loss + its_loss
            codes.append(code[0])
        return total, torch.stack(codes, dim=-1), loss

    def _encode(self, x: Tensor) -> Tensor:
        codes: list[Tensor] = []
        total = torch.zeros_like(x)
        for book in self._books():
            codes.append(book.assign_exactly((x - total)[None])[0])
            total = total + book.look_up(codes[-1][None])[0]
        return torch.stack(codes, dim=-1)

    def _decode(self, codes: Tensor) -> Tensor:
        total = torch.zeros(len(codes), self.dim, device=codes.device)
        for stage, book in enumerate(self._books()):
            book._check_ready()
            used = codes[:, stage] != LEFT_OUT
            words = book.look_up(codes[None, :, stage].clamp(min=0))[0]
            total = torch.where(used[:, None], total + words, total)
        return total

    def decode_stages(self, codes: Tensor) -> Tensor:
        """What each stage adds: (num_quantizers, .., dim); its running sum over the first axis are
        the reconstructions with 1, 2, .. stages."""
        check_codes(codes, self.alphabet_sizes, LEFT_OUT)
        flat = codes.reshape(-1, self.num_quantizers).long()
        parts = []
        for stage, book in enumerate(self._books()):
            code = flat[:, stage]
            words = book.look_up(code.clamp(min=0)[None])[0]
            parts.append(torch.where((code != LEFT_OUT)[:, None], words, torch.zeros_like(words)))
        return torch.stack(parts).view(-1, *codes.shape[:-1], self.dim)

    def to_quantizer(self) -> PolarQuantizer:
        """A fitted ``polarpack.PolarQuantizer`` of one head; codewords here are rounded to what it
        stores first, see ``VectorQuantizer.to_quantizer``."""
        books = round_codebooks(self.codebooks)  # type: ignore[arg-type]  # of Codebooks
        return to_core(books * (self.num_quantizers if self.shared_codebook else 1))

    @classmethod
    def from_quantizer(cls, quantizer: PolarQuantizer, **options: Any) -> ResidualVQ:
        """The inverse, for a PolarQuantizer of one head without radius and rotation, all stages of
        one size; options go to the constructor. InputError for any other."""
        _, stages = from_core(quantizer, n_heads=1)
        size, dim = _one_size(stages), stages[0].shape[2]
        vq = cls(dim, size, len(stages), **options)
        if vq.shared_codebook and len(stages) > 1:
            raise InputError("expected shared_codebook=False: the stages have their own codebooks")
        for book, words in zip(vq._books(), stages, strict=True):
            book.set_codewords(torch.from_numpy(words))
        return vq


class ProductVQ(_Composed):
    """Vectors cut into ``heads`` slices, each with a codebook of its own.

    codebook_size^heads combinations at the price of ``heads`` codebooks. dim must be a multiple of
    heads. commitment_cost, gradient, nonfinite: as for ``VectorQuantizer``; options:
    ``CodebookOptions``. Cost of a forward: O(n codebook_size dim), one batched matrix product.

    Source: Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", TPAMI 2011.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        heads: int,
        *,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        gradient: Gradient = "straight_through",
        nonfinite: Nonfinite = "ignore",
        **options: Unpack[CodebookOptions],
    ) -> None:
        super().__init__(dim, commitment_cost, gradient, nonfinite)
        self.heads = _check_heads(dim, heads)
        width = dim // heads
        self.codebook = Codebook(
            heads, codebook_size, width, decay=decay, epsilon=epsilon, **options
        )
        self.codebook_size = self.codebook.size

    @property
    def alphabet_sizes(self) -> list[int]:
        """``codebook_size`` for each head."""
        return [self.codebook_size] * self.heads

    def _quantize(self, x: Tensor, kept: Tensor | None) -> Output:
        words, codes, loss = self._stage(self.codebook, _split(x, self.heads), kept)
        return _join(words), codes.T, loss

    def _encode(self, x: Tensor) -> Tensor:
        return self.codebook.assign_exactly(_split(x, self.heads)).T

    def _decode(self, codes: Tensor) -> Tensor:
        self.codebook._check_ready()
        return _join(self.codebook.look_up(codes.T))

    def to_quantizer(self) -> PolarQuantizer:
        """A fitted ``polarpack.PolarQuantizer`` of one stage; codewords here are rounded to what it
        stores first, see ``VectorQuantizer.to_quantizer``."""
        return to_core(round_codebooks([self.codebook]))

    @classmethod
    def from_quantizer(cls, quantizer: PolarQuantizer, **options: Any) -> ProductVQ:
        """The inverse, for a PolarQuantizer of one stage and equal heads without radius and
        rotation; options go to the constructor. InputError for any other."""
        _, stages = from_core(quantizer)
        if len(stages) != 1:
            raise InputError(f"expected a quantizer of one stage, got {len(stages)}")
        heads, size, width = stages[0].shape
        vq = cls(heads * width, size, heads, **options)
        vq.codebook.set_codewords(torch.from_numpy(stages[0]))
        return vq


class PolarVQ(_Composed):
    """Radius and direction apart; the direction by heads x residual stages of codebooks.

    ::

        r = |x| ── one of radius_levels, learned in log r ─────────────── r_hat
        d = x / r ── heads ── stage 1, by angle ── stage 2, 3, .. ─────── d_hat
        quantized = r_hat d_hat          codes (.., 1 + stages heads): radius, then stage by stage

    A head of a unit vector has a norm near 1 / sqrt(heads), at which the codewords of stage 1 are
    kept; the loss is taken times ``heads``, so that its weight does not depend on their number.

    Parameters
    ----------
    dim, codebook_size, heads, stages : dim a multiple of heads.
    radius_levels : 2 or more, level 0 being the radius 0.
    depth_unit : None, or the radius-adaptive depth: the error of a row is r |d - d_hat|, so small
        rows need fewer stages for the same absolute error. With the unit D a row gets one stage if
        r_hat <= 2.5 D, one more for each further factor of 1.9, and none at radius 0. Nothing has
        to be sent, for the radius says it. Codes of stages beyond are 0, and codeword 0 of every
        stage but the first stays zero, so that a decoder adds all stages without asking.
    commitment_cost, gradient, nonfinite : as for ``VectorQuantizer``. options: ``CodebookOptions``.

    Cost of a forward: O(n stages codebook_size dim).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        heads: int,
        stages: int,
        *,
        radius_levels: int = 16,
        depth_unit: float | None = None,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        gradient: Gradient = "straight_through",
        nonfinite: Nonfinite = "ignore",
        **options: Unpack[CodebookOptions],
    ) -> None:
        super().__init__(dim, commitment_cost, gradient, nonfinite)
        self.heads = _check_heads(dim, heads)
        self.stages = check_count("stages", stages, 1, 1 << 10)
        if depth_unit is not None:
            depth_unit = check_number("depth_unit", depth_unit, 1e-30)
        self.depth_unit = depth_unit
        self.radius = RadiusLevels(radius_levels, decay=decay)
        self.codebooks = nn.ModuleList(
            Codebook(
                heads,
                codebook_size,
                dim // heads,
                decay=decay,
                epsilon=epsilon,
                norm=heads**-0.5 if stage == 0 else None,
                zero_first=stage > 0 and depth_unit is not None,
                **options,
            )
            for stage in range(stages)
        )
        self.codebook_size = check_count("codebook_size", codebook_size, 1)

    def _books(self) -> list[Codebook]:
        return list(self.codebooks)  # type: ignore[arg-type]  # of Codebooks

    @property
    def alphabet_sizes(self) -> list[int]:
        """Radius levels, then ``codebook_size`` for each stage and head."""
        return [self.radius.n_levels] + [self.codebook_size] * (self.stages * self.heads)

    def depth(self, radius: Tensor) -> Tensor:
        """Stages (int64) used at a quantized radius."""
        if self.depth_unit is None:
            return torch.full_like(radius, self.stages, dtype=torch.int64)
        steps = torch.log(radius.clamp(min=1e-30) / (2.5 * self.depth_unit)) / math.log(1.9)
        stages = (1 + steps.ceil()).clamp(1, self.stages)
        return torch.where(radius > 0, stages, torch.zeros_like(stages)).long()

    def _quantize(self, x: Tensor, kept: Tensor | None) -> Output:
        x = x.float()
        r = x.norm(dim=-1)
        direction = _split(normalize(x, dim=-1), self.heads)
        r_code = self.radius(r, kept)
        r_hat = self.radius.decode(r_code)
        depth = self.depth(r_hat)
        total = torch.zeros_like(direction)
        loss = self.commitment_cost * mean_square(r[:, None], r_hat[:, None], kept)
        fields = [r_code]
        for stage, book in enumerate(self._books()):
            used = depth > stage
            target = direction - total.detach()
            teaches = used if kept is None else used & kept
            adaptive = self.depth_unit is not None
            words, codes, its_loss = self._stage(
                book, target, teaches if adaptive else kept, float(self.heads)
            )
            if adaptive:
                codes = torch.where(used, codes, torch.zeros_like(codes))
                words = torch.where(used[:, None], words, torch.zeros_like(words))
            total, loss = total + words, loss + its_loss
            fields += codes.unbind(0)
        return _join(total) * r_hat[:, None], torch.stack(fields, dim=-1), loss

    def _encode(self, x: Tensor) -> Tensor:
        # as polar.PolarQuantizer: the norm in float64, rounded once
        r = x.double().square().sum(dim=-1).sqrt().float()
        direction = _split(x / torch.where(r > 0, r, torch.ones_like(r))[:, None], self.heads)
        r_code = self.radius.assign(r)
        depth = self.depth(self.radius.decode(r_code))
        fields = [r_code]
        total = torch.zeros_like(direction)
        for stage, book in enumerate(self._books()):
            codes = book.assign_exactly(direction - total)
            if self.depth_unit is not None:
                codes = torch.where(depth > stage, codes, torch.zeros_like(codes))
            words = book.look_up(codes)
            total = total + words if stage else words
            fields += codes.unbind(0)
        return torch.stack(fields, dim=-1)

    def _decode(self, codes: Tensor) -> Tensor:
        total = torch.zeros(())
        for stage, book in enumerate(self._books()):
            book._check_ready()
            first = 1 + stage * self.heads
            words = book.look_up(codes[:, first : first + self.heads].T)
            total = total + words if stage else words
        return _join(total) * self.radius.decode(codes[:, 0])[:, None]

    def to_quantizer(self) -> PolarQuantizer:
        """A fitted ``polarpack.PolarQuantizer``; codewords here are rounded to what it stores
        first, see ``VectorQuantizer.to_quantizer``. With ``depth_unit`` it decodes these codes the
        same, but its own ``encode`` uses all stages: encode here.
        InputError where ``radius_levels`` is no power of two."""
        if self.radius.n_levels & (self.radius.n_levels - 1):
            raise InputError(f"expected a power of two radius levels, got {self.radius.n_levels}")
        levels = np.ascontiguousarray(self.radius.levels().cpu().numpy())
        return to_core(round_codebooks(self._books()), levels)

    @classmethod
    def from_quantizer(cls, quantizer: PolarQuantizer, **options: Any) -> PolarVQ:
        """The inverse, for a PolarQuantizer of a radius and equal heads and stages without
        rotation; options go to the constructor. InputError for any other."""
        levels, stages = from_core(quantizer, radius=True)
        if levels is None:  # from_core has seen to it
            raise InputError("expected a quantizer with a radius")
        heads, _, width = stages[0].shape
        size = _one_size(stages)
        vq = cls(heads * width, size, heads, len(stages), radius_levels=len(levels), **options)
        vq.radius.set_levels(torch.from_numpy(levels))
        for book, words in zip(vq._books(), stages, strict=True):
            book.set_codewords(torch.from_numpy(words))
        return vq


class RadiusLevels(Float32Module):
    """Levels of the radius, learned in its logarithm, for least relative error; level 0 is 0.

    The first training batch places them at its quantiles; then each is the running mean of the
    log r it stood for, as in ``Codebook``.
    """

    table: Tensor  # (n_levels,) float32
    counts: Tensor
    sums: Tensor
    ready: Tensor

    def __init__(self, n_levels: int, *, decay: float = 0.99) -> None:
        super().__init__()
        self.n_levels = check_count("radius_levels", n_levels, 2)
        self.decay = decay
        span = torch.linspace(-4.0, 4.0, n_levels - 1) if n_levels > 2 else torch.zeros(1)
        self.register_buffer("table", torch.cat([torch.zeros(1), span.exp()]))
        self.register_buffer("counts", torch.ones(n_levels - 1))
        self.register_buffer("sums", span.clone())
        self.register_buffer("ready", torch.tensor(False))
        self._is_ready = False

    def structure(self) -> dict[str, Any]:
        """The number of levels."""
        return {"n_levels": self.n_levels}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (key := prefix + "_extra_state") in state_dict:
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_ready = bool(self.ready)

    def levels(self) -> Tensor:
        """(n_levels,) float32, not decreasing; the first is 0."""
        return self.table

    def _set_logarithms(self, logarithms: Tensor) -> None:
        self.table[1:] = logarithms.exp()

    def set_levels(self, levels: Tensor) -> None:
        """Take over (n_levels,) sorted levels, the first of them 0."""
        if levels.shape != (self.n_levels,) or levels[0] != 0 or bool((levels.diff() < 0).any()):
            raise InputError(f"expected {self.n_levels} sorted levels from 0 on, got {levels}")
        with torch.no_grad():
            self.table.copy_(levels)
            self.counts.fill_(1.0)
            self.sums.copy_(levels[1:].clamp(min=1e-30).log())
            self.ready.fill_(True)
        self._is_ready = True

    def assign(self, r: Tensor) -> Tensor:
        """Index (n,) int64 of the level nearest by ratio; ties take the lowest."""
        levels = self.levels().double()
        between = (levels[1:-1] * levels[2:]).sqrt()
        return torch.bucketize(r.double(), torch.cat([levels[1:2] / 2, between]))

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes."""
        return self.levels()[codes]

    @torch.no_grad()
    def forward(self, r: Tensor, kept: Tensor | None = None) -> Tensor:
        """Codes of radii (n,); learns from those kept in training."""
        r = r.detach()
        if self.training and not self._is_ready:
            self._initialise(r if kept is None else r[kept])
        codes = self.assign(r)
        if self.training:
            self._learn(r, codes, kept)
        return codes

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _initialise(self, r: Tensor) -> None:
        positive = r[(r > 0) & torch.isfinite(r)]
        if positive.numel():  # else wait for a batch that has some
            few = positive[:: 1 + positive.numel() // QUANTILE_ROWS]
            places = (torch.arange(self.n_levels - 1, device=r.device) + 0.5) / (self.n_levels - 1)
            self.sums.copy_(from_first_process(torch.quantile(few.log(), places)))
            self._set_logarithms(self.sums)
            self.counts.fill_(1.0)
            self.ready.fill_(True)
            self._is_ready = True

    def _learn(self, r: Tensor, codes: Tensor, kept: Tensor | None) -> None:
        weight = ((codes > 0) & torch.isfinite(r)).float()
        weight = weight if kept is None else weight * kept
        log_r = torch.where(weight > 0, r, torch.ones_like(r)).log() * weight
        at = (codes - 1).clamp(min=0)
        both = torch.zeros(2, self.n_levels - 1, device=r.device)
        both.index_add_(1, at, torch.stack([weight, log_r]))
        if is_distributed():
            torch.distributed.all_reduce(both)
        self.counts.mul_(self.decay).add_(both[0], alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(both[1], alpha=1 - self.decay)
        means = self.sums / self.counts.clamp(min=1e-30)
        used = self.counts > 1e-6  # what was not used for long keeps its place
        means, order = torch.where(used, means, self.table[1:].clamp(min=1e-30).log()).sort()
        self._set_logarithms(means)
        self.counts.copy_(self.counts[order])
        self.sums.copy_(means * self.counts)


def _check_heads(dim: int, heads: int) -> int:
    heads = check_count("heads", heads, 1, 1 << 16)
    if check_count("dim", dim, 1, 1 << 20) % heads:
        raise InputError(f"expected dim to be a multiple of heads, got {dim} and {heads}")
    return heads


def _split(x: Tensor, heads: int) -> Tensor:
    """(n, d) -> (heads, n, d / heads)."""
    return x.view(len(x), heads, -1).transpose(0, 1)


def _join(x: Tensor) -> Tensor:
    """Inverse of ``_split``."""
    return x.transpose(0, 1).flatten(1)


def _one_size(stages: list[np.ndarray[Any, Any]]) -> int:
    sizes = {book.shape[1] for book in stages}
    if len(sizes) != 1:
        raise InputError(f"expected stages of one codebook size, got {sorted(sizes)}")
    return int(sizes.pop())
