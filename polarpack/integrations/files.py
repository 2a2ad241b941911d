"""Tensors in other programs' files: a path -> named float arrays, and back.

| ending | holds | needs | writes |
|---|---|---|---|
| .npy, or ``-`` for a pipe | one array | | yes |
| .npz | named arrays | | yes |
| .safetensors | named tensors | safetensors, and torch for bfloat16 | yes |
| .pt .pth | a tensor, or (nested) dicts of tensors; nothing in the file is run | torch | |
| .parquet | columns of lists of one length | pyarrow | |
| .fvecs | rows of float32, each after its length | | |
| .txt .vec | a word and its numbers a line, as GloVe, word2vec and fastText have it | | |

A file that holds one unnamed array names it after itself. Other libraries are imported when a file
needs them.
"""

from __future__ import annotations

import array
import contextlib
import io
import json
import os
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import FLOAT_DTYPES, ITEM_BYTES, Array, TensorSpec, describe, is_torch
from ..batches import Rows, batch_rows
from ..errors import InputError, MissingDependencyError, PolarPackError

PIPE = "-"
PIPE_NAME = "x"  # of the array that comes through a pipe
NPY_MAGIC = b"\x93NUMPY"
ARROW_ROWS = 1 << 12  # of a batch of Arrow's
MAX_SAFETENSORS_HEADER = 100 << 20  # bytes, as that library has it
SAFETENSORS_FLOATS = ("F16", "F32", "F64")  # those numpy knows


def read_tensors(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Any]:
    """The float tensors in a file by name, or the one named ``key``.

    Returns numpy arrays in native byte order (.npy: memory-mapped); torch tensors on the CPU from
    .pt and for bfloat16. Arrays of other dtypes are left out with a warning that names them.

    Raises InputError for an unknown ending, a file that is not what its ending says, a key that is
    not there or names no floats, and where no floats are left; MissingDependencyError with the
    install line; OSError for the path.
    """
    reader = _by_ending(path, READERS, "read")
    try:
        found = reader(path, key)
    except (PolarPackError, OSError, MemoryError):
        raise
    except Exception as error:  # each library has classes of its own for a damaged file
        raise InputError(f"{path}: cannot be read as {ending(path)}: {error}") from error
    tensors = {name: x for name, x in found.items() if _dtype(x) in FLOAT_DTYPES}
    others = ", ".join(
        f"{name!r} ({_dtype(x)})" for name, x in found.items() if name not in tensors
    )
    wanted = ", ".join(FLOAT_DTYPES)
    if others and (key is not None or not tensors):
        raise InputError(f"{path}: expected tensors of dtype {wanted}, got {others}")
    if others:
        warnings.warn(f"{path}: left out what is not {wanted}: {others}", stacklevel=2)
    if not tensors:
        raise InputError(f"{path}: holds no tensors")
    return {name: _native(x) for name, x in tensors.items()}


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Array], bfloat16: Collection[str] = ()
) -> None:
    """Inverse of ``read_tensors`` for .npy, .npz, .safetensors and ``-`` (.npy to standard output).

    bfloat16: names of float32 arrays that are to be written in that dtype; only .safetensors can,
    elsewhere they stay float32, with a warning. The file appears under its name when it is whole;
    until then an old one stays.

    Raises InputError for another ending, or several tensors for .npy; MissingDependencyError;
    OSError.
    """
    check_target(path, list(tensors))
    if bfloat16 and ending(path) != ".safetensors":
        names = ", ".join(map(repr, bfloat16))
        warnings.warn(f"{path}: no bfloat16 in {ending(path)}, float32 for {names}", stacklevel=2)
    if path == PIPE:
        buffer = io.BytesIO()  # numpy would seek in a pipe
        np.save(buffer, next(iter(tensors.values())), allow_pickle=False)
        sys.stdout.buffer.write(buffer.getbuffer())
        sys.stdout.buffer.flush()
        return
    with replacing(path) as partial:
        WRITERS[ending(path)](partial, tensors, bfloat16)


