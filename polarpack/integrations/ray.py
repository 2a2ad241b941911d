"""Ray Data: tables larger than one machine, coded by workers that share one quantizer.

    Dataset ── fit_dataset: a sample ── quantizer q ── object store, once ── each worker, once
            ── encode_dataset(q): blocks of vectors -> blocks of codes ── Parquet or anything else
            ── write_shards(q):   blocks -> FOLDER/shard-000000.polar, ... and q once beside them

Nothing here knows how a row is coded: blocks go through ``integrations.arrow`` or into ``.polar``
files. A block is coded alike whoever codes it, so Ray gives what a killed worker had in hand to
another, and the result is the same. Ray's own progress bars show rate and progress.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .._arrays import Array
from ..blocks import NonFinite, check_max_error, check_name
from ..clustering import check_int
from ..errors import CorruptDataError, InputError, LimitError, MissingDependencyError
from ..planner import fit
from ..polar import PolarQuantizer
from ..reading import File
from ..writing import create
from .files import replacing

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, Dataset
    from ray.data.block import BlockAccessor
    from ray.data.datasource import Datasink
    from ray.data.extensions import ArrowTensorArray

    from .arrow import DTYPES, RowDecoder, RowEncoder, vector_dtype, vectors
except ImportError as error:
    raise MissingDependencyError(
        'Ray Data needs ray and pyarrow: pip install "polarpack[ray,arrow]"'
    ) from error

SAMPLE_ROWS = 1 << 16  # as many as the planner makes use of
READ_ROWS = 1 << 14  # of a shard, in a block
MANIFEST = "shards.json"
MANIFEST_VERSION = 0
MAX_MANIFEST = 1 << 28  # bytes: some millions of shards
Workers = int | tuple[int, int] | None


class Shards(NamedTuple):
    """What ``write_shards`` has put into a folder."""

    quantizer: PolarQuantizer
    paths: list[str]  # of the .polar files, in the order of the rows
    n_rows: list[int]  # of each
    column: str  # name of the tensor in them


# -- fitting ---------------------------------------------------------------------------------------
def fit_dataset(
    ds: Dataset,
    column: str,
    *,
    sample_rows: int = SAMPLE_ROWS,
    n_rows: int | None = None,
    seed: int = 0,
    **target: Any,
) -> PolarQuantizer:
    """Fit a quantizer to a sample of a dataset: ``fit_dataset(ds, "embedding", bits=2.0)``.

    column: of vectors, as ``arrow.RowEncoder`` takes them; nulls and rows that are not finite are
    left out. sample_rows: how many rows are drawn, uniformly and without replacement. n_rows: of
    the dataset, if known; else ``ds.count()``, which runs what the dataset is made by unless its
    source knows. target and further arguments: those of ``polarpack.fit``.

    The sample depends on the seed and on the blocks, not on their order, the number of workers or
    their failures. Workers read everything once; the driver holds the sample and fits on it.
    Raises InputError as ``fit`` does, and for a dataset without such rows.
    """
    check_int("sample_rows", sample_rows, 1)
    check_int("seed", seed, 0)
    _dtype(ds, column)
    total = max(1, ds.count()) if n_rows is None else check_int("n_rows", n_rows, 1)
    # Every row draws a number in [0, 1). The sample are the least of those below a threshold, which
    # all but surely more than sample_rows are: their number is binomial.
    expected = sample_rows + 6 * np.sqrt(sample_rows) + 16
    draw = functools.partial(_drawn, column=column, share=min(1.0, expected / total), seed=seed)
    drawn = ds.map_batches(draw, batch_format="pyarrow", batch_size=None)
    keys, rows = [], []
    blocks: Iterable[Any] = drawn.iter_batches(batch_format="pyarrow", batch_size=None)
    for block in blocks:
        for chunk in block.column("row").chunks:
            rows.append(vectors(chunk, chunk.type.list_size, "sample")[0])
        keys.append(block.column("key").to_numpy())
    if not sum(map(len, rows)):
        raise InputError(f"column {column!r}: expected rows to fit on, none is finite")
    widths = sorted({part.shape[1] for part in rows if len(part)})
    if len(widths) > 1:
        raise InputError(f"column {column!r}: expected vectors of one length, got {widths}")
    order = np.argsort(np.concatenate(keys), kind="stable")[:sample_rows]
    return fit(np.concatenate([part for part in rows if len(part)])[order], seed=seed, **target)


def _drawn(block: Any, *, column: str, share: float, seed: int) -> Any:
    """The rows of a block that draw less than ``share``, each with what it drew."""
    dtype = vector_dtype(block.schema, column)
    chunks = block.column(column).chunks
    lengths = [n for c in chunks for n in pc.unique(_lengths(c).drop_null()).to_pylist()]
    d = lengths[0] if lengths else 1
    rows = [vectors(chunk, d, f"column {column!r}")[0] for chunk in chunks]
    table = np.concatenate([np.zeros((0, d), dtype), *rows])
    table = table[np.isfinite(table).all(axis=1)]
    rng = np.random.default_rng([seed, len(table), zlib.crc32(table.tobytes())])
    keys = rng.random(len(table))
    chosen = np.flatnonzero(keys < share)
    flat = pa.array(table[chosen].reshape(-1), DTYPES[dtype])
    return pa.table(
        {"key": pa.array(keys[chosen]), "row": pa.FixedSizeListArray.from_arrays(flat, d)}
    )


def _lengths(chunk: Any) -> Any:
    extended = isinstance(chunk.type, pa.BaseExtensionType)
    return pc.list_value_length(chunk.storage if extended else chunk)


# -- columns of codes ------------------------------------------------------------------------------
def encode_dataset(
    ds: Dataset,
    quantizer: PolarQuantizer,
    column: str,
    *,
    into: str | None = None,
    nonfinite: Literal["error", "null"] = "error",
    workers: Workers = None,
    **ray_options: Any,
) -> Dataset:
    """The dataset with its column of vectors coded; other columns stay. Lazy, like ``map_batches``.

    into, nonfinite, and what a block may hold: as for ``arrow.RowEncoder``. The codes' field says
    with which quantizer they were made, also in Parquet files written from here. workers: number of
    actors, or (least, most); None: as many as there is room for. ray_options: of ``map_batches``
    (num_cpus, resources, ...). Rows come in Ray's order.

    Raises InputError at once where the dataset's schema does not fit, and in the workers for
    blocks that do not (another dtype too); Ray wraps the latter in an exception of its own, unless
    its ``DataContext.raise_original_map_exception`` is set.
    """
    options: dict[str, Any] = {"into": into, "nonfinite": nonfinite, "dtype": _dtype(ds, column)}
    RowEncoder(quantizer, column, **options)  # checks them
    return _coded(ds, RowEncoder, quantizer, column, options, workers, ray_options)


def decode_dataset(
    ds: Dataset,
    quantizer: PolarQuantizer,
    column: str,
    *,
    into: str | None = None,
    dtype: str | None = None,
    require_label: bool = True,
    workers: Workers = None,
    **ray_options: Any,
) -> Dataset:
    """Inverse of ``encode_dataset``: the dataset with its column of codes decoded.

    into, dtype, require_label: as for ``arrow.RowDecoder``. Blocks without nulls get a column of
    Ray tensors, which arrive as (n, d) arrays in ``iter_batches``; blocks with nulls a list column.
    """
    options: dict[str, Any] = {"into": into, "dtype": dtype, "require_label": require_label}
    RowDecoder(quantizer, column, **options)  # checks them
    return _coded(ds, RowDecoder, quantizer, column, options, workers, ray_options)


def _coded(
    ds: Dataset,
    kind: type[RowEncoder] | type[RowDecoder],
    quantizer: PolarQuantizer,
    column: str,
    options: dict[str, Any],
    workers: Workers,
    ray_options: dict[str, Any],
) -> Dataset:
    if workers is None:
        pool = ActorPoolStrategy()
    elif isinstance(workers, tuple):
        least, most = (check_int("workers", n, 1) for n in workers)
        pool = ActorPoolStrategy(min_size=least, max_size=most)
    else:
        pool = ActorPoolStrategy(size=check_int("workers", workers, 1))
    return ds.map_batches(
        _Coder,
        fn_constructor_args=(kind, _Shipped(quantizer), column, options),
        batch_format="pyarrow",
        batch_size=None,
        compute=pool,
        **ray_options,
    )


class _Coder:
    """An actor's part: a RowEncoder or RowDecoder made once."""

    def __init__(
        self,
        kind: type[RowEncoder] | type[RowDecoder],
        shipped: _Shipped,
        column: str,
        options: dict[str, Any],
    ) -> None:
        self._code = kind(shipped.quantizer(), column, **options)

    def __call__(self, block: Any) -> Any:
        coded = self._code(block)
        if isinstance(self._code, RowDecoder):
            at = coded.schema.get_field_index(self._code.into or self._code.column)
            column = coded.column(at)
            if not column.null_count:
                d = self._code.quantizer.d_
                rows = [vectors(chunk, d, "rows")[0] for chunk in column.chunks]
                dtype = column.type.value_type.to_pandas_dtype()
                tensor = ArrowTensorArray.from_numpy(
                    np.concatenate([np.zeros((0, d), dtype), *rows])
                )
                return coded.set_column(at, coded.schema.field(at).name, tensor)
        return coded


