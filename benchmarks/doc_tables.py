"""Which figures of results/*.json do README.md and docs/ show? Writes or checks them.

python benchmarks/doc_tables.py            writes the tables between their markers
python benchmarks/doc_tables.py --check    exits with 1 where a page and the JSON differ
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            "architecture.md",
            "benchmarks.md",
            "images.md",
            "quantizers.md",
            "scale.md",
            "search.md",
        )
    ),
)
MARKERS = re.compile(
    r"(<!-- table (\w+): benchmarks/doc_tables\.py -->\n).*?(<!-- end -->)", re.DOTALL
)
WHAT = {
    "sentences": "sentence embeddings",
    "sentences_500": "first 500 sentences",
    "sentences_3000": "first 3000 sentences",
    "sentences_10000": "first 10000 sentences",
    "tokens": "token embeddings",
    "weights": "weight matrices",
    "glove": "GloVe",
    "glove_excerpt": "GloVe excerpt (ships)",
    "sift": "SIFT",
    "gaussian": "independent Gaussian",
}
PAIR = ("pp.compress", "faiss PQ")
RATES = (0.5, 1.0, 2.0, 4.0)
BD = ("bd_psnr", "bd_msssim")
FIGURES = {"snr_db": ".2f", "cosine": ".4f", "cosine_p01": ".3f", "recall10": ".3f"}
Results = dict[str, Any]


def pick(results: Results, comparison: str) -> dict[tuple[str, str, float], dict[str, Any]]:
    """Lines of one comparison by table, codec and rate."""
    rows = (r for r in results["rows"] if r["comparison"] == comparison)
    return {(r["table"], r["codec"], r["rate"]): r for r in rows}


def names(results: Results) -> list[str]:
    """Tables that were measured, in the order of ``WHAT``."""
    return [name for name in WHAT if name in results["data"]]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def whole(results: Results) -> str:
    """README: equal total bytes, polarpack / faiss PQ, and a verdict over all of faiss's codecs."""
    found, rates = pick(results, "whole"), RATES
    rows = []
    for name in names(results):
        if any((name, codec, rate) not in found for codec in PAIR for rate in rates[1:]):
            continue
        n, d = results["data"][name]["shape"]
        row = [f"{WHAT[name]}, {n} x {d}"]
        for rate in rates:
            pair = [found.get((name, codec, rate)) for codec in PAIR]
            row.append(" / ".join(_bold([r["snr_db"] if r else None for r in pair])))
        ours, peer = (found[name, codec, 2.0]["recall10"] for codec in PAIR)
        rows.append([*row, f"{ours:.3f} / {peer:.3f}"])
    head = ["table", *(f"{rate:g} bit{'s' * (rate > 1)}" for rate in rates), "recall@10 at 2 bits"]
    faiss = results["versions"]["faiss-cpu"]
    made = f"Measured {results['when'][:10]} on {results['cpu']} with faiss {faiss}."
    return f"{markdown(head, rows)}\n\n{verdict(results)} {made}\n"


def _bold(values: list[float | None]) -> list[str]:
    """Numbers with one digit, the largest in bold; "-" for what a codec could not do."""
    best = max((v for v in values if v is not None), default=None)
    return ["-" if v is None else f"**{v:.1f}**" if v == best else f"{v:.1f}" for v in values]


def leads(results: Results) -> dict[tuple[str, str], list[tuple[float, dict[str, Any]]]]:
    """By codec of faiss and table: dB by which polarpack is ahead at the codec's own bytes."""
    out: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = {}
    found = pick(results, "whole")
    for (name, codec, rate), r in found.items():
        # PQ is read off between two settings, at exactly the rate that pp.compress got
        same = found.get((name, "pp.compress", rate)) if codec == "faiss PQ" else None
        ours = r.get("ours_snr_db", same and same["snr_db"])
        if codec.startswith("faiss") and r.get("snr_db") is not None and ours is not None:
            out.setdefault((codec, name), []).append((ours - r["snr_db"], r))
    return out


