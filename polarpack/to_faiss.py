"""Codes that map onto a faiss index, as that index: nothing is coded anew, distances are the same.

| our chain | faiss |
|---|---|
| heads of one stage, equal widths and bits (``pq``) | IndexPQ |
| any of codebooks behind a rotation (``opq``) | IndexPreTransform of a LinearTransform and that |
| stages of whole rows (``rq``) | IndexResidualQuantizer |
| heads x stages, equal widths and bits (``prq``) | IndexProductResidualQuantizer |
| an even grid of 8 or 4 bits (``sq8``) | IndexScalarQuantizer |
| half precision (``float16``) | IndexScalarQuantizer, QT_fp16 |

Scale and mean go into codewords and ranges. Distances behind a rotation are the same only as far as
its rounded axes are orthogonal (inner products are), so coarse ones are refused for "l2". Chains
with a radius, classes, a trellis, walls or weights have no counterpart; neither have rows stored
exactly.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ._arrays import Array
from .errors import InputError, MissingDependencyError
from .polar import PolarQuantizer
from .rotation import Rotation

Float64 = npt.NDArray[np.float64]
Metric = Literal["ip", "l2"]
NEARLY = 0.01  # of a squared distance, at most, may a rotation that is not quite orthogonal change


def index_of(quantizer: PolarQuantizer, metric: Metric = "l2") -> tuple[Any, Any]:
    """An empty faiss index that decodes as the quantizer does, trained, and the part of it that
    holds codes. MissingDependencyError without faiss; InputError naming what it cannot hold."""
    faiss = _faiss()
    if metric not in ("ip", "l2"):
        raise InputError(f"expected metric 'ip' or 'l2', got {metric!r}")
    _check(quantizer)
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    rotation = cast(Rotation, quantizer.rotation_)
    turned = rotation.matrix_ is not None
    mean = rotation.mean_.astype(np.float64) if rotation.center else np.zeros(quantizer.d_)
    if quantizer.fine != "codebook":
        if turned:
            raise InputError(f"faiss has no {quantizer.fine} codes behind a rotation")
        index = _scalar(faiss, quantizer, mean, kind)
        return index, index
    if not turned:
        index = _codebooks(faiss, quantizer, mean, kind)
        return index, index
    assert rotation.matrix_ is not None
    if rotation.n_components_ != quantizer.d_:
        raise InputError("faiss would search the leading axes alone: expected all of them")
    synthesis = rotation.matrix_ * 2.0**-rotation.exponent_
    # <q, S c + mean> = <S^T q, c + S^-1 mean>; distances of S^-1 q, as S is nearly orthogonal
    inverse = np.linalg.inv(synthesis)
    oblique = float(np.abs(synthesis.T @ synthesis - np.eye(quantizer.d_)).sum(axis=0).max())
    if metric == "l2" and oblique > NEARLY:
        raise InputError(
            f"distances behind this rotation would be off by up to {100 * oblique:.2g}%: its axes "
            "are rounded; expected metric 'ip', or a finer rotation_exponent"
        )
    index = _codebooks(faiss, quantizer, inverse @ mean, kind)
    transform = faiss.LinearTransform(quantizer.d_, quantizer.d_, False)
    axes = synthesis.T if metric == "ip" else inverse
    faiss.copy_array_to_vector(np.ascontiguousarray(axes, np.float32).ravel(), transform.A)
    transform.is_trained = True
    both = faiss.IndexPreTransform(transform, index)
    both.referenced_objects = [transform, index]  # which faiss does not own
    return both, index


def codes_for(quantizer: PolarQuantizer, codes: Array) -> npt.NDArray[np.uint8]:
    """Codes (n, n_fields) in the order and bits that ``index_of``'s index keeps them in."""
    faiss = _faiss()
    fine = quantizer.fine_
    if quantizer.fine == "float16":
        return np.ascontiguousarray(codes, "<u2").view(np.uint8).reshape(len(codes), -1)
    if quantizer.fine == "grid":
        if fine.n_bits == 8:
            return np.ascontiguousarray(codes, np.uint8)
        wide = np.pad(codes.astype(np.uint8), ((0, 0), (0, codes.shape[1] % 2)))
        return np.ascontiguousarray(wide[:, ::2] | wide[:, 1::2] << 4)
    stages = len(fine.heads[0][2])
    by_head = codes.reshape(len(codes), stages, -1).swapaxes(1, 2).reshape(codes.shape)
    bits = list(fine.heads[0][2]) * len(fine.heads)
    packed = faiss.pack_bitstrings(np.ascontiguousarray(by_head, np.int32), bits)
    return cast(npt.NDArray[np.uint8], packed)