class _Shipped:
    """A quantizer that travels as the name of one copy of its bytes in the object store."""

    def __init__(self, quantizer: PolarQuantizer) -> None:
        self._hash, self._ref = quantizer.hash, ray.put(quantizer.to_bytes())

    def quantizer(self) -> PolarQuantizer:
        """It, made once in each worker process."""
        return _made(self._hash, self._ref)


@functools.lru_cache(maxsize=2)
def _made(digest: str, ref: Any) -> PolarQuantizer:
    quantizer = PolarQuantizer.from_bytes(ray.get(ref))
    if quantizer.hash != digest:
        raise CorruptDataError(f"object store: quantizer {quantizer.hash} in place of {digest}")
    return quantizer


# -- folders of .polar files -----------------------------------------------------------------------
def write_shards(
    ds: Dataset,
    quantizer: PolarQuantizer,
    path: str | os.PathLike[str],
    column: str,
    *,
    max_error: float | None = None,
    nonfinite: NonFinite = "error",
    resume: bool = False,
    workers: int | None = None,
    **ray_options: Any,
) -> Shards:
    """Write the vectors of a dataset as ``.polar`` files into a folder that all workers see.

    The blocks of the dataset become shard-000000.polar, shard-000001.polar, ... in order (choose
    their size by ``ds.repartition``; empty blocks make none), each with one tensor named after the
    column. The quantizer is stored once beside them under its hash, and ``shards.json``, written
    last, lists them. Other columns are left out: row i of a shard is row i of its block.

    max_error, nonfinite: as in ``polarpack.compress``. workers: at most so many tasks at a time.
    ray_options: of a Ray task (num_cpus, ...). A shard appears under its name when it is whole;
    one that a killed worker had begun is written anew, so the bytes do not depend on failures.
    resume=True continues in a folder where an earlier run ended early: shards there are kept if
    their rows are as many as those of their block, so the dataset must be the same.

    Raises InputError for a folder that holds shards already (without resume), nulls, a block that
    does not fit, or a resume with other settings; OSError for the folder.
    """
    check_name(column)
    if not isinstance(quantizer, PolarQuantizer):
        raise InputError(f"expected a PolarQuantizer, got {type(quantizer).__name__}")
    settings = {
        "version": MANIFEST_VERSION,
        "quantizer": quantizer.hash,
        "column": column,
        "dtype": _dtype(ds, column),
        "max_error": check_max_error(max_error),
        "nonfinite": nonfinite,
    }
    folder = Path(os.path.realpath(path))
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        before = _manifest(folder)
        if not resume:
            raise InputError(f"{folder} holds shards already: resume=True continues them")
        odd = [name for name, value in settings.items() if before.get(name) != value]
        if odd:
            raise InputError(f"{folder}: begun with another {', another '.join(odd)}")
    elif next(folder.glob("shard-*.polar"), None) is not None:
        raise InputError(f"{folder} holds shards, but no {MANIFEST} that says of what")
    else:
        _put(folder / _quantizer_name(quantizer.hash), quantizer.to_bytes())
        _put(folder / MANIFEST, json.dumps(settings).encode())
    sink = _Shards(str(folder), _Shipped(quantizer), settings)
    order, options = ds.context.execution_options, {"ray_remote_args": ray_options}
    kept, order.preserve_order = order.preserve_order, True  # tasks are numbered as blocks are
    try:
        ds.write_datasink(sink, concurrency=workers, **options)
    finally:
        order.preserve_order = kept
    shards = [[name, n] for name, n in sorted(sink.written)]
    _put(folder / MANIFEST, json.dumps(settings | {"shards": shards}).encode())
    return open_shards(folder)