def verdict(results: Results) -> str:
    """Whether anything of faiss is ahead at equal bytes, in words."""
    found = [(gap, r) for lines in leads(results).values() for gap, r in lines]
    codecs = sorted({r["codec"].removeprefix("faiss ") for _, r in found})
    behind = [
        f"{r['codec']} {r['setting']} on {WHAT.get(r['table'], r['table'])} ({gap:+.2f} dB)"
        for gap, r in found
        if gap < 0
    ]
    text = f"Against {', '.join(codecs)} of faiss, each at its own total bytes, polarpack is ahead "
    text += f"in {len(found) - len(behind)} of {len(found)} comparisons of SNR"
    text += f"; it is behind {', '.join(behind)}." if behind else f", by {_least(found)} or more."
    return text


def _least(found: list[tuple[float, dict[str, Any]]]) -> str:
    gap, r = min(found, key=lambda pair: pair[0])
    return f"{gap:.2f} dB ({r['codec']} on {WHAT.get(r['table'], r['table'])})"


def peers(results: Results) -> str:
    """docs/benchmarks: the least lead over each of faiss's codecs, table by table."""
    lead = leads(results)
    tables = [name for name in names(results) if any(key[1] == name for key in lead)]
    rows = []
    for codec in sorted({codec for codec, _ in lead}):
        cells = []
        for name in tables:
            line = lead.get((codec, name))
            gaps = [gap for gap, _ in line or []]
            cells.append(f"{min(gaps):+.1f} to {max(gaps):+.1f}" if gaps else "-")
        rows.append([codec, *cells])
    return markdown(["dB ahead, whole table", *(WHAT[name] for name in tables)], rows) + "\n"


def heldout(results: Results) -> str:
    """docs/benchmarks: SNR of held-out rows at equal code bits, with the bound."""
    found = pick(results, "heldout")
    rows = []
    for name in names(results):
        bound = results["data"][name]
        limit = dict(zip(bound["bound_rates"], bound["bound_db"], strict=True))
        codecs = {"pp.fit": "archive", "pp.fit rows": "rows layout", "faiss PQ": "faiss PQ"}
        codecs |= {"faiss PRQ": "faiss PRQ", "faiss RQ": "faiss RQ"}
        for codec, words in codecs.items():
            line = [found.get((name, codec, rate)) for rate in RATES]
            if any(line):
                cells = [f"{r['snr_db']:.2f}" if r else "-" for r in line]
                rows.append([WHAT[name], words, *cells])
        if any(r[0] == WHAT[name] for r in rows):
            cells = [f"{limit[rate]:.2f}" for rate in RATES]
            rows.append([WHAT[name], "Gaussian bound of one KLT", *cells])
    head = ["table", "SNR in dB at code bits of", *(f"{rate:g}" for rate in RATES)]
    return markdown(head, rows) + "\n"


def objectives(results: Results) -> str:
    """docs/benchmarks: what optimizing for another figure does to the three of them."""
    found = pick(results, "heldout")
    rows = []
    for name in names(results):
        for rate in (1.0, 2.0):
            for codec in ("pp.fit", "pp.fit recall", "pp.fit cosine", "faiss PQ", "faiss EDEN"):
                r = found.get((name, codec, rate))
                if r and r.get("snr_db") and (name, "pp.fit cosine", rate) in found:
                    label = "snr" if codec == "pp.fit" else codec.removeprefix("pp.fit ")
                    row = [WHAT[name], f"{rate:g}", label]
                    cells = [f"{r[figure]:{form}}" for figure, form in FIGURES.items()]
                    small = f"{r['small_norms']:.3f}" if "small_norms" in r else "-"
                    rows.append([*row, *cells, small])
    titles = ["SNR, dB", "mean cosine", "1st percentile", "recall@10", "norms of small rows"]
    return markdown(["table", "code bits", "optimize", *titles], rows) + "\n"


