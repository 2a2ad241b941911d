"""Entropy models of code maps: histograms, PixelSNAIL, and a block-autoregressive Transformer.

All predict codes (B, H, W) of a vocabulary, possibly given features of what is known already
(``condition``, (B, C, H, W)). ``logits`` predicts all positions of known codes at once, to train;
``run`` goes through them in coding order, with everything that does not change kept, and hands each
prediction to a coder: see ``coding`` for why encoder and decoder both do that.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, scaled_dot_product_attention

from polarpack.errors import InputError

from .coding import Coder, Floats
from .layers import fold_blocks, unfold_blocks

Feed = Literal["one_hot", "vectors"]


class HistogramPrior(nn.Module):
    """Each field by itself, by how often its codes came in training: order 0.

    ``counts`` (fields, vocabulary) int64. Codes (.., fields).
    """

    counts: Tensor

    def __init__(self, fields: int, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(fields, vocabulary, dtype=torch.int64))

    def learn(self, codes: Tensor) -> None:
        """Count codes (.., fields)."""
        fields, vocabulary = self.counts.shape
        offset = torch.arange(fields, device=codes.device) * vocabulary
        flat = codes.reshape(-1, fields) + offset
        self.counts += torch.bincount(flat.flatten(), minlength=fields * vocabulary).view_as(
            self.counts
        )

    def table(self) -> Floats:
        """Logits (fields, vocabulary) float32."""
        return np.log(self.counts.double().numpy() + 0.5).astype(np.float32)

    def bits(self, codes: Tensor) -> float:
        """Cross-entropy of codes (.., fields), in bits."""
        logits = torch.from_numpy(self.table()).double().log_softmax(dim=1)
        flat = codes.reshape(-1, len(logits))
        picked = logits[torch.arange(len(logits)), flat]
        return float(-picked.sum()) / math.log(2)

    def run(self, coder: Coder, n: int, codes: Tensor | None) -> Tensor:
        """Code n vectors of fields: (n, fields)."""
        fields = len(self.counts)
        rows = np.tile(np.arange(fields), n)
        given = None if codes is None else codes.reshape(-1).numpy()
        return torch.from_numpy(coder.code_by_row(self.table(), rows, given)).view(n, fields)


class CodeEmbedding(nn.Module):
    """Codes as a network's input: their one-hot vectors, or the codewords they stand for, both
    through one linear map."""

    words: Tensor

    def __init__(self, words: Tensor, channels: int, feed: Feed) -> None:
        super().__init__()
        if feed not in ("one_hot", "vectors"):
            raise InputError(f"expected feed 'one_hot' or 'vectors', got {feed!r}")
        self.feed = feed
        size, dim = words.shape
        self.register_buffer("words", words.detach().clone())
        width = size if feed == "one_hot" else dim
        self.map = nn.Linear(width, channels)
        if feed == "one_hot":
            nn.init.normal_(self.map.weight, std=0.5)

    def forward(self, codes: Tensor) -> Tensor:
        """(..) int64 -> (.., channels)."""
        if self.feed == "one_hot":  # a one-hot vector picks a column
            return nn.functional.embedding(codes, self.map.weight.T) + self.map.bias
        return cast(Tensor, self.map(self.words[codes]))


# ------------------------------------------------------------------------------------ PixelSNAIL


class CausalConv(nn.Module):
    """3x3 convolution over what is known at a position: three above, the left one, and itself
    unless ``strict``.

    ::

        1 1 1          weight (out, 5 in): the three above, left, centre
        1 c .          ``step`` keeps a padded map of its inputs and gathers the five
        . . .
    """

    def __init__(self, width_in: int, width_out: int, *, strict: bool = False) -> None:
        super().__init__()
        self.n_taps = 4 if strict else 5
        self.width_in = width_in
        self.map = nn.Linear(self.n_taps * width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in) -> (B, H, W, out)."""
        h, w = x.shape[1:3]
        padded = nn.functional.pad(x, (0, 0, 1, 1, 1, 0))
        above = [padded[:, :h, dx : dx + w] for dx in range(3)]
        beside = [padded[:, 1:, dx : dx + w] for dx in range(self.n_taps - 3)]
        return cast(Tensor, self.map(torch.cat(above + beside, dim=-1)))

    def start(self, b: int, h: int, w: int) -> Tensor:
        """The kept map, empty."""
        return torch.zeros(b, h + 1, w + 2, self.width_in)

    def step(self, kept: Tensor, x: Tensor | None, i: int, j: int) -> Tensor:
        """Output (B, out) at row i, column j; x (B, in): the input there (None if strict)."""
        if x is not None:
            kept[:, i + 1, j + 1] = x
        above = kept[:, i, j : j + 3].flatten(1)
        beside = kept[:, i + 1, j : j + self.n_taps - 3].flatten(1)
        return cast(Tensor, self.map(torch.cat([above, beside], dim=1)))


