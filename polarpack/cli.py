"""The command line: ``polarpack compress | decompress | merge | info | verify | compare | demo``.

Results go to standard output, messages and progress to standard error. What other programs' files
hold is the business of ``integrations.files``, what a ``.polar`` file holds that of ``codec``; here
are arguments, wording and exit codes. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import FormatError, InputError, MissingDependencyError, PolarPackError

if TYPE_CHECKING:
    from rich.console import Console

    from .reading import Tensor
    from .streaming import Streamed

Progress = Callable[[str, float | None], None]
DAMAGED = 3
PIPE = "-"
READ_ROWS = 1 << 14  # rows decoded between two moves of a progress bar
STREAM_BYTES = 1 << 28  # tables from here on are read in batches
SHOWN_PROBLEMS = 20
MAX_MESSAGE = 500  # characters of an error: it may hold what a file claims
HELP = """
Compress float vectors to a stated quality or size.

Tables are read from .npy, .npz, .safetensors, .pt, .parquet (columns of lists), .fvecs and GloVe or
word2vec text, and written to .npy, .npz and .safetensors. A dash in place of a file is a pipe: of
.npy where a table is expected, of .polar where that is.

Exit codes:

- 0: success

- 1: the data or an argument is wrong

- 2: the command line is wrong

- 3: a .polar file is damaged, or is none

- 4: an optional library is missing; the message holds the line that installs it

- 5: the operating system refused, or memory ran out
"""


class Layout(StrEnum):
    """How rows are kept."""

    archive = "archive"
    rows = "rows"


class Objective(StrEnum):
    """What a size is spent on."""

    snr = "snr"
    cosine = "cosine"
    recall = "recall"


class NonFinite(StrEnum):
    """What happens to rows that hold NaN or infinity."""

    error = "error"
    raw = "raw"


class _Commands(TyperGroup):
    """Turns what a command raises into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except PolarPackError as error:
                codes = {FormatError: DAMAGED, MissingDependencyError: 4}
                code = next((c for kind, c in codes.items() if isinstance(error, kind)), 1)
                _say(f"error: {error}")
                raise typer.Exit(code) from None
            except OSError as error:
                if error.errno == errno.EPIPE:  # the reader of our pipe has seen enough
                    raise
                where = f"{error.filename}: " if error.filename else ""
                _say(f"error: {where}{error.strerror or error}")
                raise typer.Exit(5) from None
            except MemoryError as error:
                _say(f"error: not enough memory: {error}")
                raise typer.Exit(5) from None


