"""The noise level that support/noise_level.py finds, beside the true one, for ten kinds of noise.

    python -m benchmarks.noise_level --data-dir data/photographs

Prints, for every kind and level of noise, the share of the test pictures whose level is found within 15%, and the
median of found / true. The true level is measured: see true_sigma.
"""

import numpy as np

import config
import data
from config import UserError
from support import noise_level, script
from support.real_noise import through_jpeg

SETTINGS = data.PICTURE_SETTINGS
LEVELS = (5, 10, 20, 40)  # on the 0-255 scale
BLOCK = 16  # pixels, height and width of a flat place
FLATTEST = 0.1  # of the picture's blocks that are not clipped: where the truth is measured


def to_8_bits(x):
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


# ---- noise of unit variance --------------------------------------------------------------------------------------


def blur(noise, radius):
    """Noise (3, H, W) after a Gaussian filter with a standard deviation of `radius` pixels, its variance as before."""
    blurred = noise
    for axis in (1, 2):
        frequency = np.fft.rfftfreq(noise.shape[axis])
        shape = [-1 if i == axis else 1 for i in range(3)]
        gain = np.exp(-2 * (np.pi * radius * frequency) ** 2).reshape(shape)
        blurred = np.fft.irfft(np.fft.rfft(blurred, axis=axis) * gain, noise.shape[axis], axis)
    return blurred * noise.std() / blurred.std()


def colour(noise, chroma):
    """Noise (3, H, W) whose directions of chroma are `chroma` times as strong as before, its variance as before."""
    luma = noise.mean(axis=0, keepdims=True)
    return (luma + chroma * (noise - luma)) / np.sqrt((1 + 2 * chroma**2) / 3)


def demosaiced(noise):
    """The noise (3, H, W) of a sensor that sees one colour a pixel (Bayer's pattern), the others interpolated linearly.

    Red and blue are amplified for daylight, 1.9 and 1.6 times, which makes their shot noise stronger than green's.
    """
    seen = np.zeros_like(noise)
    for channel, y, x in ((0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1)):
        seen[channel, y::2, x::2] = noise[channel, y::2, x::2]
    height, width = noise.shape[1:]
    padded = np.pad(seen, ((0, 0), (1, 1), (1, 1)), "reflect")
    around = [[padded[:, y : y + height, x : x + width] for x in range(3)] for y in range(3)]
    cross = around[0][1] + around[1][0] + around[1][2] + around[2][1]
    corners = around[0][0] + around[0][2] + around[2][0] + around[2][2]
    red, _, blue = seen + cross / 2 + corners / 4
    green = (seen + cross / 4)[1]
    found = np.stack([np.sqrt(1.9) * red, green, np.sqrt(1.6) * blue])
    return found * noise.std() / found.std()


# ---- pictures with noise -----------------------------------------------------------------------------------------


def white(clean, sigma, noise):
    """The same level everywhere."""
    return clean + sigma * noise


def shot_and_read(clean, sigma, noise):
    """A sensor's shot and read noise, before a gamma of 2.2; of level sigma at a brightness of 128."""
    light, middle = (clean / 255) ** 2.2, (128 / 255) ** 2.2
    read = 0.02  # of the variance in the middle is read noise, the rest is proportional to the light
    slope = 255 / 2.2 * middle ** (1 / 2.2 - 1)  # d output / d light
    deviation = sigma / slope * np.sqrt(read + (1 - read) * light / middle)
    return 255 * np.clip(light + deviation * noise, 0, None) ** (1 / 2.2)


