"""polarpack_image: a learned image codec. Files end in ``.pvq``.

    import polarpack_image as pvq
    data = pvq.compress(image, quality=50)      # Pillow image, uint8 array or path; or bpp=, psnr=
    image = pvq.decompress(data)                # Pillow image with its ICC profile and EXIF

After the import Pillow reads and writes the format: ``Image.open("x.pvq")``,
``image.save("x.pvq", quality=50)``. Names and kernels load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polarpack.errors import MissingDependencyError

try:
    from . import plugin as _plugin
except ImportError as error:  # Pillow
    raise MissingDependencyError(
        "polarpack_image needs Pillow: pip install 'polarpack[image]'"
    ) from error

if TYPE_CHECKING:
    from .codec import Reader, compress, decompress

__all__ = ["Reader", "compress", "decompress"]

_plugin.register()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.codec"), name)
