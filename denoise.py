"""Denoise picture files with a trained network. No input is ever overwritten.

    python denoise.py noisy.png -o clean.png               the noise level is estimated from the picture, and printed
    python denoise.py a.png b.jpg -o clean/ --sigma 25     known: a standard deviation of 25 on the 0-255 scale
    python denoise.py photos -o clean --compare            a folder and all below it, and before-after figures
    python denoise.py noisy.png -o clean.png --sheet       and a sheet of its centre at several strengths

From Python:

    clean = denoise.denoise(image)                         a Pillow image, a NumPy array or a tensor; you get the same

Any size; grey (8 or 16 bits) stays grey; alpha, EXIF data, colour profile and resolution stay where the format has
them; a picture turned by EXIF is written upright, and JPEG and WebP files with quality 95. Not kept: depth beyond 8
bits in colour, the transparent grey of 16 bits, the EXIF data of a TIFF that is read, XMP data, comments and other
texts, the gamma of a PNG, and all frames of an animation but the first. A large picture goes through the network in
tiles that give what the whole would.
"""

import functools
import math
import numbers
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import config
import diffusion
from config import REQUIRED, Setting, UserError, file_name, number, whole
from diffusion import GREY_LEVELS
from support import (
    checkpoint,
    devices,
    files,
    memory,
    noise_level,
    picture_files,
    pictures,
    pixels,
    script,
    sheets,
    tiles,
)
from support.noise_level import Level

LARGEST = 1000  # of sigma, on the 0-255 scale, and of strength
up_to_largest = number(float, 0, LARGEST, above=True)
SETTINGS = {
    "inputs": Setting(REQUIRED, file_name, "picture files, or folders of them", count="+"),
    "output": Setting(REQUIRED, file_name, "picture file to write, or folder for several", flag="-o"),
    "sigma": Setting(None, up_to_largest, "standard deviation of the noise, 0-255 scale; None: estimated"),
    "strength": Setting(1, up_to_largest, "factor of the assumed noise level: higher is smoother, lower sharper"),
    "steps": Setting(1, whole(1, 1000), "denoising steps; 1: the best PSNR, more: sharper"),
    "ensemble": Setting(1, whole(1, 8), "orientations to average over; 2: mirrored too, 8: all, at 8 times the cost"),
    "weights": Setting(None, file_name, "checkpoint; None: model/photo.pth, or model/unet32.pth if that is absent"),
    "compare": Setting(False, bool, "write a before-after figure beside each output, {name}_compare.png"),
    "sheet": Setting(False, bool, "write a sheet of the centre denoised at several strengths, {name}_sheet.png"),
    "overwrite": Setting(False, bool, "replace output files that exist"),
} | pictures.SETTINGS | devices.SETTINGS  # fmt: skip

# Pixels, height and width of a tile. Larger tiles take more memory and waste less on their margins: of 24 megapixels,
# 1.29 times as many go through the encoder with 384, 1.18 times with 576.
TILE = {"float32": 384, "bfloat16": 576}
WHOLE = 2_000_000  # pixels of the largest picture for a network that cannot be tiled


# ---- from Python -------------------------------------------------------------------------------------------------


def denoise(image, sigma=None, strength=1, weights=None, ensemble=1):
    """The image without its noise; type, shape, depth and scale are those of `image`.

    image: a Pillow image (mode L, LA, RGB, RGBA or I;16; 1 and P come back as L and RGB); a NumPy array (H, W),
    (H, W, 1) or (H, W, 3), uint8, uint16 or floating in [0, 1]; or a tensor (C, H, W) or (B, C, H, W) with C = 1 or 3,
    uint8, uint16 or floating in [-1, 1], each image of a batch by itself. Floating values are not clipped. sigma: the
    standard deviation of the noise on the 0-255 scale; None: estimated. strength: a factor of it. weights: a
    checkpoint; None: model/photo.pth, or model/unet32.pth if that is absent. ensemble: see diffusion.self_ensemble.
    Raises ValueError for other images and settings, CheckpointError, and UserError for a large image where the network
    must see it as a whole.
    """
    if not (isinstance(ensemble, numbers.Integral) and 1 <= ensemble <= 8):
        raise ValueError("ensemble must be a whole number from 1 to 8")
    if not (0 < strength <= LARGEST and (sigma is None or 0 < sigma <= LARGEST)):
        raise ValueError(f"sigma and strength must be above 0 and at most {LARGEST}")
    if isinstance(image, torch.Tensor) and image.dim() == 4 and len(image):
        return torch.stack([denoise(one, sigma, strength, weights, ensemble) for one in image])
    noisy, pack = pixels.unpack(image)
    with torch.device("cpu"):  # whatever the program's default device is
        return pack(denoise_pixels(load(weights), noisy, sigma, strength, ensemble=ensemble).clean)


