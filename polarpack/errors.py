"""Every error polarpack raises on purpose.

Two questions sort them: is the caller's argument wrong (``InputError`` and friends), or are the
bytes of a file wrong (``FormatError`` and its subclasses)? Each also inherits the builtin a caller
would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class PolarPackError(Exception):
    """Base of every error raised on purpose by polarpack and polarpack_image."""


class InputError(PolarPackError, ValueError):
    """The caller's array or argument is wrong: says what was got and what was expected."""


class NotFittedError(PolarPackError, ValueError):
    """A quantizer was used before ``fit``."""


class MissingDependencyError(PolarPackError, ImportError):
    """An optional library is needed for this call; the message holds the install command."""


class FormatError(PolarPackError, ValueError):
    """The bytes being read are not a valid file of ours."""


class UnsupportedVersionError(FormatError):
    """A well-formed file that is newer than this reader."""


class CorruptDataError(FormatError):
    """Truncated, a checksum that does not match, an index out of range, or trailing bytes."""


class LimitError(FormatError):
    """The file declares more than a stated limit; nothing was allocated."""
