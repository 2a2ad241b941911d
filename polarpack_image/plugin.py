"""The Pillow plugin: format "PVQ". Opening reads the header only; pixels come when they are asked
for; saving takes quality, bpp, psnr, effort, tune, icc_profile and exif."""

from __future__ import annotations

from typing import IO, Any

from PIL import Image, ImageFile

from polarpack.errors import FormatError, InputError

MAGIC = b"\x89PVQ\r\n"
HEADER_BYTES = 64  # a header is shorter


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


class PvqImageFile(ImageFile.ImageFile):
    """A .pvq file that Pillow opened."""

    format = "PVQ"
    format_description = "polarpack image"

    def _open(self) -> None:
        from .bitstream import Mode, read_header, read_metadata
        from .pixels import unpack_metadata

        assert self.fp is not None
        data = self.fp.read(HEADER_BYTES)
        if not _accept(data):
            raise SyntaxError("not a .pvq file")
        header, position = read_header(data)
        if header.mode == Mode.BANDS:
            raise InputError(
                f"an array of {header.n_bands} bands, no picture: use polarpack_image.decompress"
            )
        self._size = header.width, header.height
        self._mode = header.mode.name
        self.info["quality"] = header.quality
        self.fp.seek(position)
        icc, exif = read_metadata(self.fp)
        if icc:
            self.info["icc_profile"] = unpack_metadata(icc, "ICC profile")
        if exif:
            self.info["exif"] = unpack_metadata(exif, "EXIF")
        self.tile = []

    def load(self) -> Any:
        """Decode the whole file."""
        if self.fp is not None and self._im is None:
            from .codec import Reader
            from .pixels import to_image

            self.fp.seek(0)
            self.im = to_image(Reader(self.fp.read()).picture()).im
            if self._exclusive_fp:
                self.fp.close()
            self.fp = None
        return super().load()


def _save(image: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    from .codec import compress

    options = {
        name: image.encoderinfo[name]
        for name in ("quality", "bpp", "psnr", "effort", "tune", "icc_profile", "exif")
        if image.encoderinfo.get(name) is not None
    }
    if isinstance(options.get("exif"), Image.Exif):
        options["exif"] = options["exif"].tobytes()
    fp.write(compress(image, **options))


def register() -> None:
    """Make the format known to Pillow; importing the package does it. Once is enough."""
    Image.register_open(PvqImageFile.format, PvqImageFile, _accept)
    Image.register_save(PvqImageFile.format, _save)
    Image.register_extension(PvqImageFile.format, ".pvq")
    Image.register_mime(PvqImageFile.format, "image/x-pvq")


__all__ = ["FormatError", "PvqImageFile", "register"]
