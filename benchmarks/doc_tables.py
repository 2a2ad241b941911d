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
PAGES = (ROOT / "README.md", ROOT / "docs" / "architecture.md")
MARKERS = re.compile(
    r"(<!-- table (\w+): benchmarks/doc_tables\.py -->\n).*?(<!-- end -->)", re.DOTALL
)
WHAT = {
    "sentences": "sentence embeddings",
    "tokens": "token embeddings",
    "weights": "weight matrices",
    "glove": "GloVe",
    "glove_excerpt": "GloVe excerpt (ships)",
    "sift": "SIFT",
    "gaussian": "independent Gaussian",
}
PAIR = ("pp.compress", "faiss PQ")
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
    """README: equal total bytes, polarpack / faiss PQ."""
    found, rates = pick(results, "whole"), (0.5, 1.0, 2.0, 4.0)
    rows, behind, cells = [], [], 0
    for name in names(results):
        if any((name, codec, rate) not in found for codec in PAIR for rate in rates):
            continue
        n, d = results["data"][name]["shape"]
        row = [f"{WHAT[name]}, {n} x {d}"]
        for rate in rates:
            ours, peer = (found[name, codec, rate]["snr_db"] for codec in PAIR)
            better, worse = f"**{ours:.1f}** / {peer:.1f}", f"{ours:.1f} / **{peer:.1f}**"
            row.append(better if ours >= peer else worse)
            cells += 1
            if ours < peer:
                behind.append(
                    f"{WHAT[name]} at {rate:g} bit{'s' * (rate > 1)} ({ours - peer:+.2f} dB)"
                )
        ours, peer = (found[name, codec, 2.0]["recall10"] for codec in PAIR)
        rows.append([*row, f"{ours:.3f} / {peer:.3f}"])
    head = ["table", *(f"{rate:g} bit{'s' * (rate > 1)}" for rate in rates), "recall@10 at 2 bits"]
    verdict = f"polarpack is ahead in {cells - len(behind)} of the {cells} figures of SNR"
    verdict += f"; it is behind on {', '.join(behind)}." if behind else "."
    faiss = results["versions"]["faiss-cpu"]
    made = f"Measured {results['when'][:10]} on {results['cpu']} with faiss {faiss}."
    return f"{markdown(head, rows)}\n\n{verdict} {made}\n"


def chain(results: Results) -> str:
    """Architecture: what each link of the chain is worth on held-out rows, at 1 and 2 bits."""
    found = pick(results, "heldout")
    links = {
        "faiss PQ": "faiss PQ, for comparison",
        "chain random rotation": "trellis (32 states) behind a random rotation",
        "chain native order": "the same in the native order",
        "chain KLT, 4 states": "the same behind a KLT, 4 states",
        "chain KLT, 8 states": "8 states",
        "chain KLT": "32 states",
        "chain KLT, 64 states": "64 states",
        "pp.fit": "what the planner chose (often a KLT for each class)",
    }
    rows = []
    for codec, words in links.items():
        lines = [[found.get((name, codec, rate)) for rate in (1.0, 2.0)] for name in names(results)]
        cells = [" / ".join(f"{r['snr_db']:.2f}" if r else "-" for r in pair) for pair in lines]
        rows.append([words, *cells])
    bounds = []
    for name in names(results):
        data = results["data"][name]
        bound = dict(zip(data["bound_rates"], data["bound_db"], strict=True))
        bounds.append(f"{bound[1.0]:.2f} / {bound[2.0]:.2f}")
    rows.append(["Gaussian bound of one KLT", *bounds])
    head = ["SNR in dB at 1 / 2 code bits", *(WHAT[name] for name in names(results))]
    return markdown(head, rows) + "\n"


def polar(results: Results) -> str:
    """Architecture: raw rows against radius and direction, at 1 bit."""
    found = pick(results, "heldout")
    rows = []
    for name in names(results):
        raw, with_radius = (found.get((name, f"chain KLT{kind}", 1.0)) for kind in ("", ", polar"))
        if not raw or not with_radius:
            continue
        pairs = [(r[figure], f) for figure, f in FIGURES.items() for r in (raw, with_radius)]
        rows.append([WHAT[name], *(f"{value:{f}}" for value, f in pairs)])
    titles = ("SNR, dB", "mean cosine", "1st percentile", "recall@10")
    head = ["at 1 code bit", *(word for title in titles for word in (f"{title}: raw", "polar"))]
    return markdown(head, rows) + "\n"


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


TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "whole": ("vectors_rd", whole),
    "chain": ("vectors_rd", chain),
    "polar": ("vectors_rd", polar),
    "lossless": ("lossless", lossless),
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