LINKS = {
    "planner": "the planner's chain",
    "one KLT": "one KLT instead of one for each class",
    "native order": "no rotation",
    "random rotation": "a random rotation",
    "4 states": "trellis of 4 states (the planner takes 32)",
    "8 states": "8 states",
    "64 states": "64 states",
    "no rate in the search": "no rate in the search",
    "polar": "radius and direction",
    "no walls": "decoded numbers not held at walls",
    "bound of one KLT": "Gaussian bound of one KLT",
}


def chain(results: Results) -> str:
    """Architecture: what each link of the chain is worth on held-out rows, at 1 and 2 bits."""
    found = {(r["table"], r["rate"], r["link"]): r for r in results["rows"]}
    tables = [name for name in WHAT if any(key[0] == name for key in found)]
    rows = []
    for link, words in LINKS.items():
        lines = [[found.get((name, rate, link)) for rate in (1.0, 2.0)] for name in tables]
        cells = [" / ".join(f"{r['snr_db']:.2f}" if r else "-" for r in pair) for pair in lines]
        rows.append([words, *cells])
    head = ["SNR in dB at 1 / 2 code bits", *(WHAT[name] for name in tables)]
    return markdown(head, rows) + "\n"


def polar(results: Results) -> str:
    """Architecture: raw rows against radius and direction, at 1 bit."""
    found = {(r["table"], r["link"]): r for r in results["rows"] if r["rate"] == 1.0}
    rows = []
    for name in WHAT:
        raw, with_radius = found.get((name, "planner")), found.get((name, "polar"))
        if not raw or not with_radius:
            continue
        pairs = [(r[figure], f) for figure, f in FIGURES.items() for r in (raw, with_radius)]
        rows.append([WHAT[name], *(f"{value:{f}}" for value, f in pairs)])
    titles = ("SNR, dB", "mean cosine", "1st percentile", "recall@10")
    head = ["at 1 code bit", *(word for title in titles for word in (f"{title}: raw", "polar"))]
    return markdown(head, rows) + "\n"


def speed(results: Results) -> str:
    """docs/benchmarks: speed beside faiss, on one core."""
    rows = [
        [
            r["what"],
            f"{r['vectors_per_second']:,}",
            f"{r['megabytes_per_second']:.0f}",
            "-" if r["peak_extra_megabytes"] is None else f"{r['peak_extra_megabytes']:.0f}",
        ]
        for r in results["rows"]
    ]
    text = markdown(["what", "vectors/s", "MB/s of float32", "peak extra MB"], rows)
    reached = [
        f"{name}: {value:g} (aim: {results['targets'][name]:g} or more)"
        for name, value in results["reached"].items()
    ]
    fits = [f"{fit['what']}: {fit['cpu_seconds']:g} CPU seconds" for fit in results["fits"]]
    quality = [f"{q['codec']} {q['snr_db']:.1f} dB" for q in results["quality"]]
    bits, clock = results["data"][0]["bits"], results["clock"]
    made = f"At {bits:g} bits: {', '.join(quality)}. {results['threads']} thread, {clock}, "
    made += f"{results['when'][:10]}, {results['cpu']}, load {results['load']:.1f}."
    items = "\n".join(f"- {line}" for line in [*reached, *fits])
    return f"{text}\n\n{items}\n\n{made}\n"


PATHS = tuple(
    f"{codec} {way}" for codec in ("archive", "rows", "faiss PQ") for way in ("encode", "decode")
)


