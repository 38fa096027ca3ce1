"""A large picture through a network in tiles, with exactly the output that the whole picture would give.

margin = margin_of(receptive_field(model))
eps_hat = tiled(model, size=608, margin=margin)(x_t, t)      # at most 608x608 pixels in one call
"""

import copy
import itertools
import math

import torch
from tqdm import tqdm

MULTIPLE = 4  # heights and widths must be multiples of it, and what the networks do repeats with this period, in pixels
CANVASES = (64, 128, 256, 512, 1024)  # pixels, tried in turn


@torch.no_grad()
def receptive_field(model):
    """Pixels, along the height or the width, beyond which nothing in x can change an output pixel of model(x, t).

    model: an nn.Module of images (B, 3, H, W); 23 for UNet(). math.inf if there is no such number, or it is
    larger than 500, or the output depends on the size of the image or on the position in it (as in PlainUNet).
    It is read off the network: whatever the weights are, a NaN spreads to everything that is computed from it (and a
    little farther where the hardware's convolutions work in blocks, which does no harm).
    """
    model = copy.deepcopy(model).cpu().eval()
    for size in CANVASES:
        reach = max(spread(model, size, flipped) for flipped in (False, True))
        if reach < math.inf:
            return reach if repeats(model, margin_of(reach)) else math.inf
    return math.inf


def spread(model, size, flipped):
    """How far a NaN goes along the longer side of a narrow canvas; math.inf if it comes to an end of it."""
    place = size // 2 + torch.arange(MULTIPLE)  # every phase of the pooling, each in an image of its own
    x = torch.zeros(MULTIPLE, 3, size, MULTIPLE, dtype=torch.float32)
    x[torch.arange(MULTIPLE), :, place] = math.nan
    eps_hat = model(x.mT if flipped else x, torch.ones(MULTIPLE))
    reached = (eps_hat.mT if flipped else eps_hat).isnan().any(dim=3).any(dim=1)  # (MULTIPLE, size)
    if reached[:, [0, -1]].any():
        return math.inf
    return ((torch.arange(size) - place[:, None]).abs() * reached).max().item()


def repeats(model, margin):
    """Whether the top of an image comes out the same when the image is cut off `margin` rows below it.

    The weights are replaced by random ones, so large that what happens deep in the network shows in its output.
    """
    random, rows = torch.Generator().manual_seed(0), max(margin, MULTIPLE)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 2 / math.sqrt(weight[0].numel()), generator=random)
    x = torch.randn(1, 3, 4 * rows, MULTIPLE, generator=random, dtype=torch.float32)
    whole, part = (model(image, torch.ones(1))[:, :, :rows] for image in (x, x[:, :, : 2 * rows]))
    return bool((whole - part).abs().max() <= 1e-4 * whole.std(correction=0))


def margin_of(reach):
    """A receptive field rounded up to what keeps the tiles in step with the pooling."""
    return reach if reach == math.inf else math.ceil(reach / MULTIPLE) * MULTIPLE


def tiled(model, size, margin):
    """The same model(x, t), which calls `model` on tiles of x of at most size x size pixels; margin: see by_tiles."""

    def run(x, t):
        eps_hat = torch.empty_like(x)
        by_tiles(lambda part, _: model(part, t), x, eps_hat, size, margin)
        return eps_hat

    return run


def by_tiles(f, source, target, size, margin):
    """target = f(source, inner) for tensors (..., H, W), where f sees at most size x size pixels at a time.

    Of what f returns, `inner` is used, two slices of rows and columns: all but `margin` pixels along every cut. If an
    output depends on nothing farther away, and on the position only modulo MULTIPLE, the tiles make no difference.
    size, margin: multiples of MULTIPLE; a margin of math.inf means no tiles, a larger one than size / 4 larger tiles.
    f keeps height and width.
    """
    rows, columns = (spans(length, size, margin) for length in source.shape[-2:])
    tiles = list(itertools.product(rows, columns))
    for (top, bottom), (left, right) in tqdm(tiles, "tiles", delay=2, leave=False, disable=len(tiles) == 1):
        y, x = max(top - margin, 0), max(left - margin, 0)
        part = source if len(tiles) == 1 else source[..., y : bottom + margin, x : right + margin]
        inner = slice(top - y, bottom - y), slice(left - x, right - x)
        target[..., top:bottom, left:right] = f(part, inner)[(..., *inner)]


def spans(length, size, margin):
    """[(start, end), ...]: the fewest parts of `length` that, with their margins, are no longer than `size`."""
    size = max(size, 4 * margin)
    if length <= size:
        return [(0, length)]
    inner = length - 2 * margin  # the first and the last part have one margin only
    count = math.ceil(inner / (size - 2 * margin))
    step = math.ceil(inner / count / MULTIPLE) * MULTIPLE
    return list(itertools.pairwise([0, *(margin + step * k for k in range(1, count)), length]))


def pad(x):
    """x (..., H, W), reflected at the bottom and at the right up to multiples of MULTIPLE."""
    for dim in (-2, -1):
        length = x.shape[dim]
        if length % MULTIPLE:
            period = max(2 * (length - 1), 1)
            index = torch.arange(length + -length % MULTIPLE, device=x.device) % period
            x = x.index_select(dim, torch.minimum(index, period - index))
    return x
