"""Numbers in the bytes of models and blocks: one at a time, in runs, and read with limits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..errors import CorruptDataError, LimitError

Int = npt.NDArray[np.int64]


def number(value: int) -> bytes:
    """An integer in 0..2**35 - 1, seven bits a byte, low ones first, the top bit set in all bytes
    but the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def runs(values: Int) -> bytes:
    """Integers >= 0 as pairs of numbers: a value, how often it follows in a row."""
    edges = np.flatnonzero(np.diff(values, prepend=-1, append=-1))
    return b"".join(number(int(values[a])) + number(int(b - a)) for a, b in pairwise(edges))


def fold(value: int) -> int:
    """Signed to unsigned, small to small: 0, -1, 1, -2, 2 -> 0, 1, 2, 3, 4."""
    return 2 * value if value >= 0 else -2 * value - 1


def unfold(value: int) -> int:
    """Inverse of ``fold``."""
    return -(value + 1 >> 1) if value & 1 else value >> 1


class Reader:
    """Numbers and bytes from front to back, never beyond the end; errors carry ``name``."""

    def __init__(self, data: bytes | memoryview, name: str) -> None:
        self.data = memoryview(data)
        self.position = 0
        self.name = name

    def number(self, limit: int) -> int:
        """Inverse of ``number``. LimitError above ``limit``; CorruptDataError if it does not end,
        or takes more bytes than needed (one value has one spelling)."""
        value = 0
        for shift in range(0, 35, 7):
            if self.position == len(self.data):
                raise CorruptDataError(f"{self.name}: ends at byte {self.position}, in a number")
            byte = self.data[self.position]
            self.position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                if value > limit:
                    raise LimitError(f"{self.name}: got {value}, limit {limit}")
                return value
        raise CorruptDataError(f"{self.name}: number before byte {self.position} is too long")

    def choice(self, n: int, what: str) -> int:
        """A number below n."""
        value = self.number(1 << 35)
        if value >= n:
            raise CorruptDataError(f"{self.name}: expected {what} below {n}, got {value}")
        return value

    def runs(self, n: int, limit: int) -> Int:
        """Inverse of ``runs`` for n values up to ``limit``."""
        values: list[int] = []
        lengths: list[int] = []
        left = n
        while left:
            values.append(self.number(limit))
            lengths.append(self.choice(left + 1, "length of a run"))
            left -= lengths[-1]
            if lengths[-1] == 0 or values[-2:-1] == values[-1:]:
                raise CorruptDataError(f"{self.name}: run that is empty or goes on as the next")
        return np.repeat(np.array(values, np.int64), lengths)

    def take(self, length: int) -> memoryview:
        """The next ``length`` bytes."""
        left = len(self.data) - self.position
        if not 0 <= length <= left:
            raise CorruptDataError(f"{self.name}: expected {length} bytes, {left} are left")
        self.position += length
        return self.data[self.position - length : self.position]

    def rest(self) -> memoryview:
        """All bytes that are left."""
        return self.take(len(self.data) - self.position)

    def end(self) -> None:
        """CorruptDataError if bytes are left."""
        if self.position != len(self.data):
            raise CorruptDataError(f"{self.name}: bytes behind its end at {self.position}")
