"""Denoise picture files with a trained network. No input is ever overwritten, no noise added.

    python denoise.py noisy.png -o clean.png               the noise level is estimated from the picture, and printed
    python denoise.py a.png b.jpg -o clean/ --sigma 25     it is known: a standard deviation of 25 grey levels of 255
    python denoise.py photos -o clean --compare            a folder with all below it, and before-after figures

Any size; grey (8 or 16 bits) stays grey; alpha, EXIF data and the colour profile are kept; a picture turned by EXIF is
written upright. What Pillow does not give: 16 bits of a colour (read as 8), EXIF data of a TIFF, and of an animation all
frames but the first. A large picture goes through the network in tiles that give what the whole picture would (with
--model plain nearly: what its upsampling does depends on the size of a tile).
"""

import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import config
import data
import diffusion
import visualize

# Pixels: what lies farther from an output of the network cannot change it. It is 23, and tiles need multiples of 4.
REACH = 24
TILE = 256 - 2 * REACH  # pixels, height and width of what one call of the network contributes
BLOCK = 7 * TILE - 2 * REACH  # pixels, height and width of what is denoised at once; both bound the memory
CROP, CROPS = 32, 4  # the noise level of a large picture is that of CROPS x CROPS crops of CROP x CROP pixels
MIDDLE = 256  # pixels of the middle that a before-after figure shows enlarged
DEEP = {".png", ".tif", ".tiff"}  # endings of files that keep 16 bits


# ---- pixels -----------------------------------------------------------------------------------------------------


def denoise(model, pixels, T, sigma=None, steps=1, device="cpu"):
    """Pixels (C, H, W) of any height and width, uint8 or uint16, denoised, and their noise level.

    C is 3, or 1 for grey. model: a colour model(x, t). sigma: in units of the [-1, 1] scale; None: estimated.
    The memory it takes beside the pixels is bounded, and a call of the model sees at most 256x256 pixels.
    """
    channels, height, width = pixels.shape
    top = np.iinfo(pixels.dtype).max
    gain = math.sqrt(3) if channels == 1 else 1.0
    if channels == 1:
        model = diffusion.grey(model)

    def to_x(part):
        x = torch.from_numpy(part.astype(np.float32)).to(device)[None]
        return (gain * (2 * x / top - 1)).contiguous(memory_format=data.memory_format(device))

    def denoise_block(part):
        t = torch.tensor([gain * sigma * T], device=device)
        x0_hat = diffusion.denoise_steps(tiled(model), to_x(part), t, T, steps)[0]
        return ((x0_hat / gain + 1) * top / 2).round().clamp(0, top).cpu().numpy()

    # The network has seen no image smaller than its training images, and takes multiples of 4 only.
    room = [(0, max(data.SIZE - n, -n % 4)) for n in (height, width)]
    padded = np.pad(pixels, [(0, 0), *room], mode="reflect") if np.any(room) else pixels  # a large copy less
    if sigma is None:
        crops = torch.cat([to_x(crop) for crop in spread_crops(padded)])
        sigma = diffusion.estimate_sigma(model, crops, T).quantile(0.5).item() / gain
    clean = np.empty_like(padded)
    by_tiles(denoise_block, padded, clean, BLOCK, steps * REACH)
    return clean[:, :height, :width], sigma


def spread_crops(pixels):
    """A large picture's crops, evenly spread, so that estimating takes bounded time; a small picture as it is."""
    if pixels[0].size <= (CROP * CROPS) ** 2:
        return [pixels]
    rows, columns = (np.linspace(0, n - CROP, CROPS).astype(int) for n in pixels.shape[1:])
    return [pixels[:, y : y + CROP, x : x + CROP] for y in rows for x in columns]


def tiled(model):
    """The same model(x, t), which calls `model` on tiles of x."""

    def run(x, t):
        eps_hat = torch.empty_like(x)
        by_tiles(lambda part: model(part, t), x, eps_hat, TILE, REACH)
        return eps_hat

    return run


