"""A second reader of ``.pvq`` files, written from docs/pvq.md and the weights file alone: no import
of polarpack.

Slow and plain on purpose, in the order of that text. It checks no limits, and of checksums only
those of the indices: what it is for is to show that the text suffices.
"""

from __future__ import annotations

import json
import zlib

import numpy as np

TILE = 128
EDGES = (1, 2, 3, 5, 7, 10, 14, 20, 29, 46, 81)


def weights_arrays(data):
    """{name: array} of a weights file."""
    size = int.from_bytes(data[:8], "little")
    kinds = {"U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "I32": "<i4", "F32": "<f4"}
    out = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        begin, end = (8 + size + at for at in entry["data_offsets"])
        out[name] = np.frombuffer(data[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return out


class Bytes:
    """A run of bytes read from front to back."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n=1):
        return int.from_bytes(self.take(n), "little")

    def varint(self):
        value = shift = 0
        while True:
            byte = self.number()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def clip(x, low, high):
    return min(max(x, low), high)


def local(x):
    return sum(edge <= min(x, 1023) for edge in EDGES)


# -- Header, sections, pixels ----------------------------------------------------------------------
def read(data, arrays):
    """The pixels of a file without alpha, (H, W, 3) uint8, or (H, W) for mode L."""
    file = Bytes(data)
    assert file.take(6) == bytes.fromhex("89505651 0D0A")
    file.number()  # version
    mode, quantizer, _ = file.number(), file.number(), file.number()
    step = file.number(2)
    file.take(4)  # hash of the weights
    width, height = file.varint(), file.varint()
    layers = [file.number() for _ in range(file.number())]
    assert file.number(4) == zlib.crc32(data[: file.at - 4])
    tiles = []
    while file.at < len(data):
        kind, length = file.number(), file.varint()
        file.take(4)
        payload = file.take(length)
        if kind == 4:
            tiles.append((int.from_bytes(payload[:4], "little"), payload[4:]))
    rows, columns = -(-height // 8), -(-width // 8)
    down, across = -(-rows // TILE), -(-columns // TILE)
    n_channels = arrays["transform.synthesis"].shape[3]
    recon = np.zeros((rows, columns, n_channels), np.int64)
    for at in range(down * across):
        top, left = at // across * TILE, at % across * TILE
        size = min(TILE, rows - top), min(TILE, columns - left)
        tile = Tile(arrays, quantizer, step, *size)
        for first, end, layer in zip(
            [0, *layers], layers, tiles[at :: down * across], strict=False
        ):
            tile.decode(first, end, *layer)
        recon[top : top + size[0], left : left + size[1]] = tile.inside()
    rgb = pixels(recon, arrays, step)[:height, :width]
    return (rgb.sum(axis=2) + 1) // 3 if mode == 1 else rgb


def pixels(recon, arrays, step):
    """(8 h, 8 w, 3) bytes of coefficients (h, w, C)."""
    kernel = arrays["transform.synthesis"].astype(np.int64)
    parity = arrays["transform.parity"].astype(np.int64)
    size = kernel.shape[0]
    margin = size - 8
    if size == 16:
        recon = np.concatenate([recon[:1] * parity[:, 0], recon, recon[-1:] * parity[:, 0]])
        sides = recon[:, :1] * parity[:, 1], recon[:, -1:] * parity[:, 1]
        recon = np.concatenate([sides[0], recon, sides[1]], axis=1)
    h, w = recon.shape[:2]
    total = np.zeros((8 * h + margin, 8 * w + margin, 3), np.int64)
    for i in range(h):
        for j in range(w):
            total[8 * i : 8 * i + size, 8 * j : 8 * j + size] += kernel @ recon[i, j]
    inner = total[12:-12, 12:-12] if size == 16 else total
    p = ((inner * step + (1 << 17)) >> 18) + 128 * 64
    return np.clip((p + 32) >> 6, 0, 255)


# -- Tiles -----------------------------------------------------------------------------------------
class Coder:
    """The range coder, for binary decisions."""

    def __init__(self, message):
        self.data, self.at = message, 8
        self.code, self.range = int.from_bytes((message + bytes(8))[:8], "big"), 2**64 - 1

    def bit(self, p):
        bound = (self.range >> 16) * p
        bit = int(self.code >= bound)
        self.code, self.range = (
            (self.code - bound, self.range - bound) if bit else (self.code, bound)
        )
        if self.range < 1 << 30:
            word = int.from_bytes((self.data[self.at : self.at + 4] + bytes(4))[:4], "big")
            self.code, self.range, self.at = self.code << 32 | word, self.range << 32, self.at + 4
        return bit


class Tile:
    """One tile of R x S positions; planes have two positions more on all sides."""

    def __init__(self, arrays, quantizer, step, rows, columns):
        self.arrays = {
            k.removeprefix("coder."): v.astype(np.int64)
            for k, v in arrays.items()
            if k.startswith("coder.")
        }
        own = {16: "polar.", 24: "switch."}.get(quantizer)
        a = self.arrays
        if own:
            self.book, self.depth = a[own + "codebook"], a[own + "depth"]
            self.spacing = int(a[own + "spacing"][0])
            for name in ("probabilities", "counts", "weights"):
                a[name] = np.concatenate([a[name], a[own + name]])
        self.quantizer = quantizer
        self.h0, self.h1 = {4: (5, 2), 8: (11, 4)}.get(quantizer & 15, (0, 0))
        self.step, self.rows, self.columns = step, rows, columns
        n_channels = len(a["magnitude_bias"])
        self.n_heads = n_channels // 8
        self.probability = [int(p) << 6 for p in a["probabilities"]]
        self.count = a["counts"].tolist()
        self.weights = a["weights"].tolist()
        self.taps = {
            name: self.by_target(a[f"{name}_taps"]) for name in ("mean", "magnitude", "head")
        }
        shape = (n_channels, rows + 4, columns + 4)
        self.k, self.recon, self.mag, self.level, self.shift, self.symbols = (
            np.zeros(shape, np.int64) for _ in range(6)
        )
        self.total = np.zeros((self.n_heads, rows + 4, columns + 4), np.int64)
        self.net = None
        if "net.starts" in arrays:
            self.net = {k: v.astype(np.int64) for k, v in arrays.items() if k.startswith("net.")}
        self.lay_out()

    @staticmethod
    def by_target(taps):
        out = {}
        for target, *tap in taps.tolist():
            out.setdefault(target, []).append(tap)
        return out

    def lay_out(self):
        """Where each table of counters and of weights starts."""
        heads, kinds = self.n_heads, int(self.arrays["channel_class"].max()) + 1
        flag = [heads * 48, heads * 48, heads * 24, 48 * 80, heads * 15, 64 * 15, heads * 32]
        index = [48, kinds * 12, kinds * 8, 24 * 12 * 8, kinds * 20, 64 * 12, kinds * 16]
        sizes = [32 * n for n in index] + flag + [16, 9 * kinds]
        sets = [128, kinds * 4, 16, heads]
        if self.quantizer >= 16:
            rows = self.book.shape[0] * self.book.shape[1]
            sizes += [16 * n for n in [*flag[:5], heads * 4, flag[6]]]
            sizes += [64 * n for n in (rows, rows * 4, 16, 16, 130, 2 * heads, 64)] + [16]
            sizes += [kinds * 8 * 32, 4 * 8 * 8 * 32] if self.quantizer == 24 else [0, 0]
            sets += [256, heads * 16, 48, 48, 64, kinds * 4]
        self.start = np.cumsum([0, *sizes]).tolist()
        self.sets = np.cumsum([0, *sets]).tolist()

    def inside(self):
        return np.moveaxis(self.recon[:, 2:-2, 2:-2], 0, 2)

    def decode(self, first, end, checksum, message):
        """One layer."""
        self.coder = Coder(message)
        for head in range(first, end):
            self.ask(head)
            state = 0
            for r in range(self.rows):
                for c in range(self.columns):
                    self.extend(head, r, c)
                    state = self.head(head, r + 2, c + 2, state)
            part = np.s_[8 * head : 8 * head + 8]
            for plane in (self.recon[part], self.mag[part], self.total[head : head + 1]):
                plane[:] = np.pad(plane[:, 2:-2, 2:-2], ((0, 0), (2, 2), (2, 2)), "edge")
        planes = [self.k] if self.quantizer < 16 else [self.k, self.symbols]
        got = 0
        for plane in planes:
            part = plane[8 * first : 8 * end, 2:-2, 2:-2].reshape(end - first, 8, self.rows, -1)
            got = zlib.crc32(part.transpose(0, 2, 3, 1).astype("<i2").tobytes(), got)
        assert got == checksum

    def extend(self, head, r, c):
        part = np.s_[8 * head : 8 * head + 8]
        for plane in (self.recon[part], self.mag[part], self.total[head : head + 1]):
            p = plane[
                :, 2:, 2:
            ]  # position (r, c) of the tile; negative ones by -1 -> 1 in ``plane``
            if c == 0 and r > 0:
                plane[:, r + 2, 0:2] = p[:, r - 1, :1]
            if r == 0:
                left = p[:, 0, c - 1] if c > 0 else np.zeros(len(plane), np.int64)
                plane[:, 0:2, c + 1 : c + 4] = left[:, None, None]
            if r > 0 and c == self.columns - 1:
                plane[:, r + 1, c + 3 : c + 5] = p[:, r - 1, c][:, None]

    # -- bits
    def move(self, at, bit):
        p, n = self.probability[at], self.count[at]
        self.probability[at] = p + (((2**22 - 1 if bit else 0) - p) * (131072 // (2 * n + 3)) >> 16)
        self.count[at] = min(n + 1, 250)

    def counted(self, at):
        bit = self.coder.bit(65536 - clip(self.probability[at] >> 6, 24, 65512))
        self.move(at, bit)
        return bit

    def mixed(self, counters, w, v):
        s = [int(self.arrays["stretch"][self.probability[at] >> 10]) for at in counters] + [256]
        w, v = self.weights[w], self.weights[v]
        x = clip(sum(a * (b + c) for a, b, c in zip(s, w, v, strict=True)) >> 17, -2815, 2815)
        p = int(self.arrays["squash"][x + 2815])
        bit = self.coder.bit(65536 - clip(p, 24, 65512))
        for i in range(8):
            d = (s[i] * (65536 * bit - p) + 2**13) >> 14
            w[i] += d
            v[i] += d
        for at in counters:
            self.move(at, bit)
        return bit

    def tail(self, start):
        length = 0
        while length < 15 and self.counted(start + length):
            length += 1
        g = 1
        for _ in range(length):
            g = 2 * g + self.coder.bit(32768)
        return min(g + 13, 30000)

    # -- a head
    def level_of(self, total):
        return int(self.arrays["level"][clip(int(total) >> 6, 0, 4095)])

    def predicted(self, channel, r, c):
        total = 64 * self.arrays["magnitude_bias"][channel]
        for source, dy, dx, weight in self.taps["magnitude"].get(channel, []):
            total += weight * self.mag[source, r + dy, c + dx]
        return self.level_of(total)

    def flag_contexts(self, h, r, c, odd):
        """Entries of the flag's experts, and the level."""
        total = 64 * self.arrays["head_bias"][h]
        for source, dy, dx, weight in self.taps["head"].get(h, []):
            total += weight * self.total[source, r + dy, c + dx]
        level = self.level_of(total)
        t = self.total[h]
        around = sum(
            int(t[r + dy, c + dx] > 0) << i
            for i, (dy, dx) in enumerate([(0, -1), (-1, 0), (-1, -1), (-1, 1)])
        )
        near = min(local(int(t[r, c - 1] + t[r - 1, c])), 7)
        before = sum(int(self.total[i, r, c] > 0) for i in range(max(h - 4, 0), h))
        ahead = recent = 0
        if h > 0:
            last = self.total[h - 1]
            ahead = int(last[r, c + 1] > 0) + int(last[r + 1, c] > 0)
            recent = min(int(last[r, c]), 2)
        net = int(self.level[8 * h, r, c])
        return [
            h * 48 + level,
            (h * 16 + around) * 3 + ahead,
            (h * 8 + near) * 3 + recent,
            (level * 16 + around) * 5 + before,
            (h * 5 + before) * 3 + ahead,
            (net * 5 + before) * 3 + ahead,
            (h * 16 + level // 3) * 2 + odd,
        ], level

    def head(self, h, r, c, state):
        odd = state & 1
        entries, level = self.flag_contexts(h, r, c, odd)
        counters = [self.start[7 + i] + entry for i, entry in enumerate(entries)]
        flag = self.mixed(counters, self.sets[2] + level // 3, self.sets[3] + h)
        rest, part, n = flag, [0] * 8, 0
        if flag and (self.quantizer == 16 or (self.quantizer == 24 and h > 0)):
            rest, n, part = self.polar(h, r, c, entries, level)
        total = seen = 0
        for j in range(8):
            channel = 8 * h + j
            mean = 2**11
            for source, dy, dx, weight in self.taps["mean"].get(channel, []):
                mean += weight * int(self.recon[source, r + dy, c + dx])
            mean = clip((mean >> 12) + int(self.shift[channel, r, c]), -(2**20), 2**20)
            k = odd = 0
            if rest:
                odd = state & 1
                k = self.index(channel, j, r, c, odd, (n, part[j], seen))
                state = (state >> 1) ^ (odd * (self.h0 >> 1)) ^ ((k & 1) * (self.h1 >> 1))
                seen += abs(k)
            q = 2 * k - odd * ((k > 0) - (k < 0))
            self.k[channel, r, c] = k
            recon = mean + 16 * q
            size = abs(q)
            if self.quantizer >= 16:
                size = (abs(part[j] + 16 * q) + 8) >> 4
                recon = clip(recon + part[j], -(2**21), 2**21)
            self.recon[channel, r, c] = recon
            self.mag[channel, r, c] = min(size, 255)
            total += size
        self.total[h, r, c] = min(total, 65535)
        return state

    def index(self, channel, j, r, c, odd, polar):
        m = self.mag[channel]
        level = self.predicted(channel, r, c)
        near = local(int(2 * m[r, c - 1] + 2 * m[r - 1, c] + m[r - 1, c - 1] + m[r - 1, c + 1]))
        earlier = self.mag[channel - j : channel, r, c].tolist()
        intra = min(local(sum(earlier) + sum(earlier[-2:])), 7)
        first, second = (
            min(int(self.mag[source, r + dy, c + dx]), most)
            for (source, dy, dx), most in zip(
                self.arrays["parents"][channel].tolist(), (4, 3), strict=True
            )
        )
        net, kind = int(self.level[channel, r, c]), int(self.arrays["channel_class"][channel])
        entries = [
            level,
            kind * 12 + near,
            kind * 8 + intra,
            ((level >> 1) * 12 + near) * 8 + intra,
            kind * 20 + 4 * first + second,
            net * 12 + near,
            kind * 16 + level // 3,
        ]
        start = [self.start[i] + 32 * entry for i, entry in enumerate(entries)]
        w, v = self.sets[0] + level // 6 * 16, self.sets[1] + 4 * kind
        n, part, seen = polar
        if n:
            rho = (n > 1) + (n > 2) + (n > 4)
            start[6] = self.start[31] + 32 * (kind * 8 + min((abs(part) + 8) >> 4, 7))
            start[1] = self.start[32] + 32 * ((rho * 8 + j) * 8 + min(seen, 7))
            w, v = self.sets[8] + rho * 16, self.sets[9] + 4 * kind
        size = 0
        while size < 14:
            counters = [at + 16 * odd + size for at in start]
            if not self.mixed(counters, w + min(size, 7) * 2 + odd, v + min(size, 3)):
                break
            size += 1
        if size == 14:
            size = self.tail(self.start[14])
        if size == 0:
            return 0
        west, north = np.sign(self.k[channel, r, c - 1]), np.sign(self.k[channel, r - 1, c])
        sign = self.start[15] + 9 * kind + 3 * (int(west) + 1) + int(north) + 1
        return -size if self.counted(sign) else size

    # -- polar heads
    def polar(self, h, r, c, entries, level):
        """(rest, n, part) of a head whose flag was 1."""
        symbols = self.symbols[8 * h : 8 * h + 8]
        entries[5] = h * 4 + int(symbols[0, r, c - 1] > 0) + 2 * int(symbols[0, r - 1, c] > 0)
        start = [self.start[16 + i] + 16 * entry for i, entry in enumerate(entries)]

        def bit(number):
            w, v = self.sets[4] + 16 * number + level // 3, self.sets[5] + 16 * h + number
            return self.mixed([at + number for at in start], w, v)

        rest = 0
        if self.quantizer == 24:
            if not bit(0):
                return 1, 0, [0] * 8
            rest = bit(1)
        n = 1
        while n < 14 and bit(n + 1):
            n += 1
        if n == 14:
            n = self.tail(self.start[30])
        levels = [self.predicted_apart(8 * h + j, r, c) for j in range(8)]
        one, two = sorted(range(8), key=lambda j: -levels[j])[:2]
        net = int(np.argmax(self.level[8 * h : 8 * h + 8, r, c]))
        rho = (n > 1) + (n > 2) + (n > 4)
        group = min(h, len(self.book) - 1)
        near = int(symbols[1, r, c - 1]) & 63 if symbols[0, r, c - 1] > 0 else 64
        symbols[0, r, c] = n
        part = np.zeros(8, np.int64)
        for s in range(sum(depth <= n for depth in self.depth[group].tolist())):
            later, row = min(s, 1), group * self.book.shape[1] + s
            entries = [
                row, row * 4 + rho, one * 2 + later, net * 2 + later, later * 65 + near,
                h * 2 + later, one * 8 + two,
            ]  # fmt: skip
            at = [self.start[23 + i] + 64 * entry for i, entry in enumerate(entries)]
            node = 1
            for i in range(6):
                w, v = self.sets[6] + 6 * min(s, 7) + i, self.sets[7] + 6 * one + i
                node = 2 * node + self.mixed([x + node for x in at], w, v)
            near = node - 64
            symbols[1 + s // 2, r, c] += near << 6 * (s % 2)
            part += self.book[group, s, near]
        return rest, n, ((n * self.spacing * part + 2**11) >> 12).tolist()

    def predicted_apart(self, channel, r, c):
        """The level of a magnitude, the head itself taken as 0 (as nothing of it is decoded yet)."""
        return self.predicted(channel, r, c)

    # -- the network
    def ask(self, head):
        starts = [] if self.net is None else self.net["net.starts"].tolist()
        if head not in starts[:-1]:
            return
        group, net = starts.index(head), self.net
        recon = self.inside()[:, :, : 8 * head]
        size = (np.abs(recon)[..., None] >= net["net.thresholds"]).sum(axis=3)
        feature = clip((len(bin(self.step**16)) - 2 - 128) // 2, 0, 127)
        feature = np.full((*recon.shape[:2], 1), feature)
        x = np.concatenate([np.sign(recon) * size, size, feature], axis=2)
        for i in range(3):
            layer = {
                name: net[f"net.{group}.{i}.{name}"]
                for name in ("weight", "bias", "shift", "limits")
            }
            k = layer["weight"].shape[0]
            padded = np.pad(x, ((k // 2,) * 2, (k // 2,) * 2, (0, 0)), "edge")
            total = layer["bias"] + ((1 << layer["shift"]) >> 1)
            for dy in range(k):
                for dx in range(k):
                    seen = padded[dy : dy + self.rows, dx : dx + self.columns]
                    total = total + seen @ layer["weight"][dy, dx]
            x = np.clip(total >> layer["shift"], *layer["limits"][:2])
        n = 8 * (starts[group + 1] - head)
        part = np.s_[8 * head : 8 * head + n, 2:-2, 2:-2]
        self.level[part] = np.moveaxis(np.clip(x[..., -n:] + 16, 0, 63), 2, 0)
        if x.shape[2] > n:
            self.shift[part] = np.moveaxis(x[..., :n], 2, 0)
