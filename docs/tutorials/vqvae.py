"""A VQ-VAE: pictures as small maps of codes.

An encoder E turns a picture into a map of vectors, each is replaced by its nearest codeword, and a
decoder D paints from these (van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation
learning", 2017). Choosing the nearest has no gradient, so the loss has three parts:

    |x - D(q(E(x)))|^2       the picture; its gradient jumps over q (straight-through)
    |sg[E(x)] - e|^2         codewords follow the encoder (here: by running means, no gradient)
    beta |E(x) - sg[e]|^2    the encoder keeps near codewords (commitment)

sg[.] is "treat as constant". Without the last the encoder may grow away from its codewords for
ever; with too much of it, it dares nothing.

The codes are what would be stored: here 8 x 8 codes of log2 64 = 6 bits for 32 x 32 x 3 bytes, 64
times fewer. The second row of the figure shows them as a map: equal colours are equal codes. The
perplexity begins high, at the k-means of the first batch; the encoder soon leaves that behind; near
step 100 codewords that fell out of use are put onto vectors of the batch, and all are used again.

    python docs/tutorials/vqvae.py
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from pictures import arguments, pictures, psnr, shown

from polarpack.nn import usage
from polarpack_image.baselines import VQVAE


def main() -> None:
    """Train, then draw code maps and curves."""
    args = arguments(__doc__)
    model = VQVAE(embedding_dim=16, num_embeddings=64, hidden_dims=[32, 48], patch=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    train, test = pictures(256 if args.fast else 2048), pictures(64, seed=1)
    steps = 20 if args.fast else 600
    errors, perplexities = [], []
    for step in range(steps):
        x = train[torch.randint(len(train), (32,))]
        out = model(x)
        error = (out["reconstructed"] - x).square().mean()
        optimizer.zero_grad()
        (error + 0.1 * out["vq_loss"]).backward()
        optimizer.step()
        errors.append(float(error.detach()))
        perplexities.append(float(out["perplexity"]))
        if step == steps // 2:
            optimizer.param_groups[0]["lr"] /= 4
    model.eval()
    with torch.no_grad():
        codes = model.encode_to_indices(test)
        restored = model.decode_from_indices(codes)
    mse = float((restored - test).square().mean())

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(3, 8)
    for i in range(8):
        axes[0, i].imshow(shown(test[i]))
        axes[1, i].imshow(codes[i].numpy(), cmap="nipy_spectral", vmin=0, vmax=63)
        axes[2, i].imshow(shown(restored[i]))
    for axis, name in zip(axes[:, 0], ("picture", "8 x 8 codes", "decoded"), strict=True):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"held-out pictures, {psnr(mse):.1f} dB from 384 bits each")
    figure.savefig(args.out / "vqvae_codes.png", dpi=100)

    figure = Figure(figsize=(10, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.semilogy(errors, color="#4477aa")
    left.set(title="mean squared error", xlabel="step")
    middle.plot(perplexities, color="#4477aa")
    middle.axhline(64, color="#777777", linestyle=":")
    middle.set(title="perplexity (of 64)", xlabel="step", ylim=(0, 68))
    report = usage(model.quantizer).codebooks[0]
    right.bar(range(64), sorted(report.histogram, reverse=True), color="#4477aa")
    right.set(title=f"uses in training, {report.n_dead} never", xlabel="codeword, by use")
    figure.savefig(args.out / "vqvae_training.png", dpi=100)
    print(f"{psnr(mse):.2f} dB, perplexity {report.perplexity:.1f}")


if __name__ == "__main__":
    main()