class GatedResidual(nn.Module):
    """x + a * sigmoid(b), (a, b) = conv(elu(conv(elu x) + condition))."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.first = CausalConv(channels, channels)
        self.second = CausalConv(channels, 2 * channels)
        self.condition = nn.Linear(condition, channels, bias=False) if condition else None

    def conditions(self, condition: Tensor | None) -> Tensor | None:
        """The condition's share, for all positions: (B, H, W, channels)."""
        if self.condition is None:
            return None
        return cast(Tensor, self.condition(condition))

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """(B, H, W, channels) -> the same; c from ``conditions``."""
        y = self.first(elu(x))
        y = y if c is None else y + c
        a, b = self.second(elu(y)).chunk(2, dim=-1)
        return cast(Tensor, x + a * torch.sigmoid(b))

    def start(self, b: int, h: int, w: int) -> list[Tensor]:
        """Kept maps."""
        return [self.first.start(b, h, w), self.second.start(b, h, w)]

    def step(self, kept: list[Tensor], x: Tensor, c: Tensor | None, i: int, j: int) -> Tensor:
        """``forward`` at one position."""
        y = self.first.step(kept[0], elu(x), i, j)
        y = y if c is None else y + c[:, i, j]
        a, b = self.second.step(kept[1], elu(y), i, j).chunk(2, dim=1)
        return x + a * torch.sigmoid(b)


