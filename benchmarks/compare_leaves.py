"""The built-in images beside real ones: statistics, a picture, and what a network trained on either is worth.

    python -m benchmarks.compare_leaves --dataset cifar10                             statistics of both, side by side
    python -m benchmarks.compare_leaves --dataset cifar10 --weights model/unet32_e0.pth   and its loss on the real images

Run from the root of the repository. Writes model/res/leaves.png: real images on the left, leaves on the right.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
import config
import data
import train


def statistics(images):
    """Names and values: colours on the scale 0 ... 1, and the slope of the power spectrum of the brightness."""
    x = images.double() / 255
    pixels = x.transpose(0, 1).flatten(1)  # (3, N * 32 * 32)
    correlation = torch.corrcoef(pixels)
    rows = {f"mean, {name}": pixels[i].mean() for i, name in enumerate(("red", "green", "blue"))}
    rows |= {f"standard deviation, {name}": pixels[i].std() for i, name in enumerate(("red", "green", "blue"))}
    rows["standard deviation within an image"] = x.flatten(2).std(2).mean()
    rows |= {
        "correlation red, green": correlation[0, 1],
        "correlation green, blue": correlation[1, 2],
        "correlation red, blue": correlation[0, 2],
        "slope of the power spectrum": spectrum_slope(x.mean(1)),
    }
    return {name: float(value) for name, value in rows.items()}


def spectrum_slope(grey):
    """Slope of log power against log radial frequency from 2 to 15 cycles an image; grey (N, 32, 32)."""
    window = torch.hann_window(32, periodic=False, dtype=grey.dtype)  # the edges of an image are no edges in it
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(grey).abs().square().mean(0)
    frequency = torch.fft.fftfreq(32, 1 / 32, dtype=grey.dtype)
    radius = torch.hypot(frequency[:, None], frequency).round()
    radii = torch.arange(2, 16)
    radial = torch.stack([power[radius == r].mean() for r in radii])
    return np.polyfit(radii.log().numpy(), radial.log().numpy(), 1)[0]


def picture(sides, path):
    """Save 10 x 10 images of each side, or as large a square as there are images for."""
    n = min(10, *(math.isqrt(len(side)) for side in sides))
    blocks = [side[: n * n].view(n, n, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(32 * n, 32 * n, 3) for side in sides]
    gap = torch.full((32 * n, 16, 3), 255, dtype=torch.uint8)
    both = Image.fromarray(torch.cat([blocks[0], gap, blocks[1]], 1).numpy())
    checkpoint.write_atomically(path, lambda file: both.save(file, format="png"))


def main():
    cfg = config.parse(__doc__, "dataset data_dir weights out_dir device precision")
    real, source = data.load("test", cfg.dataset, cfg.data_dir)
    made, _ = data.load("test", "leaves")
    print(f"{'':36}{'real':>10}{'leaves':>10}    real: {source}")
    for (name, a), b in zip(statistics(real).items(), statistics(made).values()):
        print(f"{name:36}{a:10.3f}{b:10.3f}")
    path = Path(cfg.out_dir) / "res" / "leaves.png"
    choice = torch.randperm(len(real), generator=data.generator("cpu", 0, data.CHOICE, 2))
    picture((real[choice], made), path)
    print(f"figure saved: {path}")
    if cfg.weights:
        device = config.pick_device(cfg.device)
        precision = config.pick_precision(cfg.precision, device)
        model, trained = checkpoint.load_model(cfg.weights, device)
        for name, images in (("real", real), ("leaves", made)):
            loss = train.held_out_loss(
                model, images.to(device), trained["noise_steps"], precision, train.World(0, 1, 0, device)
            )
            print(f"held-out loss of {cfg.weights} (trained on {trained['dataset']}) on {name} images: {loss:.4f}")


if __name__ == "__main__":
    config.run(main, data.DataError, checkpoint.CheckpointError)
