"""The border between callers' arrays and the float32 / integer numpy arrays used inside.

Callers bring numpy arrays or torch tensors of any float dtype, shape and layout. Inside, every
module works on C-ordered numpy arrays. ``enter`` crosses the border inwards and returns with it the
function that crosses back, so that a caller gets the library, device and dtype they came with.
torch is never imported here: a caller who holds a tensor has it in ``sys.modules`` already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class TensorSpec:
    """What a caller's tensor looked like, so that the same can be handed back."""

    shape: tuple[int, ...]
    dtype: str  # one of FLOAT_DTYPES
    library: str = "numpy"  # or "torch"
    device: str = "cpu"

    @property
    def n_rows(self) -> int:
        """Number of vectors: the product of all axes but the last."""
        n = 1
        for size in self.shape[:-1]:
            n *= size
        return n

    @property
    def d(self) -> int:
        """Length of the last axis: the dimension of one vector."""
        return self.shape[-1] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the uncompressed tensor."""
        return self.n_rows * self.d * ITEM_BYTES[self.dtype]


def is_torch(x: object) -> bool:
    """Whether x is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def describe(x: Any, name: str = "x") -> TensorSpec:
    """The ``TensorSpec`` of a numpy array or torch tensor; InputError names what else it is."""
    if is_torch(x):
        dtype = str(x.dtype).removeprefix("torch.")
        spec = TensorSpec(tuple(x.shape), dtype, "torch", str(x.device))
    elif isinstance(x, np.ndarray):
        spec = TensorSpec(x.shape, x.dtype.name)
    else:
        raise InputError(
            f"expected {name} to be a numpy array or a torch tensor, got {type(x).__name__}"
        )
    if spec.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"expected {name} of dtype {', '.join(FLOAT_DTYPES)}, got {spec.dtype}; "
            "convert it first, for example x.astype('float32')"
        )
    return spec


def to_numpy(x: Any, name: str = "x") -> Array:
    """x as a numpy array of its own float dtype; bfloat16 widens (exactly) to float32."""
    spec = describe(x, name)
    if spec.library == "torch":
        x = x.detach()
        x = x.float() if spec.dtype == "bfloat16" else x
        return np.asarray(x.cpu().numpy())
    return np.asarray(x, np.float32) if spec.dtype == "bfloat16" else x


def bfloat16_bits(x: Float32) -> npt.NDArray[np.uint16]:
    """float32 values rounded to bfloat16 (ties to even), as their 16-bit patterns."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(x)  # adding to a NaN pattern could carry into infinity
    cut = bits >> np.uint32(16)
    payload = np.where(cut & np.uint32(0x7F), cut, cut | np.uint32(0x40))  # else it were infinity
    return np.where(nan, payload, rounded).astype(np.uint16)


def bfloat16_values(bits: npt.NDArray[np.uint16]) -> Float32:
    """Inverse of ``bfloat16_bits`` on patterns: exact float32 values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def first_nonfinite_row(rows: Array) -> int | None:
    """Index of the first row of (n, d) that holds NaN or infinity, or None. O(n d), no copy of x
    beyond one block of rows."""
    step = max(1, (1 << 20) // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        finite = np.isfinite(rows[start : start + step]).all(axis=1)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def check_finite(rows: Array, name: str = "x") -> None:
    """InputError that names the first row holding NaN or infinity."""
    bad = first_nonfinite_row(rows)
    if bad is not None:
        raise InputError(f"expected {name} to be finite, got NaN or infinity first in row {bad}")


def largest(x: Array) -> float:
    """The greatest magnitude among finite numbers, 0 if there are none. O(n), no copy."""
    return max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))


def as_matrix(x: Any, *, d: int | None = None, name: str = "x") -> Array:
    """x as a finite (n, d) numpy array in its own float dtype (bfloat16 as float32); no copy where
    possible. InputError on another rank, width, dtype, or a non-finite row."""
    rows = to_numpy(x, name)
    want = f"(n, {d})" if d is not None else "(n, d)"
    if rows.ndim != 2 or (d is not None and rows.shape[1] != d) or rows.shape[1] == 0:
        raise InputError(f"expected {name} of shape {want}, got {tuple(rows.shape)}")
    check_finite(rows, name)
    return rows


def as_float32(x: Any, *, d: int | None = None, name: str = "x") -> Float32:
    """Like ``as_matrix`` in C-ordered float32; InputError for float64 beyond float32's range."""
    rows = as_matrix(x, d=d, name=name)
    if rows.dtype == np.float64:
        with np.errstate(over="ignore"):
            narrow = rows.astype(np.float32)
        bad = first_nonfinite_row(narrow)
        if bad is not None:
            raise InputError(f"expected {name} within float32's range, row {bad} overflows it")
        return np.ascontiguousarray(narrow)
    return np.ascontiguousarray(rows, np.float32)


def returner(x: Any) -> Callable[[Array], Any]:
    """A function that hands a numpy result back in x's library and device; float results also take
    x's dtype when x is a float array."""
    if is_torch(x):
        torch = sys.modules["torch"]
        dtype = x.dtype if x.dtype.is_floating_point else None
        device = x.device

        def back(y: Array) -> Any:
            y = np.ascontiguousarray(y)
            if y.dtype == np.uint16:  # torch's uint16 supports few operations
                y = y.astype(np.int32)
            t = torch.from_numpy(y).to(device)
            return t.to(dtype) if dtype is not None and t.is_floating_point() else t

        return back
    wanted = x.dtype if isinstance(x, np.ndarray) and x.dtype.name in FLOAT_DTYPES else None

    def keep(y: Array) -> Any:
        if wanted is not None and y.dtype != wanted and y.dtype.kind == "f":
            with np.errstate(over="ignore"):
                return y.astype(wanted)
        return y

    return keep


def enter(x: Any, *, d: int | None = None, name: str = "x") -> tuple[Float32, Callable[..., Any]]:
    """Cross the border: (n, d) float32 rows, and the function that carries results back."""
    return as_float32(x, d=d, name=name), returner(x)


def enter_codes(codes: Any, alphabet_sizes: Array) -> tuple[Array, Callable[..., Any]]:
    """Check a code matrix: (n, n_fields) integers, each below its alphabet size. Returns it as a
    C-ordered numpy array and the function that carries decoded floats back to its library."""
    back = returner(codes)
    c = np.asarray(codes.detach().cpu().numpy()) if is_torch(codes) else np.asarray(codes)
    n_fields = len(alphabet_sizes)
    if c.dtype.kind not in "iu":
        raise InputError(f"expected codes of an integer dtype, got {c.dtype}")
    if c.ndim != 2 or c.shape[1] != n_fields:
        raise InputError(f"expected codes of shape (n, {n_fields}), got {tuple(c.shape)}")
    if c.size:
        low, high = c.min(axis=0), c.max(axis=0)
        wrong = (low < 0) | (high.astype(np.int64) >= np.asarray(alphabet_sizes, np.int64))
        if wrong.any():
            field = int(np.argmax(wrong))
            raise InputError(
                f"expected codes of field {field} in 0..{int(alphabet_sizes[field]) - 1}, "
                f"got {int(low[field])}..{int(high[field])}"
            )
    return np.ascontiguousarray(c), back