def to_faiss(quantizer: PolarQuantizer, codes: Array, metric: Metric = "l2") -> Any:
    """A faiss index over rows of these codes (n, n_fields), numbered from 0. See ``index_of``."""
    index, inner = index_of(quantizer, metric)
    packed = codes_for(quantizer, codes)
    faiss = _faiss()
    if packed.shape[1] != inner.code_size:
        raise InputError(f"faiss keeps {inner.code_size} bytes a row, these are {packed.shape[1]}")
    faiss.copy_array_to_vector(packed.ravel(), inner.codes)
    inner.ntotal = index.ntotal = len(packed)
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError('to_faiss needs it: pip install "polarpack[faiss]"') from error
    return faiss


def _check(quantizer: PolarQuantizer) -> None:
    """InputError for a chain that no index of faiss decodes."""
    for found, what in (
        (quantizer.fine not in ("codebook", "grid", "float16"), f"{quantizer.fine} codes"),
        (quantizer.radius_ is not None, "radius and direction"),
        (quantizer.low_ is not None or quantizer.high_ is not None, "numbers held at walls"),
        (quantizer.columns_ is not None, "weighted columns"),
        (quantizer.n_classes > 1, "classes of rows"),
    ):
        if found:
            raise InputError(
                f"no faiss index has {what}; expected pq, opq, rq, prq, sq8 or float16"
            )


def _codebooks(faiss: Any, quantizer: PolarQuantizer, mean: Float64, kind: int) -> Any:
    """The index of a fine stage of codebooks; ``mean`` (m,) is added to its coefficients."""
    fine, d = quantizer.fine_, quantizer.d_
    bits, widths = fine.heads[0][2], {b - a for a, b, _ in fine.heads}
    if len(widths) > 1 or not bits or any(head[2] != bits for head in fine.heads):
        raise InputError("faiss needs heads of equal widths and bits")
    heads, stages = len(fine.heads), len(bits)
    books: list[list[Float64]] = []  # of each head, its stages
    for head, (start, stop, _) in enumerate(fine.heads):
        own = [fine.codebooks_[s * heads + head].astype(np.float64) for s in range(stages)]
        own[0] = own[0] + mean[start:stop]
        books.append([np.ldexp(book, quantizer.exponent_) for book in own])
    if stages == 1:
        index = faiss.IndexPQ(d, heads, bits[0], kind)
        flat = np.stack([own[0] for own in books])
        faiss.copy_array_to_vector(flat.astype(np.float32).ravel(), index.pq.centroids)
        index.is_trained = True
        return index
    if heads == 1:
        index = faiss.IndexResidualQuantizer(d, _vector(faiss, bits), kind)
        _fill(faiss, index.rq, books[0])
    else:
        if len(set(bits)) > 1:
            raise InputError("faiss needs stages of equal bits where there are several heads")
        index = faiss.IndexProductResidualQuantizer(d, heads, stages, bits[0], kind)
        for head, own in enumerate(books):
            part = faiss.downcast_AdditiveQuantizer(index.prq.subquantizer(head))
            _fill(faiss, part, own)
        every = np.concatenate([book.ravel() for own in books for book in own])
        faiss.copy_array_to_vector(every.astype(np.float32), index.prq.codebooks)
        index.prq.is_trained = True
    index.is_trained = True
    return index


def _fill(faiss: Any, part: Any, books: list[Float64]) -> None:
    flat = np.concatenate([book.ravel() for book in books]).astype(np.float32)
    faiss.copy_array_to_vector(flat, part.codebooks)
    part.is_trained = True


def _vector(faiss: Any, bits: Any) -> Any:
    out = faiss.UInt64Vector()
    for b in bits:
        out.push_back(int(b))
    return out


def _scalar(faiss: Any, quantizer: PolarQuantizer, mean: Float64, kind: int) -> Any:
    """The index of a grid or of half precision."""
    d, e = quantizer.d_, quantizer.exponent_
    if quantizer.fine == "float16":
        if e or mean.any():
            raise InputError("faiss's halves have neither scale nor mean")
        index = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, kind)
        index.is_trained = True
        return index
    fine = quantizer.fine_
    kinds = {8: faiss.ScalarQuantizer.QT_8bit, 4: faiss.ScalarQuantizer.QT_4bit}
    if fine.n_bits not in kinds:
        raise InputError(f"faiss has grids of 8 and 4 bits, this one has {fine.n_bits}")
    # faiss's code stands for the middle of a cell: minimum + (code + 1/2) / (2^b - 1) * range
    step = np.broadcast_to(fine.step_, d).astype(np.float64)
    low = np.broadcast_to(fine.minimum_, d).astype(np.float64) + mean - step / 2
    trained = np.concatenate([low, step * ((1 << fine.n_bits) - 1)])
    index = faiss.IndexScalarQuantizer(d, kinds[fine.n_bits], kind)
    faiss.copy_array_to_vector(np.ldexp(trained, e).astype(np.float32), index.sq.trained)
    index.is_trained = True
    return index
