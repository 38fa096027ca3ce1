"""What is measured on the held-out images after every epoch."""

import torch

import data
import diffusion
from support import channels, device
from support.run import progress_bar

SAMPLE = 90  # images on which the channels in use are counted


@torch.no_grad()
def held_out_loss(cfg, world, model, images, check=lambda: None):
    """The loss over uint8 `images`, on the same noise in every run: t is 1 ... T-1 in turn, see data.held_out_noise.

    check(): called after each batch, to stop by raising.
    """
    total = torch.zeros((), device=world.device)
    model.eval()
    world.copy(*model.buffers())  # each rank has the BatchNorm statistics of its own share
    starts = range(0, len(images), world.size * data.TEST_BATCH)
    for start in progress_bar(starts, "held-out loss", world, delay=2, leave=False):
        i = start + world.rank * data.TEST_BATCH
        if i < len(images):
            x0, t, eps = held_out_batch(cfg, images, i)
            with device.autocast(world.device, getattr(torch, cfg.precision)):
                # .forward: uncompiled, as compiling for this batch is not worth it.
                total += len(x0) * diffusion.noise_loss(model.forward, x0, eps, t, cfg.noise_steps)
        check()
    model.train()
    return float(world.sum(total)) / len(images)


def held_out_batch(cfg, images, start):
    """x0, t and eps of TEST_BATCH test images or fewer, of which the first is the start-th."""
    x0 = data.scale(images[start : start + data.TEST_BATCH])
    t = 1 + torch.arange(start, start + len(x0), device=x0.device) % (cfg.noise_steps - 1)
    return x0, t, data.held_out_noise(x0, start)


def channels_in_use(cfg, model, images):
    """{block: share of its channels in use} on the first SAMPLE test images, at noise levels over the whole range."""
    x0, t, eps = held_out_batch(cfg, images[:SAMPLE], 0)
    t = 1 + torch.arange(len(t), device=t.device) * (cfg.noise_steps - 1) // len(t)
    return channels.in_use(model, diffusion.add_noise(x0, eps, t, cfg.noise_steps), t)
