"""A fuzz target for readers of ``.polar`` files: no bytes may do more than raise a FormatError.

    python tests/fuzz/fuzz_polar.py --inputs 100000 --findings FOLDER     mutations of our own
    python tests/fuzz/fuzz_polar.py --atheris -runs=100000 CORPUS         guided by coverage

Both take files apart, change something (a number of JSON, bytes of a block, a table, an order of
chunks, rarely the container itself) and put them together under checksums that are right: with wrong
ones nothing but checksums would be tested. The second needs atheris, which instruments all modules
but those with compiled kernels. An input counts as a finding if reading it raises anything but a
FormatError, takes more than SECONDS of CPU time, or more memory than CAP beyond the tensors in it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

KERNELS = [  # modules that numba compiles from their byte code, which instruments may not change
    "polarpack.entropy.range_coder", "polarpack.entropy._block_kernels",
    "polarpack.entropy._magnitude_kernels", "polarpack.entropy._word_kernels",
    "polarpack.clustering", "polarpack.product", "polarpack.residual", "polarpack.scalar",
    "polarpack.trellis", "polarpack.bitshift",
]  # fmt: skip
if "--atheris" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["polarpack"], exclude=KERNELS):
        import polarpack
        import polarpack.reading
        import polarpack.writing

import numpy as np  # noqa: E402  after the path, and after atheris has had its say
from forging import Chunk, pack, reseal, seal, unpack, unseal  # noqa: E402

import polarpack as pp  # noqa: E402
from polarpack.container import Kind  # noqa: E402
from polarpack.errors import FormatError, InputError  # noqa: E402

SECONDS = 1.0
CAP = 128 << 20  # bytes a reader may take beyond 8 times the tensors it returns
READ_WHOLE = 1 << 24  # bytes of tensors up to which everything is read
MEMORY_EVERY = 20  # watching memory takes as long as the rest: one input in so many
ODD = [0, 1, 2, 3, 127, 128, 255, 256, 4095, 4096, 65535, 65536, (1 << 31) - 1, 1 << 32, 1 << 63]
JUNK = [
    None, True, False, -1, 0.5, 1e-320, 1e308, float("nan"), float("inf"), "", "klt", "none", "raw",
    "integers", "f4", [], {}, [1, 2], -(1 << 70), *ODD,
]  # fmt: skip


def seeds() -> list[bytes]:
    """The golden files: every chain, model and kind of block."""
    return [path.read_bytes() for path in sorted(HERE.parent.glob("golden/*/file.polar"))]


# -- changing files --------------------------------------------------------------------------------
def edited(data: bytes, rng: random.Random) -> bytes:
    """Bytes after one to three edits."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, how = rng.randrange(len(out) + 1), rng.randrange(8)
        if how < 3 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 3 and at < len(out):
            out[at] = rng.choice([0, 1, 2, 127, 128, 255])
        elif how == 4:
            out[at:at] = rng.randbytes(rng.randint(1, 8))
        elif how == 5:
            del out[at : at + rng.randint(1, 8)]
        elif how == 6:
            out[at:at] = out[at : at + rng.randint(1, 40)]
        elif how == 7 and rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with something in it changed, left out or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        how = rng.random()
        inner = [] if how < 0.1 else [value[i]] * 2 if how < 0.2 else [changed(value[i], rng)]
        return [*value[:i], *inner, *value[i + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.7:
        near = [
            value + 1,
            value - 1,
            2 * value,
            value // 2,
            -value,
            value ^ (1 << rng.randrange(20)),
        ]
        return rng.choice(near)
    if isinstance(value, float) and rng.random() < 0.5:
        return value * rng.choice([-1, 0, 1e-300, 1e30, 1e300, 2])
    return rng.choice(JUNK)


def changed_part(kind: int, part: bytes, rng: random.Random) -> bytes:
    """A part of a chunk with something in it changed, its own checksums right."""
    if kind == Kind.TENSOR_HEADER and rng.random() < 0.8:
        return json.dumps(changed(json.loads(part), rng)).encode()
    if kind == Kind.QUANTIZER:
        config, listed, blobs = unseal(part)
        how = rng.random()
        if how < 0.35:
            return seal(changed(config, rng), listed, blobs)
        if how < 0.55:
            return seal(config, changed(listed, rng), blobs)
        if how < 0.8:
            return seal(config, listed, edited(blobs, rng))
        if how < 0.9:
            return seal(None, None, blobs, text=edited(json.dumps([config, listed]).encode(), rng))
        return reseal(part, edited(part[7:], rng))
    return edited(part, rng)


def changed_chunks(chunks: list[Chunk], rng: random.Random) -> None:
    """Change the chunks of a file in place."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        i, how = rng.randrange(len(chunks)), rng.random()
        chunk = chunks[i]
        if how < 0.8 and chunk[3]:
            j = rng.randrange(len(chunk[3]))
            with contextlib.suppress(Exception):  # a part that an earlier change has spoilt
                chunk[3][j] = changed_part(chunk[0], chunk[3][j], rng)
        elif how < 0.86:
            chunk[2] = rng.choice([chunk[2] + 1, max(0, chunk[2] - 1), 2 * chunk[2], *ODD[:13]])
        elif how < 0.9:
            chunk[rng.randrange(2)] = rng.choice([0, 1, 2, 3, 4, 5, 6, 127, 128, 255])
        elif how < 0.93:
            chunks.insert(rng.randrange(len(chunks) + 1), [*chunk[:3], list(chunk[3])])
        elif how < 0.96 and len(chunks) > 1:
            del chunks[i]
        else:
            rng.shuffle(chunks if rng.random() < 0.5 else chunk[3])


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Another file: of changed chunks, of chunks of two files, or of bytes changed anywhere."""
    if rng.random() < 0.05:
        return edited(data, rng)
    try:
        chunks = unpack(data)
        if rng.random() < 0.1:
            theirs = unpack(rng.choice(others))
            chunks[rng.randrange(len(chunks))] = rng.choice(theirs)
        changed_chunks(chunks, rng)
        return pack(chunks)
    except (FormatError, InputError, IndexError):  # no sound container, or more than it can write
        return edited(data, rng)


# -- reading them ----------------------------------------------------------------------------------
def read(data: bytes, **options: Any) -> int:
    """Use a file in every way there is; returns the bytes of the tensors that were read."""
    n_bytes = 0
    with pp.open(data, library="numpy", **options) as file:
        for name in file:
            tensor = file[name]
            with contextlib.suppress(InputError):  # a quantizer kept elsewhere
                if tensor.nbytes <= READ_WHOLE:
                    whole = np.asarray(tensor[...])
                    dtypes = {tensor.dtype_name, tensor.dtype_name.replace("bfloat16", "float32")}
                    if whole.shape != tensor.shape or whole.dtype.name not in dtypes:
                        raise AssertionError(f"{whole.dtype} {whole.shape}, not as declared")
                    n_bytes += whole.nbytes
                if tensor.shape and len(tensor) and tensor.nbytes // len(tensor) <= READ_WHOLE:
                    tensor[len(tensor) - 1]
                    tensor[[0, len(tensor) // 2]]
                    n_bytes += 3 * tensor.nbytes // len(tensor)
        file.info()
    return n_bytes


def check(data: bytes, *, memory: bool = False) -> str:
    """Read bytes as a file; returns what came of it. Anything amiss is raised as an error.

    What took too long is read once more: the first time may have compiled a kernel.
    """
    for _ in range(2):
        outcome, seconds = measured(data, memory)
        if seconds <= SECONDS * (4 if memory else 2):  # two readings
            return outcome
    raise AssertionError(f"took {seconds:.1f} s, {outcome}")


def measured(data: bytes, memory: bool) -> tuple[str, float]:
    """What comes of reading bytes as a file, and the CPU seconds it takes."""
    start = time.process_time()
    outcome = "read"
    n_bytes = 0
    if memory:
        tracemalloc.start()
    try:
        for options in ({}, {"on_error": "skip"}):
            try:
                n_bytes += read(data, **options)
            except FormatError as error:
                outcome = type(error).__name__
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
    finally:
        tracemalloc.stop()
    seconds = time.process_time() - start
    if peak > CAP + 8 * n_bytes:
        raise AssertionError(f"took {peak >> 20} MiB for {n_bytes} bytes, {outcome}")
    return outcome, seconds


def run(n_inputs: int, seed: int, findings: Path | None = None) -> Counter[str]:
    """Mutate and check; returns how often what came of it. Findings are kept, or raised if no
    folder for them is given. A mutated file that is still readable may be mutated further."""
    rng = random.Random(seed)
    pool = seeds()
    n_seeds = len(pool)
    for blob in pool:
        check(blob)  # kernels compile on first use
    outcomes: Counter[str] = Counter()
    for i in range(n_inputs):
        data = mutate(rng.choice(pool), rng, pool[:n_seeds])
        try:
            outcome = check(data, memory=i % MEMORY_EVERY == 0)
        except Exception as error:
            if findings is None:
                raise
            outcome = f"finding: {type(error).__name__}"
            name = hashlib.sha256(data).hexdigest()[:16]
            findings.mkdir(parents=True, exist_ok=True)
            (findings / f"{name}.polar").write_bytes(data)
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        outcomes[outcome] += 1
        if outcome == "read" and rng.random() < 0.1:
            place = n_seeds + rng.randrange(200)
            pool[place : place + 1] = [data]
        if (i + 1) % 5000 == 0:
            print(i + 1, dict(outcomes.most_common()), flush=True)
    return outcomes


def run_atheris() -> None:
    """Hand over to libFuzzer, with our mutations among its own."""
    files = seeds()
    for blob in files:
        check(blob)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        blob = mutate(data if len(data) > 40 else rng.choice(files), rng, files)
        return blob if len(blob) <= max_size else atheris.Mutate(data, max_size)

    def target(data: bytes) -> None:
        check(data)

    sys.argv.remove("--atheris")
    atheris.Setup(sys.argv, target, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> int:
    """Fuzz; exits with 1 if there were findings."""
    if "--atheris" in sys.argv:
        run_atheris()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--replay", type=Path, nargs="*", help="check these files only")
    args = parser.parse_args()
    if args.replay:
        for path in args.replay:
            print(path, check(path.read_bytes(), memory=True))
        return 0
    start = time.monotonic()
    outcomes = run(args.inputs, args.seed, args.findings)
    n_found = sum(n for outcome, n in outcomes.items() if outcome.startswith("finding"))
    print(
        f"{args.inputs} inputs, seed {args.seed}, {time.monotonic() - start:.0f} s, {n_found} findings"
    )
    for outcome, n in outcomes.most_common():
        print(f"{n:9d}  {outcome}")
    return 1 if n_found else 0


if __name__ == "__main__":
    sys.exit(main())