def write_rows(
    path: str | os.PathLike[str],
    shape: Sequence[int],
    dtype: np.dtype[Any],
    blocks: Iterable[Array],
) -> None:
    """One array to a .npy file, or standard output, block by block: rows that together have the
    numbers of ``shape``. The file appears under its name when it is whole."""
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with contextlib.ExitStack() as stack:
        if path == PIPE:
            file: Any = sys.stdout.buffer
        else:
            partial = stack.enter_context(replacing(path))
            file = stack.enter_context(open(partial, "wb"))
        np.lib.format.write_array_header_1_0(file, {**facts, "shape": tuple(shape)})
        for rows in blocks:
            file.write(np.ascontiguousarray(rows).data)
        file.flush()


def large_rows(path: str | os.PathLike[str], key: str | None, least: int) -> Rows | None:
    """The table (n, d) in a file, or the one named ``key``, to be read in batches, if it takes
    ``least`` bytes or more and is the only one; None otherwise, and for what is no such file."""
    if ending(path) not in ROWS or not os.path.exists(path):
        return None
    if ending(path) != ".npz" and os.path.getsize(path) < least:
        return None
    try:
        table = open_rows(path, key)
    except InputError:  # several tables, or what read_tensors will say
        return None
    spec = table.spec
    return table if spec is None or (len(spec.shape) == 2 and spec.nbytes >= least) else None


def check_target(path: str | os.PathLike[str], names: Sequence[str]) -> None:
    """InputError unless ``write_tensors`` can put tensors of these names at ``path``."""
    _by_ending(path, WRITERS, "write")
    if ending(path) == ".npy" and len(names) != 1:
        raise InputError(
            f"{path}: expected one tensor for .npy, got {', '.join(map(repr, names)) or 'none'}; "
            "choose one by its name, or write .npz or .safetensors"
        )


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary sibling to write to: it takes the name ``path`` if the block succeeds, and goes
    if it fails. InputError where path is a folder, a device or a pipe."""
    real = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise InputError(f"expected a file path, got {path}, which is no regular file")
    folder, name = os.path.split(real)
    partial = os.path.join(folder, f".{name}.{os.getpid()}.partial")
    try:
        with open(partial, "xb"):  # first of all: may we write here?
            pass
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, real)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def ending(path: str | os.PathLike[str]) -> str:
    """The ending that decides the format, in lower case; a pipe carries .npy."""
    return ".npy" if path == PIPE else Path(path).suffix.lower()


def _by_ending(
    path: str | os.PathLike[str], table: Mapping[str, Callable[..., Any]], verb: str
) -> Callable[..., Any]:
    if ending(path) not in table:
        raise InputError(f"{path}: expected a file to {verb} that ends in {' '.join(table)}")
    return table[ending(path)]


def _chosen(path: str | os.PathLike[str], names: Iterable[str], key: str | None) -> list[str]:
    """All names, or the one wanted, which must be among them."""
    names = list(names)
    if key is None:
        return names
    if key not in names:
        known = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
        raise InputError(f"{path}: no tensor {key!r}; it holds {known or 'none'}")
    return [key]


def _dtype(x: Any) -> str:
    """Name of a tensor's dtype; readers put a text in place of what they cannot load."""
    if isinstance(x, str):
        return x
    return str(x.dtype).removeprefix("torch.") if is_torch(x) else str(x.dtype.name)


def _native(x: Any) -> Any:
    return x if is_torch(x) else x.astype(x.dtype.newbyteorder("="), copy=False)


def _named_after(path: str | os.PathLike[str]) -> str:
    return PIPE_NAME if path == PIPE else Path(path).stem


