"""polarpack: the smallest file of float vectors that meets a stated quality or size.

>>> import numpy as np, polarpack as pp
>>> x = np.random.default_rng(0).standard_normal((1000, 32)).astype("float32")
>>> blob = pp.compress(x, bits=4.0)
>>> pp.decompress(blob).shape
(1000, 32)

Names load on first use: importing polarpack loads none of numba, faiss and torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CorruptDataError,
    FormatError,
    InputError,
    LimitError,
    MissingDependencyError,
    NotFittedError,
    PolarPackError,
    UnsupportedVersionError,
)

if TYPE_CHECKING:
    from .clustering import kmeans
    from .codec import compress, decompress, save
    from .comparison import compare
    from .merging import merge
    from .planner import fit
    from .polar import PolarQuantizer
    from .presets import preset
    from .product import ProductQuantizer
    from .reading import open
    from .residual import ProductResidualQuantizer, ResidualQuantizer
    from .rotation import Rotation
    from .scalar import GridQuantizer, ScalarQuantizer
    from .streaming import save_stream
    from .writing import create

__version__ = "0.1.0"

_HOME = {
    "compare": "comparison",
    "compress": "codec",
    "create": "writing",
    "decompress": "codec",
    "open": "reading",
    "save": "codec",
    "kmeans": "clustering",
    "merge": "merging",
    "fit": "planner",
    "PolarQuantizer": "polar",
    "preset": "presets",
    "save_stream": "streaming",
    "ProductQuantizer": "product",
    "ProductResidualQuantizer": "residual",
    "ResidualQuantizer": "residual",
    "Rotation": "rotation",
    "GridQuantizer": "scalar",
    "ScalarQuantizer": "scalar",
}

__all__ = [
    "CorruptDataError",
    "FormatError",
    "GridQuantizer",
    "InputError",
    "LimitError",
    "MissingDependencyError",
    "NotFittedError",
    "PolarPackError",
    "PolarQuantizer",
    "ProductQuantizer",
    "ProductResidualQuantizer",
    "ResidualQuantizer",
    "Rotation",
    "ScalarQuantizer",
    "UnsupportedVersionError",
    "compare",
    "compress",
    "create",
    "decompress",
    "fit",
    "kmeans",
    "merge",
    "open",
    "preset",
    "save",
    "save_stream",
]


_MODULES = ("entropy", "metrics", "nn")  # also attributes, without an import of their own


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
