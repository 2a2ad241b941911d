"""Finite scalar quantization: no codebook, and what its levels and its temperature do.

Mentzer et al. ("Finite scalar quantization: VQ-VAE made simple", 2023) bound each number of a short
latent with a tanh and round it to one of L levels:

    b = (L - 1) / 2 tanh(z)  (shifted by half a step for even L),   q = round(b) / floor(L / 2)

The grid of all level combinations is the codebook. Nothing has to be learned for it, so nothing can
die; a linear layer before it can shape cells as it likes.

A variant lets a temperature T fall while training, b = floor(L / 2) tanh(z / T) and q = T round(b
/ T): soft and coarse at first, sharp and fine in the end. Steps are T wide, so the number of levels
*grows* as T falls: the annealed model spends more bits, and a fair comparison is at equal bits. The
last panel makes it, for a small network on 8 x 8 patches. More levels, less error. Two FSQ after
each other, weighted by learned importance, pay for their second half of the bits. Annealed as it
is written above, the tanh saturates as T falls, unless the network shrinks its z along: with many
levels hardly more than signs are left, fewer bits and a larger error. It is here to be seen.

    python docs/tutorials/fsq.py
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from pictures import arguments, pictures, psnr

from polarpack import nn


class PatchNet(torch.nn.Module):
    """8 x 8 patches through a latent of 8 numbers: 192 -> 96 -> 8 -> quantized -> 96 -> 192."""

    def __init__(self, quantizer: torch.nn.Module) -> None:
        super().__init__()
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        self.encode = torch.nn.Sequential(linear(192, 96), relu(), linear(96, 8))
        self.quantizer = quantizer
        self.decode = torch.nn.Sequential(linear(8, 96), relu(), linear(96, 192))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (n, 192) restored, and the quantizer's loss."""
        quantized, _, loss = self.quantizer(self.encode(x))
        return self.decode(quantized), loss


def patches(x: torch.Tensor) -> torch.Tensor:
    """(n, 3, 32, 32) -> (16 n, 192)."""
    x = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)
    return x.reshape(-1, 192)


def train(model: PatchNet, data: torch.Tensor, steps: int) -> None:
    """Adam, with the temperature following the steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        if isinstance(model.quantizer, nn.AnnealedFSQ):
            model.quantizer.set_progress(step / steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = data[torch.randint(len(data), (256,))]
        restored, loss = model(x)
        optimizer.zero_grad()
        ((restored - x).square().mean() + 0.001 * loss).backward()
        optimizer.step()


def main() -> None:
    """Draw staircases, temperatures, and the ablation of levels."""
    args = arguments(__doc__)
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    stairs, cold, ablation = figure.subplots(1, 3)
    z = torch.linspace(-3, 3, 600)[:, None]
    for levels, colour in ((3, "#4477aa"), (5, "#ee6677"), (8, "#228833")):
        stairs.plot(z, nn.FSQ([levels])(z)[0], color=colour, label=f"L = {levels}")
    stairs.set(xlabel="z", ylabel="quantized", title="FSQ: levels")
    stairs.legend(fontsize=8)
    annealed = nn.AnnealedFSQ([5])
    for progress, colour in ((0.0, "#4477aa"), (0.5, "#ee6677"), (1.0, "#228833")):
        annealed.set_progress(progress)
        label = f"T = {float(annealed.temperature):.2f}: {annealed.alphabet_sizes[0]} levels"
        cold.plot(z, annealed(z)[0].detach(), color=colour, label=label, linewidth=1)
    cold.set(xlabel="z", title="annealed, L = 5")
    cold.legend(fontsize=8)

    data, test = (patches(pictures(n, seed=i)) for i, n in enumerate((1024, 256)))
    steps = 30 if args.fast else 2000
    kinds = {
        "FSQ": (lambda n: nn.FSQ(n, 8), "#4477aa"),
        "annealed": (lambda n: nn.AnnealedFSQ(n, 8), "#ee6677"),
        "hierarchical (2)": (lambda n: nn.HierarchicalFSQ(n, 8, 2), "#228833"),
    }
    for kind, (make, colour) in kinds.items():
        points = []
        for levels in [3, 8] if args.fast else [3, 5, 8, 10]:
            torch.manual_seed(0)
            model = PatchNet(make(levels))
            train(model, data, steps)
            if isinstance(model.quantizer, nn.AnnealedFSQ):
                model.quantizer.set_progress(1.0)
            nn.reset_usage(model)  # counted in training mode: once more over new patches
            with torch.no_grad():
                mse = float((model(test)[0] - test).square().mean())
            points.append((nn.usage(model).bits, psnr(mse), levels))
            print(f"{kind} {levels}: {points[-1][1]:.2f} dB, {points[-1][0]:.0f} bits")
        bits, quality, names = np.array(points).T
        ablation.plot(bits, quality, "o-", color=colour, label=kind, markersize=4)
        for b, q, n in zip(bits, quality, names, strict=True):
            offset = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7}
            ablation.annotate(f"{n:.0f}", (b, q), **offset)
    ablation.set(xlabel="bits a patch (entropy)", ylabel="PSNR, dB", title="8 numbers of L levels")
    ablation.legend(fontsize=8)
    figure.savefig(args.out / "fsq.png", dpi=100)


if __name__ == "__main__":
    main()
