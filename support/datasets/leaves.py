"""Built-in training images: the dead-leaves model of natural images, no download.

    images = dead_leaves(250, torch.Generator().manual_seed(0))      # uint8 (250, 3, 32, 32)

Opaque random shapes fall on one another, their sizes after a power law (Lee, Mumford & Huang 2001, "Occlusion models
for natural images"). Denoisers trained on such images come close to ones trained on photographs if the leaves have
textures and the camera blurs a little (Achddou et al. 2021; arXiv 2504.10201). The constants were chosen by two
measures against CIFAR-10: the statistics of the images, and the loss there of a network trained on leaves.
"""

import math
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from support import streams
from support.cache import cached
from support.pictures import SIZE

CHUNKS = {"train": range(200), "test": range(200, 240)}  # of CHUNK images, each with its own random numbers
CHUNK = 250
SEED = 0  # runs with other seeds train on the same images


SETTINGS = {}


def load(split, cfg):
    """50,000 training or 10,000 test images, made once (under a minute on two cores) and stored in data_dir.

    A changed recipe makes other images, under another name.
    """
    path = Path(cfg.data_dir) / f"leaves-{split}-{SEED}-{recipe()}.bin"

    def make():
        progress = tqdm(CHUNKS[split], f"making {split} images", leave=False, mininterval=1)
        chunks = [dead_leaves(CHUNK, streams.generator("cpu", SEED, streams.LEAVES, i)) for i in progress]
        return torch.cat(chunks), {}

    images, _ = cached(path, SIZE, make, CHUNK * len(CHUNKS[split]))
    return images, "built-in dead leaves"


def recipe():
    """8 hexadecimal digits that change with this file."""
    return f"{zlib.crc32(Path(__file__).read_text('utf-8').encode()):08x}"


# ---- the model ---------------------------------------------------------------------------------------------------

LEAVES = 24  # an image; the first is the background
RADIUS = (1.2, 40.0)  # pixels, smallest and largest
POWER = 2.2  # density of the radius r ~ r^-POWER
ELONGATION = 0.5  # at most: log of the ratio of a leaf's longer half-axis to its radius
BOXES = 0.3  # share of rectangles; the others are ellipses
WAVINESS = 0.3  # of the outlines, at most, in radii
EDGE = (0.8, 1.0)  # pixels, width of the soft edges, one for each image
BLUR = 0.34  # pixels, standard deviation of the Gaussian that smooths the textures
TEXTURE = 0.25  # strength at most, in units of the full range 0 ... 1, as all that follows
TEXTURE_SLOPE = (1.0, 2.0)  # amplitude of a texture ~ frequency^-slope
SHADING = 0.5  # linear change of brightness across the image, relative to CONTRAST
CONTRAST = 0.22  # standard deviation of the brightness of the leaves of an image ...
CONTRAST_SPREAD = 0.5  # ... which is log-normal over images, with this standard deviation of the log
SATURATION_SPREAD = 0.5  # the same for the two axes of colour
MEAN = (0.494, 0.485, 0.450)  # red, green, blue
# Standard deviations along (brightness, red - blue, green - magenta) between images, and between the leaves of one.
BETWEEN_IMAGES = (0.02, 0.045, 0.018)
BETWEEN_LEAVES = (CONTRAST, 0.05, 0.028)
COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (0.5, -1.0, 0.5))


def dead_leaves(n, random):
    """n images drawn from the generator `random`, uint8 (n, 3, 32, 32)."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=random)

    def normal(*shape):
        return torch.randn(n, *shape, generator=random)

    # What differs from leaf to leaf, from the largest, which lies below, to the smallest: (n, LEAVES, ...).
    a = 1 - POWER
    radius = uniform(RADIUS[0] ** a, RADIUS[1] ** a, LEAVES).sort(dim=1).values ** (1 / a)
    stretch = uniform(-ELONGATION, ELONGATION, LEAVES).exp()
    angle = uniform(0, math.pi, LEAVES)
    reach = SIZE / 2 + radius.clamp(max=SIZE / 2)
    centre = uniform(-1, 1, LEAVES, 2) * reach[..., None]
    box = uniform(0, 1, LEAVES) < BOXES
    waviness = uniform(0, WAVINESS, LEAVES)
    contrast = (CONTRAST_SPREAD * normal(1, 1)).exp()
    axes = torch.tensor(COLOUR_AXES)
    saturation = (SATURATION_SPREAD * normal(1, 1)).exp()
    leaf_colour = normal(LEAVES, 3) * torch.tensor(BETWEEN_LEAVES) * contrast
    leaf_colour[..., 1:] *= saturation
    colour = (normal(1, 3) * torch.tensor(BETWEEN_IMAGES) + leaf_colour) @ axes + torch.tensor(MEAN)
    slope = SHADING * CONTRAST * contrast[..., None] * normal(LEAVES, 1, 2) / SIZE * (1 + 0.2 * normal(LEAVES, 3, 1))
    strength = TEXTURE * uniform(0, 1, LEAVES, 1) ** 1.5 * (1 + 0.2 * normal(LEAVES, 3))
    sharpness = 2 / (EDGE[0] * (EDGE[1] / EDGE[0]) ** uniform(0, 1, 1))
    fields = texture_fields(4, uniform, normal).flatten(2)  # (n, 4, 1024)

    # Pixel coordinates with the origin in the middle, as rows (1, x, y): a plane over the image is a product with them.
    y, x = torch.meshgrid(*[torch.arange(SIZE) - (SIZE - 1) / 2] * 2, indexing="ij")
    plane = torch.stack([torch.ones(SIZE * SIZE), x.flatten(), y.flatten()])  # (3, 1024)

    image = None
    for k in range(LEAVES):
        paint = torch.cat([colour[:, k, :, None], slope[:, k]], dim=2) @ plane  # (n, 3, 1024)
        paint += strength[:, k, :, None] * fields[:, k % 4, None]
        if image is None:
            image = paint
            continue
        # Distance from the leaf's centre in units of its half-axes, along them.
        cos, sin = angle[:, k].cos(), angle[:, k].sin()
        cx, cy = centre[:, k].unbind(1)
        u = torch.stack([-cx * cos - cy * sin, cos, sin], 1) / (radius * stretch)[:, k, None] @ plane  # (n, 1024)
        v = torch.stack([cx * sin - cy * cos, -sin, cos], 1) / (radius / stretch)[:, k, None] @ plane
        distance = torch.where(box[:, k, None], torch.maximum(u.abs(), v.abs()), torch.hypot(u, v))
        inside = 1 - distance + waviness[:, k, None] * fields[:, (k + 1) % 4]
        cover = torch.sigmoid(inside * radius[:, k, None] * sharpness)
        image = torch.lerp(image, paint, cover[:, None])
    return (255 * image).round_().clamp_(0, 255).to(torch.uint8).view(n, 3, SIZE, SIZE)


def texture_fields(count, uniform, normal):
    """Gaussian noise with a power-law spectrum and a slight blur, zero mean, unit variance: (n, count, 32, 32)."""
    frequency = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE))
    frequency[0, 0] = 1  # the mean, taken out below
    spectrum = torch.fft.rfft2(normal(count, SIZE, SIZE))
    spectrum *= frequency ** -uniform(*TEXTURE_SLOPE, 1, 1, 1) * torch.exp(-2 * (math.pi * BLUR * frequency) ** 2)
    spectrum[..., 0, 0] = 0
    field = torch.fft.irfft2(spectrum, s=(SIZE, SIZE))
    return field / field.std(dim=(2, 3), keepdim=True)
