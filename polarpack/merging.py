"""Merging ``.polar`` files: their chunks one after the other as they are, nothing is coded anew.

Workers that share a quantizer write a file each, of the rows that are theirs; what is put together
here is what one worker would have written of all rows, but for where chunks end. Blocks and models
are copied byte for byte under checksums that are compared on the way; only headers are new.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .blocks import TensorCoding, TensorHeader, header_to_bytes
from .container import Kind, Reader, Writer
from .errors import FormatError, InputError
from .polar import PolarQuantizer
from .reading import Index

Path = str | os.PathLike[str]


class _Facts(NamedTuple):
    """What has to agree, and what may differ, about a tensor of one file."""

    number: int  # in its file
    header: TensorHeader
    quantizer: str | None  # its hash; None: rows are stored as they are


@dataclass
class _Shard:
    path: Path
    tensors: dict[str, _Facts]
    n_bytes: int


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    quantizer: PolarQuantizer | None = None,
    embed_quantizer: bool = True,
) -> None:
    """Write one ``.polar`` file that holds the rows of several, file after file, tensor by tensor.

    The files must hold tensors of the same names, and those of one name agree in dtype, in all axes
    but the first, in layout and in quantizer (by its hash). A file without any tensor adds nothing.
    The quantizer is stored once, whether all files hold it, or some, or it is given here because
    none does; embed_quantizer=False, or nobody having it, leaves its hash alone. ``max_error`` of
    the result is the weakest bound promised. Ancillary chunks are not copied.

    Costs reading and writing every byte once, and comparing its checksum; memory of a chunk. The
    result appears under its name when it is complete and on the disk; until then an old file stays,
    and whatever goes wrong, the files merged are only read.

    Raises InputError, naming file and tensor, for files that do not go together; FormatError (its
    subclasses), naming the file, for damage in one; FileNotFoundError for one that is missing or
    still being written.

    >>> pp.merge(["rows-0.polar", "rows-1.polar"], "rows.polar")  # doctest: +SKIP
    """
    if isinstance(paths, str | os.PathLike) or not len(paths):
        raise InputError(f"expected a list of files to merge, got {paths!r:.80}")
    if not (quantizer is None or isinstance(quantizer, PolarQuantizer)):
        raise InputError(f"expected a PolarQuantizer, got {type(quantizer).__name__}")
    stored: dict[str, bytes] = {}  # quantizers by their hash
    if quantizer is not None:
        stored[quantizer.hash] = quantizer.to_bytes()
    shards = [_look_at(path, stored) for path in paths]
    tensors = _agreed([shard for shard in shards if shard.tensors])
    if quantizer is not None and quantizer.hash not in {q for _, q in tensors.values()}:
        raise InputError(f"no tensor was coded with the quantizer given, {quantizer.hash[:16]}...")
    with Writer(out) as writer:
        _write_headers(writer, tensors, stored if embed_quantizer else {})
        models: dict[tuple[int, int], bytes] = {}  # that hold, by tensor and kind
        for shard in shards:
            with _opened(shard.path) as (reader, index):
                if (reader.size_bytes, _facts(index)) != (shard.n_bytes, shard.tensors):
                    raise InputError(f"{shard.path}: changed while it was being merged")
                for number, name in enumerate(tensors if shard.tensors else ()):
                    _copy(reader, shard.tensors[name].number, writer, number, models)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Reader, Index]]:
    """A file and its index; damage found within is reported with the file's name."""
    try:
        with Reader(path) as reader:
            yield reader, Index(reader)
    except FormatError as error:
        raise type(error)(f"{os.fsdecode(path)}: {error}") from None


def _look_at(path: Path, stored: dict[str, bytes]) -> _Shard:
    """What a file holds; quantizers in it go to ``stored``."""
    with _opened(path) as (reader, index):
        for data in index.quantizers.values():
            stored.setdefault(hashlib.sha256(data).hexdigest(), data)
        return _Shard(path, _facts(index), reader.size_bytes)


