"""k-means, encoding and decoding on a GPU, by torch: the core's arithmetic on another device.

Written against torch's device argument, so the same lines run on torch's CPU device, where they are
compared with the numpy core; "cuda" is what they are for.

Decoding gives the core's bits: integers below 2^24 are exact in a float32 product in any order of
additions (``rotation``), so TF32 and autocast are kept out, and what follows is elementwise, one
rounding each. Encoding and k-means search with floating-point products; ties and rounding apart
they find what the core finds. k-means adds up rows as integers, so the order in which thousands of
threads get there does not show: same seed, device and versions, same centroids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, describe
from .errors import InputError

DEVICE = "cuda"  # where numpy rows are brought
MAX_SCORES = 1 << 26  # float32 scores at a time: 256 MiB
BLOCK_ROWS = 1 << 15  # rows decoded or encoded at a time
CANDIDATES = 4  # centroids among which float64 decides
SUM_BITS = 30  # rows are added up as multiples of 2^-30 of the largest number: 2^33 of them fit
EXACT_FLOAT32 = float(1 << 24)
SPLIT, SPLIT_COST, SPLIT_PASSES = 0.2, 0.5, 2  # as in ``clustering``
CONVERGED = 1e-4
CLIP = 2.0**50  # as in ``polar``: squares stay finite
LARGEST = float(np.finfo(np.float32).max)


def is_available() -> bool:
    """Whether torch can use a GPU here."""
    return bool(torch.cuda.is_available())


@contextlib.contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """Within, products of float32 matrices are float32: neither TF32 nor autocast's half."""
    matmul: Any = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, "ieee" if name == "fp32_precision" else False)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, name, before)


