"""Sanity check: one image, one noise level, one noise draw; a network that learns brings the loss to zero.

    python overfit.py              the loss falls from about 1 to below 1e-5
    python overfit.py --t 9        another noise level

Writes model/res/comparison_result_overfit.png. Exits with code 1 if the loss stays up.
"""

import torch

import config
import data
import diffusion
import unet
from config import Setting, UserError, positive, whole
from support import devices, figures, script, streams

SETTINGS = data.TEST_SETTINGS | unet.SETTINGS | {
    "t":          Setting(5, whole(), "time step of the noise, from 1 to T-1"),
    "iterations": Setting(1000, whole(), "optimizer updates at most"),
    "target":     Setting(1e-5, positive, "loss at which the check has passed"),
    "lr":         Setting(1e-3, positive, "learning rate at the start; it falls to 0 as the iterations run out"),
    "seed":       Setting(0, whole(0), "seed of the network's weights and of the noise"),
    "out_dir":    Setting("model", config.file_name, "folder for the figure (in res/)"),
    "device":     devices.SETTINGS["device"],
}  # fmt: skip


def overfit(model, x0, eps, t, T, iterations, target, lr):
    """Minimize the noise loss of one fixed noisy batch with AdamW until it is below target; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for i in range(iterations + 1):
        loss = diffusion.noise_loss(model, x0, eps, t, T)
        done = loss < target or i == iterations
        if done or i % 50 == 0:
            print(f"iteration {i:4d}  loss {loss:.2e}")
        if done:
            return loss.item()
        # Constant steps would hop around the minimum; they shrink as the iterations run out.
        optimizer.param_groups[0]["lr"] = lr * (1 - i / iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    cfg = config.parse(__doc__, SETTINGS)
    T, device = cfg.noise_steps, devices.pick(cfg.device)
    if cfg.t >= T:
        raise UserError(f"--t {cfg.t} is outside 1 ... {T - 1}; lower it")
    network = unet.describe(cfg)
    path = script.result_path(cfg.out_dir, "comparison_result_overfit.png")
    images, source = data.load("test", cfg)
    print(f"data: one of {source}")
    x0 = data.scale(images[:1].to(device))
    eps = torch.randn(x0.shape, generator=streams.generator("cpu", cfg.seed, streams.NOISE, 0)).to(device)
    t = torch.tensor([cfg.t], device=device)
    torch.manual_seed(cfg.seed)
    model = unet.build(**network).to(device, memory_format=devices.memory_format(device))
    loss = overfit(model, x0, eps, t, T, cfg.iterations, cfg.target, cfg.lr)
    x_t = diffusion.add_noise(x0, eps, t, T)
    shown = {"original": x0, f"noisy, t = {cfg.t}": x_t, "denoised": diffusion.denoise(model, x_t, t, T).detach()}
    figures.panels(path, [(title, x[0], x0[0]) for title, x in shown.items()])
    print(f"figure saved: {path}")
    if not loss < cfg.target:  # also when it is not a number
        advice = "lower --lr or give more --iterations; if neither helps, the network, noise or optimizer is broken"
        raise UserError(f"the loss stopped at {loss:.1e}, above {cfg.target:.0e}: {advice}")


if __name__ == "__main__":
    script.run(main)