# -- one reader (and writer) a format --------------------------------------------------------------
def _read_npy(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    (name,) = _chosen(path, [_named_after(path)], key)
    if path == PIPE:
        data = sys.stdin.buffer.read()
        if not data.startswith(NPY_MAGIC):
            raise InputError("expected a .npy stream on standard input, got something else")
        return {name: np.load(io.BytesIO(data), allow_pickle=False)}
    with open(path, "rb") as file:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            raise InputError(f"{path}: not a .npy file")
    try:
        return {name: np.load(path, mmap_mode="r", allow_pickle=False)}
    except ValueError:  # nothing to map: no entries, or objects, of which this says so
        return {name: np.load(path, allow_pickle=False)}


def _write_npy(path: str, tensors: Mapping[str, Array], _: Collection[str]) -> None:
    with open(path, "wb") as file:
        np.save(file, next(iter(tensors.values())), allow_pickle=False)


def _read_npz(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    with zipfile.ZipFile(path):  # numpy would take any file, and leave a bad one open
        pass
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in _chosen(path, arrays.files, key)}


def _write_npz(path: str, tensors: Mapping[str, Array], _: Collection[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # numpy.savez knows no array named "file"
        for name, x in tensors.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, x, allow_pickle=False)


def _read_safetensors(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise _missing(path, "safetensors", "safetensors") from error
    found: dict[str, Any] = {}
    halves = []
    with safe_open(path, framework="numpy") as file:
        for name in _chosen(path, file.keys(), key):
            dtype = file.get_slice(name).get_dtype()
            found[name] = file.get_tensor(name) if dtype in SAFETENSORS_FLOATS else dtype.lower()
            halves += [name] if dtype == "BF16" else []
    if halves:  # numpy has no bfloat16
        _torch(path)
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in halves}
    return found


def _write_safetensors(path: str, tensors: Mapping[str, Array], bfloat16: Collection[str]) -> None:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise _missing("the output", "safetensors", "safetensors") from error
    whole = {name: np.require(x, requirements="C") for name, x in tensors.items()}
    if bfloat16:
        torch = _torch("bfloat16 in .safetensors")
        import safetensors.torch

        as_torch = {name: torch.from_numpy(x) for name, x in whole.items()}
        as_torch |= {name: as_torch[name].bfloat16() for name in bfloat16}
        safetensors.torch.save_file(as_torch, path)
    else:
        safetensors.numpy.save_file(whole, path)


def _read_torch(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    torch = _torch(path)
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for inner, item in value.items():
                walk(item, f"{name}.{inner}" if name else str(inner))
        else:
            is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
            found[name or _named_after(path)] = value if is_dense else type(value).__name__

    walk(torch.load(path, map_location="cpu", weights_only=True), "")
    return {name: found[name] for name in _chosen(path, found, key)}


def _read_parquet(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with _parquet(path).ParquetFile(path) as file:
        schema = file.schema_arrow
        for name in _chosen(path, schema.names, key):
            kind = schema.field(name).type
            if _is_vectors(kind):
                found[name] = _rows_of_lists(name, file.read(columns=[name]).column(0).chunks)
            else:
                found[name] = str(kind)
    return found


def _parquet(path: str | os.PathLike[str]) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise _missing(path, "pyarrow", "arrow") from error
    return pyarrow.parquet


def _rows_of_lists(name: str, chunks: Iterable[Any], where: str = "") -> Array:
    """A column of lists of floats -> (n, d); InputError unless all have one length and no nulls."""
    import pyarrow.compute as pc

    parts, lengths = [], set()
    for chunk in chunks:
        chunk = getattr(chunk, "storage", chunk)  # of a tensor column
        flat = chunk.flatten()
        if chunk.null_count or flat.null_count:
            raise InputError(
                f"{where}column {name!r}: expected a list of numbers in every row, got null"
            )
        lengths |= set(pc.list_value_length(chunk).unique().to_pylist())
        parts.append(flat.to_numpy(zero_copy_only=False))
    if len(lengths) > 1:
        raise InputError(
            f"{where}column {name!r}: expected lists of one length, "
            f"got {min(lengths)} to {max(lengths)}"
        )
    d = lengths.pop() if lengths else 0
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return values.reshape(-1 if d else 0, d)


def _read_fvecs(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    (name,) = _chosen(path, [_named_after(path)], key)
    numbers = np.fromfile(path, "<i4")
    d = int(numbers[0]) if len(numbers) else 0
    whole = os.path.getsize(path) == 4 * len(numbers)
    if len(numbers) and (d < 1 or not whole or len(numbers) % (d + 1)):
        raise InputError(f"{path}: {os.path.getsize(path)} bytes are no whole rows of {d} float32")
    rows = numbers.reshape(-1, d + 1)
    if (rows[:, 0] != d).any():
        odd = int(np.argmax(rows[:, 0] != d))
        raise InputError(f"{path}: row {odd} has {rows[odd, 0]} numbers, the first has {d}")
    return {name: np.ascontiguousarray(rows[:, 1:]).view("<f4")}


def _read_text(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    (name,) = _chosen(path, [_named_after(path)], key)
    numbers = array.array("f")
    with open(path, "rb") as file:
        first = file.readline().split()
        counted = len(first) == 2 and all(field.isdigit() for field in first)  # as word2vec has it
        d = int(first[1]) if counted else len(first) - 1
        if d < 1:
            raise InputError(f"{path}: expected a word and its numbers in every line")
        if not counted:
            file.seek(0)
        for i, line in enumerate(file, 2 if counted else 1):
            fields = line.rsplit(None, d)  # a word may hold spaces
            if len(fields) <= d:
                raise InputError(f"{path}: line {i}: expected a word and {d} numbers")
            try:
                numbers.extend(map(float, fields[1:]))
            except ValueError:
                raise InputError(f"{path}: line {i}: expected a word and {d} numbers") from None
    rows = np.frombuffer(numbers, np.float32).reshape(-1, d)
    if counted and len(rows) != int(first[0]):
        raise InputError(f"{path}: announces {int(first[0])} words and holds {len(rows)}")
    return {name: rows}


# -- the same files, batch by batch ----------------------------------------------------------------
def open_rows(path: str | os.PathLike[str], key: str | None = None) -> Rows:
    """The table (n, d) in a file, or the one named ``key``, to be read in batches.

    .npy, .npz, .safetensors, .fvecs and .parquet take the memory of a batch, whatever their size;
    what is read as a whole elsewhere is here, too. Raises as ``read_tensors``, and InputError where
    a file holds several tables and no key chooses one.
    """
    opener = ROWS.get(ending(path))
    if opener is None or path == PIPE:
        return _whole_rows(path, key)
    try:
        table = opener(path, key)
    except (PolarPackError, OSError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read as {ending(path)}: {error}") from error
    if table.spec is not None and table.spec.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{path}: expected tensors of dtype {', '.join(FLOAT_DTYPES)}, "
            f"got {table.name!r} ({table.spec.dtype})"
        )
    return table


def _sole(path: str | os.PathLike[str], names: Iterable[str], key: str | None) -> str:
    """The one table of a file, or the one wanted."""
    chosen = _chosen(path, names, key)
    if len(chosen) != 1:
        raise InputError(
            f"{path}: choose one of {', '.join(map(repr, chosen[:20])) or 'none'} by its name"
        )
    return chosen[0]


def _whole_rows(path: str | os.PathLike[str], key: str | None) -> Rows:
    tensors = read_tensors(path, key)
    name = _sole(path, tensors, key)
    x = tensors[name]
    return Rows(name, lambda start: iter([x[start:]]), len(x), describe(x, name))


def _plain_rows(
    name: str,
    open_at: Callable[[int], Any],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    label: str | None = None,
) -> Rows:
    """Numbers that lie row by row in a file; ``open_at(row)`` gives a stream that begins there.

    Read, not mapped: a map's pages would count as memory of the process that has read them."""
    spec = TensorSpec(shape, label or dtype.name)
    step, n, d = batch_rows(spec) if label or dtype.name in ITEM_BYTES else 1, spec.n_rows, spec.d

    def read(start: int) -> Iterator[Any]:
        with open_at(start) as file:
            for at in range(start, n, step):
                size = (min(n, at + step) - at) * d * dtype.itemsize
                data = file.read(size)
                if len(data) != size:
                    raise InputError(f"{name}: ends within row {at + len(data) // dtype.itemsize}")
                rows = np.frombuffer(data, dtype).reshape(-1, d)
                yield _native(rows) if label is None else _as_bfloat16(rows)

    return Rows(name, read, n, spec)


def _as_bfloat16(bits: Array) -> Any:
    torch = _torch("bfloat16")
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def _npy_rows(path: str | os.PathLike[str], key: str | None) -> Rows:
    name = _sole(path, [_named_after(path)], key)
    with open(path, "rb") as file:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            raise InputError(f"{path}: not a .npy file")
        file.seek(0)
        shape, by_columns, dtype = _npy_header(file)
        begin = file.tell()
    if by_columns or dtype.hasobject or dtype.kind != "f" or 0 in shape or not shape:
        return _whole_rows(path, key)
    row = shape[-1] * dtype.itemsize

    def open_at(start: int) -> Any:
        file = open(path, "rb")  # noqa: SIM115  who reads it closes it
        file.seek(begin + start * row)
        return file

    return _plain_rows(name, open_at, shape, dtype)


def _npz_rows(path: str | os.PathLike[str], key: str | None) -> Rows:
    with zipfile.ZipFile(path) as archive:
        members = [name.removesuffix(".npy") for name in archive.namelist()]
        name = _sole(path, members, key)
        with archive.open(f"{name}.npy") as file:
            shape, by_columns, dtype = _npy_header(file)
            begin = file.tell()
    if by_columns or dtype.hasobject or dtype.kind != "f" or 0 in shape or not shape:
        return _whole_rows(path, name)

    @contextlib.contextmanager
    def open_at(start: int) -> Iterator[Any]:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            file.seek(begin + start * shape[-1] * dtype.itemsize)
            yield file

    return _plain_rows(name, open_at, shape, dtype)


def _fvecs_rows(path: str | os.PathLike[str], key: str | None) -> Rows:
    name = _sole(path, [_named_after(path)], key)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        d = int.from_bytes(file.read(4), "little", signed=True)
    if not size:
        return _whole_rows(path, key)
    if d < 1 or size % (4 * d + 4):
        raise InputError(f"{path}: {size} bytes are no whole rows of {d} float32")
    n = size // (4 * d + 4)
    spec = TensorSpec((n, d), "float32")
    step = batch_rows(spec)

    def read(start: int) -> Iterator[Any]:
        with open(path, "rb") as file:
            file.seek(start * (4 * d + 4))
            for at in range(start, n, step):
                numbers = np.fromfile(file, "<i4", min(step, n - at) * (d + 1)).reshape(-1, d + 1)
                if (numbers[:, 0] != d).any():
                    odd = int(np.argmax(numbers[:, 0] != d))
                    raise InputError(
                        f"{path}: row {at + odd} has {numbers[odd, 0]} numbers, the first has {d}"
                    )
                yield np.ascontiguousarray(numbers[:, 1:]).view("<f4")

    return Rows(name, read, n, spec)


def _safetensors_rows(path: str | os.PathLike[str], key: str | None) -> Rows:
    """By the format's one rule: a length, so much JSON of names and places, and the numbers."""
    names = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_SAFETENSORS_HEADER:
            raise InputError(f"{path}: not a .safetensors file")
        listed = json.loads(file.read(length))
    listed.pop("__metadata__", None)
    name = _sole(path, listed, key)
    facts = listed[name]
    shape, (begin, end) = tuple(facts["shape"]), facts["data_offsets"]
    label = names.get(facts["dtype"], facts["dtype"].lower())
    item = ITEM_BYTES.get(label, 0)
    spec = TensorSpec(shape, label)
    inside = 0 <= begin <= end <= os.path.getsize(path) - 8 - length
    if item and (not inside or end - begin != spec.n_rows * spec.d * item):
        raise InputError(f"{path}: tensor {name!r} does not lie within the file")
    if not item or not shape or 0 in shape:
        return _whole_rows(path, name)

    def open_at(start: int) -> Any:
        file = open(path, "rb")  # noqa: SIM115  who reads it closes it
        file.seek(8 + length + begin + start * spec.d * item)
        return file

    if label == "bfloat16":
        return _plain_rows(name, open_at, shape, np.dtype("<u2"), label)
    return _plain_rows(name, open_at, shape, np.dtype(label).newbyteorder("<"))


def _parquet_rows(path: str | os.PathLike[str], key: str | None) -> Rows:
    parquet = _parquet(path)
    with parquet.ParquetFile(path) as file:
        name = vector_column(file.schema_arrow, key, path)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def read(start: int) -> Iterator[Any]:
        first = 0
        with parquet.ParquetFile(path) as file:
            for group, n in enumerate(counts):
                skip, first = max(0, start - first), first + n
                if skip >= n:
                    continue
                for batch in file.iter_batches(ARROW_ROWS, [group], [name]):
                    rows = column_rows(batch, name, path)[skip:]
                    skip = max(0, skip - batch.num_rows)
                    yield rows

    return Rows(name, read, sum(counts))


ROWS: dict[str, Callable[[str | os.PathLike[str], str | None], Rows]] = {
    ".npy": _npy_rows,
    ".npz": _npz_rows,
    ".fvecs": _fvecs_rows,
    ".safetensors": _safetensors_rows,
    ".parquet": _parquet_rows,
}


# -- Arrow -----------------------------------------------------------------------------------------
def vector_column(schema: Any, key: str | None, where: Any) -> str:
    """The column of lists of floats in an Arrow schema, or the one named ``key``. InputError."""
    if key is not None:
        _chosen(where, schema.names, key)
        names = [key]
    else:
        names = [name for name in schema.names if _is_vectors(schema.field(name).type)]
    if len(names) != 1:
        kinds = ", ".join(f"{f.name!r} ({f.type})" for f in list(schema)[:20])
        raise InputError(f"{where}: choose one column of lists of floats, it holds {kinds}")
    if not _is_vectors(schema.field(names[0]).type):
        kind = schema.field(names[0]).type
        raise InputError(f"{where}: expected lists of floats in {names[0]!r}, got {kind}")
    return names[0]


def _is_vectors(kind: Any) -> bool:
    """Whether an Arrow type is one of lists of floats."""
    import pyarrow

    types = pyarrow.types
    kind = getattr(kind, "storage_type", kind)  # of a tensor column
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_floating(kind.value_type))


def arrow_batches(table: Any, column: str) -> Iterator[Any]:
    """Record batches of one column of an Arrow table, batch, dataset, scanner or reader, one at a
    time: a scanner left to itself reads millions of rows ahead."""
    if hasattr(table, "scanner"):  # a dataset
        scanner = table.scanner(
            columns=[column], batch_size=ARROW_ROWS, batch_readahead=1, fragment_readahead=1
        )
        yield from scanner.to_batches()
    elif hasattr(table, "to_batches") and hasattr(table, "select"):  # a table
        yield from table.select([column]).to_batches(max_chunksize=ARROW_ROWS)
    elif hasattr(table, "to_batches"):  # a scanner
        yield from table.to_batches()
    elif hasattr(table, "read_next_batch"):
        yield from table
    else:
        yield table


def column_rows(batch: Any, column: str, where: Any) -> Array:
    """A column of lists of floats of an Arrow batch or table -> (n, d)."""
    values = batch.column(column)
    return _rows_of_lists(column, getattr(values, "chunks", [values]), f"{where}: ")


READERS: dict[str, Callable[[str | os.PathLike[str], str | None], dict[str, Any]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".parquet": _read_parquet,
    ".fvecs": _read_fvecs,
    ".txt": _read_text,
    ".vec": _read_text,
}
WRITERS: dict[str, Callable[[str, Mapping[str, Array], Collection[str]], None]] = {
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}


def _torch(path: str | os.PathLike[str]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise _missing(path, "torch", "torch") from error
    return torch


def _missing(path: str | os.PathLike[str], library: str, extra: str) -> MissingDependencyError:
    return MissingDependencyError(f'{path}: needs {library}: pip install "polarpack[{extra}]"')
