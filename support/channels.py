"""Which channels of a network are in use, and new ones for those that are not.

A ReLU that never opens neither computes nor learns, and gradient descent cannot open it again.
"""

import torch

from unet import ResidualBlock

THRESHOLD = 0.01  # a channel is in use if it is active in more than this share of all places
STRENGTH = 0.1  # of a recycled channel: its standard deviation over that of the shortcut that it is added to


def activity(h):
    """The share of all places in which each channel of h (B, C, H, W) is positive: (C,)."""
    return (h > 0).float().mean(dim=(0, 2, 3))


def is_open(h):
    """Which channels of h (B, C, H, W) are positive in more than THRESHOLD of all places: a bool (C,)."""
    return activity(h) > THRESHOLD


@torch.no_grad()
def in_use(model, batches):
    """{block: share of its channels in use}, where a block is a part of `model` that has a ReLU over an image.

    batches: pairs of noisy images (B, C, H, W) and their time steps (B,). Of a block's ReLUs the last that is called
    counts, and a channel is in use if its output is positive in more than THRESHOLD of all places of all the images.
    """
    modules = model.named_modules()
    relus = {part: name.rpartition(".")[0] or name for name, part in modules if isinstance(part, torch.nn.ReLU)}
    was_training = model.training
    total, count = {}, 0
    model.eval()
    try:
        for x_t, t in batches:
            count += len(x_t)
            found = outputs(model, relus, x_t, t, lambda h: activity(h) if h.ndim == 4 else None)
            for relu, active in found.items():
                if active is not None:
                    total[relu] = total.get(relu, 0) + len(x_t) * active
    finally:
        model.train(was_training)
    return {relus[relu]: (active > THRESHOLD * count).float().mean().item() for relu, active in total.items()}


@torch.no_grad()
def recycle(model, optimizer, x_t, t, random):
    """Give every channel that is not in use at the end of a residual block a new kernel; returns how many there were.

    Dormant neurons are recycled as in Sokar et al. 2023 (arXiv 2302.12902), but the new channel starts small instead of
    with outgoing weights of zero, since it shares these with the shortcut: its output has STRENGTH times the standard
    deviation of the shortcut's, and the mean of it is taken out of the shortcut's bias, where there is one. The
    optimizer forgets what it knew of the old kernel. x_t, t: noisy images to measure on; random: a CPU generator for
    the kernels.
    """
    blocks = [block for block in model.modules() if isinstance(block, ResidualBlock)]
    return sum(recycle_block(model, block, optimizer, x_t, t, random) for block in blocks)


def recycle_block(model, block, optimizer, x_t, t, random):
    """Recycle the closed channels of one block; returns how many there were.

    The bias centres the output of a new kernel, so that the ReLU is open in some places and closed in others.
    """
    found = outputs(model, (block.conv2, block.shortcut), x_t, t)
    h, shortcut = found[block.conv2], found[block.shortcut]
    off = (~is_open(h)).nonzero().flatten()
    if not len(off):
        return 0
    weight, bias = block.conv2.weight, block.conv2.bias
    weight[off] = torch.randn(weight[off].shape, generator=random).to(weight)
    h = outputs(model, (block.conv2,), x_t, t)[block.conv2]
    h = h[:, off] - bias[off, None, None]
    mean = h.mean(dim=(0, 2, 3))
    opened = torch.relu(h - mean[:, None, None])
    scale = STRENGTH * shortcut[:, off].std(dim=(0, 2, 3)) / opened.std(dim=(0, 2, 3))
    scale = scale.nan_to_num(0, 0, 0)  # what is the same everywhere stays off
    weight[off] *= scale[:, None, None, None]
    bias[off] = -scale * mean
    if isinstance(block.shortcut, torch.nn.Conv2d):
        block.shortcut.bias[off] -= scale * opened.mean(dim=(0, 2, 3))
    for parameter in (weight, bias):
        for moment in optimizer.state.get(parameter, {}).values():
            if moment.shape == parameter.shape:
                moment[off] = 0
    return len(off)


def outputs(model, parts, x_t, t, look=torch.Tensor.float):
    """{part: look(its output)} of those `parts` of the model that are called; of several calls the last one counts."""
    found = {}

    def keep(part, _, output):
        found[part] = look(output)

    hooks = [part.register_forward_hook(keep) for part in parts]
    try:
        model.forward(x_t, t)  # .forward: not the compiled one, which has no hooks
    finally:
        for hook in hooks:
            hook.remove()
    return found
