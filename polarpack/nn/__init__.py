"""Trainable quantizers for torch: the bottlenecks of learned codecs and of discrete latent models.

=====================  ==================================================================
``VectorQuantizer``    one codebook; (quantized, loss, perplexity)
``ResidualVQ``         stages, each on what the last left
``ProductVQ``          slices with a codebook each
``PolarVQ``            radius and direction, product and residual codebooks
``FSQ``                no codebook: a few levels a number; ``AnnealedFSQ``, ``AdaptiveFSQ``,
                       ``HierarchicalFSQ``, ``LFQ`` are its relatives
=====================  ==================================================================

All but the first return (quantized, codes, loss). Codebooks become quantizers of the numpy core,
and so files, by ``to_quantizer()``. ``usage(model)`` reports how codewords are used.

>>> import torch
>>> from polarpack import nn
>>> vq = nn.VectorQuantizer(64, 16)
>>> quantized, loss, perplexity = vq(torch.randn(4, 8, 8, 16))
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    from ..errors import MissingDependencyError

    raise MissingDependencyError(
        "polarpack.nn needs torch: pip install 'polarpack[torch]'"
    ) from error

from .codebook import Codebook, CodebookOptions
from .composed import PolarVQ, ProductVQ, RadiusLevels, ResidualVQ
from .finite import FSQ, LFQ, AdaptiveFSQ, AnnealedFSQ, HierarchicalFSQ
from .gradients import rotate_to, straight_through
from .usage import CodebookUsage, UsageReport, reset_usage, usage
from .vector import Quantized, VectorQuantizer

__all__ = [
    "FSQ",
    "LFQ",
    "AdaptiveFSQ",
    "AnnealedFSQ",
    "Codebook",
    "CodebookOptions",
    "CodebookUsage",
    "HierarchicalFSQ",
    "PolarVQ",
    "ProductVQ",
    "Quantized",
    "RadiusLevels",
    "ResidualVQ",
    "UsageReport",
    "VectorQuantizer",
    "reset_usage",
    "rotate_to",
    "straight_through",
    "usage",
]
