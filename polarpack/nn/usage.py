"""How codewords are used: perplexity, dead codes and histograms, as data and as a plot."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from ..errors import InputError, MissingDependencyError
from .codebook import Codebook
from .finite import _Finite


@dataclass(frozen=True)
class CodebookUsage:
    """Use of one codebook (or of one field of a codebook-free quantizer) since the last reset."""

    name: str
    size: int
    n_vectors: int
    perplexity: float  # exp of the entropy, in codewords
    n_dead: int  # never used
    bits: float  # the entropy: what a code would cost with an ideal coder
    histogram: list[int]  # (size,) uses of each codeword


@dataclass(frozen=True)
class UsageReport:
    """Use of every codebook of a model; ``usage`` makes it."""

    codebooks: list[CodebookUsage]

    @property
    def perplexity(self) -> float:
        """Mean over codebooks."""
        return float(np.mean([c.perplexity for c in self.codebooks]))

    @property
    def n_dead(self) -> int:
        """Codewords never used, over all codebooks."""
        return sum(c.n_dead for c in self.codebooks)

    @property
    def bits(self) -> float:
        """Entropy of all fields of one vector, in bits, as if fields were independent."""
        return math.fsum(c.bits for c in self.codebooks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'codebook':<32} {'size':>6} {'perplexity':>10} {'dead':>6} {'bits':>6}"]
        lines += [
            f"{c.name:<32} {c.size:>6} {c.perplexity:>10.1f} {c.n_dead:>6} {c.bits:>6.2f}"
            for c in self.codebooks
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Write a picture: for each codebook its uses, sorted, beside an even use.
        MissingDependencyError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError(
                "plots need matplotlib: pip install 'polarpack[bench]'"
            ) from error
        columns = min(4, len(self.codebooks))
        rows = -(-len(self.codebooks) // columns)
        figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(self.codebooks) :]:
            axis.set_axis_off()
        for axis, c in zip(axes.flat, self.codebooks, strict=False):
            share = np.sort(np.array(c.histogram))[::-1] / max(1, c.n_vectors)
            axis.fill_between(np.arange(c.size), share, step="mid", color="#4477aa")
            axis.axhline(1 / c.size, color="#cc6677", linewidth=1, label="even")
            axis.set_title(
                f"{c.name}\nperplexity {c.perplexity:.0f} of {c.size}, {c.n_dead} dead", fontsize=8
            )
            axis.set_xlabel("codewords, by use", fontsize=7)
            axis.set_ylabel("share of vectors", fontsize=7)
            axis.tick_params(labelsize=7)
            axis.set_ylim(bottom=0)
        axes.flat[0].legend(fontsize=7)
        figure.savefig(path, dpi=120)


def usage(model: nn.Module) -> UsageReport:
    """The use of every codebook inside ``model`` in training since it was made or reset.

    InputError for a model without any of this package's quantizers.
    """
    found = [
        entry
        for name, module in model.named_modules()
        if isinstance(module, Codebook | _Finite)
        for entry in _uses(name or type(module).__name__, module)
    ]
    if not found:
        raise InputError(f"{type(model).__name__} holds no quantizer of polarpack.nn")
    return UsageReport(found)


def reset_usage(model: nn.Module) -> None:
    """Start counting anew in every quantizer inside ``model``."""
    for module in model.modules():
        if isinstance(module, Codebook | _Finite):
            module.reset_usage()


def _uses(name: str, module: Codebook | _Finite) -> list[CodebookUsage]:
    hits = module.hits.cpu().numpy()
    if isinstance(module, Codebook):
        labels = [name] if module.heads == 1 else [f"{name} head {h}" for h in range(len(hits))]
        return [_use(label, row) for label, row in zip(labels, hits, strict=True)]
    sizes = module.alphabet_sizes
    return [_use(f"{name} field {i}", row[:n]) for i, (row, n) in enumerate(zip(hits, sizes))]  # noqa: B905 (rows may be more)


def _use(name: str, histogram: npt.NDArray[np.int64]) -> CodebookUsage:
    n = int(histogram.sum())
    p = histogram[histogram > 0] / max(1, n)
    entropy = float(-(p * np.log(p)).sum())
    return CodebookUsage(
        name=name,
        size=len(histogram),
        n_vectors=n,
        perplexity=math.exp(entropy) if n else 0.0,
        n_dead=int((histogram == 0).sum()),
        bits=entropy / math.log(2),
        histogram=histogram.tolist(),
    )