def _facts(index: Index) -> dict[str, _Facts]:
    return {
        header.name: _Facts(number, header, index.quantizer_hash(header))
        for number, header in index.headers.items()
    }


def _agreed(shards: Sequence[_Shard]) -> dict[str, tuple[TensorHeader, str | None]]:
    """The header and quantizer that the tensors of all files have by name, bounds and libraries
    being what holds for all; InputError where they do not go together."""
    if not shards:
        return {}
    first = shards[0]
    agreed = {name: facts.header for name, facts in first.tensors.items()}
    for shard in shards:
        if shard.tensors.keys() != first.tensors.keys():
            raise InputError(
                f"{shard.path}: holds {sorted(shard.tensors)}, "
                f"{first.path} holds {sorted(first.tensors)}"
            )
        for name, facts in shard.tensors.items():
            if len(facts.header.spec.shape) < 2:
                raise InputError(f"{shard.path}: tensor {name!r} is one row, not a table of rows")
            mine, theirs = _of_all(facts), _of_all(first.tensors[name])
            for what, value in mine.items():
                if value != theirs[what]:
                    raise InputError(
                        f"{shard.path}: tensor {name!r} has {what} {value}, "
                        f"in {first.path} {theirs[what]}"
                    )
            agreed[name] = _weaker(agreed[name], facts.header)
    return {name: (header, first.tensors[name].quantizer) for name, header in agreed.items()}


def _of_all(facts: _Facts) -> dict[str, object]:
    """What tensors to be merged have in common, in words."""
    spec, q = facts.header.spec, facts.quantizer
    shape = " x ".join(["n", *map(str, spec.shape[1:])])
    coded = "none" if q is None else f"{q[:16]}..."
    return {
        "dtype": spec.dtype,
        "shape": shape,
        "layout": facts.header.layout,
        "quantizer": coded,
    }


def _weaker(a: TensorHeader, b: TensorHeader) -> TensorHeader:
    """What two headers both promise."""
    bounds = [h.max_error for h in (a, b) if h.max_error is not None]
    spec = a.spec
    if (spec.library, spec.device) != (b.spec.library, b.spec.device):
        spec = replace(spec, library="numpy", device="cpu")
    return replace(a, spec=spec, max_error=max(bounds) if len(bounds) == 2 else None)


def _write_headers(
    writer: Writer,
    tensors: Mapping[str, tuple[TensorHeader, str | None]],
    stored: Mapping[str, bytes],
) -> None:
    """The chunks before all rows: each quantizer once, with the first tensor that needs it."""
    owners: dict[str, int] = {}
    for number, (name, (header, quantizer)) in enumerate(tensors.items()):
        reference: int | str | None = quantizer
        if quantizer is not None and quantizer in stored:
            reference = owners.setdefault(quantizer, number)
        coding = TensorCoding(header.spec, None, header.layout, max_error=header.max_error)
        content = header_to_bytes(name, coding, reference, streamed=True)
        writer.add(Kind.TENSOR_HEADER, number, 0, [content])
        if quantizer is not None and reference == number:
            writer.add(Kind.QUANTIZER, number, 0, [stored[quantizer]])


def _copy(
    reader: Reader, tensor: int, writer: Writer, number: int, models: dict[tuple[int, int], bytes]
) -> None:
    """Copy the rows of a tensor, and the models they are under where others hold so far."""
    waiting: dict[int, bytes] = {}
    for i in np.flatnonzero(reader.chunks["tensor"] == tensor).tolist():
        kind, n_rows = int(reader.chunks["kind"][i]), int(reader.chunks["n_rows"][i])
        if kind in (Kind.ENTROPY_MODEL, Kind.WORD_MODEL):
            waiting[kind] = bytes(reader.part(i, 0))
        elif kind == Kind.ROW_BLOCKS and n_rows:
            for other, data in waiting.items():
                if models.get((number, other)) != data:
                    writer.add(other, number, 0, [data])
                    models[number, other] = data
            waiting.clear()
            parts = [reader.part(i, j) for j in range(len(reader.parts(i).lengths))]
            writer.add(kind, number, n_rows, parts)
            reader.forget()
