"""VectorQuantizer: one codebook, the bottleneck of a VQ-VAE."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import InputError
from ..polar import PolarQuantizer
from .codebook import Codebook, CodebookOptions, check_choice, check_number, perplexity
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


class Quantized(NamedTuple):
    """What ``VectorQuantizer.quantize`` returns."""

    quantized: Tensor  # like the inputs
    codes: Tensor  # int64, the inputs' shape without channels
    loss: Tensor  # scalar float32
    perplexity: Tensor  # scalar float32


class VectorQuantizer(nn.Module):
    """Replace each vector by the nearest of ``num_embeddings`` codewords.

    ::

        inputs x (B, H, W, C) ── nearest codeword e_k ── quantized (B, H, W, C)
                                  k (B, H, W)
        loss = commitment_cost |x - sg[e_k]|^2      + |sg[x] - e_k|^2 with learning="gradient"

    The first term keeps the encoder near its codewords; codewords follow it by running means (or
    by the second term). The gradient of ``quantized`` goes to ``inputs`` as if nothing had been
    done, or turned by the rotation trick.

    Parameters
    ----------
    num_embeddings, embedding_dim : K codewords of C numbers.
    commitment_cost : beta, in (0, 2] as a rule.
    decay, epsilon : of the running means.
    cosine : nearest by angle; inputs are put on the unit sphere first, where codewords live.
    gradient : "straight_through" or "rotation" (arXiv 2410.06424).
    layout : "channels_last" (.., C), or "channels_first" (B, C, ..).
    nonfinite : "raise" names the first NaN or infinity in the inputs (a GPU waits for the answer);
        "ignore" keeps them out of the codebook, and the loss shows them.
    options : how the codebook is learned, see ``CodebookOptions``.

    Cost of a forward: O(n K C) for n vectors.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", 2017;
    Razavi et al., "Generating diverse high-fidelity images with VQ-VAE-2", 2019.

    >>> import torch
    >>> vq = VectorQuantizer(16, 4)
    >>> quantized, loss, perplexity = vq(torch.randn(2, 8, 8, 4))
    >>> quantized.shape, vq.encode(quantized).shape
    (torch.Size([2, 8, 8, 4]), torch.Size([2, 8, 8]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        *,
        cosine: bool = False,
        gradient: Gradient = "straight_through",
        layout: Literal["channels_last", "channels_first"] = "channels_last",
        nonfinite: Nonfinite = "ignore",
        **options: Unpack[CodebookOptions],
    ) -> None:
        super().__init__()
        self.codebook = Codebook(
            1,
            num_embeddings,
            embedding_dim,
            decay=decay,
            epsilon=epsilon,
            norm=1.0 if cosine else None,
            **options,
        )
        self.num_embeddings, self.embedding_dim = self.codebook.size, self.codebook.dim
        self.commitment_cost = check_number("commitment_cost", commitment_cost, 0.0)
        self.cosine = bool(cosine)
        self.gradient = check_choice("gradient", gradient, ("straight_through", "rotation"))
        self.layout = check_choice("layout", layout, ("channels_last", "channels_first"))
        self.nonfinite = check_choice("nonfinite", nonfinite, ("ignore", "raise"))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(quantized, loss, perplexity) of inputs (.., C), or (B, C, ..) with channels first.

        mask: bool, the inputs' shape without channels; vectors where it is False are quantized,
        but count neither in the loss nor for the codebook. quantized has the inputs' shape and
        dtype; loss and perplexity (codewords used evenly by this batch) are float32 scalars.
        InputError for another channel count, dtype or mask; NotFittedError in evaluation before a
        first batch that the initialisation waits for.
        """
        result = self.quantize(inputs, mask)
        return result.quantized, result.loss, result.perplexity

    def quantize(self, inputs: Tensor, mask: Tensor | None = None) -> Quantized:
        """``forward`` with the codes."""
        rows, shape = self._rows(inputs)
        kept = check_mask(mask, shape)
        target = normalize(rows, dim=-1) if self.cosine else rows
        book = self.codebook
        if self.training and not book._is_ready:
            book.initialise((target if kept is None else target[kept])[None])
        codes = book.assign(target[None])
        words = book.look_up(codes)[0]
        loss = self.commitment_cost * mean_square(target, words.detach(), kept)
        if book.learning == "gradient":
            loss = loss + mean_square(words, target.detach(), kept)
            if book.orthogonal_weight:
                loss = loss + book.orthogonal_loss()
        quantized = pass_gradient(target, words, self.gradient)
        if self.training:
            counts = book.learn(target[None], codes, None if kept is None else kept[None])
        else:
            counts, _ = book._sums(codes, target.detach().float()[None], kept)
        return Quantized(
            self._restored(quantized, inputs), codes[0].view(shape), loss, perplexity(counts)[0]
        )

    # ---------------------------------------------------------------------------- codes alone

    def encode(self, inputs: Tensor) -> Tensor:
        """Codes of inputs, int64 without the channel axis, as ``to_quantizer`` finds them."""
        rows, shape = self._rows(inputs)
        rows = normalize(rows, dim=-1) if self.cosine else rows
        return self.codebook.assign_exactly(rows[None])[0].view(shape)

    def decode(self, codes: Tensor) -> Tensor:
        """The codewords of integer codes of any shape: (.., C) float32, or (B, C, ..) with channels
        first. InputError for a code out of range."""
        check_codes(codes.unsqueeze(-1) if isinstance(codes, Tensor) else codes, self._sizes())
        self.codebook._check_ready()
        words = self.codebook.look_up(codes.reshape(1, -1).long())
        out = words.view(*codes.shape, self.embedding_dim)
        return out.movedim(-1, 1) if self.layout == "channels_first" else out

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """``decode``, by its original name."""
        return self.decode(indices)

    def get_distance_matrix(self, inputs: Tensor) -> Tensor:
        """Squared distances of all vectors to all codewords: (n, K) float32, at least 0."""
        rows, _ = self._rows(inputs)
        rows = (normalize(rows, dim=-1) if self.cosine else rows).float()
        words = self.embedding
        distances = rows.square().sum(dim=-1, keepdim=True) + words.square().sum(dim=-1)
        return torch.addmm(distances, rows, words.T, alpha=-2).clamp(min=0.0)

    @property
    def embedding(self) -> Tensor:
        """The codewords, (K, C) float32."""
        return self.codebook.codewords()[0]

    def _sizes(self) -> list[int]:
        return [self.num_embeddings]

    def _rows(self, inputs: Tensor) -> tuple[Tensor, torch.Size]:
        """Inputs as (n, C), and their shape without channels."""
        first = self.layout == "channels_first"
        check_input(inputs, self.embedding_dim, self.nonfinite, axis=1 if first else -1)
        last = inputs.movedim(1, -1) if first else inputs
        return last.reshape(-1, self.embedding_dim), last.shape[:-1]

    def _restored(self, rows: Tensor, inputs: Tensor) -> Tensor:
        if self.layout == "channels_last":
            return rows.view(inputs.shape)
        shape = (inputs.shape[0], *inputs.shape[2:], inputs.shape[1])
        return rows.view(shape).movedim(-1, 1)

    # ------------------------------------------------------------------------ the numpy core

    def to_quantizer(self) -> PolarQuantizer:
        """This codebook as a fitted ``polarpack.PolarQuantizer`` of one head and one stage.

        Codewords here are first rounded to what files store (float16 times a power of two; 2^-12
        of the largest), so that ``encode`` and ``decode`` of both sides agree bit for bit. With
        ``cosine`` the quantizer expects rows of unit norm. NotFittedError before first values.
        """
        (book,) = round_codebooks([self.codebook])
        return to_core([book])

    @classmethod
    def from_quantizer(cls, quantizer: PolarQuantizer, **options: Any) -> VectorQuantizer:
        """The inverse, for a PolarQuantizer of one codebook without radius and rotation; options
        go to the constructor. InputError for any other."""
        _, stages = from_core(quantizer, n_heads=1)
        if len(stages) != 1:
            raise InputError(f"expected a quantizer of one stage, got {len(stages)}")
        (book,) = stages
        vq = cls(book.shape[1], book.shape[2], **options)
        vq.codebook.set_codewords(torch.from_numpy(book))
        return vq
