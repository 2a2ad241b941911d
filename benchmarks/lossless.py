"""How small is a table stored to the bit, next to byte shuffling with zstd, and at what speed?

Whole files of ``pp.compress(x, max_error=0)`` against bytes shuffled (all first bytes of the
numbers, then all second ones) and compressed by zstd at levels 9 and 19. Every result is decoded
and compared with the input before anything is timed; repeats of all contestants alternate, on one
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["POLARPACK_THREADS"] = "1"

import numpy as np
from entropy_speed import cpu_name
from numcodecs import Shuffle, Zstd
from tables import load_tables

import polarpack as pp

SEED = 0
RESULTS = Path(__file__).parent / "results" / "lossless.json"
NAMES = ("sentences", "tokens", "weights", "glove", "glove_excerpt", "sift", "gaussian")
MAX_BYTES = 24 << 20  # of a table; the first rows of larger ones


def variants(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    """(what the numbers are, (n, d) array) to compress of one table."""
    if name == "sentences":  # stored as float16
        yield "float16", x.astype(np.float16)
        yield "float32", turned(x)
        yield "float16 in float32", x
    elif name == "sift":
        yield "0..255 in float32", x
    else:
        yield "float16", x.astype(np.float16)
        yield "float32", x


def turned(x: Any) -> Any:
    """The rows in a random orthogonal frame: float32 numbers that use all of their bits."""
    rng = np.random.default_rng(SEED)
    q = np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])))[0]
    return x @ q.astype(np.float32)


def zstd_calls(x: Any, level: int) -> tuple[Callable[[], bytes], Callable[[bytes], Any]]:
    """Shuffle and zstd, and back."""
    shuffle, zstd = Shuffle(x.itemsize), Zstd(level)

    def encode() -> bytes:
        return bytes(zstd.encode(shuffle.encode(x)))

    def decode(data: bytes) -> Any:
        plain = np.frombuffer(shuffle.decode(zstd.decode(data)), x.dtype)
        return plain.reshape(x.shape)

    return encode, decode


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(x: Any, repeats: int, level_19: bool) -> dict[str, Any]:
    """Bits a number takes with each contestant, and speeds in MB/s of the numbers."""

    def compress() -> bytes:
        return pp.compress(x, max_error=0)

    contestants = {"polarpack": (compress, pp.decompress), "zstd 9": zstd_calls(x, 9)}
    if level_19:
        contestants["zstd 19"] = zstd_calls(x, 19)
    row: dict[str, Any] = {}
    coded = {}
    for name, (encode, decode) in contestants.items():
        coded[name] = encode()
        assert decode(coded[name]).tobytes() == x.tobytes(), name
        row[f"{name} bits"] = round(8 * len(coded[name]) / x.size, 3)
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, (encode, decode) in contestants.items():
            if name != "zstd 19":  # some 2 MB/s: its size is what it is for
                times.setdefault(f"{name} encode", []).append(seconds(encode))
            data = coded[name]
            times.setdefault(f"{name} decode", []).append(
                seconds(lambda decode=decode, data=data: decode(data))
            )
    for what, values in times.items():
        row[f"{what} MB/s"] = round(x.nbytes / 1e6 / statistics.median(values), 1)
    for what in ("encode", "decode"):
        pairs = zip(times[f"zstd 9 {what}"], times[f"polarpack {what}"], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        row[f"{what} speed ratio"] = round(statistics.median(ratios), 2)
        row[f"{what} speed ratio range"] = [round(ratios[0], 2), round(ratios[-1], 2)]
    return row


def run(names: Sequence[str], data: Sequence[Path], repeats: int, level_19: bool) -> list[Any]:
    rows = []
    for table in load_tables(names, data):
        x = table.x[: MAX_BYTES // (4 * table.x.shape[1])]
        for numbers, array in variants(table.name, x):
            row = {"table": table.name, "numbers": numbers, "shape": list(array.shape)}
            row |= {"dtype": array.dtype.name}
            row |= measure(np.ascontiguousarray(array), repeats, level_19)
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), sep=" | ", flush=True)
    return rows


def main() -> None:
    """Check, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="*", default=NAMES)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders with tables")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--without-19", action="store_true", help="leave out zstd 19, which is slow"
    )
    args = parser.parse_args()
    rows = run(args.tables, args.data, args.repeats, not args.without_19)
    versions = {"python": platform.python_version(), "polarpack": pp.__version__}
    versions |= {name: version(name) for name in ("numpy", "numba", "numcodecs")}
    data = [{"name": f"{r['table']}, {r['numbers']}", "shape": r["shape"], "dtype": r["dtype"]}
            for r in rows]  # fmt: skip
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "threads": 1,
        "clock": "CPU time of the process",
        "cpu": cpu_name(),
        "versions": versions,
        "data": data,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
