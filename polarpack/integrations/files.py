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
import os
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import FLOAT_DTYPES, Array, is_torch
from ..errors import InputError, MissingDependencyError, PolarPackError

PIPE = "-"
PIPE_NAME = "x"  # of the array that comes through a pipe
NPY_MAGIC = b"\x93NUMPY"
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
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise _missing(path, "pyarrow", "arrow") from error
    types = pyarrow.types
    found: dict[str, Any] = {}
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        for name in _chosen(path, schema.names, key):
            kind = schema.field(name).type
            is_list = (
                types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
            )
            if is_list and types.is_floating(kind.value_type):
                found[name] = _rows_of_lists(name, file.read(columns=[name]).column(0).chunks)
            else:
                found[name] = str(kind)
    return found


def _rows_of_lists(name: str, chunks: Iterable[Any]) -> Array:
    """A column of lists of floats -> (n, d); InputError unless all have one length and no nulls."""
    import pyarrow.compute as pc

    parts, lengths = [], set()
    for chunk in chunks:
        flat = chunk.flatten()
        if chunk.null_count or flat.null_count:
            raise InputError(f"column {name!r}: expected a list of numbers in every row, got null")
        lengths |= set(pc.list_value_length(chunk).unique().to_pylist())
        parts.append(flat.to_numpy(zero_copy_only=False))
    if len(lengths) > 1:
        raise InputError(
            f"column {name!r}: expected lists of one length, got {min(lengths)} to {max(lengths)}"
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