def growth(results: Results) -> str:
    """docs/benchmarks: rates by the number of rows, their dimension and the bits."""
    found: dict[tuple[int, int, float], dict[str, Any]] = {}
    for r in results["growth"]:
        found.setdefault((r["n"], r["d"], r["bits"]), {})[r["what"]] = r
    rows = []
    for (n, d, bits), ways in found.items():
        quality = " / ".join(f"{ways[f'{c} encode']['snr_db']:.1f}" for c in ("rows", "faiss PQ"))
        extra = max(ways[what]["peak_extra_megabytes"] for what in PATHS[:2])
        cells = [f"{ways[what]['megabytes_per_second']:,.0f}" for what in PATHS]
        rows.append([f"{n:,} x {d}", f"{bits:g}", *cells, quality, f"{extra:,.0f}"])
    head = ["rows", "bits", *PATHS, "dB: rows / faiss PQ", "archive: peak extra MB"]
    made = 'MB of float32 a CPU second, one thread. *archive* is `preset("trellis")`, *rows* is '
    made += f'`preset("pq")`, files and their checks included. {_when(results, "growth")}'
    return f"{markdown(head, rows)}\n\n{made}\n"


def scaling(results: Results) -> str:
    """docs/benchmarks: two threads beside one."""
    rows = [
        [
            r["what"],
            f"{1000 * r['seconds_1']:.0f}",
            f"{1000 * r['seconds_2']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['cpu_ratio']:.2f}",
        ]
        for r in results["scaling"]
    ]
    head = ["what", "one thread, ms", "two, ms", "times faster", "CPU seconds of two / one"]
    made = f"{results['scaling_rows']:,} rows of 384; the shortest of several runs, by the clock. "
    return f"{markdown(head, rows)}\n\n{made}{_when(results, 'scaling')}\n"


def kmeans(results: Results) -> str:
    """docs/benchmarks: k-means beside faiss's."""
    rows = []
    for r in results["kmeans"]:
        cells = [f"{r['rows']:,} x {r['d']}, k = {r['k']:,}"]
        for way in ("faiss", "as_good", "polarpack"):
            error = r[f"{way}_error"] / r["faiss_error"] - 1
            relative = "" if way == "faiss" else f" ({error:+.2%})"
            cells.append(f"{r[f'{way}_seconds']:.2f}{relative}")
        cells[2] += f", {r['as_good_iterations']} iterations"
        rows.append(cells)
    head = ["rows", "faiss, 25 iterations", "polarpack, faiss's error reached", "25 iterations"]
    made = (
        "CPU seconds of one thread (mean squared error beside faiss's), nearest centroids of all "
    )
    return f"{markdown(head, rows)}\n\n{made}rows included. {_when(results, 'kmeans')}\n"


def _when(results: Results, part: str) -> str:
    """Day, machine and load of one part of a result."""
    times = results["parts"][part]
    return f"{times['when'][:10]}, {results['cpu']}, load {times['load']:.1f}."


def streaming(results: Results) -> str:
    """docs/scale: memory and rate of a table that is streamed, with kills."""
    steps = results["steps"]
    shape = " x ".join(f"{v:,}" for v in results["shape"])
    rows = [
        ["`fit` from the stream", "-", f"{steps['fit']['peak_megabytes']:.0f}"],
        ["`compress`, rows in memory", f"{steps['memory']['megabytes_per_second']:.0f}", "-"],
    ]
    for what, name in (("stream", "`create`, `extend`"), ("killed", "resumed after the last kill")):
        rate, peak = steps[what]["megabytes_per_second"], steps[what]["peak_megabytes"]
        rows.append([name, f"{rate:.0f}", f"{peak:.0f}"])
    killed = steps["killed"]
    held = ", ".join(f"{n:,}" for n in killed["resumed_at_rows"])
    made = f"{results['gigabytes']:g} GB: {shape} float32 rows at {results['bits']:g} bits, made "
    made += f"while they are read. Killed {len(killed['killed_after_seconds'])} times at random "
    made += f"moments, it went on with {held} rows in the file: the same file to the byte. "
    made += "MB/s of float32 a CPU second, one thread; memory with interpreter, libraries and the "
    made += f"80 MB that rows are made from. {results['when'][:10]}, {results['cpu']}, "
    made += f"load {results['load']:.1f}."
    return f"{markdown(['step', 'MB/s', 'peak resident MB'], rows)}\n\n{made}\n"