def by_tiles(f, source, target, size, margin):
    """target = f(source) for arrays (..., H, W), a tile of size x size at a time.

    f sees `margin` more pixels on each side, up to the picture's edge. If its output depends on nothing farther away,
    and on nothing but the position modulo 4 (size, margin, H and W are multiples of 4), tiles make no difference.
    """
    height, width = source.shape[-2:]
    corners = [(y, x) for y in range(0, height, size) for x in range(0, width, size)]
    for y, x in tqdm(corners, "tiles", delay=2, leave=False, mininterval=1, disable=len(corners) == 1):
        top, left = max(y - margin, 0), max(x - margin, 0)
        part = f(source[..., top : y + size + margin, left : x + size + margin])
        target[..., y : y + size, x : x + size] = part[..., y - top :, x - left :][..., :size, :size]


# ---- files ------------------------------------------------------------------------------------------------------


def plan(inputs, output, overwrite=False, compare=False):
    """[(source, target)], paths of every picture to denoise. Raises what can be known to go wrong before it does."""
    to_folder = len(inputs) > 1 or os.path.isdir(inputs[0]) or os.path.isdir(output) or output.endswith(("/", os.sep))
    output, pairs = Path(output), []
    for path in map(Path, inputs):
        if path.is_dir():
            if output.resolve().is_relative_to(path.resolve()):
                raise config.ConfigError(f"the output {output} is inside the input {path}; choose a folder outside it")
            pairs += [(path / file, output / file) for file in data.image_files(path)]
        elif path.exists():
            pairs.append((path, output / path.name if to_folder else output))
        else:
            raise config.ConfigError(f"{path} does not exist; name picture files or folders of them")
    if not pairs:
        raise config.ConfigError(f"no pictures (.png, .jpg, ...) in {', '.join(inputs)}")
    if to_folder and output.exists() and not output.is_dir():
        raise config.ConfigError(f"{output} is a file; several pictures need a folder to go to")
    originals = {identity(source) for source, _ in pairs}
    source_of = {}
    for source, target in pairs:
        if target.suffix.lower() not in data.IMAGE_FILES:
            raise config.ConfigError(
                f"{target} has no ending of a picture file that can be written ({' '.join(sorted(data.IMAGE_FILES))}); "
                "name the output file with one of them, or a folder with a / at its end"
            )
        for path in (target, figure_of(target)) if compare else (target,):
            if path in source_of:
                raise config.ConfigError(
                    f"{source_of[path]} and {source} would both be written to {path}; denoise them into two folders"
                )
            source_of[path] = source
            if path.is_dir():
                raise config.ConfigError(f"{path} is a folder; choose another name for the denoised {source}")
            if path.exists() and identity(path) in originals:
                raise config.ConfigError(f"{path} is an input, which is never overwritten; choose another output")
            if path.exists() and not overwrite:
                raise config.ConfigError(f"{path} exists; choose another output, or add --overwrite to replace it")
    return pairs


def identity(path):
    """What two names of one file have in common."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def figure_of(target):
    return target.with_name(f"{target.stem}_compare.png")


def writable(image):
    """The Pillow image in one of the modes that are written: L, LA, RGB, RGBA or, for 16 bits, I;16."""
    if image.mode.startswith("I"):
        deep = Image.fromarray(np.asarray(image).clip(0, 65535).astype(np.uint16))
        deep.info = image.info
        return deep
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    mode += "A" if image.has_transparency_data else ""
    return image if image.mode == mode else image.convert(mode)


def denoise_file(source, target, max_pixels, compare, run):
    """Denoise a picture file with run(pixels) -> (pixels, sigma); returns sigma and whether the picture is grey."""
    image = data.read_image(source, max_pixels, writable)
    # A format that cannot hold such a picture is better found on a corner of it, before the work.
    encode(io.BytesIO(), image.crop((0, 0, 64, 64)), target, image.info)
    mode, info = image.mode, image.info
    alpha = image.getchannel("A") if mode.endswith("A") else None
    pixels = np.atleast_3d(np.asarray(image))[..., : 3 if mode.startswith("RGB") else 1].transpose(2, 0, 1)
    del image  # of a large picture, memory that the network needs
    if (pixels == pixels[:1]).all():  # grey, also where it is kept as colours
        pixels = pixels[:1]
    clean, sigma = run(pixels)
    result = as_colour(clean) if mode.startswith("RGB") else Image.fromarray(np.ascontiguousarray(clean[0]))
    if alpha:
        result.putalpha(alpha)
    checkpoint.write_atomically(target, lambda file: encode(file, result, target, info))
    if compare:
        before_after(figure_of(target), pixels, clean)
    return sigma, len(pixels) == 1


def as_colour(pixels):
    """Pixels (C, H, W), uint8, as an RGB Pillow image."""
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)))


def encode(file, image, path, info):
    """Write the image in the format of path's ending, with what `info` of the original is to be kept."""
    if image.mode == "I;16" and path.suffix.lower() not in DEEP:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    options = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    profile = info.get("icc_profile", b"")
    if profile[16:20] == (b"RGB " if image.mode.startswith("RGB") else b"GRAY"):  # the colours it is made for
        options["icc_profile"] = profile
    if "exif" in info:
        options["exif"] = info["exif"]
    try:
        image.save(file, Image.registered_extensions()[path.suffix.lower()], **options)
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # a full disk, not the format
            raise
        raise data.DataError(f"{path} cannot be written ({error}); choose another ending, such as .png") from None