def open_shards(path: str | os.PathLike[str]) -> Shards:
    """The shards of a folder that ``write_shards`` has finished, and their quantizer.

    CorruptDataError or LimitError where the folder's list or quantizer is damaged, InputError where
    the list is unfinished; the shards themselves are checked when they are read.
    """
    folder = Path(os.path.realpath(path))
    manifest = _manifest(folder)
    shards = manifest.get("shards")
    if shards is None:
        raise InputError(f"{folder}: not finished; write_shards(..., resume=True) continues")
    digest = manifest["quantizer"]
    quantizer = PolarQuantizer.from_bytes((folder / _quantizer_name(digest)).read_bytes())
    if quantizer.hash != digest:
        raise CorruptDataError(f"{folder}: quantizer {quantizer.hash[:16]}... in place of {digest}")
    names = [str(folder / name) for name, _ in shards]
    return Shards(quantizer, names, [n for _, n in shards], manifest["column"])


def read_shards(path: str | os.PathLike[str], **ray_options: Any) -> Dataset:
    """The rows of a folder of shards as a dataset of one column, of Ray tensors; lazy.

    Raises as ``open_shards``; in the workers, FormatError for a damaged shard and InputError for
    one that was written with another quantizer. ray_options: of ``map_batches``.
    """
    shards = open_shards(path)
    names = ray.data.from_items(
        [{"path": p, "n": n} for p, n in zip(shards.paths, shards.n_rows, strict=True)],
        override_num_blocks=max(1, len(shards.paths)),
    )
    read = functools.partial(_rows_of, shipped=_Shipped(shards.quantizer), column=shards.column)
    return names.map_batches(read, batch_format="pyarrow", batch_size=None, **ray_options)


