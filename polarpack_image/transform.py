"""The linear transform: pixels to coefficients in floats, and back in exact integers.

    analysis    y[i, j, c] = sum of analysis[.., c] * (pixel - 128) over the k x k x 3 pixels around
                block (i, j); k = 8 (a block transform) or 16 (lapped: half a block more all around)
    synthesis   pixel = 128 + sum of y_hat[i, j, c] * synthesis[.., c], each atom at its place

Outside of the picture stands its mirror image. Atoms are symmetric or antisymmetric, so in terms of
coefficients the mirror image is the first row times the parity: one ring of positions, and borders
need no other treatment. The synthesis is stored as integers and carried out in float64, in which
every partial sum is an exact integer below 2**53: pixels, not only coefficients, are the same on
every machine, whatever order a matrix product sums in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from polarpack.errors import InputError

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

BLOCK = 8
SYNTHESIS_BITS = 12  # fraction of the stored synthesis
RECON_BITS = 4  # fraction of reconstructions: 1/16 step
STEP_BITS = 8  # fraction of steps
PIXEL_BITS = 6  # fraction of what ``synthesis`` returns
MAX_RECON = 1 << 21  # of |recon|; 2**21 * 2**12 * sum of |synthesis| stays below 2**53
STRIP = 64  # rows of blocks that the analysis takes at a time


class LinearTransform:
    """A block or lapped transform with C channels.

    arrays: ``analysis`` (k, k, 3, C) float, ``synthesis`` (k, k, 3, C) int16 in 2**-12 and
    ``parity`` (C, 2) int8, the sign of each atom under a vertical and a horizontal flip.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        size, _, _, self.n_channels = arrays["analysis"].shape
        if size not in (BLOCK, 2 * BLOCK) or arrays["synthesis"].shape != arrays["analysis"].shape:
            raise InputError(f"expected kernels of 8 or 16 pixels, got {arrays['analysis'].shape}")
        self.cells = size // BLOCK  # blocks that an atom reaches over, in each direction
        self.halo = self.cells - 1  # positions around a block that its pixels depend on
        self.parity = arrays["parity"].astype(np.int32)
        self._analysis = self._by_cell(arrays["analysis"].astype(np.float32))
        # float64 that holds integers
        self._synthesis = self._by_cell(arrays["synthesis"].astype(np.float64))

    def _by_cell(self, kernel: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(k, k, 3, C) -> (cells, cells, 192, C): the parts of the atoms in each 8 x 8 block."""
        n = self.cells
        parts = kernel.reshape(n, BLOCK, n, BLOCK, 3, self.n_channels).transpose(0, 2, 1, 3, 4, 5)
        return np.ascontiguousarray(parts).reshape(n, n, BLOCK * BLOCK * 3, self.n_channels)

    def analysis(self, pixels: npt.NDArray[Any], centre: float = 128) -> Float32:
        """(H, W, 3), H and W multiples of 8, to coefficients (H / 8, W / 8, C) float32 of what is
        left of the pixels without ``centre``.
        0.6 GFLOP a megapixel at k = 8, four times that at k = 16."""
        height, width = pixels.shape[0] // BLOCK, pixels.shape[1] // BLOCK
        y = np.empty((height, width, self.n_channels), np.float32)
        margin = BLOCK // 2 * self.halo
        for first in range(0, height, STRIP):
            last = min(first + STRIP, height)
            rows = np.arange(first * BLOCK - margin, last * BLOCK + margin)
            columns = np.arange(-margin, width * BLOCK + margin)
            part = pixels[mirrored(rows, pixels.shape[0])][:, mirrored(columns, pixels.shape[1])]
            blocks = to_blocks(part.astype(np.float32) - np.float32(centre))
            n_rows = last - first
            y[first:last] = 0
            for a in range(self.cells):
                for b in range(self.cells):
                    cell = blocks[a : a + n_rows, b : b + width].reshape(n_rows * width, -1)
                    y[first:last] += (cell @ self._analysis[a, b]).reshape(n_rows, width, -1)
        return y

    def surrounded(
        self, recon: npt.NDArray[Any], sides: tuple[bool, bool, bool, bool]
    ) -> npt.NDArray[Any]:
        """The ring of mirrored positions where ``recon`` (h, w, C) ends at a border of the picture:
        sides = (top, bottom, left, right)."""
        if self.halo == 0:
            return recon
        top, bottom, left, right = sides
        parity = self.parity.astype(recon.dtype)
        rows = [recon[:1] * parity[:, 0]] * top + [recon]
        rows += [recon[-1:] * parity[:, 0]] * bottom
        tall = np.concatenate(rows)
        columns = [tall[:, :1] * parity[:, 1]] * left + [tall]
        columns += [tall[:, -1:] * parity[:, 1]] * right
        return np.concatenate(columns, axis=1)

    def synthesis(self, recon: Int32, step: int) -> Int32:
        """Pixels in 1/64, (8 h, 8 w, 3) int32, not clipped, of the inner h x w positions of
        ``recon`` (h + 2 halo, w + 2 halo, C) int32 in 1/16 step, |recon| <= MAX_RECON.

        step: in 1/256. Exact: each product of matrices is a sum of integers below 2**53.
        """
        values = self._sums(recon.astype(np.float64), self._synthesis).astype(np.int64) * step
        drop = SYNTHESIS_BITS + RECON_BITS + STEP_BITS - PIXEL_BITS
        values = (values + (1 << (drop - 1))) >> drop
        limit = 1 << 20
        pixels: Int32 = np.clip(values + (128 << PIXEL_BITS), -limit, limit).astype(np.int32)
        return pixels

    def nearly(self, y: Float32) -> Float32:
        """``synthesis`` in floats, around 0: pixels of coefficients (h + 2 halo, w + 2 halo, C), as
        good as float32 is."""
        return self._sums(y, self._synthesis.astype(np.float32)) * np.float32(2.0**-SYNTHESIS_BITS)

    def _sums(self, y: npt.NDArray[Any], atoms: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Sum of the atoms at their places, (8 h, 8 w, 3), in the dtype of both."""
        height, width = y.shape[0] - 2 * self.halo, y.shape[1] - 2 * self.halo
        margin = BLOCK // 2 * self.halo
        used = y.any(axis=(0, 1))  # most of a coarse picture's channels are 0 everywhere
        y, atoms = y[:, :, used], atoms[:, :, :, used]
        n = self.cells
        total = np.zeros((height + self.halo, width + self.halo, BLOCK * BLOCK * 3), y.dtype)
        # block (i, j) of the shifted grid gets the parts of the atoms of positions around it
        for a in range(n):
            for b in range(n):
                top, left = n - 1 - a, n - 1 - b
                part = y[top : top + height + self.halo, left : left + width + self.halo]
                flat = part.reshape(part.shape[0] * part.shape[1], -1)
                total += (flat @ atoms[a, b].T).reshape(total.shape)
        pixels = from_blocks(total)
        return pixels[margin : margin + height * BLOCK, margin : margin + width * BLOCK]


def to_pixels(values: Int32) -> npt.NDArray[np.uint8]:
    """What ``synthesis`` returns, rounded (halves up) and clipped to bytes."""
    half = 1 << (PIXEL_BITS - 1)
    clipped: npt.NDArray[np.uint8] = np.clip((values + half) >> PIXEL_BITS, 0, 255).astype(np.uint8)
    return clipped


def mirrored(positions: Int64, size: int) -> Int64:
    """Positions outside of 0..size-1 folded back in, edge pixels repeated: -1 -> 0, size -> size-1.
    Any distance."""
    folded = positions % (2 * size)
    return np.where(folded < size, folded, 2 * size - 1 - folded)


def to_blocks(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(8 h, 8 w, 3) -> (h, w, 192); copies."""
    h, w = pixels.shape[0] // BLOCK, pixels.shape[1] // BLOCK
    blocks = pixels.reshape(h, BLOCK, w, BLOCK, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks).reshape(h, w, BLOCK * BLOCK * 3)


def from_blocks(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Inverse of ``to_blocks``."""
    h, w = blocks.shape[:2]
    pixels = blocks.reshape(h, w, BLOCK, BLOCK, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(pixels).reshape(h * BLOCK, w * BLOCK, 3)
