"""A second reader of ``.polar`` files, written from docs/format.md alone: no import of polarpack.

Slow and plain on purpose, in the order of that text. It checks no limits and no checksums but the
footer's: what it is for is to show that the text suffices.
"""

from __future__ import annotations

import json
import math
import struct
import zlib

import numpy as np

ITEM = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}


class Bytes:
    """A run of bytes read from front to back."""

    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, n=None):
        n = len(self.data) - self.at if n is None else n
        self.at += n
        assert self.at <= len(self.data)
        return self.data[self.at - n : self.at]

    def number(self):
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def runs(self, n):
        out = []
        while len(out) < n:
            value = self.number()
            out += [value] * self.number()
        assert len(out) == n
        return out

    def signed(self):
        value = self.number()
        return -(value + 1) // 2 if value & 1 else value // 2


# -- Container and tensors -------------------------------------------------------------------------
def read(data):
    """{name: array} of a file's bytes; bfloat16 as float32."""
    assert data[:10] == bytes.fromhex("89504c520d0a1a0a01fe")
    size, crc = struct.unpack("<II", data[-8:])
    assert crc == zlib.crc32(data[:10] + data[-8 - size : -4])
    table = Bytes(data[-8 - size : -8])
    chunks, at = [], 10
    for _ in range(table.number()):
        kind, tensor, n_rows, n_bytes = (table.number() for _ in range(4))
        chunks.append((kind, tensor, n_rows, parts(data[at : at + n_bytes])))
        at += n_bytes
    side = {(kind, tensor): p[0] for kind, tensor, _, p in chunks if kind in (1, 2)}
    out = {}
    for kind, tensor in side:
        if kind == 1:
            header = json.loads(side[1, tensor])
            of = header.get("quantizer")
            quantizer = None if of is None else Quantizer(side[2, of])
            mine, model, words = [], None, None
            for k, t, n, p in chunks:
                if t == tensor:
                    model = Model(p[0]) if k == 3 else model
                    words = Words(p[0], header) if k == 5 else words
                    mine += [(n, p, model, words)] if k == 4 else []
            out[header["name"]] = rows_of(header, quantizer, mine)
    return out


def parts(chunk):
    b = Bytes(chunk)
    for _ in range(3):
        b.number()
    lengths = [b.number() for _ in range(b.number())]
    b.take(4 * len(lengths) + 4)
    return [b.take(n) for n in lengths]


