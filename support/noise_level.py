"""The noise level of a picture from the picture alone, for noise that need not be white.

    level = estimate(pixels, model, T)      # level.sigma, and a range: level.low, level.high

Two estimates are combined. Flat places show noise of every kind, but where a picture has none, they show its texture.
The network's likelihood (diffusion.estimate_sigma) tells noise from texture, but hardly sees noise that is not white.
Flat places decide, except where only luma has noise: if it looks white there (the means of 2x2 pixels have half of it),
or the flat places are uneven, they may exceed the likelihood by little. In a small picture the likelihood decides.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

import diffusion
from diffusion import GREY_LEVELS
from support.device import memory_format

WINDOW, WINDOWS = 64, 8  # of a large picture, WINDOWS x WINDOWS evenly spread windows are searched for flat places,
CROP, CROPS = 32, 3  # and CROPS x CROPS windows of the size that the network was trained on are shown to it
BLOCK = 16  # pixels, height and width of a flat place
FEW = 100  # blocks: a picture with fewer need not have a flat place
WHITE = 0.62  # what is left of the noise in the means of 2x2 pixels: 0.5 if it is white, 0.9 after a blur by 0.5 pixels
# The chroma's energy as a part of the luma's, at all and at the highest frequencies: with less, luma alone has noise.
IN_LUMA = np.array([0.077, 0.1])
UNEVEN = 0.45  # an evenness of the luma below which even the flattest blocks are likely to be texture

# Luma and two directions of chroma, orthonormal: noise that is equal and independent in R, G and B is so in these too.
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
COLOURS = COLOURS.astype(np.float32)


class Level(NamedTuple):
    """A noise level and a range that it should lie in: standard deviations on the [-1, 1] scale."""

    sigma: float
    low: float
    high: float


def estimate(pixels, model=None, T=None, device="cpu"):
    """The Level of an array (C, H, W) of any size: C is 3, or 1 for grey; uint8, uint16, or float in [-1, 1].

    model: a colour model(x, t) that knows the time step, T its number of steps; None: only flat places are looked at.
    Noise that differs between channels has the root mean square of their levels, noise that depends on the brightness
    the level of the flattest places. Time and memory are bounded.
    """
    energies = block_energies(windows(pixels, WINDOW, WINDOWS))
    sigma, low, high, evenness = flat_level(energies, len(pixels))
    few = len(energies) < FEW
    if model is not None and sigma > 0 and (few or evenness is not None):
        crops = np.stack(windows(pixels, CROP, CROPS))
        if not few:  # noise of luma alone, which the network does not expect of a colour picture
            crops = crops.mean(axis=1, keepdims=True)
        halves = crops.reshape(*crops.shape[:2], crops.shape[2] // 2, 2, crops.shape[3] // 2, 2).mean(axis=(3, 5))
        full, half = (likelihood(model, x, T, device) for x in (crops, halves))
        likely = np.median(full)
        if few:
            sigma = min(likely, 2 * sigma)  # the network finds a little noise even where there is none
            low, high = 0.93 * sigma, 1.07 * sigma
        elif evenness < UNEVEN or np.median(half / full) < WHITE:
            sigma, low = min(1.2 * likely, sigma), min(0.9 * likely, low)
    return Level(*(float(level) / GREY_LEVELS for level in (sigma, low, high)))


def windows(pixels, size, count):
    """count x count windows of size x size pixels, evenly spread, in grey levels of 255; a smaller picture whole.

    They are mirrored at the edges to CROP pixels where they have less, and cut to multiples of 8, as the network needs.
    """
    unit, zero = (GREY_LEVELS, GREY_LEVELS) if pixels.dtype.kind == "f" else (255 / np.iinfo(pixels.dtype).max, 0)
    height, width = pixels.shape[1:]
    parts = [pixels]
    if height * width > (size * count) ** 2:
        rows, columns = (np.unique(np.linspace(0, max(n - size, 0), count).astype(int)) for n in (height, width))
        parts = [pixels[:, y : y + size, x : x + size] for y in rows for x in columns]
    height, width = parts[0].shape[1:]
    room = [(0, 0), (0, max(CROP - height, 0)), (0, max(CROP - width, 0))]
    parts = [np.pad(part.astype(np.float32) * unit + zero, room, "symmetric") for part in parts]
    return [part[:, : part.shape[1] // 8 * 8, : part.shape[2] // 8 * 8] for part in parts]


def likelihood(model, crops, T, device):
    """The noise levels of greatest likelihood, (N,), of crops (N, C, H, W), both in grey levels of 255."""
    x = (torch.from_numpy(crops).to(device) / GREY_LEVELS - 1).contiguous(memory_format=memory_format(device))
    gain = 1.0
    if x.shape[1] == 1:  # see diffusion.grey
        model, gain = diffusion.grey(model), math.sqrt(3)
    return GREY_LEVELS / gain * diffusion.estimate_sigma(model, gain * x, T).cpu().numpy()


def block_energies(parts):
    """Mean squares (N, 2, 3) in the N overlapping blocks of the parts [(C, H, W)], in grey levels squared.

    Of luma and of chroma (the mean of its two directions; 0 of grey) at all frequencies that a block can have (without
    its mean and slope), at 0.2 to 0.35, and above 0.35 cycles a pixel. Clipped pixels have lost their noise: blocks
    with more than 1% of them are left out, but never more than three quarters of those that are at most half clipped.
    """
    cut = [np.lib.stride_tricks.sliding_window_view(part, (BLOCK, BLOCK), (1, 2)) for part in parts]
    cut = [blocks[:, :: BLOCK // 2, :: BLOCK // 2].transpose(1, 2, 0, 3, 4) for blocks in cut]
    blocks = np.concatenate([blocks.reshape(-1, *blocks.shape[2:]) for blocks in cut])
    clipped = ((abs(blocks) < 0.001) | (abs(blocks - 255) < 0.001)).mean(axis=(1, 2, 3))
    if (clipped <= 0.5).any():
        blocks = blocks[clipped <= max(0.01, np.quantile(clipped[clipped <= 0.5], 0.25))]

    k = np.arange(BLOCK)
    cosines = np.cos(np.pi * np.outer(k, k + 0.5) / BLOCK) * np.sqrt(np.where(k > 0, 2, 1) / BLOCK)[:, None]
    cosines = cosines.astype(np.float32)
    frequency = np.hypot(k[:, None], k) / (2 * BLOCK)
    bands = np.stack([frequency > 1 / (2 * BLOCK), (frequency >= 0.2) & (frequency < 0.35), frequency >= 0.35])
    means = (bands / bands.sum(axis=(1, 2), keepdims=True)).reshape(3, -1).T.astype(np.float32)
    if blocks.shape[1] == 3:
        blocks = np.einsum("dc,nchw->ndhw", COLOURS, blocks)
    squares = np.square(cosines @ blocks @ cosines.T).reshape(*blocks.shape[:2], -1)
    energies = squares @ means
    return np.concatenate([energies[:, :1], energies[:, 1:].sum(axis=1, keepdims=True) / 2], axis=1)


def flat_level(energies, channels):
    """(sigma, low, high) in grey levels of 255 from the energies (N, 2, 3) of blocks, and the evenness of luma.

    Photographs have little texture in their chroma. If it has noise, its flattest blocks give the level whatever the
    spectrum, and luma has about as much: as is seen at the highest frequencies, where texture is weakest. Otherwise the
    noise is in luma alone, or JPEG took that of the chroma away. Then even the flattest blocks may be texture: the
    likelier, the more steeply the energy rises from them to the others.
    That evenness, 0 to 1, comes with the level; it is None if chroma gave the level.
    The constants are fitted to 40 photographs with the noise of benchmarks/noise_level.py.
    """
    least, more = np.quantile(energies, [0.01, 0.08], axis=0)  # each (2, 3)
    chroma = 1.15 * least[1, 0]  # the flattest blocks are also those where the noise happens to be weak
    fine = chroma * (least[0, 2] + 0.05) / (least[1, 2] + 0.05)  # of luma; rounding alone adds about 0.05
    flattest = math.sqrt(least[0, 0] * least[0, 1])
    evenness = min(1.0, flattest / (more[0, 0] + 1e-6))
    texture = 1.25 * flattest * evenness**0.5
    if (least[1, [0, 2]] > IN_LUMA * least[0, [0, 2]]).any():
        luma, low, high, evenness = min(fine, 1.25 * chroma), 0.85, min(fine, texture), None
    else:
        luma, low, high = texture, 0.88 * evenness**0.5, texture
    sigma, high = (math.sqrt((energy + (channels - 1) * chroma) / channels) for energy in (luma, max(luma, high)))
    return sigma, low * sigma, 1.15 * high, evenness