class CausalAttention(nn.Module):
    """Attention of a position to all positions before it, and to one learned slot (for the first).

    Keys and values come from the features and the code of a position, so a code far away can be
    looked at directly, past the blind spot of stacked causal convolutions (to the upper right).
    """

    def __init__(self, channels: int, key: int = 16) -> None:
        super().__init__()
        self.query = nn.Linear(channels, key)
        self.key_value = nn.Linear(2 * channels, key + channels)
        self.slot = nn.Parameter(torch.zeros(key + channels))
        self.out = nn.Linear(channels, channels)
        self.n_key = key

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x, e (B, H, W, channels): features, and embedded codes -> (B, H, W, channels)."""
        b, h, w, c = x.shape
        n = h * w
        kv = self.key_value(torch.cat([x, e], dim=-1)).view(b, n, -1)
        kv = torch.cat([self.slot.expand(b, 1, -1), kv[:, :-1]], dim=1)
        q = self.query(x).view(b, n, -1)
        # position t sees the slot and positions 0..t-1, which stand at 0..t
        mixed = scaled_dot_product_attention(
            q[:, None], kv[:, None, :, : self.n_key], kv[:, None, :, self.n_key :], is_causal=True
        )
        return cast(Tensor, x + self.out(mixed[:, 0].reshape(b, h, w, c)))

    def start(self, b: int, h: int, w: int) -> Tensor:
        """Kept keys and values, the slot in place."""
        kept = torch.zeros(b, h * w + 1, self.slot.numel())
        kept[:, 0] = self.slot
        return kept

    def step(self, kept: Tensor, x: Tensor, t: int) -> Tensor:
        """``forward`` at position t."""
        known = kept[:, : t + 1]
        scores = torch.bmm(known[..., : self.n_key], self.query(x)[..., None])[..., 0]
        weights = torch.softmax(scores * self.n_key**-0.5, dim=1)
        mixed = torch.bmm(weights[:, None], known[..., self.n_key :])[:, 0]
        return cast(Tensor, x + self.out(mixed))

    def keep(self, kept: Tensor, x: Tensor, e: Tensor, t: int) -> None:
        """Remember position t, now that its code is known."""
        if t + 1 < kept.shape[1]:
            kept[:, t + 1] = self.key_value(torch.cat([x, e], dim=-1))


class PixelSNAIL(nn.Module):
    """Causal convolutions and causal attention over the codes in raster order.

    ::

        codes ── embed ── strict causal conv ── [ gated residuals ── attention ] x blocks ── logits
        condition ────────────────────────────────┘

    Parameters
    ----------
    words : (vocabulary, dim) codewords, for feed="vectors". feed: what the network sees of codes.
    condition : channels of the condition, 0 without.

    Source: Chen et al., "PixelSNAIL: an improved autoregressive generative model", ICML 2018;
    Razavi et al., VQ-VAE-2, 2019. ``run`` costs one position's network for every position: the
    activations of all others are kept.
    """

    def __init__(
        self,
        words: Tensor,
        *,
        channels: int = 64,
        n_blocks: int = 2,
        n_residuals: int = 2,
        condition: int = 0,
        feed: Feed = "one_hot",
    ) -> None:
        super().__init__()
        vocabulary = len(words)
        self.embed = CodeEmbedding(words, channels, feed)
        self.first = CausalConv(channels, channels, strict=True)
        self.blocks = nn.ModuleList(
            nn.ModuleList(GatedResidual(channels, condition) for _ in range(n_residuals))
            for _ in range(n_blocks)
        )
        self.attentions = nn.ModuleList(CausalAttention(channels) for _ in range(n_blocks))
        self.head = nn.Sequential(
            nn.ELU(), nn.Linear(channels, channels), nn.ELU(), nn.Linear(channels, vocabulary)
        )

    def logits(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, H, W, vocabulary) predictions of codes (B, H, W), each from those before it."""
        c = None if condition is None else condition.permute(0, 2, 3, 1)
        e = self.embed(codes)
        x = self.first(e)
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            for residual in cast(Any, block):
                x = residual(x, residual.conditions(c))
            x = attention(x, e)
        return cast(Tensor, self.head(x))

    @torch.inference_mode()
    def run(
        self,
        coder: Coder,
        shape: tuple[int, int, int],
        condition: Tensor | None,
        codes: Tensor | None,
    ) -> Tensor:
        """Code (B, H, W) codes, given them or finding them."""
        b, h, w = shape
        c = None if condition is None else condition.permute(0, 2, 3, 1).contiguous()
        layers: list[tuple[list[Any], Any]] = [
            (list(cast(Any, block)), attention)
            for block, attention in zip(self.blocks, self.attentions, strict=True)
        ]
        conditions = [[r.conditions(c) for r in block] for block, _ in layers]
        kept = [[r.start(b, h, w) for r in block] for block, _ in layers]
        memories = [attention.start(b, h, w) for _, attention in layers]
        kept_codes = self.first.start(b, h, w)
        out = torch.zeros(shape, dtype=torch.int64)
        for t in range(h * w):
            i, j = divmod(t, w)
            x = self.first.step(kept_codes, None, i, j)
            before = []
            for n, (block, attention) in enumerate(layers):
                for m, residual in enumerate(block):
                    x = residual.step(kept[n][m], x, conditions[n][m], i, j)
                before.append(x)
                x = attention.step(memories[n], x, t)
            given = None if codes is None else codes[:, i, j].numpy()
            found = torch.from_numpy(coder.code(self.head(x).numpy(), given))
            out[:, i, j] = found
            e = self.embed(found)
            kept_codes[:, i + 1, j + 1] = e
            for n, (_, attention) in enumerate(layers):
                attention.keep(memories[n], before[n], e, t)
        return out


# ------------------------------------------------------------ block-autoregressive Transformer


class _TransformerLayer(nn.Module):
    """Pre-norm attention and MLP; ``step`` keeps keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def _close(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return cast(Tensor, x + self.mlp(self.norm_2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, width) -> the same, each from those up to it."""
        return self._close(x, scaled_dot_product_attention(*self._split(x), is_causal=True))

    def step(self, kept: Tensor, x: Tensor, t: int) -> Tensor:
        """``forward`` of x (B, 1, width) at place t; kept (2, B, heads, n, width / heads)."""
        q, k, v = self._split(x)
        kept[0, :, :, t], kept[1, :, :, t] = k[:, :, 0], v[:, :, 0]
        known = kept[:, :, :, : t + 1]
        return self._close(x, scaled_dot_product_attention(q, known[0], known[1]))