class Network(NamedTuple):
    model: Any
    train_cfg: Any  # the settings of its training
    path: Path
    device: torch.device
    precision: str  # see devices.pick_precision
    margin: float  # pixels, see tiles.by_tiles


def load(weights=None, device="auto", precision="auto"):
    """The Network of a checkpoint, by default the one for photographs if there is one; cached until its file changes.

    Raises CheckpointError, and UserError if the device cannot be used.
    """
    path = Path(weights or (checkpoint.PHOTO if checkpoint.PHOTO.exists() else checkpoint.SHIPPED))
    return load_once(path, path.stat().st_mtime_ns if path.exists() else None, device, precision)


@functools.lru_cache(maxsize=1)
def load_once(path, changed, device, precision):
    """changed: the file's modification time, ns, or None; part of the cache's key and nothing else."""
    device = devices.pick(device)
    return prepare(*checkpoint.load_model(path, device), path, device, precision)


def prepare(model, train_cfg, path, device, precision):
    """The Network of what checkpoint.load_model returned."""
    margin = tiles.margin_of(tiles.receptive_field(model))
    return Network(model, train_cfg, path, device, devices.pick_precision(precision, device), margin)


# ---- pixels ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    clean: torch.Tensor
    level: Level  # of the noise, given or estimated
    gain: float  # what the network was told, over the level, see diffusion.grey


def denoise_pixels(network, noisy, sigma=None, strength=1, steps=1, ensemble=1):
    """The Result for pixels (C, H, W) of any height and width: uint8, uint16, or floating in [-1, 1]; C is 1 or 3.

    sigma: on the 0-255 scale; None: estimated. ensemble: see diffusion.self_ensemble. Apart from copies of the pixels,
    memory use is bounded. Raises UserError, see check_size.
    """
    model, T = network.model, network.train_cfg.noise_steps
    margin, size = network.margin, TILE[network.precision]
    check_size(network, *noisy.shape[1:])
    gain, source = 1.0, noisy
    if is_grey(noisy):
        gain = 1.0 if knows_equal_noise(network.train_cfg) else math.sqrt(3)
        source, model = noisy[:1], diffusion.grey(model, T, gain)
    level = Level(sigma, sigma, sigma) if sigma is not None else level_of(source, network, model, gain)
    told = torch.tensor([strength * (level.sigma / GREY_LEVELS)], dtype=torch.float32, device=network.device)
    t = diffusion.t_of(told, T)
    # Tiles in tiles: the outer ones, up to three times as wide or four of their margins (every step adds one), bound
    # the memory of a whole denoising, the inner ones that of a call of the network. With one step they coincide.
    in_tiles = tiles.tiled(diffusion.self_ensemble(model, ensemble), size, margin)
    once = steps == ensemble == 1 and getattr(network.model, "takes_inner", False)  # then no margin need be decoded

    def denoise_part(part, inner):
        predict = functools.partial(model, inner=inner) if once else in_tiles
        x = tiles.pad(pixels.to_x(part)[None].to(network.device))  # float32 alone: Apple's MPS has no float64
        x_t = x.contiguous(memory_format=devices.memory_format(network.device))
        x0_hat = diffusion.denoise_steps(predict, x_t, t, T, steps)[0, :, : part.shape[1], : part.shape[2]]
        return pixels.from_x(x0_hat.cpu(), part.dtype)

    clean = torch.empty_like(source)
    with torch.inference_mode(), devices.autocast(network.device, network.precision):
        tiles.by_tiles(denoise_part, source, clean, size * min(steps, 3), steps * margin)
    return Result(clean.expand_as(noisy), level, gain)


def check_size(network, height, width):
    """Raises UserError if a network that cannot work in tiles cannot take a picture of so many pixels."""
    if network.margin == math.inf and height * width > WHOLE:
        raise UserError(f"{network.path} must see a picture as a whole, of at most {WHOLE:,} pixels; use other weights")


def is_grey(noisy):
    """Whether pixels (C, H, W) are grey, even where they are stored as colours."""
    return all(torch.equal(plane, noisy[0]) for plane in noisy[1:])


def knows_equal_noise(train_cfg):
    """Whether a network has seen noise that is nearly equal in all channels, see real_noise.correlate."""
    return train_cfg.noise == "mixed" and train_cfg.noise_shares[0] > 0


@torch.inference_mode()
def level_of(source, network, model, gain):
    """The estimated Level of the noise in pixels (C, H, W). model: that of such images; gain: see diffusion.grey."""
    T = network.train_cfg.noise_steps
    highest = diffusion.t_of(diffusion.sigma_of(T, T) / gain, T)  # beyond, the network would be told more than it knows
    array = (source if source.dtype in pixels.WHITE else source.float()).cpu().numpy()
    knows_t = getattr(network.model, "knows_t", True)
    likelihood = functools.partial(diffusion.estimate_sigma, model, T=T, highest=highest) if knows_t else None
    return noise_level.estimate(array, likelihood, network.device)


