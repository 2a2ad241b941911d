"""Residual k-means on data sets of different shapes: error by stage, and what the settings do.

Without a network, residual quantization is k-means repeated on what is left. ``RQKMeans`` is a
scikit-learn transformer: ``transform`` quantizes, ``get_codes`` has one array of codes a stage.

How much a stage gains depends on the data. Clusters: the first stage finds them and gains much; the
rest is noise. White noise: every stage gains the same little, at most 6.02 log2(K) / d dB (Shannon:
6.02 dB for each bit a number), and less for finite K. Correlated data lies between.

    python docs/tutorials/rq_kmeans.py
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from pictures import arguments

from polarpack import _glove
from polarpack.integrations.sklearn import RQKMeans


def data_sets(n: int) -> dict[str, np.ndarray]:
    """Tables (n, 16 or 50) of different structure."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 3, (40, 16))
    line = rng.normal(0, 1, (n, 16)) @ np.diag(0.7 ** np.arange(16))
    _, glove = _glove.load()
    return {
        "40 clusters": centres[rng.integers(40, size=n)] + rng.normal(0, 0.7, (n, 16)),
        "white noise": rng.normal(0, 1, (n, 16)),
        "steep spectrum": line,
        "word vectors (d = 50)": glove[:n].astype(float),
    }


def main() -> None:
    """Draw error by stage and the sensitivity to both sizes."""
    args = arguments(__doc__)
    tables = data_sets(1500 if args.fast else 8000)
    stages = 3 if args.fast else 8
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    by_stage, by_size, usage = figure.subplots(1, 3)
    for name, x in tables.items():
        train, test = x[::2], x[1::2]
        rq = RQKMeans(n_clusters=32, n_stages=stages, random_state=0).fit(train)
        for rows, style in ((train, "-"), (test, "--")):
            report = rq.analyze_quantization_quality(rows)
            energy = rows.var(axis=0).mean()
            gain = 10 * np.log10(np.array([energy, *report["mse_by_stage"]]) / energy)
            label = name if style == "-" else None
            colour = ["#4477aa", "#ee6677", "#228833", "#aa3377"][list(tables).index(name)]
            by_stage.plot(range(stages + 1), gain, style, color=colour, label=label)
        usage.plot(range(1, stages + 1), report["perplexity"], "--", color=colour)
        print(f"{name:24s} {report['snr_db']:.2f} dB at {report['bits_per_vector']} bits a row")
    by_stage.set(xlabel="stages of 32", ylabel="error, dB", title="training (-) and new (--) rows")
    by_stage.legend(fontsize=7)
    usage.axhline(32, color="#777777", linestyle=":")
    usage.set(xlabel="stage", title="perplexity on new rows", ylim=(0, 34))

    x = tables["word vectors (d = 50)"]
    for size in [8, 32] if args.fast else [4, 16, 64, 256]:
        rq = RQKMeans(n_clusters=size, n_stages=4, random_state=0).fit(x[::2])
        report = rq.analyze_quantization_quality(x[1::2])
        energy = x[1::2].var(axis=0).mean()
        gain = 10 * np.log10(np.array(report["mse_by_stage"]) / energy)
        bits = np.log2(size) * np.arange(1, 5)
        by_size.plot(bits, gain, "o-", label=f"stages of {size}", markersize=4)
    by_size.set(xlabel="bits a row", ylabel="error, dB", title="word vectors, new rows")
    by_size.legend(fontsize=7)
    figure.savefig(args.out / "rq_kmeans.png", dpi=100)


if __name__ == "__main__":
    main()