# -- the nearest centroid --------------------------------------------------------------------------
def nearest(
    x: Tensor, centroids: Tensor, metric: Literal["l2", "ip"] = "l2", *, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """Index of the nearest centroid (metric "ip": of the largest inner product) of each row.

    x: (heads, n, d) float32, each head with ``centroids`` (heads, k, d) of its own, both of
    moderate scale. Returns index (heads, n) int64, the lowest among equals, and score (heads, n)
    float32: squared distance, or inner product. exact: float64 decides among the four that look
    best; else the rounding of float32 products may choose between centroids as good as equal.
    O(heads n k d) time; at most MAX_SCORES scores of memory beyond the result.
    """
    heads, n, d = x.shape
    k = centroids.shape[1]
    index = torch.empty(heads, n, dtype=torch.int64, device=x.device)
    score = torch.empty(heads, n, dtype=torch.float32, device=x.device)
    l2 = metric == "l2"
    mean = centroids.mean(dim=1, keepdim=True) if l2 else torch.zeros_like(centroids[:, :1])
    centred = centroids - mean  # smaller numbers, smaller rounding errors
    energy = centred.double().square().sum(dim=-1) / 2
    bias = (energy if l2 else torch.zeros_like(energy)).float()[:, None]
    columns = centred.transpose(1, 2)
    with _float32_products(x.device):
        step = max(1, MAX_SCORES // max(1, heads * max(k, CANDIDATES * d)))
        for start in range(0, n, step):
            rows = x[:, start : start + step]
            products = torch.baddbmm(bias, rows - mean, columns, alpha=-1)
            some = min(CANDIDATES if exact else 1, k)
            if some == 1:
                best = _lowest(products)[..., None]
            else:
                best = products.topk(some, dim=-1, largest=False).indices.sort(dim=-1).values
            found = _gathered(centroids, best).double()
            wide = rows.double()[:, :, None]
            value = (wide - found).square().sum(-1) if l2 else -(wide * found).sum(-1)
            at = _lowest(value)[..., None]
            index[:, start : start + step] = best.gather(-1, at)[..., 0]
            value = value.gather(-1, at)[..., 0]
            score[:, start : start + step] = (value if l2 else -value).float()
    return index, score


def _lowest(values: Tensor) -> Tensor:
    """Place of the least value along the last axis, the first of equals (argmin takes any)."""
    places = torch.arange(values.shape[-1], device=values.device)
    least = values.amin(dim=-1, keepdim=True)
    return torch.where(values == least, places, values.shape[-1]).amin(dim=-1)


def _gathered(centroids: Tensor, index: Tensor) -> Tensor:
    """centroids (heads, k, d), index (heads, n, c) -> (heads, n, c, d)."""
    heads, n, some = index.shape
    flat = index.reshape(heads, n * some, 1).expand(-1, -1, centroids.shape[2])
    return centroids.gather(1, flat).reshape(heads, n, some, -1)


# -- k-means ---------------------------------------------------------------------------------------
def grow(x: Tensor, k: int, *, spherical: bool, n_iter: int, rng: np.random.Generator) -> Tensor:
    """k centroids of each head's rows by splitting, as ``clustering`` does: (heads, k, d) float32.

    x: (heads, n, d) float32, n >= 1, of moderate scale; centred, or with spherical without zero
    rows. O(n_iter heads n k d) time. Memory: two numbers a row, and that of ``nearest``.
    """
    heads, n, d = x.shape
    norms = x.double().square().sum(dim=-1).sqrt()
    centroids = x.double().mean(dim=1, keepdim=True).float()
    if spherical:
        empty = ~centroids.any(dim=-1, keepdim=True)
        centroids = _unit(torch.where(empty, x[:, :1], centroids))
    index = torch.zeros(heads, n, dtype=torch.int64, device=x.device)
    error = norms if spherical else norms.square()
    while centroids.shape[1] < k:
        count = centroids.shape[1]
        cost = torch.zeros(heads, count, dtype=torch.float64, device=x.device)
        for head in range(heads):  # in the order of the rows: histograms of floats are not
            cost[head] = _sums_of(error[head, :, None], index[head], count)[:, 0]
        costly = (cost > SPLIT_COST * cost.mean(dim=1, keepdim=True)).sum(dim=1).max()
        n_split = min(max(int(costly), count // 4), int((cost > 0).sum(dim=1).max()), k - count)
        if n_split == 0:  # distances vanish in float32
            return centroids[:, torch.arange(k, device=x.device) % count]
        split = cost.argsort(dim=1, descending=True, stable=True)[:, :n_split]
        member = _members(index, count, rng)
        rows = x.gather(1, member.gather(1, split)[..., None].expand(-1, -1, d))
        at = split[..., None].expand(-1, -1, d)
        delta = SPLIT * ((_unit(rows) if spherical else rows) - centroids.gather(1, at))
        centroids = centroids.scatter(1, at, centroids.gather(1, at) - delta)
        centroids = torch.cat([centroids, centroids.gather(1, at) + 2 * delta], dim=1)
        centroids = _unit(centroids) if spherical else centroids
        passes = n_iter if centroids.shape[1] == k else SPLIT_PASSES
        centroids = _lloyd(x, centroids, norms, spherical, passes, rng)
        if centroids.shape[1] < k:
            index, error = _assign(x, centroids, norms, spherical)
    return centroids


def _assign(x: Tensor, centroids: Tensor, norms: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """Nearest centroid and error of each row: squared distance, or norm less inner product."""
    index, score = nearest(x, centroids, "ip" if spherical else "l2", exact=False)
    return index, (norms - score if spherical else score.double()).clamp_(min=0.0)


def _lloyd(
    x: Tensor,
    centroids: Tensor,
    norms: Tensor,
    spherical: bool,
    n_iter: int,
    rng: np.random.Generator,
) -> Tensor:
    heads, k = centroids.shape[:2]
    cost = torch.full((heads,), np.inf, dtype=torch.float64, device=x.device)
    for _ in range(n_iter):
        index, error = _assign(x, centroids, norms, spherical)
        before, cost = cost, error.sum(dim=1)
        if bool((cost >= (1 - CONVERGED) * before).all()):
            break
        sums = torch.stack([_sums_of(x[h], index[h], k) for h in range(heads)])
        if spherical:
            size = sums.square().sum(dim=-1).sqrt()
        else:
            size = torch.stack([torch.bincount(index[h], minlength=k) for h in range(heads)])
        filled = size > 0
        centroids = (sums / torch.where(filled, size, 1)[..., None]).float()
        for head in torch.nonzero(~filled.all(dim=1))[:, 0].tolist():
            _restart_empty(centroids[head], filled[head], x[head], error[head], spherical, rng)
    return centroids


def _sums_of(x: Tensor, index: Tensor, k: int) -> Tensor:
    """sums[index[i]] += x[i], (k, d) float64, the same in whatever order threads add: as integers.

    x: (n, d) of magnitudes up to ``top``; each number is rounded to 2^-SUM_BITS of that.
    """
    top = float(x.abs().amax()) if x.numel() else 0.0
    unit = 2.0 ** (int(np.frexp(top)[1]) - SUM_BITS)
    sums = torch.zeros(k, x.shape[1], dtype=torch.int64, device=x.device)
    step = max(1, MAX_SCORES // x.shape[1])
    for start in range(0, len(x), step):
        block = (x[start : start + step].double() / unit).round_().long()
        sums.index_add_(0, index[start : start + step], block)
    return sums.double() * unit


def _members(index: Tensor, k: int, rng: np.random.Generator) -> Tensor:
    """A random row of each cluster, (heads, k); row 0 for one that is empty."""
    heads, n = index.shape
    order = np.stack([rng.permutation(n) for _ in range(heads)])
    rank = torch.from_numpy(np.argsort(order, axis=1)).to(index.device)
    last = torch.full((heads, k), -1, dtype=torch.int64, device=index.device)
    last.scatter_reduce_(1, index, rank, "amax")
    return torch.from_numpy(order).to(index.device).gather(1, last.clamp(min=0))


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their norms; zero rows stay."""
    norms = x.double().square().sum(dim=-1, keepdim=True).sqrt()
    return (x / torch.where(norms > 0, norms, 1)).float()


def _restart_empty(
    centroids: Tensor,
    filled: Tensor,
    x: Tensor,
    error: Tensor,
    spherical: bool,
    rng: np.random.Generator,
) -> None:
    """Move the centroids of empty clusters of one head to rows drawn in proportion to error."""
    empty = torch.nonzero(~filled)[:, 0]
    share = error.cpu().numpy()
    n_drawn = min(len(empty), int(np.count_nonzero(share)))
    if n_drawn:
        drawn = rng.choice(len(share), n_drawn, replace=False, p=share / share.sum())
        rows = x[torch.from_numpy(drawn).to(x.device)]
        centroids[empty[:n_drawn]] = _unit(rows) if spherical else rows
    if n_drawn < len(empty):
        centroids[empty[n_drawn:]] = centroids[torch.nonzero(filled)[0, 0]]


def grow_rows(
    x: Array,
    k: int,
    *,
    spherical: bool,
    n_iter: int,
    rng: np.random.Generator,
    device: str = "cuda",
) -> Array:
    """``grow`` for numpy rows (n, d), as ``clustering`` calls it: (k, d) float32."""
    rows = torch.from_numpy(x)[None].to(DEVICE)
    return grow(rows, k, spherical=spherical, n_iter=n_iter, rng=rng)[0].cpu().numpy()


def search(metric: Literal["l2", "ip"]) -> Any:
    """``nearest`` for numpy rows (n, d) and centroids (k, d), as ``clustering`` calls it."""

    def find(x: Array, centroids: Array) -> tuple[Array, Array]:
        rows, book = (torch.from_numpy(a)[None].to(DEVICE) for a in (x, centroids))
        index, score = nearest(rows, book, metric)
        return index[0].cpu().numpy(), score[0].cpu().numpy()

    return find


# -- a quantizer on a device -----------------------------------------------------------------------
def encode(quantizer: Any, x: Tensor) -> Tensor:
    """``quantizer.encode`` on x's device, for quantizers that end in codebooks. InputError for
    another width, no floats, or rows that are not finite."""
    spec = describe(x)
    if x.ndim != 2 or x.shape[1] != quantizer.d_:
        raise InputError(f"expected x of shape (n, {quantizer.d_}), got {spec.shape}")
    finite = torch.isfinite(x).all(dim=1)
    if not bool(finite.all()):
        bad = int(torch.nonzero(~finite)[0, 0])
        raise InputError(f"expected x to be finite, got NaN or infinity first in row {bad}")
    codes = OnDevice(quantizer, x.device).encode(x.detach())
    wide = quantizer.alphabet_sizes.max(initial=1) > 256
    return codes.to(torch.int32 if wide else torch.uint8)


def decode(quantizer: Any, codes: Tensor, *, stages: int | None = None) -> Tensor:
    """``quantizer.decode`` on the device of codes. InputError for codes that fit no alphabet."""
    sizes = quantizer.alphabet_sizes
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputError(f"expected codes of an integer dtype, got {codes.dtype}")
    if codes.ndim != 2 or codes.shape[1] != len(sizes):
        raise InputError(f"expected codes of shape (n, {len(sizes)}), got {tuple(codes.shape)}")
    if codes.numel():
        low, high = (v.cpu().numpy() for v in codes.long().aminmax(dim=0))
        wrong = (low < 0) | (high >= sizes)
        if wrong.any():
            field = int(np.argmax(wrong))
            raise InputError(
                f"expected codes of field {field} in 0..{int(sizes[field]) - 1}, "
                f"got {int(low[field])}..{int(high[field])}"
            )
    return OnDevice(quantizer, codes.device).decode(codes, stages=stages)


class _Heads(NamedTuple):
    """Heads of equal width and equal codebooks: one batch."""

    columns: Tensor  # of the rows, head by head
    fields: list[list[int]]  # of the codes: for each stage those of the heads
    books: list[Tensor]  # of each stage (heads, k, width)


class OnDevice:
    """The tables of a fitted ``PolarQuantizer`` as tensors on a device, ready to be used often.

    decode : codes -> rows, the bits of ``quantizer.decode``. Radius, rotation, codebooks and the
        trellis's machine run on the device; other fine stages decode in the numpy core.
    encode : rows -> codes, for quantizers that end in codebooks. Codes are the core's except where
        rounding decides between codewords as good as equal.
    """

    def __init__(self, quantizer: Any, device: torch.device | str) -> None:
        self.quantizer, self.device = quantizer, torch.device(device)
        q, rotation = quantizer, quantizer.rotation_
        self._levels = None if q.radius_ is None else self._to(q.radius_.levels_)
        self._columns = None if q.columns_ is None else self._to(q.column_factors())
        self._rest: Tensor | None
        self._frames = hasattr(rotation, "common")  # a rotation for each class of rows
        if self._frames:
            self._means, self._exponent = self._to(rotation.means_), rotation.common.exponent_
            self._rest, self._turned = self._to(rotation._rest), self._to(rotation._turned)
        else:
            self._means, self._exponent = self._to(rotation.mean_), rotation.exponent_
            matrix = rotation.matrix_
            self._rest = None if matrix is None else self._to(matrix.T.astype(np.float32))
        self._row_norm = 1.0 if self._rest is None else float(rotation._row_norm)
        self._groups = self._heads() if q.fine == "codebook" else []

    def _heads(self) -> list[_Heads]:
        """The heads, those that are alike together."""
        fine = self.quantizer.fine_
        alike: dict[tuple[int, tuple[int, ...]], list[tuple[int, list[int]]]] = {}
        for head, (begin, end) in enumerate(pairwise(fine.splits_.tolist())):
            fields = [f for f, (_, h) in enumerate(fine._fields) if h == head]
            sizes = tuple(len(fine.codebooks_[f]) for f in fields)
            if fields:  # else it decodes to its offset
                alike.setdefault((end - begin, sizes), []).append((begin, fields))
        groups = []
        for (width, _), heads in alike.items():
            columns = np.concatenate([begin + np.arange(width) for begin, _ in heads])
            by_stage = [list(fields) for fields in zip(*(f for _, f in heads), strict=True)]
            books = [
                self._to(np.stack([fine.codebooks_[f] for f in fields])) for fields in by_stage
            ]
            groups.append(_Heads(self._to(columns), by_stage, books))
        return groups

    def _to(self, array: Array) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device)

    # -- decoding -----------------------------------------------------------------------------
    def decode(self, codes: Tensor, *, stages: int | None = None) -> Tensor:
        """Codes (n, n_fields) of an integer dtype, each checked to be below its alphabet size ->
        (n, d) float32. Memory beyond the result is bounded by BLOCK_ROWS rows."""
        y = torch.empty(len(codes), self.quantizer.d_, dtype=torch.float32, device=self.device)
        with _float32_products(self.device):
            for start in range(0, len(codes), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                y[block] = self._decode_block(codes[block].to(self.device).long(), stages)
        return y

    def _decode_block(self, codes: Tensor, stages: int | None) -> Tensor:
        q, radius = self.quantizer, None
        if self._levels is not None:
            radius, codes = self._levels[codes[:, 0]].float(), codes[:, 1:]
        if q.fine == "trellis":
            row_class, lattice = self._lattice(codes)
            y = self._turn_back(lattice, q.fine_.step_, row_class)
        elif q.fine == "bitshift":
            row_class, integers = q.fine_.decode(self._on_host(codes))
            y = self._turn_back(self._to(integers), q.fine_.step_, self._to(row_class))
        elif q.fine == "codebook":
            y = self._rotate_back(self._sum_codewords(codes, stages))
        else:
            y = self._rotate_back(self._to(q.decode_fine(self._on_host(codes), stages)))
        if radius is not None:
            y = y * radius[:, None]
        for limit, beyond in ((q.low_, torch.lt), (q.high_, torch.gt)):
            if limit is not None:
                wall = torch.tensor(float(limit), dtype=torch.float32, device=self.device)
                y = torch.where(beyond(y, wall), wall, y)
        if self._columns is not None:
            y = y * self._columns
        if q.exponent_:  # in two steps, since 2^e alone may lie beyond float64
            half = q.exponent_ // 2
            y = (y.double() * 2.0**half * 2.0 ** (q.exponent_ - half)).clamp(-LARGEST, LARGEST)
        return y.float()

    def _on_host(self, codes: Tensor) -> Array:
        wide = self.quantizer.alphabet_sizes.max(initial=1) > 256
        return np.asarray(codes.cpu().numpy().astype(np.uint16 if wide else np.uint8))

    def _lattice(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Trellis codes -> row classes (n,) and integers (n, m), as ``MagnitudeModel.split`` and
        the trellis's machine have it: k is folded, and y = 2 k - sign(k) [state is odd]."""
        fine = self.quantizer.fine_
        row_class = torch.zeros(len(codes), dtype=torch.int64, device=self.device)
        if fine.model.n_classes > 1:
            row_class, codes = codes[:, 0], codes[:, 1:]
        odd = codes & 1
        k = ((codes >> 1) + odd) * (2 * odd - 1)
        moves = self._to(fine.next_state.astype(np.int64)).reshape(-1)
        states = torch.zeros(codes.shape[1], len(codes), dtype=torch.int64, device=self.device)
        parity = (k & 1).t().contiguous()
        for j in range(1, len(states)):  # of all rows at once
            states[j] = moves[2 * states[j - 1] + parity[j - 1]]
        quantizer = self._to(fine.quantizer.astype(np.int64))[states].t()
        return row_class, 2 * k - k.sign() * quantizer

    def _sum_codewords(self, codes: Tensor, stages: int | None) -> Tensor:
        """Codewords added in the order of the stages, as the core adds them."""
        fine = self.quantizer.fine_
        y = self._to(fine.offset_).expand(len(codes), -1).clone()  # heads without bits stay there
        for group in self._groups:
            paths = torch.stack([codes[:, fields].t() for fields in group.fields[:stages]], dim=2)
            words = _sum_of(group.books[:stages], paths[:, :, None])[:, :, 0]
            y[:, group.columns] = words.transpose(0, 1).reshape(len(codes), -1)
        return y

    def _rotate_back(self, c: Tensor) -> Tensor:
        """As the core's: coefficients on a grid, so that the rotation is exact."""
        rotation = self.quantizer.rotation_
        if self._rest is None and rotation.n_components_ == self.quantizer.d_:
            return c + self._means if rotation.center else c
        unit = self.quantizer.grid_unit()
        return self._turn_back((c * np.float32(1 / unit).item()).round(), unit, None)

    def _turn_back(self, y: Tensor, unit: float, row_class: Tensor | None) -> Tensor:
        """Integers (n, m), counted in units -> rows (n, d), the bits of the core's rotations."""
        factor = np.float32(unit * 2.0**-self._exponent).item()
        if self._rest is None:
            x = y.float() * factor
            return x + self._means if self.quantizer.rotation_.center else x
        y = y.float() if y.is_floating_point() else y
        largest = float(y.float().square().sum(dim=1).amax()) ** 0.5 if len(y) else 0.0
        kind = torch.float32 if largest * self._row_norm < 0.999 * EXACT_FLOAT32 else torch.float64
        y = y.to(kind)
        if not self._frames:
            x = (y @ self._rest.to(kind)).float() * factor
            return x + self._means if self.quantizer.rotation_.center else x
        assert row_class is not None
        q = self._turned.shape[1]
        sums = y[:, q:] @ self._rest.to(kind)
        for k in torch.unique(row_class).tolist():
            mine = torch.nonzero(row_class == k)[:, 0]
            sums[mine] += y[mine, :q] @ self._turned[k].to(kind)
        return sums.float() * factor + self._means[row_class]

    # -- encoding -----------------------------------------------------------------------------
    def encode(self, x: Tensor) -> Tensor:
        """Rows (n, d), finite and of a float dtype -> codes (n, n_fields) int64, for a quantizer
        that ends in codebooks. Memory is bounded by BLOCK_ROWS rows and MAX_SCORES scores."""
        assert self.quantizer.fine == "codebook"
        parts = [torch.empty(0, self.quantizer.n_fields, dtype=torch.int64, device=self.device)]
        with _float32_products(self.device):
            for start in range(0, len(x), BLOCK_ROWS):
                parts.append(self._encode_block(x[start : start + BLOCK_ROWS].to(self.device)))
        return torch.cat(parts)

    def _encode_block(self, x: Tensor) -> Tensor:
        q, fine, fields = self.quantizer, self.quantizer.fine_, []
        half = q.exponent_ // 2
        v = x.double() * 2.0**-half * 2.0 ** (half - q.exponent_)
        if self._columns is not None:
            v = v * (1 / self._columns.double())
        v = v.clamp(-CLIP, CLIP).float()
        if self._levels is not None:
            if q.radius_norm == "max":
                radius = v.abs().amax(dim=1)
            else:
                radius = v.double().square().sum(dim=1).sqrt().float()
            v = v / torch.where(radius > 0, radius, 1)[:, None]
            thresholds = self._to(q.radius_._thresholds)
            fields.append(torch.searchsorted(thresholds, radius.double())[:, None])
        rotation = q.rotation_
        if self._rest is not None:
            v = (v - self._means if rotation.center else v) @ self._to(rotation.analysis)
        elif rotation.center:
            v = v - self._means
        codes = torch.zeros(len(v), fine.n_fields, dtype=torch.int64, device=self.device)
        for group in self._groups:
            heads = len(group.fields[0])
            parts = v[:, group.columns].reshape(len(v), heads, -1).transpose(0, 1).contiguous()
            paths = _search_stages(parts, group.books, fine.beam)
            for stage, mine in enumerate(group.fields):
                codes[:, mine] = paths[:, :, stage].t()
        return torch.cat([*fields, codes], dim=1)


def _search_stages(x: Tensor, books: Sequence[Tensor], beam: int) -> Tensor:
    """Codes (heads, n, stages) of rows (heads, n, width), codebooks (heads, k, width) a stage: the
    best of a beam search through the stages, or the nearest one by one where that leaves less."""
    heads, n, width = x.shape
    step = max(1, MAX_SCORES // (heads * beam * max(max(b.shape[1], width) for b in books)))
    found = []
    for start in range(0, n, step):
        rows = x[:, start : start + step]
        best = _paths(rows, books, 1)
        if beam > 1 and len(books) > 1:
            wider = _paths(rows, books, beam)
            less = _error(rows, books, wider) <= _error(rows, books, best)
            best = torch.where(less[..., None], wider, best)
        found.append(best)
    return torch.cat(
        [torch.zeros(heads, 0, len(books), dtype=torch.int64, device=x.device), *found], 1
    )


def _paths(x: Tensor, books: Sequence[Tensor], beam: int) -> Tensor:
    """The best of the paths kept, (heads, n, stages); ``beam`` are kept from stage to stage."""
    heads, n, width = x.shape
    paths = torch.zeros(heads, n, 1, 0, dtype=torch.int64, device=x.device)
    for stage, book in enumerate(books):
        left = x[:, :, None] - _sum_of(books[:stage], paths) if stage else x[:, :, None]
        kept, k = paths.shape[2], book.shape[1]
        if beam == 1:
            index = nearest(left[:, :, 0], book)[0]
            paths = torch.cat([paths, index[..., None, None]], dim=3)
            continue
        mean = book.mean(dim=1, keepdim=True)
        centred = book - mean
        left = (left - mean[:, None]).clamp(-CLIP, CLIP)
        cost = left.reshape(heads, n * kept, width) @ centred.transpose(1, 2)
        cost = cost.mul_(-2).add_(centred.square().sum(dim=2)[:, None]).reshape(heads, n, kept, k)
        cost = cost.add_(left.square().sum(dim=3, keepdim=True)).reshape(heads, n, kept * k)
        some = min(beam, kept * k) if stage + 1 < len(books) else 1
        best = cost.topk(some, dim=2, largest=False).indices
        before = paths.gather(2, (best // k)[..., None].expand(-1, -1, -1, stage))
        paths = torch.cat([before, (best % k)[..., None]], dim=3)
    return paths[:, :, 0]


def _sum_of(books: Sequence[Tensor], paths: Tensor) -> Tensor:
    """Codewords of paths (heads, n, beam, stages), added in the order of the stages as the core
    adds them: (heads, n, beam, width)."""
    total = _gathered(books[0], paths[..., 0])
    for stage in range(1, paths.shape[3]):
        total = total + _gathered(books[stage], paths[..., stage])
    return total


def _error(x: Tensor, books: Sequence[Tensor], paths: Tensor) -> Tensor:
    """Squared error of paths (heads, n, stages): (heads, n) float64."""
    left = x - _sum_of(books, paths[:, :, None])[:, :, 0]
    return left.double().square().sum(dim=2)
