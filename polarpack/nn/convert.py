"""Codebooks of torch <-> the chain of the numpy core (``polarpack.PolarQuantizer``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from .._arrays import Float32
from ..errors import InputError
from ..polar import PolarQuantizer
from ..residual import ProductResidualQuantizer
from ..rotation import Rotation
from ..scalar import ScalarQuantizer
from .codebook import Codebook

Half = npt.NDArray[np.float16]
MAX_CORE_BITS = 16


def halves_of(book: Float32) -> tuple[Half, int]:
    """One codebook (size, dim) as files hold it: float16 with the largest near 2^15, times 2^e."""
    e = int(np.frexp(np.abs(book).max(initial=np.float32(2.0**-126)))[1]) - 15
    return np.ldexp(book, -e).astype(np.float16), e


def round_codebooks(codebooks: Iterable[Codebook]) -> list[Float32]:
    """Round the codewords of each codebook in place to what a file can hold; returns them,
    (heads, size, dim) each. Running means stay, so that training goes on as if nothing had been."""
    rounded = []
    for codebook in codebooks:
        codebook._check_ready()
        if codebook.transform != "none":
            raise InputError(
                "codewords under a linear transform cannot be rounded in place; copy them into a "
                "plain module with set_codewords first"
            )
        words = codebook.codewords().detach().cpu().numpy()
        for head in words:
            half, e = halves_of(head)
            head[:] = np.ldexp(half.astype(np.float32), e)
        with torch.no_grad():
            codebook.embedding.data.copy_(torch.from_numpy(words))
        rounded.append(np.ascontiguousarray(words))
    return rounded


def to_core(stages: Sequence[Float32], radius_levels: Float32 | None = None) -> PolarQuantizer:
    """A fitted quantizer of these stages, each (heads, size, dim) with codewords a file can hold.

    radius_levels: (2^bits,) sorted, the first 0. A size that is no power of two is filled up by
    repeating the last codeword, which is never found: ties take the lowest index.
    """
    heads, _, width = stages[0].shape
    d = heads * width
    bits = tuple(max(1, (book.shape[1] - 1).bit_length()) for book in stages)
    if max(bits) > MAX_CORE_BITS:
        raise InputError(f"expected at most 2^{MAX_CORE_BITS} codewords, got 2^{max(bits)}")
    flat, exponents = [], []
    for book, n_bits in zip(stages, bits, strict=True):
        for head in book:
            half, e = halves_of(head)
            missing = (1 << n_bits) - len(half)
            flat.append(np.concatenate([half, np.repeat(half[-1:], missing, axis=0)]).ravel())
            exponents.append(e)
    edges = pairwise(range(0, d + 1, width))
    fine = ProductResidualQuantizer([(a, b, bits) for a, b in edges])
    fine.load_arrays(
        {"codebooks": np.concatenate(flat), "exponents": np.array(exponents, np.int16)}
    )
    radius_bits = 0 if radius_levels is None else (len(radius_levels) - 1).bit_length()
    quantizer = PolarQuantizer(radius_bits=radius_bits, beam=1)
    quantizer.rotation_ = Rotation("none", center=False).fit(np.zeros((1, d), np.float32))
    quantizer.fine_ = fine
    if radius_levels is not None:
        radius = ScalarQuantizer(n_bits=radius_bits, domain="log")
        quantizer.radius_ = radius.load_arrays({"levels": radius_levels})
    quantizer.d_ = d
    return quantizer


def from_core(
    quantizer: PolarQuantizer, n_heads: int | None = None, *, radius: bool = False
) -> tuple[Float32 | None, list[Float32]]:
    """(radius levels or None, stages (heads, size, dim)) of a quantizer whose chain is no more than
    radius and codebooks of equal heads; InputError names what else it has."""
    fine = quantizer.fine_
    rotation = quantizer.rotation_
    plain = isinstance(rotation, Rotation) and rotation.kind == "none" and not rotation.center
    if not isinstance(fine, ProductResidualQuantizer) or not plain or quantizer.exponent_:
        raise InputError(
            "expected a fitted PolarQuantizer of codebooks without rotation, centring and scale, "
            f"got {quantizer!r}"
        )
    if (quantizer.radius_ is not None) != radius:
        raise InputError(f"expected a quantizer {'with' if radius else 'without'} a radius")
    widths = np.diff(fine.splits_)
    heads = len(widths)
    # every field's bits, stage by stage: the heads of a stage must be alike to be one batch
    sizes = [int(size) for size in fine.alphabet_sizes]
    by_stage = [sizes[i : i + heads] for i in range(0, len(sizes), heads)]
    even = all(len(set(stage)) == 1 and len(stage) == heads for stage in by_stage)
    if len(set(widths.tolist())) != 1 or not even or (n_heads or heads) != heads:
        raise InputError(f"expected {n_heads or 'equal'} heads, got widths {widths.tolist()}")
    books = fine.codebooks_
    stages = [np.stack(books[i : i + heads]) for i in range(0, len(books), heads)]
    levels = None if quantizer.radius_ is None else quantizer.radius_.levels_
    return levels, stages