def _rows_of(names: Any, *, shipped: _Shipped, column: str) -> Iterator[Any]:
    for item in names.to_pylist():
        with File(item["path"], quantizer=shipped.quantizer()) as file:
            tensor = file[column]
            if len(tensor) != item["n"]:
                raise CorruptDataError(
                    f"{item['path']}: holds {len(tensor)} rows, {MANIFEST} says {item['n']}"
                )
            for start in range(0, len(tensor), READ_ROWS):
                rows = tensor[start : start + READ_ROWS]
                yield pa.table({column: ArrowTensorArray.from_numpy(rows)})


class _Shards(Datasink[tuple[str, int] | None]):
    """Writes what one task is given as one shard, named by the task's number."""

    def __init__(self, folder: str, shipped: _Shipped, settings: dict[str, Any]) -> None:
        self._folder, self._shipped, self._settings = folder, shipped, settings
        self.written: list[tuple[str, int]] = []

    def write(self, blocks: Iterable[Any], ctx: Any) -> tuple[str, int] | None:
        """In a worker: the shard's name and rows; None for no rows."""
        try:
            parts = [rows for block in blocks for rows in self._rows(block)]
            n = sum(map(len, parts))
            name = f"shard-{ctx.task_idx:06d}.polar"
            path = os.path.join(self._folder, name)
            if n and not (os.path.exists(path) and self._holds(path, n)):
                self._write(path, parts)
        except InputError as error:
            raise InputError(f"block {ctx.task_idx}: {error}") from None
        return (name, n) if n else None

    def _rows(self, block: Any) -> Iterator[Array]:
        """The vectors of a block, chunk by chunk."""
        column, dtype = self._settings["column"], self._settings["dtype"]
        table = BlockAccessor.for_block(block).to_arrow()
        if not len(table):  # it may have no columns
            return
        found = vector_dtype(table.schema, column)
        if dtype not in (None, found):
            raise InputError(f"column {column!r}: expected vectors of {dtype}, got {found}")
        first, d = 0, self._shipped.quantizer().d_
        for chunk in table.column(column).chunks:
            rows, valid = vectors(chunk, d, f"column {column!r}", first)
            if not valid.all():
                row = first + int(np.argmin(valid))
                raise InputError(
                    f"column {column!r}: row {row} is null, which a shard cannot hold: "
                    "filter nulls out, or use encode_dataset"
                )
            yield rows
            first += len(chunk)

    def _holds(self, path: str, n: int) -> bool:
        """Whether a shard of an earlier run, or of a worker that died, has as many rows."""
        with File(path) as file:
            tensors = file.info()["tensors"]
        mine = tensors.get(self._settings["column"], {"shape": [0], "quantizer": None})
        return bool(
            len(tensors) == 1
            and mine["shape"][0] == n
            and mine["quantizer"] == self._settings["quantizer"]
        )

    def _write(self, path: str, parts: list[Array]) -> None:
        with create(
            path,
            self._shipped.quantizer(),
            max_error=self._settings["max_error"],
            nonfinite=self._settings["nonfinite"],
            embed_quantizer=False,
        ) as file:
            for rows in parts:
                file.append(self._settings["column"], rows)

    def on_write_complete(self, write_result: Any) -> None:
        """In the driver: what was written."""
        self.written = [result for result in write_result.write_returns if result is not None]


