"""How fast are the entropy coders next to constriction's, on one core?

Static: 256 symbols with a skewed pmf, whole calls from an array of symbols to bytes and back,
against constriction's range coder and its ANS coder with the same pmf. Adaptive: bits whose
probability follows them, and AdaptiveModel. Every result is decoded and compared before anything is
timed; repeats of all contestants alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["POLARPACK_THREADS"] = "1"

import constriction
import numpy as np

import polarpack
from polarpack.entropy import AdaptiveModel, StaticModel
from polarpack.entropy import range_coder as rc

SEED = 0
RESULTS = Path(__file__).parent / "results" / "entropy_speed.json"


@rc.kernel
def write_bits(bits: Any, words: Any) -> int:
    """Bits whose probability follows them, one shift by 5 a step."""
    pos, low, range_ = rc.start_writing()
    p = np.int64(32768)
    for i in range(bits.size):
        pos, low, range_ = rc.put_bit(words, pos, low, range_, p, bits[i])
        p = p - (p >> 5) if bits[i] else p + ((65536 - p) >> 5)
    return rc.finish(words, pos, low, range_)


@rc.kernel
def read_bits(words: Any, bits: Any) -> None:
    """Inverse of ``write_bits``."""
    pos, code, range_ = rc.start_reading(words)
    p = np.int64(32768)
    for i in range(bits.size):
        bit, pos, code, range_ = rc.get_bit(words, pos, code, range_, p)
        p = p - (p >> 5) if bit else p + ((65536 - p) >> 5)
        bits[i] = bit


def static_contestants(symbols: Any, pmf: Any) -> tuple[dict[str, Callable[[], Any]], list[Any]]:
    """Calls to time by name, and a row with the size of each coder's message."""
    n = symbols.size
    rows = symbols[:, None]
    model = StaticModel.fit(rows, [256])
    data = model.encode(rows)
    assert (model.decode(data, n)[:, 0] == symbols).all()

    stream = constriction.stream
    theirs = stream.model.Categorical(pmf.astype(np.float64), perfect=False)
    wide = symbols.astype(np.int32)  # what constriction takes

    def range_encode() -> Any:
        coder = stream.queue.RangeEncoder()
        coder.encode(wide, theirs)
        return coder.get_compressed()

    def ans_encode() -> Any:
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(wide, theirs)
        return coder.get_compressed()

    ranged, stacked = range_encode(), ans_encode()

    def range_decode() -> Any:
        return stream.queue.RangeDecoder(ranged).decode(theirs, n)

    def ans_decode() -> Any:
        return stream.stack.AnsCoder(stacked).decode(theirs, n)

    assert (range_decode() == wide).all()
    assert (ans_decode() == wide).all()
    entropy = -float(np.log2(pmf)[symbols].sum()) / 8
    sizes = [
        {"coder": "polarpack", "bytes": len(data), "table_bytes": len(model.to_bytes())},
        {"coder": "constriction range", "bytes": 4 * ranged.size},
        {"coder": "constriction ans", "bytes": 4 * stacked.size},
    ]
    for row in sizes:
        row["over_entropy"] = round(row["bytes"] / entropy - 1, 6)
        assert row["over_entropy"] < 1e-3
    calls = {
        "polarpack encode": lambda: model.encode(rows),
        "polarpack decode": lambda: model.decode(data, n),
        "constriction range encode": range_encode,
        "constriction range decode": range_decode,
        "constriction ans encode": ans_encode,
        "constriction ans decode": ans_decode,
    }
    return calls, sizes


def adaptive_contestants(symbols: Any, rng: Any) -> dict[str, Callable[[], Any]]:
    """Calls to time by name; each codes symbols.size bits or symbols."""
    calls: dict[str, Callable[[], Any]] = {}
    n = symbols.size
    for one in (0.5, 0.2, 0.05):
        bits = (rng.random(n) < one).astype(np.uint8)
        words = np.empty(rc.capacity(n), np.uint32)
        read = rc.words_from_bytes(rc.words_to_bytes(words, write_bits(bits, words)))
        out = np.empty_like(bits)
        read_bits(read, out)
        assert (out == bits).all()
        calls[f"bits, p(1) = {one} encode"] = lambda b=bits, w=words: write_bits(b, w)
        calls[f"bits, p(1) = {one} decode"] = lambda r=read, o=out: read_bits(r, o)
    for k in (16, 256):
        rows = (symbols // (256 // k))[:, None]
        model = AdaptiveModel([k])
        data = model.encode(rows)
        assert (model.decode(data, n) == rows).all()
        calls[f"AdaptiveModel, {k} symbols encode"] = lambda m=model, r=rows: m.encode(r)
        calls[f"AdaptiveModel, {k} symbols decode"] = lambda m=model, d=data: m.decode(d, n)
    return calls


def measure(calls: dict[str, Callable[[], Any]], n: int, repeats: int) -> list[dict[str, Any]]:
    """Median and quartiles of the CPU time a symbol takes, in ns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat:  # the first round warms caches
                times[name].append((time.process_time() - start) / n * 1e9)
    rows = []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        ns = {"ns": round(median, 3), "ns_quartiles": [round(low, 3), round(high, 3)]}
        rows.append({"what": name, **ns, "million_per_second": round(1e3 / median, 1)})
    return rows


def cpu_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Check, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--symbols", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(SEED)
    pmf = np.exp(-np.abs(np.arange(256) - 128) / 12.0)
    pmf /= pmf.sum()
    symbols = rng.choice(256, args.symbols, p=pmf).astype(np.uint8)
    calls, sizes = static_contestants(symbols, pmf)
    rows = measure(calls, args.symbols, args.repeats)
    rows += measure(adaptive_contestants(symbols, rng), args.symbols, max(3, args.repeats // 3))
    ns = {row["what"]: row["ns"] for row in rows}
    ratios = {
        f"{direction} against constriction {coder}": round(
            ns[f"constriction {coder} {direction}"] / ns[f"polarpack {direction}"], 2
        )
        for direction in ("encode", "decode")
        for coder in ("range", "ans")
    }
    for row in rows:
        low, high = row["ns_quartiles"]
        speed = f"{row['million_per_second']:8.1f} M/s"
        print(f"{row['what']:38s}{row['ns']:8.2f} ns  ({low:.2f} to {high:.2f}) {speed}")
    for size in sizes:
        print(f"{size['coder']:38s}{size['bytes']:10d} bytes, entropy + {size['over_entropy']:.4%}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio} times as fast")
    versions = {"python": platform.python_version(), "polarpack": polarpack.__version__}
    versions |= {name: version(name) for name in ("numpy", "numba", "constriction")}
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "threads": 1,
        "clock": "CPU time of the process",
        "cpu": cpu_name(),
        "versions": versions,
        "data": [{"name": "symbols, p ~ exp(-|s - 128| / 12)", "shape": [args.symbols],
                  "dtype": "uint8"}],
        "sizes": sizes,
        "ratios": ratios,
        "rows": rows,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