# ---- files -------------------------------------------------------------------------------------------------------


def denoise_file(source, target, network, cfg):
    """Denoise a picture file, and print its noise level and what makes the result doubtful."""
    image = pictures.read(source, cfg.max_pixels, pixels.to_supported_mode)
    options, lost = picture_files.options_for(image, target)
    noisy, pack = pixels.unpack(image)
    del image  # of a large picture, memory that the network needs
    result = denoise_pixels(network, noisy, cfg.sigma, cfg.strength, cfg.steps, cfg.ensemble)

    def at_level(x, sigma):
        return denoise_pixels(network, x, sigma, steps=cfg.steps, ensemble=cfg.ensemble).clean

    for extra in extras_of(cfg):
        if extra == "compare":
            figure = sheets.before_after(noisy, result.clean)
        else:
            figure = sheets.strengths(noisy, result.level.sigma, at_level)
        picture_files.write(figure, picture_files.beside(target, extra), {"format": "PNG"}, cfg.overwrite)
    picture_files.write(pack(result.clean), target, options, cfg.overwrite)  # last: where it is, all is
    tqdm.write(f"{source} -> {target}  {describe(result.level, cfg.sigma, cfg.strength)}")
    warnings = [f"its {what} cannot be stored there" for what in lost]
    if found := doubt(noisy, result, network, cfg.strength):
        warnings.append(found)
    for warning in warnings:
        tqdm.write(f"WARNING: {source}: {warning}", sys.stderr)


def extras_of(cfg):
    return [extra for extra in ("compare", "sheet") if getattr(cfg, extra)]


def describe(level, given, strength):
    """The noise level as a text: `sigma 18 (estimated; 16 to 21)`. given: the level that the user gave, or None."""
    estimated = f"{rounded(level.sigma)} (estimated; {rounded(level.low)} to {rounded(level.high)})"
    found = f"{given:g} (given)" if given else estimated
    return f"sigma {found}" + (f", times {strength:g}" if strength != 1 else "")


def doubt(noisy, result, network, strength):
    """A reason to look at the result, or None."""
    if pixels.rms_change(noisy, result.clean) < 1:
        remedy = "a larger --strength" if strength < 1 else "--sigma 15, 25 or 40"
        return f"almost nothing was removed; try {remedy} if you see noise"
    train_cfg = network.train_cfg
    assumed = strength * result.level.sigma
    end = 0.5 if train_cfg.continuous_t else 1
    ends = [GREY_LEVELS * diffusion.sigma_of(t, train_cfg.noise_steps) for t in (end, train_cfg.noise_steps - end)]
    low, high = (level / result.gain for level in train_cfg.sigma_range or ends)
    if low / 2 <= assumed <= 1.1 * high:
        return None
    other = "give another --sigma"
    if network.path.resolve() == checkpoint.PHOTO and assumed > high and not is_grey(noisy):
        other = "for white noise try --weights model/unet32.pth"
    return (
        f"sigma {rounded(assumed)} is assumed, but the network was trained on {low:.1f} to {high:.1f}"
        f"{' (grey)' if result.gain > 1 else ''}; look at the result, or {other}"
    )


def rounded(sigma):
    """A noise level as text, of two digits or more."""
    return f"{sigma:.0f}" if sigma >= 9.95 else f"{sigma:.1f}"


def main():
    cfg = config.parse(__doc__, SETTINGS)
    memory.keep_freed_memory(of_any_size=True)  # for the next tile
    pairs = picture_files.plan(cfg.inputs, cfg.output, cfg.overwrite, extras_of(cfg))
    network = load(cfg.weights, cfg.device, cfg.precision)
    for folder in {target.parent for _, target in pairs}:
        script.make_folder(folder)
        files.clean(folder)
    print(f"weights: {network.path}")
    left_out = 0
    for source, target in tqdm(pairs, "pictures", leave=False, disable=len(pairs) == 1):
        try:
            denoise_file(source, target, network, cfg)
        except Exception as error:  # whatever is wrong with one picture, the others go on
            if len(pairs) == 1:
                raise
            left_out += 1
            reason = " ".join(str(error).split()) or repr(error)
            named = "" if reason.startswith(str(source)) else f"{source}: "
            tqdm.write(f"WARNING: left out: {named}{reason}", sys.stderr)
    if left_out:
        others = "; the others are written" if left_out < len(pairs) else ""
        raise UserError(f"{left_out} of {len(pairs)} pictures were left out, see above{others}")


if __name__ == "__main__":
    script.run(main)