class BlockTransformer(nn.Module):
    """Blocks of codes in raster order; the codes of a block are predicted together.

    ::

        block t-1 (codes embedded, joined) ── + condition of block t, + place ── layers ── h_t
        logits of position p of block t = head(h_t + place_p)

    A block of size^2 codes costs one step instead of size^2, at the price of not knowing the codes
    inside it from one another.
    """

    def __init__(
        self,
        words: Tensor,
        *,
        size: int = 2,
        width: int = 128,
        n_layers: int = 3,
        heads: int = 4,
        condition: int = 0,
        feed: Feed = "one_hot",
        max_blocks: int = 4096,
    ) -> None:
        super().__init__()
        self.size, self.width, self.max_blocks = size, width, max_blocks
        code_width = max(8, width // (size * size))
        self.embed = CodeEmbedding(words, code_width, feed)
        self.join = nn.Linear(size * size * code_width, width)
        self.condition = nn.Linear(size * size * condition, width) if condition else None
        self.start_token = nn.Parameter(torch.zeros(width))
        self.row = nn.Embedding(64, width)
        self.column = nn.Embedding(64, width)
        self.layers = nn.ModuleList(_TransformerLayer(width, heads) for _ in range(n_layers))
        self.place = nn.Parameter(torch.randn(size * size, width) * 0.1)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(words))
        )
        nn.init.normal_(self.row.weight, std=0.1)
        nn.init.normal_(self.column.weight, std=0.1)

    def _places(self, h: int, w: int, condition: Tensor | None) -> Tensor:
        """What is known of a block before any code: (1 or B, blocks, width)."""
        rows, columns = h // self.size, w // self.size
        if h % self.size or w % self.size or max(rows, columns) > 64:
            raise InputError(
                f"expected a map of whole {self.size} x {self.size} blocks, at most 64 of them a "
                f"side, got {h} x {w}"
            )
        at = torch.arange(rows * columns, device=self.place.device)
        known = (self.row(at // columns) + self.column(at % columns))[None]
        if self.condition is not None and condition is not None:
            known = known + self.condition(unfold_blocks(condition, self.size).flatten(2))
        return cast(Tensor, known)

    def _joined(self, codes: Tensor) -> Tensor:
        """(.., size^2) codes -> (.., width)."""
        return cast(Tensor, self.join(self.embed(codes).flatten(-2)))

    def logits(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, H, W, vocabulary) predictions of codes (B, H, W), each from the blocks before."""
        b, h, w = codes.shape
        blocks = unfold_blocks(codes[:, None], self.size)[..., 0]
        before = self._joined(blocks[:, :-1])
        x = torch.cat([self.start_token.expand(b, 1, -1), before], dim=1)
        x = x + self._places(h, w, condition)
        for layer in self.layers:
            x = layer(x)
        out = self.head(x[:, :, None] + self.place)
        return fold_blocks(out, self.size, h, w).permute(0, 2, 3, 1)

    @torch.inference_mode()
    def run(
        self,
        coder: Coder,
        shape: tuple[int, int, int],
        condition: Tensor | None,
        codes: Tensor | None,
    ) -> Tensor:
        """Code (B, H, W) codes, given them or finding them."""
        b, h, w = shape
        places = self._places(h, w, condition).expand(b, -1, -1)
        n = places.shape[1]
        given = None if codes is None else unfold_blocks(codes[:, None], self.size)[..., 0]
        layers = [cast(_TransformerLayer, layer) for layer in self.layers]
        kept = [torch.zeros(2, b, a.heads, n, self.width // a.heads) for a in layers]
        out = torch.zeros(b, n, self.size**2, dtype=torch.int64)
        token = self.start_token.expand(b, -1)
        for t in range(n):
            x = (token + places[:, t])[:, None]
            for layer, memory in zip(layers, kept, strict=True):
                x = layer.step(memory, x, t)
            logits = self.head(x + self.place).flatten(0, 1).numpy()
            symbols = None if given is None else given[:, t].reshape(-1).numpy()
            out[:, t] = torch.from_numpy(coder.code(logits, symbols)).view(b, -1)
            token = self._joined(out[:, t])
        return fold_blocks(out[..., None], self.size, h, w)[:, 0]


def cross_entropy_bits(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean bits a code: logits (.., vocabulary), codes (..)."""
    flat = logits.reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, codes.reshape(-1)) / math.log(2)
