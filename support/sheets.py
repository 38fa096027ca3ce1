"""Figures to judge noise in: pictures side by side with every pixel shown as it is."""

import itertools

import torch
from PIL import Image, ImageDraw, ImageFont

MIDDLE = 200  # pixels of the middle that is enlarged
STRENGTHS = (0.5, 0.75, 1, 1.25, 1.5, 2, 3)
SIGMAS = (5, 10, 15, 20, 25, 40, 60)  # 0-255 scale; in place of multiples of next to nothing
GAP, LINE, FONT = 12, 24, 17  # pixels between pictures, of a label, of its letters
LEAST_WIDTH = 270  # pixels of a label


def before_after(before, after):
    """Pixels (C, H, W) before and after: the whole picture, and below it its middle at three times the size."""
    views = {"before": before, "after": after}
    if max(before.shape[1:]) <= MIDDLE:
        return sheet([(f"{label}, enlarged", shown(view, scale=3)) for label, view in views.items()], columns=2)
    enlarged = [(f"{label}, the middle enlarged", shown(middle(view), scale=3)) for label, view in views.items()]
    return sheet([(label, shown(view, largest=3 * MIDDLE)) for label, view in views.items()] + enlarged, columns=2)


def strengths(pixels, sigma, denoise):
    """The middle of a picture as denoise(pixels, sigma) leaves it at several levels, at twice the size.

    sigma: the noise level found, on the 0-255 scale.
    """
    levels = {f"--strength {factor:g}  (sigma {factor * sigma:.0f})": factor * sigma for factor in STRENGTHS}
    if sigma < SIGMAS[0]:
        levels = {f"--sigma {level}": level for level in SIGMAS}
    crop = middle(pixels)
    cells = [("before", crop)] + [(label, denoise(crop, level)) for label, level in levels.items()]
    return sheet([(label, shown(view, scale=2)) for label, view in cells], columns=4)


def middle(pixels, size=MIDDLE):
    """The middle (C, size, size) of pixels (C, H, W), or fewer pixels where the picture is smaller."""
    y, x = (max(0, length - size) // 2 for length in pixels.shape[1:])
    return pixels[:, y : y + size, x : x + size]


def shown(pixels, scale=1, largest=None):
    """Pixels as an RGB image, each of them scale x scale large, or reduced to `largest` pixels a side."""
    if pixels.dtype == torch.uint16:
        pixels = (pixels.float() / 257).round().byte()
    image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    if largest:
        image.thumbnail((largest, largest))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def sheet(cells, columns):
    """A picture of pictures: cells, a list of (label, RGB image), `columns` of them in a row."""
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    width = GAP + max(LEAST_WIDTH, *(image.width for _, image in cells))
    heights = [GAP + LINE + max(image.height for _, image in row) for row in rows]
    page = Image.new("RGB", (GAP + width * columns, GAP + sum(heights)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    for row, y in zip(rows, itertools.accumulate(heights, initial=GAP)):
        for i, (label, image) in enumerate(row):
            draw.text((GAP + i * width, y), label, "black", font)
            page.paste(image, (GAP + i * width, y + LINE))
    return page
