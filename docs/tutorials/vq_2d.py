"""Vector quantization in the plane: what a codebook is, how it is learned, how it dies.

Vector quantization replaces a vector x by the nearest of K codewords:

    q(x) = e_k,   k = argmin_j |x - e_j|^2

The plane falls into the codewords' Voronoi cells, and sending x costs log2 K bits, or the entropy
of k, which is less where cells are used unevenly. Two conditions hold at the best codebook
(Lloyd, "Least squares quantization in PCM", 1957/1982): every vector goes to its nearest codeword,
and every codeword is the mean of its vectors. k-means alternates between the two. A network's
latent moves while it trains, so ``polarpack.nn.VectorQuantizer`` keeps running means of both sums:

    n_k <- decay n_k + (1 - decay) (how many vectors of this batch went to k)
    m_k <- decay m_k + (1 - decay) (their sum),       e_k = m_k / n_k

A codeword that no vector is nearest to gets nothing to follow: it is dead, and stays so. That is
the usual trouble of VQ. Cures: begin at k-means of a first batch, and revive: put a codeword that
falls out of use onto a random vector. The first figure shows all three; the second, what more
codewords buy: with K^(-2/d) (Zador 1982) the error falls by 6.02 / d dB a bit, 3.01 in the plane.

    python docs/tutorials/vq_2d.py
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from pictures import arguments

from polarpack import nn


def moons(n: int, seed: int) -> torch.Tensor:
    """(n, 2): two arcs and a round cloud, a distribution that no grid fits."""
    rng = np.random.default_rng(seed)
    t, which = rng.uniform(0, np.pi, n), rng.integers(3, size=n)
    arcs = np.stack([np.cos(t), np.sin(t)], axis=1)
    x = np.where((which == 1)[:, None], arcs * [1, -1] + [1.0, 0.4], arcs)
    x = np.where((which == 2)[:, None], rng.normal([0.5, -1.2], 0.25, (n, 2)), x)
    return torch.from_numpy(x + rng.normal(0, 0.09, (n, 2))).float()


def draw_cells(axis, vq: nn.VectorQuantizer, x: torch.Tensor) -> None:
    """Voronoi cells by asking for the code of every point of a fine grid."""
    low, high = x.min(0).values - 0.25, x.max(0).values + 0.25
    u, v = torch.linspace(low[0], high[0], 300), torch.linspace(low[1], high[1], 300)
    grid = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)
    cells = vq.encode(grid).numpy()
    edges = np.zeros_like(cells, bool)
    edges[1:] |= cells[1:] != cells[:-1]
    edges[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    axis.plot(*x[:1500].T, ".", markersize=1.5, color="#bbbbbb", zorder=0)
    axis.imshow(np.where(edges, 1.0, np.nan), extent=extent, origin="lower", cmap="gray", alpha=0.6)
    words = vq.embedding.numpy()
    used = np.isin(np.arange(len(words)), vq.encode(x).numpy())
    axis.plot(*words[used].T, "o", markersize=4, color="#4477aa")
    axis.plot(*words[~used].T, "x", markersize=5, color="#ee6677")
    axis.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])


def main() -> None:
    """Draw both figures."""
    args = arguments(__doc__)
    test, steps = moons(4000, 99), 30 if args.fast else 200
    starts = {
        "uniform start": {"initialisation": "uniform"},
        "uniform start, revival": {"initialisation": "uniform", "revive_below": 1.0},
        "k-means start": {"initialisation": "kmeans"},
    }
    moments = [1, steps // 10, steps]
    figure = Figure(figsize=(9, 8.4), layout="constrained")
    axes = figure.subplots(3, 3)
    for row, (name, options) in zip(axes, starts.items(), strict=True):
        torch.manual_seed(0)
        vq = nn.VectorQuantizer(32, 2, decay=0.9, **options)
        for step in range(1, steps + 1):
            vq.train()(moons(512, step))
            if step in moments:
                axis = row[moments.index(step)]
                vq.eval()
                quantized, _, perplexity = vq(test)
                draw_cells(axis, vq, test)
                error = float((quantized - test).square().sum(1).mean())
                axis.set_title(
                    f"{name}, step {step}\nerror {error:.4f}, perplexity {perplexity:.1f} of 32",
                    fontsize=9,
                )
    figure.savefig(args.out / "vq_2d_evolution.png", dpi=100)

    sizes = [4, 16, 64] if args.fast else [2, 4, 8, 16, 32, 64, 128, 256]
    errors, entropies = [], []
    for size in sizes:
        torch.manual_seed(0)
        vq = nn.VectorQuantizer(size, 2, decay=0.9, initialisation="kmeans", revive_below=0.2)
        for step in range(steps):
            vq(moons(1024, step))
        quantized, _, perplexity = vq.eval()(test)
        errors.append(float((quantized - test).square().sum(1).mean()))
        entropies.append(float(torch.log2(perplexity)))
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(np.log2(sizes), 10 * np.log10(errors), "o-", label="bits = log2 K", color="#4477aa")
    axis.plot(entropies, 10 * np.log10(errors), "s--", label="bits = entropy", color="#228833")
    ideal = 10 * np.log10(errors[-1]) + 3.01 * (np.log2(sizes[-1]) - np.log2(sizes))
    axis.plot(np.log2(sizes), ideal, ":", color="#777777", label="3.01 dB a bit")
    axis.set(xlabel="bits a vector", ylabel="error, dB", title="Codebook size")
    axis.legend()
    figure.savefig(args.out / "vq_2d_sizes.png", dpi=100)
    print("codewords", sizes, "error", [round(e, 4) for e in errors])


if __name__ == "__main__":
    main()