def sample_sizes(results: Results) -> str:
    """docs/scale: what more rows to fit on would have brought."""
    found = results["steps"]["sample"]
    rows = []
    for r in found["fits"]:
        cells = [
            f"{r[f'{way}_snr_db']:.2f} ({r[f'{way}_seeds'][0]:.2f} to {r[f'{way}_seeds'][1]:.2f})"
            for way in ("archive", "rows")
        ]
        name = "made" if r["table"] == "made" else "GloVe, 400,000 words"
        rows.append([f"{name}, d = {r['d']}", f"{r['rows']:,}", *cells])
    head = ["table", "rows fitted on", "archive, dB", "rows layout, dB"]
    made = f"SNR of 16,384 other rows at {results['bits']:g} code bits, mean of {found['seeds']} "
    return f"{markdown(head, rows)}\n\n{made}seeds, least and most.\n"


def lossless(results: Results) -> str:
    """README: bits a number takes when stored to the bit, beside zstd."""
    rows = []
    for r in results["rows"]:
        n, d = r["shape"]
        bits = [r.get(f"{name} bits") for name in ("polarpack", "zstd 9", "zstd 19")]
        cells = [f"**{v:.2f}**" if v == min(filter(None, bits)) else f"{v:.2f}" for v in bits]
        speeds = [f"{r[f'polarpack {way} MB/s']:.0f}" for way in ("encode", "decode")]
        theirs = [f"{r[f'zstd 9 {way} MB/s']:.0f}" for way in ("encode", "decode")]
        speed = f"{' / '.join(speeds)} ({' / '.join(theirs)})"
        rows.append([f"{WHAT[r['table']]}, {n} x {d}", r["numbers"], *cells, speed])
    head = ["table", "numbers", "polarpack", "zstd -9", "zstd -19", "MB/s in / out (zstd -9)"]
    made = f"Measured {results['when'][:10]} on {results['cpu']}, one thread."
    return f"{markdown(head, rows)}\n\n{made}\n"


PUBLISHED = {
    "cai_bmshj2018-hyperprior_mse": "bmshj2018-hyperprior (CompressAI)",
    "cai_mbt2018-mean_mse": "mbt2018-mean (CompressAI)",
    "vtm": "VTM, intra",
}