def before_after(path, before, after):
    """Save a figure of the pixels (C, H, W) before and after: whole, and the middle of a large picture."""

    def cell(title, pixels):
        image = as_colour((pixels // 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels)
        image.thumbnail((2 * MIDDLE, 2 * MIDDLE))
        return title, data.scale(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0], None

    height, width = before.shape[1:]
    cells = [cell("before", before), cell("after", after)]
    if max(height, width) > MIDDLE:
        y, x = max(0, height - MIDDLE) // 2, max(0, width - MIDDLE) // 2
        middle = np.s_[:, y : y + MIDDLE, x : x + MIDDLE]
        cells += [cell("before, middle", before[middle]), cell("after, middle", after[middle])]
    visualize.panels(path, cells)


def warn_outside(source, sigma, grey, trained):
    """Say so if the network has hardly seen such noise: below half a step, or above 127 on the 0-255 scale.

    trained: the config it was trained with.
    """
    gain, T = math.sqrt(3) if grey else 1, trained["noise_steps"]
    margin = 0.5 if trained.get("continuous_t") else 0
    if not 0.5 / T <= gain * sigma <= 127 / 127.5:
        low, high = (127.5 * t / T / gain for t in (1 - margin, T - 1 + margin))
        tqdm.write(
            f"WARNING: {source}: sigma {127.5 * sigma:.1f} is assumed, but the network was trained on "
            f"{low:.1f} to {high:.1f}{' (grey)' if grey else ''}; look at the result, or give another --sigma",
            sys.stderr,
        )


def main():
    names = "inputs output sigma steps weights out_dir compare overwrite max_pixels device precision"
    cfg = config.parse(__doc__, names)
    pairs = plan(cfg.inputs, cfg.output, cfg.overwrite, cfg.compare)
    weights = checkpoint.choose(cfg.weights, cfg.out_dir)
    device = config.pick_device(cfg.device)
    precision = config.pick_precision(cfg.precision, device)
    model, trained = checkpoint.load_model(weights, device)
    T = trained["noise_steps"]
    if trained["model"] == "plain" and cfg.sigma is None:
        raise config.ConfigError(f"{weights} does not know noise levels (--model plain); give the level with --sigma")
    for folder in {target.parent for _, target in pairs}:
        config.make_folder(folder)
    print(f"weights: {weights}")

    def run(pixels):
        sigma = None if cfg.sigma is None else cfg.sigma / 127.5
        with torch.inference_mode(), config.autocast(device, precision):
            return denoise(model, pixels, T, sigma, cfg.steps or 1, device)

    bad = 0
    for source, target in tqdm(pairs, "pictures", leave=False, disable=len(pairs) == 1):
        try:
            sigma, grey = denoise_file(source, target, cfg.max_pixels, cfg.compare, run)
        except (data.DataError, OSError) as error:
            bad += 1
            if len(pairs) == 1:
                raise
            tqdm.write(f"WARNING: left out: {error}", sys.stderr)
            continue
        how = "estimated" if cfg.sigma is None else "given"
        tqdm.write(f"{source} -> {target}  sigma {127.5 * sigma:.1f} ({how})")
        warn_outside(source, sigma, grey, trained)
    if bad:
        raise data.DataError(f"{bad} of {len(pairs)} pictures were left out, see above; the others are written")


if __name__ == "__main__":
    config.run(main, data.DataError, checkpoint.CheckpointError)
