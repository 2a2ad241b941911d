"""``polarpack demo``: the shipped word vectors compressed, looked up, compared and plotted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import _glove, comparison
from ._arrays import Float32
from .codec import save
from .comparison import Result
from .errors import MissingDependencyError
from .reading import open as open_polar

if TYPE_CHECKING:
    from rich.console import Console

    from .reading import Tensor

WORDS = ("paris", "piano", "monday", "cheap", "ocean")
N_NEAREST = 3
FILE_BITS = 2.0  # in total, of the file in which words are looked up
FILE_NAME, PLOT_NAME = "polarpack-demo.polar", "polarpack-demo.png"
TENSOR = "glove"
PQ_SETTINGS = ((5, 8), (25, 4), (25, 6))  # subquantizers x bits: its best at 1.3, 2.1 and 3.2 bits
SMALL_BITS = (0.5, 1.0)  # totals of ours besides those of the others


def run(
    folder: str | os.PathLike[str],
    out: Console,
    doing: Callable[[str], None],
    missing: Callable[[str], None],
) -> None:
    """Print the demo to ``out``, leave a file and a plot in ``folder``.

    ``doing`` takes what is under way, ``missing`` what is left out and why. Less than a minute on
    two cores.
    """
    words, x = _glove.load()
    target, picture = Path(folder) / FILE_NAME, Path(folder) / PLOT_NAME
    out.print(f"{len(words):,} GloVe word vectors of {x.shape[1]} float32: {x.nbytes:,} bytes")
    doing(f"polarpack at {FILE_BITS:g} bits per float")
    started = time.process_time()
    save(target, {TENSOR: x}, bits=FILE_BITS)
    seconds = time.process_time() - started
    size = target.stat().st_size
    out.print(f"{target}: {size:,} bytes, {x.nbytes / size:.1f} times smaller\n")
    with open_polar(target) as file:
        _look_up(file[TENSOR], words, x, out)
        stored = comparison.measure(comparison.OURS, "", x, file[TENSOR][...], size, seconds)
    results = _measure(x, stored, doing, missing)
    out.print()
    out.print(comparison.table(results, "the same table in other ways, every byte counted"))
    out.print("float16 is exact here because the package ships these vectors rounded to it")
    try:
        comparison.of_results(f"{len(words):,} GloVe word vectors", x, results).plot(picture)
        out.print(f"\n{picture}: the table as a plot")
    except MissingDependencyError as error:
        missing(str(error))
    out.print(f"where the bytes are: polarpack info {target}")


def _look_up(stored: Tensor, words: list[str], x: Float32, out: Console) -> None:
    """Nearest words in the original table and in the file, which is decoded where it is asked."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    shown = Table(title="nearest words", title_justify="left", title_style="bold", box=HORIZONTALS)
    for head in ("word", "in the original", "in the file"):
        shown.add_column(head)
    rows = [words.index(word) for word in WORDS]
    unit = x / np.sqrt((x.astype(np.float64) ** 2).sum(axis=1))[:, None]
    queries = stored[rows]  # decodes the blocks that hold these rows
    _, found = stored.search(queries, k=N_NEAREST + 1, metric="cosine")
    for row, after in zip(rows, found, strict=True):
        before = np.argsort(-(unit @ unit[row]), kind="stable")
        lists = ([words[j] for j in ids if j != row][:N_NEAREST] for ids in (before, after))
        shown.add_row(words[row], *map(", ".join, lists))
    out.print(shown)


def _measure(
    x: Float32, stored: Result, doing: Callable[[str], None], missing: Callable[[str], None]
) -> list[Result]:
    """What others reach, and polarpack in as many bytes; ``stored`` and small sizes on top."""
    results = [comparison.float16_rows(x), comparison.int8_rows(x)]
    try:
        for m, n_bits in PQ_SETTINGS:
            doing(f"faiss PQ {m}x{n_bits}")
            results.append(comparison.faiss_pq(x, m, n_bits))
    except MissingDependencyError as error:
        missing(str(error))
    sizes = {r.total_bytes for r in results if r.method != "float16"}
    for total_bytes in sorted(sizes | {int(bits * x.size / 8) for bits in SMALL_BITS}):
        doing(f"polarpack in {total_bytes:,} bytes")
        results.append(comparison.polarpack(x, total_bytes))
    return [stored, *results]
