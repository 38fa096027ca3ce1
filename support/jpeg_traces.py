"""What JPEG has left in the pixels of a picture: where its blocks begin, and how coarsely it has rounded.

    start, trace = grid(parts, axis=1)      # rows above the first block, and how distinct that is
    table = quantization(blocks)            # of blocks cut from there on

JPEG takes the cosine transform of blocks of 8x8 pixels, of luma and (in most files at half the resolution) of chroma,
and rounds each coefficient to a multiple of a step, many of high frequency to 0. Weak noise goes with them, so that the
noise that is left cannot be told from texture without the steps.
"""

import itertools

import numpy as np

BLOCK = 8  # pixels, height and width
# Weights of R, G and B in the planes that JPEG compresses, as JFIF has them (ITU-T T.871).
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
CHROMA = np.array([[-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], np.float32)
ROUNDED = 1  # a coefficient that is smaller was 0 before pixels were rounded
HIGH = slice(5, 8)  # frequencies of which JPEG leaves least
CHANCE = 4  # standard deviations of a share of coefficients that a difference must exceed
DIAGONALS = (1, 2, 3, 4, 5, 7, 9, 15)  # sums of a coefficient's indices: the limits of seven groups
STEPS = (0.1, 0.5)  # quantiles of a group's coefficients that are not 0


def grid(parts, axis):
    """Where the blocks begin along an axis, 1 or 2, of all parts of a picture: (0 to 7 pixels, trace).

    Cut there, most coefficients of high frequency in luma, transformed along this axis alone, are 0. trace: the share
    of these that are 0, less its median over all starts. Where it may be chance, the start is 0. parts: arrays
    (C, H, W) on the 0-255 scale, C = 1 or 3, all a multiple of 8 pixels apart.
    """
    shares, count = np.zeros(BLOCK), 0
    for part in parts:
        luma = np.einsum("c,chw->hw", LUMA, np.broadcast_to(part, (3, *part.shape[1:])))
        luma = luma if axis == 2 else luma.T
        runs = np.lib.stride_tricks.sliding_window_view(luma, BLOCK, axis=1)
        unclipped = (runs[..., :1] > 0.5) & (runs[..., :1] < 254.5)
        zeros = (abs(runs @ cosines(BLOCK)[HIGH].T) < ROUNDED) & unclipped
        shares += [zeros[:, start::BLOCK].mean() / len(parts) for start in range(BLOCK)]
        count += zeros.size / BLOCK
    usual = np.median(shares)
    trace = shares.max() - usual
    return shares.argmax() if trace > CHANCE * np.sqrt(usual * (1 - usual) / count) else 0, trace


def quantization(blocks):
    """A row for each group of DIAGONALS, of luma and then of chroma: the share of the coefficients that are 0, and the
    logarithms of the STEPS of the others.

    In luma the smallest are what was rounded to. In chroma, whose blocks in most files are of 16x16 pixels, most of
    these blocks lie across them, and all that shows is that coarser rounding leaves smaller coefficients. blocks:
    (N, 3, 16, 16) on the 0-255 scale, beginning where those of luma do.
    """
    luma = np.einsum("c,nchw->nhw", LUMA, blocks[..., :BLOCK, :BLOCK])
    halved = (blocks[..., ::2, :] + blocks[..., 1::2, :]) / 2
    halved = (halved[..., ::2] + halved[..., 1::2]) / 2
    chroma = np.einsum("dc,nchw->dnhw", CHROMA, halved).reshape(-1, BLOCK, BLOCK)
    diagonal = np.add.outer(np.arange(BLOCK), np.arange(BLOCK)).ravel()
    rows = []
    for plane in (luma, chroma):
        coefficients = abs(cosine_transform(plane)).reshape(-1, BLOCK**2).T
        for low, high in itertools.pairwise(DIAGONALS):
            values = coefficients[(low <= diagonal) & (diagonal < high)]
            others = values[values >= ROUNDED]
            steps = np.quantile(others if others.size else 255, STEPS)
            rows.append([1 - others.size / values.size, *np.log(steps)])
    return np.array(rows)


def cosine_transform(blocks):
    """The discrete cosine transform (type II, orthonormal) of blocks (..., n, n), rows and columns."""
    matrix = cosines(blocks.shape[-1])
    return matrix @ blocks @ matrix.T


def cosines(n):
    """The matrix (n, n) of that transform along one axis: row k has frequency k, k / 2n cycles a pixel."""
    k = np.arange(n)
    return (np.cos(np.pi * np.outer(k, k + 0.5) / n) * np.sqrt(np.where(k > 0, 2, 1) / n)[:, None]).astype(np.float32)
