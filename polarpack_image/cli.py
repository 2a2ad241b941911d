"""The command line ``polarpack-image``: compress, decompress, info, train, benchmark, compare,
download-data. Results go to standard output, progress and messages to standard error."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperGroup

from polarpack import __version__
from polarpack.errors import FormatError, InputError, MissingDependencyError, PolarPackError

Item = TypeVar("Item")
HELP = """
Compress photographs to .pvq files and back.

Exit codes: 0 success; 1 the data or an argument is wrong; 2 the command line is wrong; 3 a .pvq
file is damaged, or is none; 4 an optional library is missing; 5 the operating system refused.
"""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".avif", ".gif"}
KODAK = "https://r0k.us/graphics/kodak/kodak/kodim{:02d}.png"


class _Commands(TyperGroup):
    """Turns what a command raises into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            try:
                return super().invoke(ctx)
            except PolarPackError as error:
                codes = {FormatError: 3, MissingDependencyError: 4}
                code = next((c for kind, c in codes.items() if isinstance(error, kind)), 1)
                _say(f"error: {error}")
                raise typer.Exit(code) from None
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                _say(f"error: {where}{error.strerror or error}")
                raise typer.Exit(5) from None


app = typer.Typer(
    cls=_Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="polarpack-image")


def _say(text: str) -> None:
    typer.echo(text[:500], err=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polarpack-image {__version__}")
        raise typer.Exit


@app.callback()
def polarpack_image(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What precedes a command; the help stands in ``HELP``."""


def _progress(items: Iterable[Item], n: int, what: str, quiet: bool) -> Iterator[Item]:
    """The items, with a bar on standard error where that is a terminal."""
    if quiet or n < 2 or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, total=n, description=what, console=Console(stderr=True))


def _jobs(
    sources: list[Path], target: Path | None, suffixes: set[str], suffix: str
) -> list[tuple[Path, Path]]:
    """(input, output) of a command: files, or folders whose pictures are all taken."""
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            found += sorted(p for p in source.iterdir() if p.suffix.lower() in suffixes)
        elif source.exists():
            found.append(source)
        else:
            raise InputError(f"{source}: no such file")
    if not found:
        raise InputError(f"no pictures in {', '.join(map(str, sources))}")
    many = len(found) > 1 or any(source.is_dir() for source in sources)
    if target is not None and many and target.is_file():
        raise InputError(f"{target}: expected a folder for {len(found)} files")
    if target is not None and (many or target.is_dir()):
        target.mkdir(parents=True, exist_ok=True)
        jobs = [(path, target / f"{path.stem}{suffix}") for path in found]
    elif target is not None:
        jobs = [(found[0], target)]
    else:
        jobs = [(path, path.with_suffix(suffix)) for path in found]
    for source, output in jobs:
        if source.resolve() == output.resolve():
            raise InputError(f"{source}: would be overwritten by its own output")
    if len({output for _, output in jobs}) < len(jobs):
        raise InputError("two inputs would be written to one output")
    return jobs


def _write(path: Path, data: bytes) -> None:
    """A killed writer leaves the old file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Sources = Annotated[list[Path], typer.Argument(metavar="IN...", help="Files, or folders of them.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File, or a folder for many.")]
Weights = Annotated[
    Path | None, typer.Option(help="A weights file to use instead of the package's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def compress(
    sources: Sources,
    out: Out = None,
    quality: Annotated[
        float | None, typer.Option("--quality", "-Q", help="0..100; 50 by default.")
    ] = None,
    bpp: Annotated[float | None, typer.Option(help="Bits a pixel, never exceeded.")] = None,
    psnr: Annotated[float | None, typer.Option(help="PSNR in dB to reach.")] = None,
    effort: Annotated[int, typer.Option(help="1..3: how much the search tries.")] = 1,
    tune: Annotated[
        Literal["psnr", "msssim"], typer.Option(help="What to spend bytes on.")
    ] = "psnr",
    weights: Weights = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write pictures, or .npy arrays (H, W, C) of bands, as .pvq files, beside them or in --out."""
    from .codec import compress as encode

    rows = []
    jobs = _jobs(sources, out, SUFFIXES | {".npy"}, ".pvq")
    for source, target in _progress(jobs, len(jobs), "compressing", quiet or as_json):
        image = _array(source) if source.suffix.lower() == ".npy" else source
        data = encode(image, quality, bpp=bpp, psnr=psnr, effort=effort, tune=tune, weights=weights)
        _write(target, data)
        before = source.stat().st_size
        rows.append(
            {"input": str(source), "output": str(target), "input_bytes": before,
             "file_bytes": len(data)}
        )  # fmt: skip
        if not (quiet or as_json):
            typer.echo(f"{target}: {len(data):,} bytes ({source.name}: {before:,})")
    _sum_up(rows, as_json, quiet)


def _array(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path}: not a .npy file ({error})") from error


def _sum_up(rows: list[dict[str, Any]], as_json: bool, quiet: bool) -> None:
    """The rows as JSON, or one line for several files."""
    if as_json:
        typer.echo(json.dumps(rows))
    elif len(rows) > 1 and not quiet:
        before, after = (sum(row[k] for row in rows) for k in ("input_bytes", "file_bytes"))
        typer.echo(f"{len(rows)} files: {after:,} bytes from {before:,}")


@app.command()
def decompress(
    sources: Sources,
    out: Out = None,
    suffix: Annotated[
        str, typer.Option(help="Format of pictures, by its suffix; arrays become .npy.")
    ] = ".png",
    partial: Annotated[
        bool, typer.Option(help="Also read a file that is cut short, as far as it goes.")
    ] = False,
    weights: Weights = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write .pvq files as pictures that other programs read, or as .npy arrays."""
    import numpy as np

    from .codec import decompress as decode

    suffix = suffix if suffix.startswith(".") else f".{suffix}"
    rows = []
    jobs = _jobs(sources, out, {".pvq"}, suffix)
    for source, target in _progress(jobs, len(jobs), "decompressing", quiet or as_json):
        image = decode(source.read_bytes(), partial=partial, weights=weights)
        if isinstance(image, np.ndarray):
            if target.suffix != ".npy":
                target = target.with_suffix(".npy")
            np.save(target, image)
            what = f"{' x '.join(map(str, image.shape))} {image.dtype}"
        else:
            kept = {str(k): image.info[k] for k in ("icc_profile", "exif") if k in image.info}
            _save(image, target, kept)
            what = f"{image.width} x {image.height} {image.mode}"
        sizes = source.stat().st_size, target.stat().st_size
        rows.append(
            {"input": str(source), "output": str(target), "input_bytes": sizes[0],
             "file_bytes": sizes[1]}
        )  # fmt: skip
        if not (quiet or as_json):
            typer.echo(f"{target}: {what}")
    _sum_up(rows, as_json, quiet)


def _save(image: Any, target: Path, kept: dict[str, bytes]) -> None:
    """By Pillow; what it says about a format it does not know, or that cannot hold the mode."""
    try:
        image.save(target, **kept)
    except (ValueError, KeyError) as error:
        raise InputError(f"{target}: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{target}: {error}") from error


@app.command()
def info(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A .pvq file.")],
    as_json: Json = False,
) -> None:
    """What a file holds, down to the byte, from its header and its table of sections alone."""
    from .bitstream import SAMPLES, Mode, read_header, section_bytes
    from .plugin import HEADER_BYTES

    with source.open("rb") as file:
        header, position = read_header(file.read(HEADER_BYTES))
        file.seek(position)
        sizes = section_bytes(file)
    n_bytes = source.stat().st_size
    row: dict[str, Any] = {
        "file_bytes": n_bytes,
        "width": header.width,
        "height": header.height,
        "mode": header.mode.name,
    }
    if header.mode == Mode.BANDS:
        row |= {"bands": header.n_bands, "dtype": SAMPLES[header.dtype], "groups": header.n_groups}
    row |= {
        "coding": header.coding.name,
        "quality": header.quality,
        "step": header.step / 256,
        "bpp": 8 * n_bytes / header.width / header.height,
        "tiles": header.tiles[0] * header.tiles[1],
        "layers": len(header.layers),
        "quantizer": header.quantizer.name,
        "weights": header.weights.hex(),
        "icc_bytes": sizes["ICC"],
        "exif_bytes": sizes["EXIF"],
        "alpha_bytes": sizes["ALPHA"],
        "side_bytes": sizes["BANDS"] + sizes["HYPER"],
        "pixel_bytes": sizes["TILE"],
        "container_bytes": n_bytes - sum(sizes.values()),
    }
    if as_json:
        typer.echo(json.dumps(row))
        return
    for name, value in row.items():
        typer.echo(f"{name.replace('_', ' '):16} {value:.4g}" if isinstance(value, float)
                   else f"{name.replace('_', ' '):16} {value}")  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path(),
) -> None:
    """The shipped photograph beside JPEG of as many bytes: a .pvq file and a drawing."""
    from .demo import run as show

    out.mkdir(parents=True, exist_ok=True)
    typer.echo(show(out))


@app.command()
def compare(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture.")],
    bpp: Annotated[float, typer.Option(help="Bits a pixel that all get.")] = 0.5,
    as_json: Json = False,
) -> None:
    """This codec beside JPEG, WebP, AVIF, JPEG XL and JPEG 2000 at the same bytes."""
    import numpy as np
    from PIL import Image

    from .comparison import at_equal_bytes

    rgb = np.asarray(Image.open(source).convert("RGB"))
    rows = at_equal_bytes(rgb, bpp)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    typer.echo(f"{'codec':12} {'bytes':>9} {'bpp':>7} {'PSNR':>7} {'MS-SSIM':>8}")
    for row in rows:
        typer.echo(
            f"{row['codec']:12} {row['bytes']:9,} {row['bpp']:7.3f} {row['psnr']:7.2f} "
            f"{row['msssim']:8.4f}"
        )


@app.command()
def benchmark(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of pictures, such as Kodak's.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path(),
    quick: Annotated[bool, typer.Option(help="Three pictures, without the slow codecs.")] = False,
    quiet: Quiet = False,
) -> None:
    """Rate and distortion against the other codecs: a table, JSON, plots and a page to look at."""
    from .report import run

    table = run(folder, out, quick=quick, doing=(lambda _: None) if quiet else _say)
    typer.echo(table)


@app.command()
def train(
    preset: Annotated[
        str, typer.Argument(help="lapped, context, post, small, full, tiny or original.")
    ],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Folders, tar files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; resumes it.")],
    start: Annotated[
        Path | None, typer.Option(help="arrays.npz of a finished run to build on.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the whole schedule.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops a step.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop after so long; resume later.")] = math.inf,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the decoded pictures, kept for later runs.")
    ] = None,
) -> None:
    """Train a transform or a network on photographs; exact resume from --out."""
    try:
        from .training_presets import run_preset
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs torch: pip install 'polarpack[torch]' ({error})"
        ) from error
    finished = run_preset(
        preset, data, out, start=start, cache=cache,
        steps=steps, batch=batch, device=device, seconds=seconds,
    )  # fmt: skip
    typer.echo(f"{out}: {'finished' if finished else 'stopped; call again to go on'}")


@app.command()
def fit(
    transform: Annotated[
        Path, typer.Argument(metavar="ARRAYS", help="arrays.npz of a finished run.")
    ],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Folders, tar files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The weights file to write.")],
    network: Annotated[
        Path | None, typer.Option(help="arrays.npz of a finished context run.")
    ] = None,
    n_crops: Annotated[int, typer.Option(help="Training crops of 320 x 320 pixels.")] = 400,
    cache: Annotated[Path | None, typer.Option(help="As for train.")] = None,
) -> None:
    """Fit the entropy coder to a trained transform (a run of lapped) or codec (small, full) and
    write a weights file, for ``compress --weights``."""
    try:
        from .data import load_pictures
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs torch: pip install 'polarpack[torch]' ({error})"
        ) from error
    import numpy as np

    from . import fitting, weights

    pictures, _ = load_pictures(data, cache).split()
    with np.load(transform) as stored:
        learned = "codec.config" in stored and dict(stored)
    if learned:
        from .fitting_learned import build

        if network is not None:
            raise InputError(f"{transform} has an entropy network of its own; drop --network")
        arrays = build(learned, fitting.training_crops(pictures, n_crops, 320))
    else:
        arrays = fitting.build_from_files(transform, network, pictures, n_crops)
    weights.save(out, arrays)
    typer.echo(f"{out}: {out.stat().st_size:,} bytes")


@app.command("download-data")
def download_data(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to put the pictures.")],
    quiet: Quiet = False,
) -> None:
    """Fetch the 24 Kodak photographs (free to use), 15 MB; what is there is kept."""
    from urllib.error import URLError
    from urllib.request import urlopen

    folder.mkdir(parents=True, exist_ok=True)
    wanted = [folder / f"kodim{i:02d}.png" for i in range(1, 25)]
    missing = [path for path in wanted if not path.exists()]
    for path in _progress(missing, len(missing), "downloading", quiet):
        url = KODAK.format(int(path.stem[5:]))
        try:
            with urlopen(url, timeout=60) as answer:
                data = answer.read(1 << 24)
        except URLError as error:
            raise OSError(None, f"cannot be fetched: {error.reason}", url) from error
        if not data.startswith(b"\x89PNG"):
            raise InputError(f"{path.name}: the server did not send a PNG file")
        _write(path, data)
    if not quiet:
        typer.echo(f"{folder}: {len(missing)} fetched, {len(wanted) - len(missing)} were there")
