"""How a gradient passes a step that has none, and what the inputs of every module must be."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import InputError

Gradient = Literal["straight_through", "rotation"]
Nonfinite = Literal["ignore", "raise"]


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """quantized, with the gradient of x (Bengio et al., arXiv 1308.3432).

    The usual x + (quantized - x) rounds; here what is added is exactly 0, or NaN where x is.
    """
    return quantized.detach() + (x - x.detach())


def rotate_to(x: Tensor, quantized: Tensor) -> Tensor:
    """quantized, as a rotation and scaling of x that is taken as constant: (.., d) each.

    With e = x / |x| and f = q / |q|, the reflections I - 2 m m^T (m along e + f) and I - 2 e e^T
    turn e into f:

        R = I - 2 m m^T + 2 f e^T,    q = (|q| / |x|) R x

    The gradient of q then reaches x turned by the same angle, so vectors of one cell are pushed
    apart or together by where they lie in it; straight-through moves them all alike.
    Source: Fifty et al., "Restructuring vector quantization with the rotation trick", 2024,
    arXiv 2410.06424, section 4.
    """
    with torch.no_grad():
        e, f = normalize(x, dim=-1), normalize(quantized, dim=-1)
        m = normalize(e + f, dim=-1)
        length = x.norm(dim=-1, keepdim=True)
        scale = quantized.norm(dim=-1, keepdim=True) / length.clamp(min=1e-12)
    along_m = (x * m).sum(dim=-1, keepdim=True)
    along_e = (x * e).sum(dim=-1, keepdim=True)
    turned: Tensor = scale * (x - 2 * along_m * m + 2 * along_e * f)
    # rounding aside turned is quantized; opposite or zero vectors have no such rotation
    return straight_through(turned, quantized)


def pass_gradient(x: Tensor, quantized: Tensor, how: str) -> Tensor:
    """quantized in x's dtype, with a gradient to x as ``how`` says."""
    if how == "rotation":
        return rotate_to(x.float(), quantized.float()).to(x.dtype)
    return straight_through(x, quantized.to(x.dtype))


def check_input(x: Tensor, dim: int, nonfinite: str, what: str = "inputs", axis: int = -1) -> None:
    """InputError for anything but a float tensor with ``dim`` channels; with nonfinite="raise" also
    for NaN and infinity, naming the first."""
    if not isinstance(x, Tensor):
        raise InputError(f"expected {what} to be a torch tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise InputError(f"expected {what} of a float dtype, got {x.dtype}")
    if x.ndim < 1 or (axis == 1 and x.ndim < 2) or x.shape[axis] != dim:
        shape = f"(batch, {dim}, ...)" if axis == 1 else f"(..., {dim})"
        raise InputError(f"expected {what} of shape {shape}, got {tuple(x.shape)}")
    if nonfinite == "raise":
        _check_finite(x, what)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_finite(x: Tensor, what: str) -> None:
    finite = torch.isfinite(x)
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise InputError(f"expected {what} to be finite, got {x[place].item()} first at {place}")


def check_codes(codes: Tensor, sizes: list[int], least: int = 0) -> None:
    """InputError unless codes (.., n_fields) are integers, field i in least..sizes[i] - 1."""
    if not isinstance(codes, Tensor) or codes.dtype.is_floating_point or codes.dtype == torch.bool:
        kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise InputError(f"expected codes to be an integer tensor, got {kind}")
    if codes.ndim < 1 or codes.shape[-1] != len(sizes):
        raise InputError(f"expected codes of shape (..., {len(sizes)}), got {tuple(codes.shape)}")
    flat = codes.reshape(-1, len(sizes))
    if not flat.numel():
        return
    low, high = flat.amin(dim=0), flat.amax(dim=0)
    wrong = (low < least) | (high >= torch.tensor(sizes, device=codes.device))
    if wrong.any():
        field = int(wrong.int().argmax())
        raise InputError(
            f"expected codes of field {field} in {least}..{sizes[field] - 1}, "
            f"got {int(low[field])}..{int(high[field])}"
        )


def check_mask(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask (bool, True where a vector counts), flat; InputError for another shape or dtype."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        raise InputError(f"expected a bool mask of shape {tuple(shape)}, got {got}")
    return mask.reshape(-1)


def mean_square(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (a - b)^2 in float32 over (.., n, d), over the vectors of mask (n,) alone."""
    squared = (a.float() - b.float()).square()
    if mask is None:
        return squared.mean()
    kept = torch.where(mask[:, None], squared, torch.zeros_like(squared))
    return kept.sum() / (mask.sum() * (squared.numel() / mask.numel())).clamp(min=1)