def images(results: Results) -> str:
    """README: BD-rates on the Kodak photographs, and seconds for one."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    for r in results["rows"]:
        seconds.setdefault(r["codec"], []).append((r["encode_seconds"], r["decode_seconds"]))
    rows = []
    for entry in results["bd_rates"]:
        codec = entry["codec"]
        measured = entry["source"] == "measured"
        if not measured and codec not in PUBLISHED:
            continue
        cells = [f"{entry[k]:+.1f}%" if entry[k] is not None else "-" for k in BD]
        clock = "-"
        if measured and codec in seconds:
            clock = " / ".join(
                f"{sum(way) / len(way):.2f}" for way in zip(*seconds[codec], strict=True)
            )
        name = f"**{codec}**" if codec.startswith("polarpack") else codec
        rows.append([name if measured else f"{PUBLISHED[codec]}, published", *cells, clock])
    for r in results["rows"]:
        if r["codec"] == "png":
            clock = f"{r['encode_seconds']:.2f} / {r['decode_seconds']:.2f}"
            rows.append(["png", f"{r['bpp']:.1f} bits a pixel, lossless", "-", clock])
    other = results.get("yardstick")
    if other:
        clock = f"{other['encode_seconds']:.2f} / {other['decode_seconds']:.2f}"
        rows.append(["layers of mbt2018-mean here, random weights", "-", "-", clock])
    head = ["codec", "rate at equal PSNR", "at equal MS-SSIM", "CPU seconds in / out"]
    made = f"Measured {results['when'][:10]}; seconds for 768 x 512 pixels, mean over qualities."
    return f"{markdown(head, rows)}\n\n{made}\n"


PARTS = {
    "polar+dq8": 'heads polar, or indices, or both (`quantizer="polar+dq8"`)',
    "dq4": 'trellis of 4 states (`"dq4"`)',
    "scalar": 'no trellis: uniform quantizer, indices optimized (`"scalar"`)',
    "polar": 'radius and direction in stages (`"polar"`)',
    "no network": "no level network",
    "no magnitude taps": "no prediction of magnitudes",
    "no mean taps": "no prediction of coefficients",
    "no parents": "no parents among the contexts",
    "one class of channels": "all channels share their counters",
    "nothing learned": "counters and weights start from nothing",
    "effort 2": "the first five heads searched with contexts of each path's own (`effort=2`)",
    "effort 3": "all heads so (`effort=3`)",
}


def band_rates(results: Results) -> str:
    """docs/images: bits a number of arrays of bands, at equal PSNR and without loss."""
    names = list(dict.fromkeys(row["data"] for row in results["rows"]))
    ways = list(dict.fromkeys((row["codec"], row["target"]) for row in results["rows"]))
    ways.sort(key=lambda way: (way[1] is None, way[1] or 0))
    found = {(r["codec"], r["target"], r["data"]): r["bits"] for r in results["rows"]}
    rows = []
    for codec, target in ways:
        at = f"{target:g} dB" if target is not None else "without loss"
        cells = [f"{found[codec, target, name]:.3f}" for name in names]
        rows.append([at, f"**{codec}**" if codec == "polarpack" else codec, *cells])
    height, width, _ = results["data"][0]["shape"]
    made = f"Measured {results['when'][:10]} by benchmarks/bands.py on made scenes of {width} x "
    made += f"{height} pixels at 12 bits; decibels below the range of the numbers."
    return f"{markdown(['at', 'bits a number', *names], rows)}\n\n{made}\n"


def image_parts(results: Results) -> str:
    """docs/images: what each part of the coder is worth."""
    found = {row["variant"]: row["bd_rate"] for row in results["rows"]}
    rows = [[words, f"{found[name]:+.1f}%"] for name, words in PARTS.items() if name in found]
    pictures = ", ".join(entry["name"] for entry in results["data"])
    n, (least, most) = len(results["rows"][0]["points"]), _ends(results["rows"][0]["points"])
    sizes = {tuple(sorted(entry["shape"][:2])) for entry in results["data"]}
    size = " or ".join(f"{w} x {h}" for h, w in sorted(sizes))
    made = f"Measured {results['when'][:10]} on {size} pixels of {pictures}, "
    made += f"{n} qualities from {least:.2f} to {most:.2f} bits a pixel; "
    made += "counters of every line learned from the same "
    made += f"{results['n_crops']} crops of training photographs."
    return f"{markdown(['instead of the default', 'bytes at equal PSNR'], rows)}\n\n{made}\n"


def _ends(points: list[list[float]]) -> tuple[float, float]:
    """The least and the greatest rate of a curve."""
    rates = [rate for rate, _ in points]
    return min(rates), max(rates)


def scale_steps(results: Results) -> str:
    """docs/scale: what one core does."""
    steps = [r for r in results["steps"] if "snr_db" in r]
    ways = ("write shard", "read shard", "encode column", "decode column")
    rows = [
        [
            r["codec"],
            f"{r['snr_db']:.1f}",
            f"{r['shard bytes/row']:.0f} / {r['column bytes/row']:.0f}",
            *(f"{r[f'{way}, rows/s']:,}" for way in ways),
            f"{r['quantizer_bytes'] / 1e3:.0f} kB",
        ]
        for r in steps
    ]
    head = ["codec", "SNR, dB", "bytes a row: shard / column", *(f"{w}, rows/s" for w in ways)]
    (parquet,) = (r["read, rows/s"] for r in results["steps"] if "read, rows/s" in r)
    made = f"Reading the vectors from Parquet: {parquet:,} rows/s. "
    made += f"Measured {results['steps_when'][:10]} on {results['cpu']}."
    return f"{markdown([*head, 'quantizer'], rows)}\n\n{made}\n"


def scale_pipelines(results: Results) -> str:
    """docs/scale: Ray's pipelines beside plain loops."""
    rows = [
        [
            r["what"],
            f"{r['rows_per_second']:,} ({r['range'][0]:,} to {r['range'][1]:,})",
            f"{r['rows_per_cpu_second']:,} ({r['cpu_range'][0]:,} to {r['cpu_range'][1]:,})",
        ]
        for r in results["rows"]
    ]
    head = ["pipeline (archive, 8 states)", "rows/s by the clock", "rows a CPU second"]
    n, d = results["data"][0]["shape"]
    made = f"{n:,} rows of {d} in blocks of {results['data'][0]['block_rows']:,}, load "
    return f"{markdown(head, rows)}\n\n{made}{results['load']:.1f}.\n"


