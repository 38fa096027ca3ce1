"""The noise level of a picture from the picture alone, for noise that need not be white.

    level = estimate(pixels)      # level.sigma, and a range: level.low, level.high

A small regression network, model/noise_level.pth, reads the level off statistics of the picture's blocks: how much
energy the flattest of them have in each band of frequencies, in luma and in chroma, how it rises to the others, and
what JPEG has left. It was fitted to photographs with noise of many kinds (benchmarks/fit_noise_level.py). In a very
small picture, which need not have a flat block, the likelihood decides (diffusion.estimate_sigma); it takes the noise
for white.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import data
from diffusion import GREY_LEVELS
from support import checkpoint, jpeg_traces
from support.tiles import MULTIPLE

WEIGHTS = checkpoint.SHIPPED.with_name("noise_level.pth")
WINDOW, WINDOWS = 64, 8  # of a large picture, WINDOWS x WINDOWS evenly spread windows are looked at
BLOCK = 16  # pixels, height and width
FEW = 100  # blocks: in a picture with fewer the likelihood decides
LIKELIHOOD_LIMITS = (0.4, 2)  # of the level by likelihood, over that by statistics
LIKELIHOOD_RANGE = (0.93, 1.07)  # over the level by likelihood; a guess, unlike the range of the regression
SMALLEST = 32  # pixels: a smaller picture is mirrored at its edges

# Luma and two directions of chroma, orthonormal: noise that is equal and independent in R, G and B is so in these too.
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float32) / np.sqrt([[3], [2], [6]], dtype=np.float32)
BANDS = (0.032, 0.1, 0.2, 0.35, 0.5, 1)  # cycles a pixel, limits of five bands, without a block's mean and slope
QUANTILES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # of the blocks, by their energy in one band
FLATTEST = (0, 0.01, 0.04, 0.12)  # of the blocks, by their energy in all bands of luma: the limits of three groups
FLOOR = 0.02  # grey levels squared: less energy than rounding leaves
# Band energies in luma and chroma, JPEG's coefficients in both, 2 of its grid, and 3 of the whole picture.
JPEG_GROUPS, EACH = len(jpeg_traces.DIAGONALS) - 1, 1 + len(jpeg_traces.STEPS)
STATISTICS = 2 * ((len(QUANTILES) + len(FLATTEST) - 1) * (len(BANDS) - 1) + JPEG_GROUPS * EACH) + 5
LEAST = 0.4  # grey levels: smaller levels are not told apart
OUTPUTS = (0.5, 0.05, 0.95)  # quantiles of the level: the estimate, and the range that holds it nine times out of ten


class Level(NamedTuple):
    """A noise level and a range that it should lie in: standard deviations on the 0-255 scale."""

    sigma: float
    low: float
    high: float


def estimate(pixels, likelihood=None, device="cpu"):
    """The Level of an array (C, H, W) of any size: C is 3, or 1 for grey; uint8, uint16, or float in [-1, 1].

    likelihood: the level of greatest likelihood as a function of x (1, C, H, W), both on the [-1, 1] scale, see
    diffusion.estimate_sigma; None: statistics alone decide. For noise that differs between channels it is the root
    mean square of their levels; for noise that depends on brightness, the level in the flattest places. Time and memory
    are bounded. Raises CheckpointError without usable WEIGHTS.
    """
    parts = windows(pixels)
    features, count = statistics(parts)
    levels = regression().levels(features) if features is not None else np.zeros(len(OUTPUTS))
    if likelihood and len(parts) == 1 and count < FEW and levels[0] > 0:
        height, width = (n // MULTIPLE * MULTIPLE for n in parts[0].shape[1:])
        x = data.scale(torch.from_numpy(parts[0][None, :, :height, :width]).to(device))
        # The likelihood may have a maximum too many, and finds a little noise even where there is none.
        sigma = np.clip(GREY_LEVELS * likelihood(x).item(), *(levels[0] * np.array(LIKELIHOOD_LIMITS)))
        levels = sigma * np.array([1, *LIKELIHOOD_RANGE])
    return Level(*map(float, levels))


def windows(pixels):
    """Evenly spread windows of a large picture, a smaller one whole: [(C, H, W)] on the 0-255 scale.

    They are a multiple of 8 pixels apart, so that JPEG's blocks begin at the same place in all.
    """
    unit, zero = (GREY_LEVELS, GREY_LEVELS) if pixels.dtype.kind == "f" else (255 / np.iinfo(pixels.dtype).max, 0)
    height, width = pixels.shape[1:]
    parts = [pixels]
    if height * width > (WINDOW * WINDOWS) ** 2:
        rows, columns = (
            np.unique(np.linspace(0, max(n - WINDOW, 0), WINDOWS).astype(int) // jpeg_traces.BLOCK * jpeg_traces.BLOCK)
            for n in (height, width)
        )
        parts = [pixels[:, y : y + WINDOW, x : x + WINDOW] for y in rows for x in columns]
    height, width = parts[0].shape[1:]
    room = [(0, 0), (0, max(SMALLEST - height, 0)), (0, max(SMALLEST - width, 0))]
    return [np.pad(part.astype(np.float32) * unit + zero, room, "symmetric") for part in parts]


# ---- statistics --------------------------------------------------------------------------------------------------


def statistics(parts):
    """(STATISTICS,) float32 of the parts of a picture, [(C, H, W)] in grey levels, and the number of their blocks.

    None in place of the statistics where the blocks are constant.
    """
    (y, trace_y), (x, trace_x) = (jpeg_traces.grid(parts, axis) for axis in (1, 2))
    parts = [part[:, y:, x:] for part in parts]  # a picture may have been cut since it was compressed
    blocks, clipped = usable_blocks(parts)
    energies = band_energies(blocks)
    if energies.max() < 1e-4:  # what float32 leaves of equal pixels
        return None, len(blocks)
    order = energies[:, 0].mean(axis=1).argsort(kind="stable")  # by luma
    limits = [int(share * len(order)) for share in FLATTEST]
    groups = [order[start : max(end, start + 3)] for start, end in itertools.pairwise(limits)]
    summary = [np.quantile(energies, QUANTILES, axis=0), *(energies[group].mean(axis=0) for group in groups)]
    return np.concatenate(
        [
            *(np.log(energy + FLOOR).ravel() for energy in summary),
            jpeg_traces.quantization(blocks).ravel(),
            [trace_y, trace_x],
            [math.log(len(blocks)), clipped, blocks.mean() / 255],
        ]
    ).astype(np.float32), len(blocks)


def usable_blocks(parts):
    """Overlapping blocks (N, 3, BLOCK, BLOCK) of the parts, and the share of clipped pixels in them.

    Left out is what was drawn over the noise, and what has lost it by clipping: blocks with more than 1% of clipped
    pixels, but never more than three quarters of those that are at most half clipped.
    """
    cut = [np.lib.stride_tricks.sliding_window_view(part, (BLOCK, BLOCK), (1, 2)) for part in parts]
    cut = [blocks[:, :: BLOCK // 2, :: BLOCK // 2].transpose(1, 2, 0, 3, 4) for blocks in cut]
    blocks = np.concatenate([blocks.reshape(-1, *blocks.shape[2:]) for blocks in cut])
    is_clipped = (abs(blocks) < 0.001) | (abs(blocks - 255) < 0.001)
    same = (blocks[..., 1:] == blocks[..., :-1]) & ~is_clipped[..., 1:]
    drawn = was_drawn(same.all(axis=1).mean(axis=(1, 2)))
    blocks, clipped = blocks[~drawn], is_clipped[~drawn].mean(axis=(1, 2, 3))
    if (clipped <= 0.5).any():
        chosen = clipped <= max(0.01, np.quantile(clipped[clipped <= 0.5], 0.25))
        blocks, clipped = blocks[chosen], clipped[chosen]
    return np.broadcast_to(blocks, (len(blocks), 3, BLOCK, BLOCK)), clipped.mean()


def was_drawn(same):
    """Which blocks are of bars, boxes and cut-outs, filled with one colour after the noise: (N,) bool.

    same: the share of each block's neighbouring pixels that are equal, (N,). Noise leaves few equal: if hardly any
    block is in between, those with most pixels equal were drawn. A picture without noise has blocks of every degree.
    """
    drawn = same > 0.5
    others = same[~drawn]
    return drawn & (len(others) > 0.1 * len(same) and (others > 0.1).mean() < 0.2)


def band_energies(blocks):
    """Mean squares (N, 2, bands) of blocks (N, 3, BLOCK, BLOCK), of luma and of chroma (the mean of its directions)."""
    k = np.arange(BLOCK)
    frequency = np.hypot(k[:, None], k) / (2 * BLOCK)
    bands = np.stack([(frequency >= low) & (frequency < high) for low, high in itertools.pairwise(BANDS)])
    means = (bands / bands.sum(axis=(1, 2), keepdims=True)).reshape(len(bands), -1).T.astype(np.float32)
    colours = np.einsum("dc,nchw->ndhw", COLOURS, blocks)
    energies = np.square(jpeg_traces.cosine_transform(colours)).reshape(*colours.shape[:2], -1) @ means
    return np.stack([energies[:, 0], energies[:, 1:].mean(axis=1)], axis=1)


# ---- regression --------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """Statistics (B, STATISTICS) -> logarithms of the level, 0-255 scale, (B, 3), see OUTPUTS, `from_logarithm`."""

    def __init__(self, width=256):
        super().__init__()
        self.register_buffer("mean", torch.zeros(STATISTICS))
        self.register_buffer("std", torch.ones(STATISTICS))
        self.layers = nn.Sequential(
            nn.Linear(STATISTICS, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(OUTPUTS))
        )

    def forward(self, x):
        return self.layers(((x - self.mean) / self.std).clamp(-6, 6))

    @torch.no_grad()
    def levels(self, features):
        """The estimate, and the ends of its range, in grey levels, (3,)."""
        sigma, *ends = from_logarithm(self(torch.from_numpy(features)[None])[0]).tolist()
        return np.array([sigma, min(sigma, *ends), max(sigma, *ends)])


def logarithm_of(sigma):
    """log sqrt(sigma^2 + LEAST^2): what Regression returns."""
    return (sigma**2 + LEAST**2).log() / 2


def from_logarithm(logarithm):
    return ((2 * logarithm).exp() - LEAST**2).clamp(min=0).sqrt()


@functools.cache
def regression():
    """The Regression that comes with the repository. Raises CheckpointError."""
    with torch.device("meta"):  # no random weights, which would change the random numbers of the program
        model = Regression()
    try:
        state = checkpoint.read(WEIGHTS)
        checkpoint.verify(WEIGHTS, state)
        model.load_state_dict(state["model"], assign=True)
    except (checkpoint.CheckpointError, RuntimeError, KeyError, TypeError):
        raise checkpoint.CheckpointError(f"{WEIGHTS} is missing, damaged or of another version; restore it") from None
    return model.eval()
