"""Sanity check: one image, one noise level, one noise draw; a network that learns brings the loss to zero.

    python overfit.py              the loss falls from about 1 to below 1e-5
    python overfit.py --t 9        another noise level

Prints the loss every 50 iterations, writes model/res/comparison_result_overfit.png, exits with 1 if the loss stays up.
"""

import sys
import time
from pathlib import Path

import torch

import config
import data
import diffusion
import unet
import visualize

SETTINGS = (
    "dataset data_dir skip_bad_images max_pixels noise_steps t model t_dim iterations target lr seed device out_dir"
)


def overfit(model, x0, eps, t, T, iterations, target, lr):
    """Minimize the noise loss of one fixed noisy batch with AdamW until it is below target; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for i in range(iterations + 1):
        loss = diffusion.noise_loss(model, x0, eps, t, T)
        if i % 50 == 0 or loss < target or i == iterations:
            print(f"iteration {i:4d}  loss {loss:.2e}")
        if loss < target or i == iterations:
            return loss.item()
        # Constant steps would hop around the minimum; they shrink as the iterations run out.
        optimizer.param_groups[0]["lr"] = lr * (1 - i / iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    cfg = config.parse(__doc__, SETTINGS, lr=1e-3)  # no warm-up here, and a minimum to settle in
    config.check_t(cfg.t, cfg.noise_steps)
    device = config.pick_device(cfg.device)
    images, source = data.load(
        "test", cfg.dataset, cfg.data_dir, skip_bad_images=cfg.skip_bad_images, max_pixels=cfg.max_pixels
    )
    print(f"data: one of {source}")
    x0 = data.scale(images[:1].to(device))
    eps = torch.randn(x0.shape, generator=data.generator("cpu", cfg.seed, data.NOISE, 0)).to(device)
    t = torch.tensor([cfg.t], device=device)
    torch.manual_seed(cfg.seed)
    model = unet.build(cfg.model, cfg.t_dim).to(device, memory_format=data.memory_format(device))

    started = time.time()
    loss = overfit(model, x0, eps, t, cfg.noise_steps, cfg.iterations, cfg.target, cfg.lr)
    print(f"{time.time() - started:.1f} s on {device}")
    x_t = diffusion.add_noise(x0, eps, t, cfg.noise_steps)
    with torch.no_grad():
        x0_hat = diffusion.denoise(model, x_t, t, cfg.noise_steps)
    path = Path(cfg.out_dir) / "res" / "comparison_result_overfit.png"
    visualize.panels(
        path, [("original", x0[0], x0[0]), (f"noisy, t = {cfg.t}", x_t[0], x0[0]), ("reconstructed", x0_hat[0], x0[0])]
    )
    print(f"figure saved: {path}")
    if not loss < cfg.target:  # also when it is not a number
        sys.exit(
            f"error: the loss stopped at {loss:.1e}, above {cfg.target:.0e}: try a lower --lr or more --iterations; "
            "if that does not help, the network, the noise or the optimizer is broken"
        )


if __name__ == "__main__":
    config.run(main, data.DataError)