def _figure(value: float) -> str:
    """A number with four digits, or as many as it has before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def scale_plan(results: Results) -> str:
    """docs/scale: ten billion rows on paper."""
    values: dict[str, dict[str, float]] = {}
    for r in results["rows"]:
        values.setdefault(f"{r['what']} ({r['unit']})", {})[r["codec"]] = r["value"]
    codecs = list(next(iter(values.values())))
    rows = [[what, *(_figure(line[c]) for c in codecs)] for what, line in values.items()]
    given = [f"{name} {value:,.12g}" for name, value in results["assumed"].items()]
    made = f"Assumed: {', '.join(given)}. Worked out {results['when'][:10]}."
    return f"{markdown(['plan', *codecs], rows)}\n\n{made}\n"


def search(results: Results) -> str:
    """docs/search: recall and speed of searches in codes, beside faiss's indexes."""
    rows = []
    for r in results["rows"]:
        table = WHAT.get(r["table"], "made of sentence embeddings")
        rows.append(
            [
                f"{table}, {r['n']:,} x {r['d']}, {r['metric']}",
                r["codec"],
                f"{r['row_bytes']:.0f}",
                f"{r['recall10']:.3f}",
                f"{r['batch_queries_per_second']:,.0f}",
                f"{r['single_queries_per_second']:,.0f}",
            ]
        )
    head = ["table", "codes", "row bytes", "recall@10", "queries/s in a batch", "one by one"]
    made = f"{results['bits']:g} bits a number. {results['clock']}, {results['threads']} thread, "
    made += f"{results['when'][:10]}, {results['cpu']}, faiss {results['versions']['faiss-cpu']}, "
    made += f"load {results['load']:.1f}."
    return f"{markdown(head, rows)}\n\n{made}\n"


SYSTEMS = {
    "vqvae": "VQ-VAE, order 0",
    "rqvae": "RQ-VAE, 4 levels, order 0",
    "vqvae2-1-histogram": "VQ-VAE-2, variant 1, order 0",
    "vqvae2-1": "VQ-VAE-2, variant 1, PixelSNAIL",
    "vqvae2-2": "VQ-VAE-2, variant 2, PixelSNAIL",
    "vqvae2-3": "VQ-VAE-2, variant 3, PixelSNAIL",
    "vqvae2-3-transformer": "VQ-VAE-2, variant 3, block Transformer",
    "vqvae2-3-transformer-adaptive": "the same, adaptive codewords",
    "hyperprior": "Conv-HyperPrior",
    "original": "the first Polar-VQ prototype",
}


