"""Polar against Cartesian: what quantizing radius and direction apart is good for.

A vector is a length and a direction, x = r d. A quantizer of x as it is (Cartesian) keeps the
squared error small, and large vectors decide that. Coding r in steps of its logarithm and d on the
unit sphere makes the *relative* error the same for all:

    |x - r_hat d_hat| ~ r (|log r - log r_hat| + |d - d_hat|)

which is what cosine similarity asks for. The figure quantizes points of the plane whose lengths
vary a hundredfold, and rows of 16 numbers, with the same number of bits both ways. Cartesian
codewords spread over the large vectors; polar ones lie on rings, as many for the small.

On the sphere itself (second figure) the same shows with the radius left out: k-means codewords are
means, and the mean of unit vectors is shorter than 1, the more so the larger the cell. A spherical
codebook keeps them on the sphere and chooses by angle. Means have the smaller squared error;
codewords of norm 1 lose nothing in angle, and do not shrink what is decoded.

The price of polar codes is squared error. ``polarpack`` therefore codes polar where a cosine or
relative-error target asks for it, and plain otherwise (docs/architecture.md, "Polar where it
pays").

    python docs/tutorials/polar.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pictures import arguments
from torch.nn.functional import cosine_similarity, normalize

from polarpack import nn


def vectors(n: int, d: int, seed: int) -> torch.Tensor:
    """(n, d): directions, some preferred; lengths from 0.1 to 10, evenly in the logarithm."""
    g = torch.Generator().manual_seed(seed)
    skew = torch.linspace(2, 1, d)
    directions = normalize(torch.randn(n, d, generator=g) * skew, dim=1)
    return directions * 10 ** (2 * torch.rand(n, 1, generator=g) - 1)


def trained(module: torch.nn.Module, d: int, steps: int) -> torch.nn.Module:
    """The module after some batches."""
    for step in range(steps):
        module(vectors(4096, d, step))
    return module.eval()


def draw_sphere(out: Path, steps: int) -> None:
    """Plain and spherical codebooks of unit vectors in three dimensions."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    x = normalize(vectors(6000, 3, 999), dim=1)
    sizes = [4, 16, 64]
    errors: dict[str, list[list[float]]] = {}
    for place, cosine in ((1, False), (2, True)):
        name = "spherical" if cosine else "Cartesian"
        for size in sizes:
            torch.manual_seed(0)
            vq = nn.VectorQuantizer(size, 3, decay=0.9, initialisation="kmeans", cosine=cosine)
            for step in range(steps):
                vq(normalize(vectors(2048, 3, step), dim=1))
            y = vq.eval()(x)[0]
            norm = float(vq.embedding.norm(dim=1).mean())
            angle = float(torch.rad2deg(cosine_similarity(x, y).clamp(-1, 1).acos()).mean())
            errors.setdefault(name, []).append([norm, angle, float((x - y).square().sum(1).mean())])
            print(f"{name} {size}: norm {norm:.3f}, {angle:.2f} degrees")
            if size == 16:
                axis = figure.add_subplot(1, 4, place, projection="3d")
                axis.scatter(*x[:800].T, s=1, color="#cccccc")
                axis.scatter(*vq.embedding.T, s=18, color="#4477aa" if cosine else "#ee6677")
                axis.set(title=f"{name}: 16 codewords", xticks=[], yticks=[], zticks=[])
                axis.set_box_aspect((1, 1, 1))
    norms, angles = figure.add_subplot(1, 4, 3), figure.add_subplot(1, 4, 4)
    styles = (("o-", "#ee6677"), ("s--", "#4477aa"))  # dashed: the angles lie on one another
    for (name, rows), (style, colour) in zip(errors.items(), styles, strict=True):
        norm, angle, _ = np.array(rows).T
        norms.semilogx(sizes, norm, style, color=colour, base=2, label=name)
        angles.semilogx(sizes, angle, style, color=colour, base=2, label=name)
    norms.set(xlabel="codewords", title="mean norm of a codeword", ylim=(0.4, 1.05))
    norms.legend(fontsize=8)
    angles.legend(fontsize=8)
    angles.set(xlabel="codewords", title="mean angle, degrees", ylim=(0, 40))
    figure.savefig(out / "polar_sphere.png", dpi=100)


def main() -> None:
    """Draw both codebooks in the plane, errors by length in 16 dimensions, and the sphere."""
    args = arguments(__doc__)
    steps = 20 if args.fast else 300
    options = {"initialisation": "kmeans", "revive_below": 0.5, "decay": 0.9}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    flat, rings, relative, cosine = figure.subplots(1, 4)

    torch.manual_seed(0)
    x = vectors(3000, 2, 999)
    cartesian = trained(nn.VectorQuantizer(128, 2, **options), 2, steps)
    polar = trained(nn.PolarVQ(2, 16, 1, 1, radius_levels=8, **options), 2, steps)
    for axis, points, name in (
        (flat, cartesian.embedding, "Cartesian: 128 codewords"),
        (rings, torch.unique(polar(x)[0], dim=0), "polar: 8 radii x 16 directions"),
    ):
        axis.plot(*x.T, ".", markersize=1, color="#cccccc")
        axis.plot(*points.detach().T, "o", markersize=3, color="#4477aa")
        axis.set(xlim=(-10.5, 10.5), ylim=(-10.5, 10.5), aspect="equal", title=name)

    d, test = 16, vectors(8000, 16, 999)
    makers = {
        "Cartesian, 4 x 256": nn.ResidualVQ(d, 256, 4, **options),
        "polar, 16 radii, 2 heads x 2 x 128": nn.PolarVQ(d, 128, 2, 2, **options),
    }
    order = test.norm(dim=1).argsort()
    lengths = test.norm(dim=1)[order].view(40, -1).mean(1)
    for (name, module), colour in zip(makers.items(), ("#ee6677", "#4477aa"), strict=True):
        torch.manual_seed(0)
        restored = trained(module, d, steps)(test)[0].detach()
        error = (restored - test).norm(dim=1) / test.norm(dim=1)
        angle = cosine_similarity(restored, test)
        bits = sum(np.log2(n) for n in module.alphabet_sizes)
        relative.loglog(lengths, error[order].view(40, -1).mean(1), color=colour, label=name)
        cosine.semilogx(lengths, angle[order].view(40, -1).mean(1), color=colour)
        snr = 10 * torch.log10(test.square().sum() / (restored - test).square().sum())
        print(f"{name}: {bits:.0f} bits, SNR {snr:.2f} dB, mean cosine {angle.mean():.4f}")
    relative.set(xlabel="length of the row", title="relative error, 16 dimensions, 32 bits")
    relative.legend(fontsize=7)
    cosine.set(xlabel="length of the row", title="cosine to the original")
    figure.savefig(args.out / "polar.png", dpi=100)
    draw_sphere(args.out, steps // 2)


if __name__ == "__main__":
    main()