def _quantizer_name(digest: str) -> str:
    return f"quantizer-{digest}.bin"


def _put(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    with replacing(path) as partial:
        Path(partial).write_bytes(data)


def _manifest(folder: Path) -> dict[str, Any]:
    """What a folder's list says, checked."""
    path = folder / MANIFEST
    if path.stat().st_size > MAX_MANIFEST:
        raise LimitError(f"{path}: larger than {MAX_MANIFEST} bytes")
    try:
        manifest = json.loads(path.read_bytes())
        shards = manifest.get("shards")
        sound = (
            manifest["version"] == MANIFEST_VERSION
            and isinstance(manifest["column"], str)
            and isinstance(manifest["quantizer"], str)
            and len(bytes.fromhex(manifest["quantizer"])) == 32
            and (shards is None or all(_is_shard(*shard) for shard in shards))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise CorruptDataError(f"{path}: no list of shards: {type(e).__name__}: {e}") from e
    if not sound:
        raise CorruptDataError(f"{path}: no list of shards of version {MANIFEST_VERSION}")
    return dict(manifest)


def _is_shard(name: Any, n: Any) -> bool:
    """Whether a list's entry names a file in the folder itself."""
    plain = isinstance(name, str) and name == os.path.basename(name) and name.endswith(".polar")
    return plain and type(n) is int and n > 0


def _dtype(ds: Dataset, column: str) -> str | None:
    """The dtype of a column of vectors; None if the dataset is empty or no Arrow table."""
    schema = ds.schema()
    base = getattr(schema, "base_schema", schema)
    return vector_dtype(base, column) if isinstance(base, pa.Schema) else None