def baselines(results: Results) -> str:
    """docs/quantizers: the systems this project grew from, on Kodak, beside the default codec."""
    found = {row["model"]: row for row in results["rows"]}
    rows = []
    for name, words in SYSTEMS.items():
        if name in found:
            r = found[name]
            rates = [f"{r[key]:.3f}" for key in ("bpp", "entropy_bpp", "zlib_bpp")]
            size = f"{r['parameters'] / 1e6:.1f} M"
            rows.append([words, f"{r['psnr']:.2f}", *rates, size])
    for r in results["default_codec"]:
        if 10 <= r["quality"] <= 60 and r["quality"] % 20 == 10:
            words = f"**polarpack_image**, default codec, quality {r['quality']:g}"
            rows.append([words, f"{r['psnr']:.2f}", f"{r['bpp']:.3f}", "-", "-", "-"])
    head = ["system", "PSNR, dB", "bits a pixel", "cross-entropy", "zlib of the codes", "weights"]
    n = results["rows"][0]["pictures"]
    most = max(abs(row["over_entropy"]) for row in results["rows"])
    made = f"Means of {n} pictures, {results['when'][:10]}. Coded symbols take {most:.2%} or less "
    made += "off their cross-entropy under the model."
    return f"{markdown(head, rows)}\n\n{made}\n"


def fsq(results: Results) -> str:
    """docs/quantizers: FSQ-VAE by levels, annealing, adaptive levels and hierarchy."""
    rows = []
    for r in results["fsq"]:
        kind = r.get("bottleneck", "plain")
        cells = [f"{r['bce_over_its_least']:.1f}", f"{r['psnr']:.2f}", f"{r['entropy_bits']:.0f}"]
        rows.append([kind, str(r["levels"]), *cells])
    head = ["FSQ", "levels", "loss above its least, nats", "PSNR, dB", "bits a picture (entropy)"]
    return f"{markdown(head, rows)}\n"


def rq_kmeans(results: Results) -> str:
    """docs/quantizers: RQKMeans beside a loop of scikit-learn's KMeans."""
    rows = []
    for r in results["rows"]:
        n, d = r["shape"]
        change = r["error"] / r["error_scikit_learn"] - 1
        seconds = [f"{r['seconds']:.1f}", f"{r['seconds_scikit_learn']:.1f}"]
        data = WHAT.get(r["data"], r["data"])
        rows.append([f"{data}, {n} x {d}", *seconds, f"{r['times_faster']:.1f}", f"{change:+.1%}"])
    head = ["rows", "RQKMeans, s", "scikit-learn, s", "times faster", "error"]
    made = f"{results['stages']} stages of {results['clusters']}, CPU seconds of one thread, "
    made += f"{results['when'][:10]}, {results['cpu']}."
    return f"{markdown(head, rows)}\n\n{made}\n"


TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "scale_steps": ("ray_scaling", scale_steps),
    "scale_pipelines": ("ray_scaling", scale_pipelines),
    "scale_plan": ("scale_plan", scale_plan),
    "whole": ("vectors_rd", whole),
    "peers": ("vectors_rd", peers),
    "heldout": ("vectors_rd", heldout),
    "objectives": ("vectors_rd", objectives),
    "chain": ("ablation", chain),
    "polar": ("ablation", polar),
    "speed": ("vectors_speed", speed),
    "growth": ("vectors_speed", growth),
    "scaling": ("vectors_speed", scaling),
    "kmeans": ("vectors_speed", kmeans),
    "streaming": ("streaming", streaming),
    "sample_sizes": ("streaming", sample_sizes),
    "lossless": ("lossless", lossless),
    "baselines": ("baselines", baselines),
    "fsq": ("baselines", fsq),
    "rq_kmeans": ("rq_kmeans", rq_kmeans),
    "search": ("search", search),
    "images": ("kodak", images),
    "band_rates": ("bands", band_rates),
    "image_parts": ("image_ablation", image_parts),
}


def made(name: str) -> str:
    """The table of that name from the results it is made of."""
    file, function = TABLES[name]
    return function(json.loads((RESULTS / f"{file}.json").read_text("utf-8")))


def main() -> int:
    """Write the tables, or compare them."""
    stale = []
    for page in PAGES:
        text = page.read_text("utf-8")
        fresh = MARKERS.sub(lambda m: m[1] + made(m[2]) + m[3], text)
        if fresh != text:
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(fresh, "utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"{', '.join(stale)}: run benchmarks/doc_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