KINDS = {  # functions of (clean pixels, sigma, white noise), all (C, H, W)
    "white": white,
    "blurred 0.5": lambda clean, sigma, noise: white(clean, sigma, blur(noise, 0.5)),
    "blurred 0.8": lambda clean, sigma, noise: white(clean, sigma, blur(noise, 0.8)),
    "shot and read": shot_and_read,
    "chroma": lambda clean, sigma, noise: white(clean, sigma, colour(noise, 2)),
    "equal": lambda clean, sigma, noise: white(clean, sigma, colour(noise, 0)),
    "camera": lambda clean, sigma, noise: through_jpeg(
        to_8_bits(shot_and_read(clean, sigma, demosaiced(noise))), 92, subsampling=2
    ),
    "JPEG 75": lambda clean, sigma, noise: through_jpeg(to_8_bits(white(clean, sigma, noise)), 75),
    "JPEG 85": lambda clean, sigma, noise: through_jpeg(to_8_bits(white(clean, sigma, noise)), 85),
    "JPEG 95": lambda clean, sigma, noise: through_jpeg(to_8_bits(white(clean, sigma, noise)), 95),
}
OF_COLOURS = {"chroma", "equal", "camera"}  # kinds of noise that a grey picture cannot have


def degrade(kind, clean, sigma, seed=0):
    """The clean pixels (C, H, W), uint8, with noise of the kind at level sigma, as uint8."""
    noise = np.random.default_rng(seed).standard_normal(clean.shape)
    return to_8_bits(KINDS[kind](clean.astype(float), sigma, noise))


def blocks(x):
    """(C, H, W) cut into (N, C, BLOCK, BLOCK); what is left at the right and at the bottom is dropped."""
    c, h, w = x.shape
    x = x[:, : h // BLOCK * BLOCK, : w // BLOCK * BLOCK].reshape(c, h // BLOCK, BLOCK, w // BLOCK, BLOCK)
    return x.transpose(1, 3, 0, 2, 4).reshape(-1, c, BLOCK, BLOCK)


def true_sigma(clean, noisy):
    """The root mean square of noisy - clean over pixels and channels of the flat places, 0-255 scale.

    Flat places are the FLATTEST blocks by the standard deviation of the clean picture, among those where at most 1% of
    the noisy values are 0 or 255. Where these are less than a quarter of all, the least clipped quarter takes their
    place.
    """
    clean, noisy = blocks(clean.astype(float)), blocks(noisy.astype(float))
    if not len(clean):
        raise UserError(f"a picture is smaller than {BLOCK}x{BLOCK} pixels; leave it out")
    clipped = ((noisy <= 0) | (noisy >= 255)).mean(axis=(1, 2, 3))
    usable = clipped <= max(0.01, np.quantile(clipped, 0.25))
    clean, noisy = clean[usable], noisy[usable]
    spread = clean.var(axis=(2, 3)).mean(axis=1)
    flat = np.argsort(spread)[: max(1, int(FLATTEST * len(spread)))]
    return float(np.sqrt(np.square(noisy[flat] - clean[flat]).mean()))


def row(kind, pictures):
    """A row of the table: kind, and for each of LEVELS the share within 15% and the median of found / true."""
    cells = []
    for sigma in LEVELS:
        ratios = []
        for seed, read in enumerate(pictures):
            clean = read().numpy()
            noisy = degrade(kind, clean, sigma, seed)
            found = noise_level.estimate(noisy).sigma
            ratios.append(found / true_sigma(clean, noisy))
        right = np.mean(np.abs(np.array(ratios) - 1) < 0.15)
        cells.append(f"{right:.0%} ({np.median(ratios):.2f})")
    return f"| {kind:13} |" + "".join(f" {cell:>12} |" for cell in cells)


def main():
    pictures = data.whole_pictures("test", config.parse(__doc__, SETTINGS))
    print(f"{len(pictures)} pictures")
    print("| within 15%    |" + "".join(f" {f'sigma {sigma}':>12} |" for sigma in LEVELS))
    print("|---" + "|---" * len(LEVELS) + "|")
    for kind in KINDS:
        print(row(kind, pictures), flush=True)
    clean = [noise_level.estimate(read().numpy()).sigma for read in pictures]
    print(f"no noise added: at most 2 for {np.mean(np.array(clean) <= 2):.0%}, median {np.median(clean):.1f}, ", end="")
    print(f"highest {max(clean):.1f}")


if __name__ == "__main__":
    script.run(main)
