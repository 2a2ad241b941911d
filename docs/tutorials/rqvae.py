"""RQ-VAE against VQ-VAE, level by level.

One codebook of K codewords gives log2 K bits a position; for twice the bits it needs K^2 of them,
more than can be learned. A residual quantizer spends the bits in levels, each quantizing what the
levels before have left (Lee et al., "Autoregressive image generation using residual quantization",
CVPR 2022):

    r_1 = E(x),   r_(s+1) = r_s - e_s(r_s),   z_hat = e_1 + e_2 + ...

S levels of K codewords make K^S combinations out of S K stored ones. The price: sums of codewords
fill space less well than free ones would. Any prefix is a coarser picture. The figure compares the
levels of one RQ-VAE with VQ-VAEs that have the bits of one and of two levels in one codebook.

    python docs/tutorials/rqvae.py
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from pictures import arguments, pictures, psnr, shown

from polarpack_image.baselines import RQVAE, VQVAE

NET = {"embedding_dim": 16, "hidden_dims": [32, 48], "patch": 32}


def train(model: torch.nn.Module, data: torch.Tensor, steps: int) -> None:
    """Adam on the model's own loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        if step == steps * 2 // 3:
            optimizer.param_groups[0]["lr"] /= 4
        loss, _ = model.loss(data[torch.randint(len(data), (32,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def main() -> None:
    """Train one RQ-VAE and two VQ-VAEs; compare at equal bits."""
    args = arguments(__doc__)
    data, test = pictures(256 if args.fast else 2048), pictures(128, seed=1)
    steps = 12 if args.fast else 500
    rq = RQVAE(**NET, num_embeddings=32, num_quantizers=4)
    train(rq, data, steps)
    levels = rq.analyze_quantization_levels(test)
    single = {}
    for size in [32, 1024]:
        vq = VQVAE(**NET, num_embeddings=size)
        train(vq, data, steps)
        with torch.no_grad():
            error = (vq(test)["reconstructed"] - test).square().mean()
        single[size] = psnr(float(error))

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bits = [5 * (i + 1) for i in range(4)]
    left.plot(bits, levels["psnr"], "o-", color="#4477aa", label="RQ-VAE, 4 levels of 32")
    left.plot(
        [math.log2(k) for k in single], list(single.values()), "s", color="#ee6677",
        label="VQ-VAE, one codebook"
    )  # fmt: skip
    left.set(xlabel="bits a position", ylabel="PSNR, dB", title="pictures", xticks=bits)
    left.legend(fontsize=8)
    middle.semilogy(range(1, 5), levels["latent_mse"], "o-", color="#4477aa")
    middle.set(xlabel="level", title="error of the latent", xticks=range(1, 5))
    right.bar(range(1, 5), levels["perplexity"], color="#4477aa")
    right.axhline(32, color="#777777", linestyle=":")
    right.set(xlabel="level", title="perplexity (of 32)", xticks=range(1, 5))
    figure.savefig(args.out / "rqvae_levels.png", dpi=100)

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots(5, 8)
    with torch.no_grad():
        codes = rq.get_codes(test[:8])
        rows = [test[:8], *(rq.decode_from_codes(codes[:n]) for n in range(1, 5))]
    for line, row in zip(axes, rows, strict=True):
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(shown(picture))
            axis.set(xticks=[], yticks=[])
    names = ["picture", *(f"{n} levels" for n in range(1, 5))]
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    figure.savefig(args.out / "rqvae_pictures.png", dpi=100)
    print("RQ-VAE", [round(p, 2) for p in levels["psnr"]], "VQ-VAE", single)


if __name__ == "__main__":
    main()
