"""The systems this project grew from, each trainable and each a codec with real bytes.

=================  ===========================================================================
``VQVAE``          one map of codes
``RQVAE``          residual codes, coarse to fine
``FSQVAE``         32 x 32 pictures in one vector of finite scalars
``VQVAE2``         two maps, PixelSNAIL or block Transformer as entropy model, adaptive option
``HyperPrior``     continuous latents under a scale hyperprior
``OriginalCodec``  the first Polar-VQ prototype
=================  ===========================================================================

    python -m polarpack_image.baselines train vqvae2 --data photographs/ --out run/
    python -m polarpack_image.baselines compress --model run/model.pt photo.png photo.pvqb

They are here to compare with; the codec to use is ``polarpack_image.compress``.
"""

from __future__ import annotations

from .autoencoders import FSQVAE, RQVAE, VQVAE
from .base import Baseline
from .hyperprior import HyperPrior
from .original import OriginalCodec
from .priors import BlockTransformer, HistogramPrior, PixelSNAIL
from .training import TrainConfig, Trainer, load
from .vqvae2 import VQVAE2

__all__ = [
    "FSQVAE",
    "RQVAE",
    "VQVAE",
    "VQVAE2",
    "Baseline",
    "BlockTransformer",
    "HistogramPrior",
    "HyperPrior",
    "OriginalCodec",
    "PixelSNAIL",
    "TrainConfig",
    "Trainer",
    "load",
]