app = typer.Typer(
    cls=_Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Arguments and options that several commands share.
PolarFile = Annotated[
    str, typer.Argument(metavar="FILE", help="A .polar file, or - for standard input.")
]
Key = Annotated[str | None, typer.Option(metavar="NAME", help="Only the tensor of this name.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


def main() -> None:
    """Entry point of the console script."""
    # numpy's BLAS would start threads of its own in each of ours, and both would wait for cores:
    # ten times slower on a busy machine. It reads this when it is loaded, which is later.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    app(prog_name="polarpack")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polarpack {__version__}")
        raise typer.Exit


@app.callback()
def polarpack(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What precedes a command; the help stands in ``HELP``."""


# -- compress and its inverse ----------------------------------------------------------------------
@app.command()
def compress(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file of float tensors, or -.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The .polar file to write, or -.")],
    bits: Annotated[
        float | None, typer.Option(help="Bits per float of the whole file, never exceeded.")
    ] = None,
    size_bytes: Annotated[
        float | None, typer.Option(help="Bytes of the whole file, never exceeded.")
    ] = None,
    snr_db: Annotated[float | None, typer.Option(help="Signal-to-noise ratio in decibels.")] = None,
    cosine: Annotated[
        float | None, typer.Option(help="Mean cosine of original and decoded rows.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Share of each row's 10 best inner products kept.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Error of every row, relative to its norm: a guarantee; 0 is lossless."),
    ] = None,
    key: Key = None,
    layout: Annotated[
        Layout | None,
        typer.Option(help="archive is the smallest; rows has one width, any row is read at once."),
    ] = None,
    optimize: Annotated[
        Objective | None, typer.Option(help="What a size is spent on; by default snr.")
    ] = None,
    nonfinite: Annotated[
        NonFinite, typer.Option(help="Rows with NaN or infinity: refuse, or store them raw.")
    ] = NonFinite.error,
    seed: Annotated[int, typer.Option(help="Same seed, machine and versions: same bytes.")] = 0,
    time_budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Try no further settings after this.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress the float tensors of a file to exactly one target.

    State how small or how good: one of --bits, --size-bytes, --snr-db, --cosine, --recall,
    --max-error. There is no default, because only you know what may be lost; --bits 4 is a careful
    start for embeddings. The last axis of a tensor holds the vectors. Of text files the numbers are
    kept, not the words. A table of 256 MB or more in a .npy, .npz, .safetensors, .parquet or .fvecs
    file, or a pipe, is read in batches: it need not fit in memory.

    polarpack compress table.npy table.polar --bits 2
    """
    targets = {
        "bits": bits,
        "size_bytes": size_bytes,
        "snr_db": snr_db,
        "cosine": cosine,
        "recall": recall,
        "max_error": max_error,
    }
    chosen = {name: value for name, value in targets.items() if value is not None}
    if len(chosen) != 1:
        options = ", ".join("--" + name.replace("_", "-") for name in targets)
        _refuse(f"expected exactly one of {options}, got {len(chosen) or 'none'}")
    _check_stdout(target, as_json)
    from .codec import save
    from .integrations.files import large_rows, read_tensors
    from .streaming import save_stream

    started = time.monotonic()
    settings: dict[str, Any] = {
        "layout": layout and layout.value,
        "optimize": optimize and optimize.value,
        "nonfinite": nonfinite.value,
        "seed": seed,
        "time_budget": time_budget,
        **chosen,
    }
    with _progress(quiet) as progress, _file_for(target) as path, _table(source) as table:
        progress(f"reading {source}", None)
        large = large_rows(table, key, STREAM_BYTES)
        if large is not None:
            made = save_stream(path, large, progress=progress, **settings)
            seconds = time.monotonic() - started
            summary = _streamed_summary(path, made)
        else:
            tensors = read_tensors(table, key)
            progress(f"compressing {', '.join(tensors)}", None)
            save(path, tensors, **settings)
            seconds = time.monotonic() - started
            summary = {} if quiet and not as_json else _summary(path, tensors, progress)
    if as_json:
        _print_json(summary | {"seconds": round(seconds, 3)})
    elif not quiet:
        _say_summary(source, target, summary, seconds)


def _streamed_summary(path: str, made: Streamed) -> dict[str, Any]:
    """What ``_summary`` finds, of a table whose rows were compared while they were written."""
    from .inspection import in_json
    from .reading import open as open_polar

    with open_polar(path, library="numpy") as file:
        size = file.info()["file_bytes"]
        (name,) = file.keys()
        shape, dtype, raw = list(file[name].shape), file[name].dtype_name, file[name].nbytes
    return {
        "file_bytes": size,
        "raw_bytes": raw,
        "bits_per_float": 8 * size / math.prod(shape),
        "tensors": {name: {"shape": shape, "dtype": dtype} | in_json(made.closeness)},
    }


def _summary(path: str, tensors: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Sizes of a file just written, and how close it came, read back from the disk."""
    from . import inspection
    from .reading import open as open_polar

    with open_polar(path, library="numpy") as file:
        size = file.info()["file_bytes"]
        raw = sum(file[name].nbytes for name in file)
        floats = sum(math.prod(file[name].shape) for name in file)
        each = {
            name: {"shape": list(file[name].shape), "dtype": file[name].dtype_name}
            | inspection.quality(tensors[name], inspection.read(file[name], progress))
            for name in file
        }
    rate = 8 * size / floats if floats else None
    return {"file_bytes": size, "raw_bytes": raw, "bits_per_float": rate, "tensors": each}


def _say_summary(source: str, target: str, summary: dict[str, Any], seconds: float) -> None:
    size, raw, bits = summary["file_bytes"], summary["raw_bytes"], summary["bits_per_float"]
    rate = f", {bits:.3f} bits per float" if bits else ""
    _say(
        f"{source} {raw:,} bytes -> {target} {size:,} bytes "
        f"({raw / size:.1f} times smaller{rate}), {seconds:.1f} s"
    )
    for name, tensor in summary["tensors"].items():
        _say(f"{name} {tuple(tensor['shape'])} {tensor['dtype']}: {_quality_text(tensor)}")


@app.command()
def decompress(
    source: PolarFile,
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="A .npy (one tensor), .npz or .safetensors, or -.")
    ],
    key: Key = None,
    quiet: Quiet = False,
) -> None:
    """Decode a .polar file to a file of arrays. Every byte that is read is checked.

    Shapes and dtypes are those that were compressed; where the output knows no bfloat16 (.npy,
    .npz) it becomes float32, which loses nothing.
    """
    _check_stdout(target, False)
    from .inspection import read
    from .integrations.files import check_target, ending, write_tensors
    from .reading import open as open_polar

    with _progress(quiet) as progress, open_polar(_contents(source), library="numpy") as file:
        names = [key] if key is not None else file.keys()
        check_target(target, names)
        if ending(target) == ".npy":
            _write_npy(target, file[names[0]], progress)
            return
        tensors = {name: read(file[name], progress) for name in names}
        halves = [name for name in names if file[name].dtype_name == "bfloat16"]
        progress(f"writing {target}", None)
        write_tensors(target, tensors, bfloat16=halves)


def _write_npy(target: str, tensor: Tensor, progress: Progress) -> None:
    """A tensor to .npy, block by block."""
    from .blocks import work_dtype
    from .inspection import blocks
    from .integrations.files import write_rows

    if tensor.dtype_name == "bfloat16":
        warnings.warn(f"{target}: no bfloat16 in .npy, float32 for {tensor.name!r}", stacklevel=2)
    decoded = (rows for _, rows in blocks(tensor, progress))
    write_rows(target, tensor.shape, work_dtype(tensor.dtype_name), decoded)


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(metavar="FILE...", help=".polar files.")],
    target: Annotated[
        str, typer.Option("--out", "-o", metavar="OUT", help="The .polar file to write, or -.")
    ],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Put the rows of several .polar files into one, file after file. Nothing is coded anew.

    The files hold tensors of the same names and were written with one quantizer, which is stored
    once. Every checksum is compared on the way.

    polarpack merge part-*.polar --out whole.polar
    """
    _check_stdout(target, as_json)
    from .merging import merge as merge_files
    from .reading import open as open_polar

    with _progress(quiet) as progress, _file_for(target) as path:
        progress(f"merging {len(sources)} files", None)
        merge_files(sources, path)
        with open_polar(path, library="numpy") as file:
            facts = file.info()
    if as_json:
        shapes = {name: {"shape": tensor["shape"]} for name, tensor in facts["tensors"].items()}
        _print_json({"file_bytes": facts["file_bytes"], "tensors": shapes})
    elif not quiet:
        _say(f"{len(sources)} files -> {target} {facts['file_bytes']:,} bytes")
        for name, tensor in facts["tensors"].items():
            _say(f"{name} {tuple(tensor['shape'])} {tensor['dtype']}")


# -- what is in a file, and is it sound ------------------------------------------------------------
@app.command()
def info(file: PolarFile, as_json: Json = False) -> None:
    """Show what a .polar file holds and where its bytes are, to the byte. Nothing is decoded.

    As JSON: a tensor's codes_bytes grow with its rows, its side_bytes (quantizer, entropy model,
    header) do not; with container_bytes they sum to file_bytes.
    """
    from .inspection import sizes

    facts = sizes(_contents(file))
    if as_json:
        _print_json(facts)
        return
    from rich.box import HORIZONTALS
    from rich.table import Table

    size = facts["file_bytes"]
    shown = Table(box=HORIZONTALS, title=file, title_justify="left", title_style="bold")
    shown.add_column("part")
    shown.add_column("bytes", justify="right", no_wrap=True)
    shown.add_column("share", justify="right", no_wrap=True)

    def row(name: str, n_bytes: int, style: str | None = None) -> None:
        shown.add_row(name, f"{n_bytes:,}", f"{n_bytes / size:.2%}", style=style)

    for name, tensor in facts["tensors"].items():
        mine = tensor["codes_bytes"] + tensor["side_bytes"]
        floats = math.prod(tensor["shape"])
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        rate = f", {8 * mine / floats:.3f} bits per float" if floats else ""
        row(f"{name}: {shape} {tensor['dtype']}, {tensor['layout']}{rate}", mine, "bold")
        for part, n_bytes in tensor["parts"].items():
            row(f"  {part}", n_bytes)
        shown.add_section()
    row("header and table of chunks", facts["container_bytes"])
    row("file", size, "bold")
    _stdout().print(shown)


@app.command()
def verify(
    file: PolarFile,
    against: Annotated[
        str | None, typer.Option(metavar="IN", help="Compare with the originals in this file.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="The tensor to compare; by default all.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check every checksum of a .polar file and decode every row.

    Damage is listed with its place, and the exit code is 3. With --against also the real
    signal-to-noise ratio, the mean cosine and the largest relative error of a row.
    """
    if key is not None and against is None:
        _refuse("--key names the tensor to compare: it goes with --against")
    from . import inspection
    from .integrations.files import read_tensors

    source = _contents(file)
    with _progress(quiet) as progress:
        found = inspection.examine(source, progress)
        tensors: dict[str, dict[str, Any]] = {
            name: {"rows": n, "damaged_rows": found.damaged_rows[name]}
            for name, n in found.n_rows.items()
        }
        if against is not None and not found.problems:
            originals = read_tensors(against)
            for name, facts in inspection.against(source, originals, key, progress).items():
                tensors[name] |= facts
    if as_json:
        sound = not found.problems
        _print_json({"sound": sound, "problems": found.problems, "tensors": tensors})
    elif not quiet:
        for name, facts in tensors.items():
            state = f"{facts['damaged_rows']:,} damaged" if found.problems else "sound"
            compared = f"; {_quality_text(facts)}" if "snr_db" in facts else ""
            typer.echo(f"{name}: {facts['rows']:,} rows, {state}{compared}")
    for problem in found.problems[:SHOWN_PROBLEMS]:
        _say(f"error: {file}: {problem}")
    if len(found.problems) > SHOWN_PROBLEMS:
        _say(f"error: {file}: {len(found.problems) - SHOWN_PROBLEMS} problems more")
    if found.problems:
        raise typer.Exit(DAMAGED)


def _quality_text(facts: dict[str, Any]) -> str:
    """What ``inspection.quality`` found, in words."""
    worst, snr = facts["max_relative_error"], facts["snr_db"]
    if worst == 0:
        text = "exact"
    else:
        ratio = "SNR -inf" if snr is None else f"SNR {snr:.2f} dB"
        error = "infinite" if worst is None else f"{worst:.3g}"
        cosine = facts["mean_cosine"]
        text = f"{ratio}, mean cosine {cosine:.5f}, largest relative error {error}"
    if "nonfinite_rows" in facts:
        kept = "exact" if facts["nonfinite_exact"] else "CHANGED"
        text += f"; {facts['nonfinite_rows']:,} rows with NaN or infinity, {kept}"
    return text


# -- comparisons -----------------------------------------------------------------------------------
@app.command()
def compare(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file of float tensors, or -.")],
    key: Key = None,
    bits: Annotated[
        list[float], typer.Option(help="Total bits per float; give it once for each size.")
    ] = [0.5, 1.0, 2.0, 4.0],  # noqa: B006  typer reads it and nobody changes it
    method: Annotated[
        list[str] | None,
        typer.Option(help="polarpack, a preset or a peer such as 'faiss PQ'; once for each."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Where the plot goes; by default IN-compare.png, here."),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Use at most this many rows, evenly chosen.")
    ] = 20_000,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Store one table in every way at the same total sizes: a table of results, and a plot.

    Compared are polarpack, all presets (pq, opq, rq, ...), faiss's codecs, and what has but one
    size (sq8, int8_rows, float16), each with everything counted that decoding needs. Minutes for
    large tables.
    """
    from . import comparison
    from .integrations.files import read_tensors, replacing

    with _progress(quiet) as progress:
        progress(f"reading {source}", None)
        tensors = read_tensors(source, key)
        if len(tensors) != 1:
            raise InputError(f"{source}: choose one of {', '.join(tensors)} by --key")
        ((name, tensor),) = tensors.items()
        progress("polarpack", None)
        compared = comparison.compare(
            tensor,
            bits=bits,
            methods=method,
            max_rows=rows,
            name=name,
            on_result=lambda r: progress(f"after {r.name} at {r.bits_per_float:.2f} bits", None),
        )
    if as_json:
        _print_json({"tensor": name} | json.loads(compared.to_json()))
    else:
        _stdout().print(comparison.table(compared.rows, compared.title))
    for note in compared.notes():
        _say(f"warning: {note}")
    picture = plot or Path(f"{Path(source).stem if source != PIPE else name}-compare.png")
    try:
        with replacing(picture) as path:
            compared.plot(path)
        _say(f"plot: {picture}")
    except MissingDependencyError as missing:
        _say(f"warning: {missing}")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where a .polar file and a plot go.")
    ] = Path(),
    quiet: Quiet = False,
) -> None:
    """Compress the word vectors shipped with the package, look words up, compare sizes, and plot;
    then a photograph, beside JPEG of as many bytes.

    Needs no network and less than a minute.
    """
    from . import demo as words

    out.mkdir(parents=True, exist_ok=True)
    with _progress(quiet) as progress:
        words.run(
            out,
            _stdout(),
            doing=lambda text: progress(text, None),
            missing=lambda text: _say(f"warning: {text}"),
        )
        progress("a photograph", None)
        _photograph(out)


def _photograph(out: Path) -> None:
    """The image codec's own demo. It is run as the program it is, because polarpack_image stands on
    polarpack and not the reverse."""
    if find_spec("PIL") is None:
        _say("warning: no photograph: that needs Pillow: pip install 'polarpack[image]'")
        return
    command = [sys.executable, "-m", "polarpack_image", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        _say(f"warning: no photograph: {done.stderr}")
        return
    _stdout().print(f"\n{done.stdout}", end="", highlight=False, markup=False, soft_wrap=True)


# -- words, files and bars -------------------------------------------------------------------------
def _say(text: str) -> None:
    """One line on standard error."""
    line = " ".join(text.split())
    typer.echo(f"polarpack: {line[:MAX_MESSAGE]}{'...' * (len(line) > MAX_MESSAGE)}", err=True)


def _refuse(text: str) -> NoReturn:
    """The command line makes no sense in a way that typer cannot see."""
    _say(f"error: {text}")
    raise typer.Exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {message}")


def _print_json(facts: dict[str, Any]) -> None:
    typer.echo(json.dumps(facts, indent=2, allow_nan=False))


def _stdout() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def _check_stdout(target: str, as_json: bool) -> None:
    if target == PIPE and as_json:
        _refuse("--json and the data cannot both go to standard output")
    if target == PIPE and sys.stdout.isatty():
        _refuse("refusing to write binary data to a terminal")


@contextlib.contextmanager
def _table(source: str) -> Iterator[str]:
    """A file with what comes through the pipe, if it is one: it may not fit in memory, and is read
    more than once."""
    from .integrations.files import NPY_MAGIC, PIPE_NAME

    if source != PIPE:
        yield source
        return
    first = sys.stdin.buffer.read(len(NPY_MAGIC))
    if first != NPY_MAGIC:
        raise InputError("expected a .npy stream on standard input, got something else")
    with tempfile.TemporaryDirectory(prefix="polarpack-") as folder:
        path = os.path.join(folder, f"{PIPE_NAME}.npy")
        with open(path, "wb") as file:
            file.write(first)
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        yield path


def _contents(file: str) -> str | bytes:
    """The path, or the bytes that come through the pipe."""
    return sys.stdin.buffer.read() if file == PIPE else file


@contextlib.contextmanager
def _file_for(target: str) -> Iterator[str]:
    """A path to write to; what is there at the end of the block goes to the pipe, if it is one."""
    if target != PIPE:
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="polarpack-") as folder:
        path = os.path.join(folder, "piped.polar")
        yield path
        with open(path, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Yields what to call with the work at hand and its share done (None: nobody knows). Shown with
    the time it takes, on standard error, where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, emoji=False)
    if quiet or not console.is_terminal:
        yield lambda doing, done: None
        return
    from rich import progress

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        current = ""

        def show(doing: str, done: float | None) -> None:
            nonlocal current
            if doing != current:
                bar.reset(task, description=doing, total=None if done is None else 1.0)
                current = doing
            bar.update(task, completed=done or 0)

        yield show
