"""Lapped linear transforms: their symmetry, their borders, and where training starts from.

A block transform of 8 x 8 pixels does not see that a smooth gradient goes on in the next block, and
its decoded blocks meet in visible edges. A lapped transform has the same number of coefficients,
one set for each 8 x 8 block, but its atoms reach over 16 x 16 pixels:

    y[i, j, c] = sum over the 16 x 16 x 3 pixels around block (i, j) of analysis[.., c] * x
    x          = sum over blocks and c of y[i, j, c] * synthesis[.., c], each at its place

Every atom is exactly symmetric or antisymmetric under a vertical flip and under a horizontal one
(``parity``). Photographs have no handedness, so nothing is lost; and it makes borders exact: the
coefficients of a picture continued by its mirror image are the picture's own, mirrored, times the
parity. So neither encoder nor decoder has to treat a border otherwise than by a mirrored ring.

Source of the starting point: Tran, Liang and Tu, "Lapped transform via time-domain pre- and
post-filtering", IEEE Trans. Signal Processing 2003 (a filter across each block edge, then a block
transform); here the block transform is the Karhunen-Loeve transform of what the filter leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

BLOCK = 8  # pixels from one set of coefficients to the next
N_CHANNELS = 3 * BLOCK * BLOCK
# How much the filter amplifies the lowest difference across an edge. At 1 the transform is
# orthonormal. Tran et al. find 8 / 5 best at high rate; but an encoder that weighs rate against
# error coefficient by coefficient takes the sum of their squared errors for the picture's, and then
# what it loses is more than the 0.1 dB of coding gain.
EDGE_GAIN = 1.0
BLOCKS_ONLY = 0.0  # instead of a gain: no filter, a plain block transform
PARITIES = ((1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class LappedKernels:
    """A linear transform as arrays.

    Attributes
    ----------
    analysis, synthesis : (k, k, 3, C) float32; row, column and colour of a pixel, channel. k is
        even and at least 8; the kernel is centred on its 8 x 8 block. Synthesis atoms have norm 1.
    parity : (C, 2) int8, +1 or -1 under the vertical and the horizontal flip.
    """

    analysis: Float32
    synthesis: Float32
    parity: Int8


def edge_filter(gain: float) -> tuple[Float64, Float64]:
    """The filter over the 8 pixels across a block edge and its inverse, (8, 8) each: it takes from
    them what the two blocks have in common, in proportion to a jump's chance to be a real one."""
    half = BLOCK // 2
    k, n = np.mgrid[:half, :half]
    dct2 = np.sqrt(2 / half) * np.cos(np.pi * k * (n + 0.5) / half)
    dct2[0] /= np.sqrt(2)
    dct4 = np.sqrt(2 / half) * np.cos(np.pi * (k + 0.5) * (n + 0.5) / half)
    flip = np.eye(half)[::-1]
    inner = flip @ dct2.T @ np.diag([gain, *[1.0] * (half - 1)]) @ dct4 @ flip
    eye, zero = np.eye(half), np.zeros((half, half))
    butterfly = np.block([[eye, flip], [flip, -eye]])

    def between(v: Float64) -> Float64:
        product: Float64 = 0.5 * butterfly @ np.block([[eye, zero], [zero, v]]) @ butterfly
        return product

    return between(inner), between(np.linalg.inv(inner))


def overlap_matrices(gain: float) -> tuple[Float64, Float64]:
    """The edge filters as maps from the 16 pixels around a block to its 8 filtered ones, and the
    inverse as one from 8 filtered to 16 pixels: (8, 16) and (16, 8)."""
    forward, inverse = edge_filter(gain) if gain else (np.eye(BLOCK), np.eye(BLOCK))
    half = BLOCK // 2
    analysis, synthesis = np.zeros((BLOCK, 2 * BLOCK)), np.zeros((2 * BLOCK, BLOCK))
    analysis[:half, :BLOCK], analysis[half:, BLOCK:] = forward[half:], forward[:half]
    synthesis[:BLOCK, :half], synthesis[BLOCK:, half:] = inverse[:, half:], inverse[:, :half]
    return analysis, synthesis


def windows(x: Float32) -> Float32:
    """All 16 x 16 windows around the 8 x 8 blocks inside pictures (n, H, W, 3): (m, 16, 16, 3)."""
    size = 2 * BLOCK
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    half = BLOCK // 2
    return view[:, half::BLOCK, half::BLOCK].transpose(0, 1, 2, 4, 5, 3).reshape(-1, size, size, 3)


def covariance(pictures: Float32, gain: float = EDGE_GAIN) -> Float64:
    """(192, 192) covariance of the filtered 8 x 8 x 3 blocks of (n, H, W, 3) pictures, averaged
    over the flips and the transposition of the pictures."""
    analysis, _ = overlap_matrices(gain)
    total, count = np.zeros((N_CHANNELS, N_CHANNELS)), 0
    for picture in pictures:
        around = windows(picture[None])
        blocks = np.einsum("ai,nijc,bj->nabc", analysis, around - 128.0, analysis, optimize=True)
        for way in (blocks, blocks[:, ::-1], blocks[:, :, ::-1], blocks[:, ::-1, ::-1]):
            for turned in (way, way.transpose(0, 2, 1, 3)):
                flat = turned.reshape(len(blocks), -1)
                total += flat.T @ flat
                count += len(flat)
    return total / count


def parity_basis() -> tuple[Float64, Int8]:
    """An orthonormal basis of 8 x 8 x 3 blocks whose vectors have a parity each, and the parities,
    grouped as in ``PARITIES``: (192, 192) columns, (192, 2)."""
    half = BLOCK // 2
    fold = {
        sign: np.vstack([np.eye(half), sign * np.eye(half)[::-1]]) / np.sqrt(2) for sign in (1, -1)
    }
    columns, parity = [], []
    for vertical, horizontal in PARITIES:
        part = np.kron(np.kron(fold[vertical], fold[horizontal]), np.eye(3))
        columns.append(part)
        parity += [(vertical, horizontal)] * part.shape[1]
    return np.hstack(columns), np.array(parity, np.int8)


def karhunen_loeve(pictures: Float32, gain: float = EDGE_GAIN) -> LappedKernels:
    """The transform training starts from, of (n, H, W, 3) pictures in 0..255; channels by falling
    variance. With ``BLOCKS_ONLY`` the plain block transform (its 16 x 16 kernels are zero outside
    the block)."""
    of_blocks = covariance(pictures, gain)
    basis, parity = parity_basis()
    inner = basis.T @ of_blocks @ basis
    size = N_CHANNELS // len(PARITIES)
    vectors, variances = np.zeros((N_CHANNELS, N_CHANNELS)), np.zeros(N_CHANNELS)
    for start in range(0, N_CHANNELS, size):  # flips average the rest to zero
        part = slice(start, start + size)
        variances[part], within = np.linalg.eigh(inner[part, part])
        vectors[:, part] = basis[:, part] @ within
    order = np.argsort(-variances, kind="stable")
    atoms = vectors[:, order].reshape(BLOCK, BLOCK, 3, N_CHANNELS)
    analysis, synthesis = overlap_matrices(gain)
    forward = np.einsum("ai,abcn,bj->ijcn", analysis, atoms, analysis, optimize=True)
    backward = np.einsum("ia,abcn,jb->ijcn", synthesis, atoms, synthesis, optimize=True)
    norm = np.sqrt((backward**2).sum((0, 1, 2)))
    return LappedKernels(
        (forward * norm).astype(np.float32),
        (backward / norm).astype(np.float32),
        parity[order],
    )
