"""denoise.py beside BM3D on photographs: noise of sigma 25 added, rounded to 8 bits and clipped as in a picture file.

    pip install -r requirements-bench.txt
    python -m benchmarks.photographs

Run from the root of the repository. The photographs are those that scikit-image installs. Both are told sigma; the
last column is the network's with sigma estimated. Writes model/res/photographs.png, a detail of each.
"""

from pathlib import Path

import numpy as np
import torch

import checkpoint
import classical
import config
import data
import denoise
import diffusion
import visualize

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIGMA = 25  # on the 0-255 scale
DETAIL = 160  # pixels


def to_x(pixels):
    """uint8 (3, H, W) as (1, 3, H, W) in [-1, 1]."""
    return data.scale(torch.from_numpy(np.ascontiguousarray(pixels))[None])


def main():
    cfg = config.parse(__doc__, "weights out_dir device precision")
    try:
        from skimage import data as photographs
    except ImportError:
        raise config.ConfigError("scikit-image is missing; pip install -r requirements-bench.txt") from None
    bm3d = classical.methods().get("BM3D", [None])[0]
    if not bm3d:
        raise config.ConfigError("bm3d is missing; pip install -r requirements-bench.txt")
    device = config.pick_device(cfg.device)
    precision = config.pick_precision(cfg.precision, device)
    weights = checkpoint.choose(cfg.weights, cfg.out_dir)
    model, trained = checkpoint.load_model(weights, device)
    print(f"weights: {weights}")
    print(
        f"{'PSNR, dB':12}{'noisy':>8}{'BM3D':>8}{'network':>9}{'difference':>12}{'sigma estimated':>17}{'network':>9}"
    )

    columns = []
    for i, name in enumerate(PHOTOGRAPHS):
        clean = getattr(photographs, name)().transpose(2, 0, 1)
        noise = np.random.default_rng(i).normal(0, SIGMA, clean.shape)
        noisy = (clean + noise).round().clip(0, 255).astype(np.uint8)
        with torch.inference_mode(), config.autocast(device, precision):
            told, _ = denoise.denoise(model, noisy, trained["noise_steps"], SIGMA / 127.5, device=device)
            blind, sigma = denoise.denoise(model, noisy, trained["noise_steps"], device=device)
        x0, x_bm3d = to_x(clean), bm3d(to_x(noisy), SIGMA / 127.5)
        estimates = [to_x(noisy), x_bm3d, to_x(told), to_x(blind)]
        psnr = [diffusion.psnr(x, x0).item() for x in estimates]
        print(
            f"{name:12}{psnr[0]:8.2f}{psnr[1]:8.2f}{psnr[2]:9.2f}{psnr[2] - psnr[1]:+12.2f}{127.5 * sigma:17.1f}"
            f"{psnr[3]:9.2f}",
            flush=True,
        )
        y, x = (np.array(clean.shape[1:]) - DETAIL) // 2
        columns.append([image[0, :, y : y + DETAIL, x : x + DETAIL] for image in (x0, *estimates[:3])])
    originals, *others = map(torch.stack, zip(*columns))
    rows = [("original", originals, None)]
    rows += [(label, x, originals) for label, x in zip(("noisy", "BM3D", "network"), others)]
    path = Path(cfg.out_dir) / "res" / "photographs.png"
    visualize.draw(path, rows, cell=1.9)
    print(f"figure saved: {path}")


if __name__ == "__main__":
    config.run(main, data.DataError, checkpoint.CheckpointError)
