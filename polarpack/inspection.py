"""What is in a ``.polar`` file: where its bytes are, is it sound, how close to the original.

``progress`` arguments take a call with the work at hand and the share of it that is done.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._arrays import Array
from .blocks import native_rows, work_dtype
from .container import Kind, Reader
from .errors import FormatError, InputError
from .metrics import Closeness
from .polar import PolarQuantizer, _array_to_bytes
from .reading import File, Tensor
from .reading import open as open_polar

Source = str | os.PathLike[str] | bytes
Progress = Callable[[str, float], None]
READ_ROWS = 1 << 14  # rows decoded between two words of progress
SIDE_PARTS = {
    Kind.TENSOR_HEADER: "tensor header",
    Kind.ENTROPY_MODEL: "entropy model",
    Kind.WORD_MODEL: "word model",
}


# -- where the bytes are ---------------------------------------------------------------------------
def sizes(source: Source) -> dict[str, Any]:
    """``File.info`` with ``parts`` for each tensor: names to bytes, together its codes_bytes and
    side_bytes. Reads heads and quantizers, decodes nothing. Raises as ``polarpack.open`` does."""
    with Reader(source) as reader, open_polar(source, library="numpy") as file:
        facts = file.info()
        of_kind = reader.chunks["kind"] == Kind.TENSOR_HEADER
        numbers = reader.chunks["tensor"][of_kind].tolist()
        for name, number in zip(file.keys(), numbers, strict=True):
            facts["tensors"][name]["parts"] = _tensor_parts(reader, number, file[name])
    return facts


def _tensor_parts(reader: Reader, number: int, tensor: Tensor) -> dict[str, int]:
    parts = {"codes": 0}
    overhead = 0
    for i in np.flatnonzero(reader.chunks["tensor"] == number).tolist():
        kind, n_bytes = int(reader.chunks["kind"][i]), int(reader.chunks["n_bytes"][i])
        payload = int(reader.parts(i).lengths.sum())
        overhead += n_bytes - payload
        if kind == Kind.ROW_BLOCKS:
            parts["codes"] += payload
        elif kind == Kind.QUANTIZER and tensor.quantizer is not None:
            parts |= _quantizer_parts(tensor.quantizer)
        elif kind in SIDE_PARTS:
            name = SIDE_PARTS[Kind(kind)]
            parts[name] = parts.get(name, 0) + payload
        else:  # of a later version, which a reader may skip
            overhead += payload
    return parts | {"index and checks": overhead}


def _quantizer_parts(q: PolarQuantizer) -> dict[str, int]:
    """Bytes of a stored quantizer: the learned arrays of each stage, and the rest, its settings."""
    parts = {
        f"quantizer: {stage} {name}": len(_array_to_bytes(values)[1])
        for stage, learned in q._stages()
        for name, values in learned.arrays().items()
    }
    return parts | {"quantizer: settings": len(q.to_bytes()) - sum(parts.values())}


# -- soundness -------------------------------------------------------------------------------------
@dataclass
class Soundness:
    """What ``examine`` found: every problem in words, and rows and damaged rows of each tensor."""

    problems: list[str] = field(default_factory=list)
    n_rows: dict[str, int] = field(default_factory=dict)
    damaged_rows: dict[str, int] = field(default_factory=dict)


def examine(source: Source, progress: Progress) -> Soundness:
    """Compare every checksum and decode every row, going on past damage.

    OSError for the path. All else that is wrong with the file is reported, not raised.
    """
    found = Soundness()
    try:
        with Reader(source, recover=True) as reader:
            found.problems = [str(problem) for problem in reader.problems()]
        mode = "skip" if found.problems else "raise"
        with open_polar(source, on_error=mode, library="numpy") as file:
            for name in file:
                _examine_tensor(file, name, found, progress)
    except FormatError as error:  # too damaged to say what it holds, or no such file at all
        if not found.problems:
            raise
        found.problems.append(str(error))
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _examine_tensor(file: File, name: str, found: Soundness, progress: Progress) -> None:
    try:
        tensor = file[name]
        for _ in blocks(tensor, progress):
            pass
        found.n_rows[name], found.damaged_rows[name] = n_rows(tensor), len(tensor.damaged_rows)
    except FormatError as error:
        found.problems.append(str(error))


# -- reading, with a word of progress --------------------------------------------------------------
def n_rows(tensor: Tensor) -> int:
    """Number of vectors: the product of all axes but the last."""
    return math.prod(tensor.shape[:-1])


def blocks(tensor: Tensor, progress: Progress) -> Iterator[tuple[int, Array]]:
    """(number of the first row, rows (n, d)) through a tensor."""
    n = n_rows(tensor)
    for start in range(0, n, READ_ROWS):
        progress(f"reading {tensor.name}", start / n)
        yield start, tensor.read_rows(range(start, min(n, start + READ_ROWS)))
        tensor.forget()


def read(tensor: Tensor, progress: Progress) -> Array:
    """A whole tensor as a numpy array of its shape; bfloat16 as float32."""
    width = tensor.shape[-1] if tensor.shape else 1
    out = np.empty((n_rows(tensor), width), work_dtype(tensor.dtype_name))
    for start, rows in blocks(tensor, progress):
        out[start : start + len(rows)] = rows
    return out.reshape(tensor.shape)


# -- closeness -------------------------------------------------------------------------------------
def quality(x: Any, y: Array) -> dict[str, Any]:
    """How close a decoded array y is to the tensor x it was made from.

    Returns {"snr_db", "mean_cosine", "max_relative_error"} over the rows that are finite, as JSON
    values: the SNR is None where it is infinite (an exact copy, of relative error 0; or nothing but
    zero rows in x), so is a relative error. Other rows are counted as "nonfinite_rows", and
    "nonfinite_exact" says whether y has them unchanged. InputError on unequal shapes.
    """
    spec, rows = native_rows(x)
    if spec.shape != y.shape:
        raise InputError(f"expected an original of shape {y.shape}, got {spec.shape}")
    closeness = Closeness()
    closeness.add(rows, y.reshape(rows.shape))
    return in_json(closeness)


def in_json(closeness: Closeness) -> dict[str, Any]:
    """What was found by comparing batches, as ``quality`` has it."""
    facts: dict[str, Any] = {
        "snr_db": _finite(closeness.snr_db),
        "mean_cosine": closeness.mean_cosine,
        "max_relative_error": _finite(closeness.max_relative_error),
    }
    if closeness.nonfinite_rows:
        counted = closeness.nonfinite_rows
        facts |= {"nonfinite_rows": counted, "nonfinite_exact": closeness.nonfinite_exact}
    return facts


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def against(
    source: Source, originals: Mapping[str, Any], key: str | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """The ``quality`` of each tensor in a file, by name, or of the one named ``key``.

    originals: tensors by name. Where there is one tensor to compare and one original, their names
    need not agree. InputError where an original is missing or has another shape.
    """
    with open_polar(source, library="numpy") as file:
        if key is not None and key not in file and key not in originals:
            raise InputError(f"no tensor {key!r} on either side; the file holds {file.keys()}")
        names = [key] if key is not None and key in file else file.keys()
        if key is not None and key in originals:
            originals = {key: originals[key]}
        if len(names) == len(originals) == 1:
            originals = dict(zip(names, originals.values(), strict=True))
        missing = [name for name in names if name not in originals]
        if missing:
            raise InputError(
                f"no original of {missing[0]!r} among {list(originals)}; choose one by its name"
            )
        return {name: quality(originals[name], read(file[name], progress)) for name in names}
