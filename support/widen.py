"""A wider UNet that begins as a trained one: train.py --init with larger --widths or --t-dim.

The channels that it has beyond the trained network's keep their random kernels, but the weights by which the old ones
would use them begin at zero. So the network computes what the trained one does, and every channel can learn.
"""

# Layers whose input is a concatenation, of which each half grows by itself.
CONCATENATED = ("dec1.conv1.weight", "dec1.shortcut.weight", "dec2.conv1.weight", "dec2.shortcut.weight")
TRANSPOSED = ("up1.weight", "up2.weight")  # (in, out, 2, 2), where other weights are (out, in, ...)


def widened(weights, model):
    """The state dict with which `model`, a UNet, computes what a narrower UNet with the state dict `weights` does.

    Returns `weights` unchanged if they are not those of such a network. (A block that keeps its width has no weights in
    its shortcut, so it cannot become one that changes it.)
    """
    wide = {name: weight.clone() for name, weight in model.state_dict().items()}
    if weights.keys() != wide.keys() or any(exceeds(weights[name], wide[name]) for name in wide):
        return weights
    for name, narrow in weights.items():
        target = wide[name]
        if narrow.dim() == 1:  # a bias
            target[: len(narrow)] = narrow
            continue
        if name in TRANSPOSED:
            target, narrow = target.transpose(0, 1), narrow.transpose(0, 1)
        rows = target[: len(narrow)]  # the outputs that the narrow network has
        rows.zero_()
        parts = 2 if name in CONCATENATED else 1
        for wide_part, part in zip(rows.chunk(parts, dim=1), narrow.chunk(parts, dim=1)):
            wide_part[:, : part.shape[1]] = part
    return wide


def exceeds(narrow, wide):
    """Whether a tensor does not fit into another, by its kind or its shape."""
    same = narrow.is_floating_point() == wide.is_floating_point() and narrow.dim() == wide.dim()
    return not same or any(a > b for a, b in zip(narrow.shape, wide.shape))