def rows_of(header, quantizer, chunks):
    shape, dtype = header["shape"], header["dtype"]
    d = shape[-1] if shape else 1
    layout = header.get("layout", "archive")
    if quantizer is not None and layout == "archive":
        limits = (45, 90, 181, 362, 724, 1448)
        step = next((4096 >> i for i, limit in enumerate(limits) if d <= limit), 64)
    else:
        most, least, width = 2**17, 1, d * np.dtype(ITEM[dtype]).itemsize
        if quantizer is not None:
            most, least = 2**14, 16
            width = -(-sum(bits_of(k) for k in quantizer.sizes) // 8)
        step = min(4096, max(least, 1 << max(0, (most // max(1, width)).bit_length() - 1)))
    blocks = []
    for n_rows, some, model, words in chunks:
        for i, part in enumerate(some):
            n = min(step, n_rows - i * step)
            blocks.append(block_of(part, n, d, dtype, layout, quantizer, model, words))
    work = np.dtype("f4" if dtype == "bfloat16" else ITEM[dtype])
    rows = np.concatenate([np.zeros((0, d), work), *blocks])
    if shape and shape[0] == -1:
        shape = [len(rows) // math.prod(shape[1:-1]), *shape[1:]]
    return rows.reshape(shape)


def raw_rows(data, d, dtype):
    rows = np.frombuffer(data, ITEM[dtype]).reshape(-1, d)
    return (rows.astype(np.uint32) << 16).view("f4") if dtype == "bfloat16" else rows


def block_of(part, n, d, dtype, layout, quantizer, model, words):
    b = Bytes(part)
    kind = b.take(1)[0]
    if kind == 0:
        return raw_rows(b.take(), d, dtype)
    if kind == 3:
        return raw_rows(words.decode(b.take(), n), d, dtype)
    places, exact = [], None
    if kind == 2:
        count, size = struct.unpack("<HI", b.take(6))
        places = np.frombuffer(b.take(2 * count), "<u2")
        inner = b.take(len(b.data) - b.at - size)
        exact = block_of(inner, count, d, dtype, layout, None, None, words)
    codes = codes_of(b.take(), n, layout, quantizer, model)
    rows = np.stack([quantizer.decode(row, dtype) for row in codes])
    if len(places):
        rows[places] = exact
    return rows


def bits_of(k):
    return (k - 1).bit_length()


def codes_of(data, n, layout, quantizer, model):
    sizes = quantizer.sizes
    if layout == "rows":
        width = -(-sum(map(bits_of, sizes)) // 8)
        out = []
        for i in range(n):
            row = int.from_bytes(data[i * width : (i + 1) * width], "big")
            left, fields = 8 * width, []
            for k in sizes:
                left -= bits_of(k)
                fields.append(row >> left & (1 << bits_of(k)) - 1)
            out.append(fields)
        return out
    own = quantizer.own
    if own is None:
        return model.decode(data, n)
    if model is None:
        return own.decode(data, n)
    size = int.from_bytes(data[:4], "little")
    head, tail = model.decode(data[4 : 4 + size], n), own.decode(data[4 + size :], n)
    return [[*a, *b] for a, b in zip(head, tail, strict=True)]


EIGHTHS = [32768, 35734, 38968, 42495, 46341, 50535, 55109, 60097]  # of an octave


# -- Quantizer -------------------------------------------------------------------------------------
class Quantizer:
    def __init__(self, data):
        b = Bytes(data)
        assert b.take(3) == b"PQ\1"
        assert int.from_bytes(b.take(4), "little") == zlib.crc32(data[7:])
        head = b.take(int.from_bytes(b.take(4), "little"))
        self.config, listed = json.loads(zlib.decompress(head))
        arrays = {"radius": {}, "rotation": {}, "fine": {}}
        for stage, name, dtype, shape, coding, size in listed:
            blob = b.take(size)
            if coding == "raw":
                arrays[stage][name] = np.frombuffer(blob, "<" + dtype).reshape(shape)
            else:
                arrays[stage][name] = integer_matrix(blob, *shape)
        assert b.at == len(data)
        self.kind, self.fine = self.config["fine_kind"], self.config.get("fine")
        self.stored, self.own = arrays["fine"], None
        self.levels = arrays["radius"].get("levels")
        self.rotations, m = rotations_of(
            self.config["rotation"], arrays["rotation"], self.config["d"]
        )
        self.sizes = [] if self.levels is None else [len(self.levels)]
        if self.kind == "float16":
            self.sizes += [1 << 16] * m
            self.largest = 1.0
        elif self.kind in ("lloyd", "grid"):
            self.sizes += [1 << self.fine["n_bits"]] * m
            self.largest = (
                1.0 if self.kind == "grid" else float(np.abs(self.stored["levels"]).max())
            )
        elif self.kind == "codebook":
            self._codebooks()
        elif self.kind == "bitshift":
            self._circles()
        else:
            n_states = self.fine["n_states"]
            checks = {4: (0o5, 2), 8: (0o13, 4), 16: (0o23, 4), 32: (0o45, 0o10), 64: (0o103, 0o24)}
            self.own = Magnitude(self.stored["model"].tobytes(), checks[n_states])
            self.sizes += [self.own.n_classes] * (self.own.n_classes > 1) + [65535] * m

    def _codebooks(self):
        heads, at = self.fine["heads"], 0
        offset = self.stored.get("offset", np.zeros(heads[-1][1], "f4"))
        self.books, self.offset = [], offset
        for stage in range(max(len(bits) for _, _, bits in heads)):
            for a, b, bits in heads:
                if len(bits) > stage:
                    k = 1 << bits[stage]
                    half = self.stored["codebooks"][at : at + k * (b - a)].reshape(k, b - a)
                    at += half.size
                    e = int(self.stored["exponents"][len(self.books)])
                    book = np.ldexp(half.astype("f4"), e)
                    self.books.append((a, b, stage, book + offset[a:b] if stage == 0 else book))
                    self.sizes.append(k)
        self.largest = max(
            float(np.abs(v).max()) for v in [offset, *(book for *_, book in self.books)]
        )

    def _circles(self):
        """Bits and scales of each class's components, one bit after the other."""
        total, size = self.fine["row_bits"], self.stored["tables"].shape[1]
        gains = [-4, -18, -34, -50, -66, -82, -98, -114, -130][: size.bit_length() - 1]
        self.circles = []
        for row in np.cumsum(self.stored["scales"].astype(int), axis=1).tolist():
            bits = [0] * len(row)
            for _ in range(total):
                free = [j for j in range(len(row)) if bits[j] < len(gains)]
                bits[max(free, key=lambda j: (2 * row[j] + gains[bits[j]], -j))] += 1
            self.circles.append((row, bits))
        n_bytes = -(-total // 8)
        classes = [len(self.circles)] if len(self.circles) > 1 else []
        self.sizes += [*classes, *[256] * (n_bytes - 1), 1 << (total - 8 * (n_bytes - 1))]

    def _around(self, codes, row_class):
        total, tables = self.fine["row_bits"], self.stored["tables"].tolist()
        last = total - 8 * (len(codes) - 1)
        circle = "".join(f"{code:08b}" for code in codes[:-1]) + f"{codes[-1]:0{last}b}"
        size, at, y = len(tables[0]), 0, []
        state = int(circle, 2) % size
        for g, b in zip(*self.circles[row_class], strict=True):
            if not b:
                y.append(0)
                continue
            state = (state << b | int(circle[at : at + b], 2)) % size
            at += b
            shift = min(62, 18 + b - g // 8 + self.fine["unit"])
            factor = EIGHTHS[g % 8]
            y.append((tables[b - 1][state] * factor + (1 << shift >> 1)) >> shift)
        return y

    def decode(self, codes, dtype):
        radius = None
        if self.levels is not None:
            radius, codes = self.levels[codes[0]], codes[1:]
        row_class, y, unit, c = 0, None, 1.0, None
        if self.kind == "trellis":
            if len(self.rotations) > 1:
                row_class, codes = codes[0], codes[1:]
            y, unit = self.own.lattice(codes), float(np.float32(self.fine["step"]))
        elif self.kind == "bitshift":
            if len(self.rotations) > 1:
                row_class, codes = codes[0], codes[1:]
            y, unit = self._around([int(c) for c in codes], row_class), 2.0 ** self.fine["unit"]
        elif self.kind == "float16":
            c = np.array(codes, "u2").view("f2").astype("f4")
            c = np.nan_to_num(c, nan=0.0, posinf=65504, neginf=-65504)
        elif self.kind == "lloyd":
            c = self.stored["levels"][codes]
        elif self.kind == "grid":
            steps = self.stored["step"].astype("f8") * np.array(codes)
            c = (self.stored["minimum"].astype("f8") + steps).astype("f4")
        else:
            c = self.offset.astype("f4").copy()
            for code, (a, b, stage, book) in zip(codes, self.books, strict=True):
                c[a:b] = book[code] if stage == 0 else c[a:b] + book[code]
        matrix, s, mean = self.rotations[row_class]
        if matrix is None:
            v = c if y is None else np.array(y).astype("f4") * np.float32(unit)
        else:
            if y is None:
                unit = 2.0 ** (math.ceil(math.log2(self.largest)) - 16)
                y = [round(float(x) / unit) for x in c]
            sums = [sum(int(a) * b for a, b in zip(line, y, strict=True)) for line in matrix]
            v = np.array([np.float32(float(t)) for t in sums]) * np.float32(unit * 2.0**-s)
        v = v if mean is None else v + mean
        v = v if radius is None else v * np.float32(radius)
        for name, outside in (("low", np.less), ("high", np.greater)):
            limit = self.config.get(name)
            if limit is not None:
                v = np.where(outside(v, np.float32(limit)), np.float32(limit), v)
        if "columns" in self.config:
            octaves = [divmod(-k, 8) for k in self.config["columns"]]
            v = v * np.array([2.0 ** (o - 15) * EIGHTHS[i] for o, i in octaves], "f4")
        if self.config["exponent"]:
            v = np.ldexp(v.astype("f8"), self.config["exponent"])
        narrow = np.dtype("f4" if dtype == "bfloat16" else ITEM[dtype])
        if narrow.itemsize < v.dtype.itemsize:
            v = np.clip(v, -float(np.finfo(narrow).max), float(np.finfo(narrow).max))
        v = v.astype(narrow)
        if dtype == "bfloat16":
            bits = v.view("u4").astype("u8")
            bits = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
            v = (bits.astype("u4") << np.uint32(16)).view("f4")
        return v


def rotations_of(config, arrays, d):
    """[(matrix of integers or None, s, mean or None)] for each class, and m."""
    common = config.get("common", config)
    mean = arrays["mean"].astype("f4") if common["center"] else None
    if common["kind"] == "none":
        return [(None, 0, mean)], d
    s = common.get("exponent", 10)
    if common["kind"] == "hadamard":
        return [(hadamard(d, common["seed"]), s, mean)], d
    matrix = arrays["matrix"].astype(np.int64)
    m = matrix.shape[1]
    if common is config:
        return [(matrix, s, mean)], m
    t, o = config["turn_exponent"], config["offset_exponent"]
    offsets = arrays["offsets"].astype(np.int64)
    n_classes, p = offsets.shape
    f = min(8, m // 2)
    order = [*range(m - 1, m - 1 - f, -1), *range(m - f)]
    out = []
    for k in range(n_classes):
        turn = arrays["turns"][k * p : (k + 1) * p].astype(np.int64)
        lead = np.clip((matrix[:, :p] @ turn + (2**t >> 1)) >> t, -32767, 32767)
        both = np.concatenate([lead, matrix[:, p:]], axis=1)[:, order]
        moved = (matrix[:, :p] @ offsets[k]).astype("f4") * np.float32(2.0 ** -(o + s))
        out.append((both, s, (mean if mean is not None else np.zeros(d, "f4")) + moved))
    return out, m


def hadamard(d, seed):
    z = []
    for t in range(2 * d):
        v = (2 * seed * d + 1 + t) * 0x9E3779B97F4A7C15 % 2**64
        v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        v = (v ^ v >> 27) * 0x94D049BB133111EB % 2**64
        z.append(v ^ v >> 31)
    order = sorted(range(d), key=lambda i: z[i])
    matrix, a = np.zeros((d, d), np.int64), 0
    for bit in reversed(range(d.bit_length())):
        h = d & 1 << bit
        for i in range(h):
            row = order[a + i]
            for j in range(h):
                sign = (-1) ** (i & j).bit_count() * (1 if z[d + row] & 1 else -1)
                matrix[row, a + j] = sign * round(1024 / math.sqrt(h))
        a += h
    return matrix


# -- Entropy models --------------------------------------------------------------------------------
class Message:
    def __init__(self, data):
        self.data, self.at, self.range = data, 8, 2**64 - 1
        self.code = int.from_bytes(data[:8].ljust(8, b"\0"), "big")

    def symbol(self, cdf, unit):
        value = min(self.code // unit, int(cdf[-1]) - 1)
        s = int(np.searchsorted(cdf, value, side="right")) - 1
        self.code -= unit * int(cdf[s])
        self.range = unit * int(cdf[s + 1] - cdf[s])
        if self.range < 2**30:
            word = self.data[self.at : self.at + 4].ljust(4, b"\0")
            self.at += 4
            self.code = self.code << 32 | int.from_bytes(word, "big")
            self.range <<= 32
        return s

    def coded(self, cdf, precision):
        return self.symbol(cdf, self.range >> precision)

    def raw(self, b):
        return self.coded(range(2**b + 1), b) if b else 0


def messages(data, n, one):
    """[(message, its rows)] of a block of n rows."""
    if one:
        return [(Message(data), range(n))]
    b, q = Bytes(data), n // 4
    lengths = [b.number()]
    lengths += [lengths[0] + b.signed()]
    lengths += [lengths[1] + b.signed()]
    lanes = [Message(b.take(k)) for k in lengths] + [Message(b.take())]
    rows = [list(range(i * q, (i + 1) * q)) for i in range(4)]
    rows[0] += range(4 * q, n)
    return list(zip(lanes, rows, strict=True))


def cdf_of(weights, precision):
    w = [int(v) for v in weights]
    w = w if any(w) else [1] * len(w)
    shares = [True] * len(w)
    while True:
        room = 2**precision - shares.count(False)
        total = sum(v for v, s in zip(w, shares, strict=True) if s)
        still = [s and v * room >= total for v, s in zip(w, shares, strict=True)]
        if still == shares:
            break
        shares = still
    sizes = [v * room // total if s else 1 for v, s in zip(w, shares, strict=True)]
    rest = 2**precision - sum(sizes)
    by_remainder = sorted(
        (i for i, s in enumerate(shares) if s), key=lambda i: (-(w[i] * room % total), i)
    )
    for i in by_remainder[:rest]:
        sizes[i] += 1
    return np.concatenate([[0], np.cumsum(sizes)])


def weight(level, resolution):
    """floor(2^(37 - (level - 1) / resolution)) by exact integers."""
    if level == 0:
        return 0
    top = 37 * resolution - (level - 1)  # the resolution-th root of 2^top
    low, high = 0, 2**38
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**resolution <= 2**top else (low, middle)
    return low if top >= 0 else 0


class Model:
    """A model of a chunk of kind 3."""

    def __init__(self, data):
        b = Bytes(data)
        self.kind = b.take(1)[0]
        n = b.number()
        self.sizes = b.runs(n)
        self.precision = [20 if k <= 4096 else 24 for k in self.sizes]
        if self.kind == 1:
            self.cdfs = [
                cdf_of([1] * k, p) for k, p in zip(self.sizes, self.precision, strict=True)
            ]
        elif self.kind == 2:
            resolution, n_tables = 1 << b.number(), b.number()
            table_of = [0] * n if n_tables == 1 else list(range(n))
            if 1 < n_tables < n:
                table_of = [r[0] for r in adaptive(b.take(b.number()), n, [n_tables], [0], 0)]
            sizes = [self.sizes[table_of.index(t)] for t in range(n_tables)]
            prediction = b.number()
            column = [r[0] for r in adaptive(b.take(), sum(sizes), [256], [0], 0)]
            weights = [weight(v, resolution) for v in range(256)]
            cdfs, before, at = [], [], 0
            for k in sizes:
                levels, previous = column[at : at + k], 0
                at += k
                if prediction == 1 or (prediction == 2 and len(before) == k):
                    for i, v in enumerate(levels):
                        step = -(v + 1) // 2 if v & 1 else v // 2
                        levels[i] = previous = (
                            (previous if prediction == 1 else before[i]) + step
                        ) % 256
                elif prediction == 2:
                    levels = [(-(v + 1) // 2 if v & 1 else v // 2) % 256 for v in levels]
                before = levels
                cdfs.append(cdf_of([weights[v] for v in levels], 20 if k <= 4096 else 24))
            self.cdfs = [cdfs[t] for t in table_of]
        else:
            self.pooled, self.back = b.number(), b.runs(n)

    def decode(self, data, n):
        if self.kind == 3:
            return adaptive(data, n, self.sizes, self.back, self.pooled)
        out = [[0] * len(self.sizes) for _ in range(n)]
        for message, rows in messages(data, n, n < 4 or n * len(self.sizes) < 2**14):
            for f, (cdf, p) in enumerate(zip(self.cdfs, self.precision, strict=True)):
                for i in rows:
                    out[i][f] = message.coded(cdf, p)
        return out


def adaptive(data, n, sizes, back, pooled):
    message, trees = Message(data), {}
    out = [[0] * len(sizes) for _ in range(n)]
    for f, k in enumerate(sizes):
        b = max(1, bits_of(k))
        seen = sizes[f - back[f]] if back[f] else 1
        s = max(0, bits_of(seen) - 4)
        n_trees = (seen - 1 >> s) + 1
        group = trees.setdefault((k, n_trees) if pooled else f, {})
        for i in range(n):
            if i % 1024 == 0:
                for node in group.values():
                    if sum(node) > 24575:
                        node[:] = [c - c // 2 for c in node]
            tree = out[i][f - back[f]] >> s if back[f] else 0
            known, prefix = 0, 0
            while known < b:
                width = (b - 1) % 4 + 1 if known == 0 else 4
                left = b - known - width
                if (tree, known, prefix) not in group:
                    lowest = [((prefix << width) + j) << left for j in range(1 << width)]
                    group[tree, known, prefix] = [4 if v < k else 0 for v in lowest]
                node = group[tree, known, prefix]
                cdf = np.concatenate([[0], np.cumsum(node)])
                branch = message.symbol(cdf, message.range // sum(node))
                node[branch] += 8
                prefix = prefix << width | branch
                known += width
            out[i][f] = prefix
    return out


def root(numerator, denominator):
    """The integer nearest to the fourth root of numerator / denominator."""
    return math.isqrt(math.isqrt(numerator * 16 // denominator)) + 1 >> 1


GAIN = [root(2 ** (64 + 24), 2 ** max(e, 16)) for e in range(89)]
COUNTED = [root(GAIN[e] ** 4 * 2**e, 2**24) for e in range(89)]


def log(seen):
    return round(4 * math.log2(((seen >> 11) + 0.5) * 2**11))


def default_levels():
    y = np.arange(4096) / 16
    out = np.zeros((2, 20, 32), int)
    for i in range(20):
        g = np.exp(-((y / (1.25 * (2 ** ((i + 0.75) / 2 - 6) + 0.25))) ** 1.3))
        for q in range(2):
            k = np.minimum(31, (y + q + 1) // 2).astype(int)
            p = np.bincount(k, g, 32) / g.sum()
            out[q, i] = np.rint(-8 * np.log2(np.maximum(p, 2.0**-15)))
    return out


class Magnitude:
    def __init__(self, data, machine=None):
        b = Bytes(data)
        self.n_classes, self.m = b.number(), b.number()
        own_tables = b.take(1)[0]
        payload = np.frombuffer(zlib.decompress(b.take()), np.uint8)
        k, size = self.n_classes, self.n_classes * self.m
        self.class_cdf = cdf_of([weight(v + 1, 8) for v in payload[:k].tolist()], 15)
        steps = payload[k : k + size].reshape(k, self.m)
        self.profile = np.cumsum(steps, axis=1, dtype=np.uint8).astype(int)
        levels = payload[k + size :].reshape(2, 20, 32) if own_tables else default_levels()
        weights = [weight(v + 1, 8) for v in range(121)]
        self.cdfs = [[cdf_of([weights[v] for v in t], 15) for t in of_q] for of_q in levels]
        self.machine = machine
        self.base = np.zeros((k, self.m), int)
        for c in range(k):
            usual = 2**19
            for j, e in enumerate(self.profile[c]):
                self.base[c, j] = e - log(usual)
                usual += COUNTED[e] - (usual >> 5)

    def step(self, state, k):
        if self.machine is None:
            return 0
        h0, h1 = self.machine
        return state >> 1 ^ (state & 1) * (h0 >> 1) ^ (k & 1) * (h1 >> 1)

    def lattice(self, codes):
        state, out = 0, []
        for code in codes:
            k = int(code) + 1 >> 1 if code & 1 else -(int(code) >> 1)
            out.append(2 * k - (k > 0) * (state & 1) + (k < 0) * (state & 1))
            state = self.step(state, k)
        return out

    def decode(self, data, n):
        out = [None] * n
        for message, rows in messages(data, n, n < 4 or n * self.m < 2**14):
            for i in rows:
                c = message.coded(self.class_cdf, 15) if self.n_classes > 1 else 0
                row = [c] if self.n_classes > 1 else []
                seen, state = 2**19, 0
                for j in range(self.m):
                    q = state & 1 if self.machine else 0
                    scale = min(45, max(0, int(self.base[c, j]) + log(seen) >> 1))
                    shift = max(0, scale - 18) >> 1
                    k = message.coded(self.cdfs[q][scale - 2 * shift], 15)
                    if k == 31:
                        length = message.raw(4)
                        k = 30 + (1 << length) + message.raw(length)
                    if q == 0:
                        low = message.raw(shift if k else max(0, shift - 1))
                        k = (k << shift | low) - (1 << shift >> 1) if k else low
                    elif k:
                        k = (k - 1 << shift | message.raw(shift)) + 1
                    negative = message.raw(1) if k else 0
                    gain = GAIN[self.profile[c, j]]
                    seen += min((2 * k - (q if k else 0)) * gain, 2**19) - (seen >> 5)
                    state = self.step(state, k)
                    row.append(2 * k if negative or not k else 2 * k - 1)
                out[i] = row
        return out


class Words:
    """Numbers stored exactly."""

    def __init__(self, data, header):
        self.w = 8 * np.dtype(ITEM[header["dtype"]]).itemsize
        b = Bytes(data)
        self.t, self.u = b.number(), b.number()
        b.number()
        steps = b.runs(b.number())
        self.keys = np.cumsum(steps).tolist()
        self.model = Model(b"\x02" + b.take())

    def decode(self, data, n):
        b, h = Bytes(data), self.w - 1 - self.t
        rows = self.model.decode(b.take(b.number()), n)
        plain, at, out = b.take(), 0, []
        for z, v, *symbols in rows:
            for s in symbols:
                if s == len(self.keys) + 1:
                    out.append(out[-len(symbols)] if len(out) >= len(symbols) else 0)
                    continue
                bits = self.w if s == len(self.keys) else self.t - int(z)
                held = int.from_bytes(plain[at // 8 : (at + bits + 7) // 8], "little")
                value = held >> at % 8 & (1 << bits) - 1
                at += bits
                if s < len(self.keys):
                    k = self.keys[s]
                    move = int(v) << self.u - 1 if self.u else 0
                    magnitude = ((k >> 1) + move) % (1 << h)
                    value = (k & 1) << self.w - 1 | magnitude << self.t | value << int(z)
                out.append(value)
        assert len(plain) == -(-at // 8)
        return np.array(out, f"<u{self.w // 8}").tobytes()


def integer_matrix(data, n, m):
    b = Bytes(data)
    model = Magnitude(b.take(b.number()))
    codes = np.array(model.decode(b.take(), n), np.int64).reshape(n, m)
    return np.where(codes & 1, codes + 1 >> 1, -(codes >> 1))
