"""Entropy coding of integer symbols: models (who says how likely) and the range coder (bytes).

Names load on first use, so that importing this package loads neither numpy code nor numba.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import (
        AdaptiveModel,
        StaticModel,
        SymbolModel,
        UniformModel,
        cdf_from_counts,
        choose_model,
        decode_blocks,
        encode_blocks,
        model_from_bytes,
        model_to_bytes,
    )

__all__ = [
    "AdaptiveModel",
    "StaticModel",
    "SymbolModel",
    "UniformModel",
    "cdf_from_counts",
    "choose_model",
    "decode_blocks",
    "encode_blocks",
    "model_from_bytes",
    "model_to_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.model"), name)
