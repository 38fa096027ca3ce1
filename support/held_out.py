"""What is measured on the held-out images after every epoch."""

import dataclasses

import torch

import data
import diffusion
from support import channels, devices
from support.pictures import SIZE

SAMPLE = 90  # images on which the channels in use are counted
PIXELS = data.TEST_BATCH * SIZE**2  # that a network is given at once


@torch.no_grad()
def held_out_loss(cfg, world, model, images, check=lambda: None):
    """The loss over uint8 `images`, on the same noise in every run, see data.held_out_noise; t: see `levels`.

    check(): called after each batch, to stop by raising.
    """
    total = torch.zeros((), device=world.device)
    model.eval()
    world.copy(*model.buffers())  # each rank has the BatchNorm statistics of its own share
    starts = range(0, len(images), world.size * data.TEST_BATCH)
    for start in world.bar(starts, "held-out loss", delay=2, leave=False):
        i = start + world.rank * data.TEST_BATCH
        if i < len(images):
            x0, t, eps = held_out_batch(cfg, images, i)
            with devices.autocast(world.device, cfg.precision):
                # .forward: uncompiled, as compiling for this batch is not worth it.
                total += len(x0) * diffusion.noise_loss(in_parts(model.forward), x0, eps, t, cfg.noise_steps)
        check()
    model.train()
    return float(world.sum(total)) / len(images)


def in_parts(model):
    """The same model(x, t), which calls `model` on a few images at a time where they are large."""

    def eps_hat(x, t):
        return torch.cat([model(*part) for part in parts_of(x, t)])

    return eps_hat


def parts_of(x, t):
    """The images x (B, C, H, W) and their t (B,), a few at a time where they are large."""
    few = max(1, PIXELS // x[0, 0].numel())
    return zip(x.split(few), t.split(few))


def held_out_batch(cfg, images, start):
    """x0, t and eps of the batch of at most TEST_BATCH test images that begins at `start`."""
    x0 = data.scale(images[start : start + data.TEST_BATCH])
    k, count = torch.arange(start, start + len(x0), device=x0.device), cfg.noise_steps - 1
    k = k % count if len(images) >= count else k * count // len(images)  # a few images: levels over the whole range
    return x0, levels(k, cfg), data.held_out_noise(x0, start)


def levels(k, cfg):
    """t of the T-1 levels at which the loss is measured, k from 0 to T-2.

    The integers from 1 to T-1 or, with cfg.sigma_range, evenly spaced quantiles of the distribution of training.
    """
    return data.t_of_quantile((k + 0.5) / (cfg.noise_steps - 1), cfg) if cfg.sigma_range else 1 + k


def channels_in_use(cfg, model, images):
    """{block: share of its channels in use} on the first SAMPLE test images, at levels spread evenly over the range."""
    cfg = dataclasses.replace(cfg, sigma_power=0.0)
    x0 = data.scale(images[:SAMPLE])
    t = levels(torch.arange(len(x0), device=x0.device) * (cfg.noise_steps - 1) // len(x0), cfg)
    x_t = diffusion.add_noise(x0, data.held_out_noise(x0, 0), t, cfg.noise_steps)
    return channels.in_use(model, parts_of(x_t, t))
