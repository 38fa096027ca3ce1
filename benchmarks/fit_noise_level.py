"""Fit model/noise_level.pth, with which support/noise_level.py reads a picture's noise level off its statistics.

    python -m benchmarks.fit_noise_level --data-dir data/photographs -o new.pth

Every training picture of the folder gets noise of random kinds: of any level, white or correlated across pixels and
channels, the same everywhere or that of a sensor, perhaps of one colour a pixel; then it is perhaps resized or
sharpened, and perhaps compressed as JPEG and cut. The level to be found is the true one in flat places,
benchmarks.noise_level.true_sigma. Prints the errors on the held-out pictures.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

import config
import data
from benchmarks.noise_level import blur, colour, demosaiced, shot_and_read, to_8_bits, true_sigma, white
from config import REQUIRED, Setting, UserError, name_ending, whole
from support import checkpoint, files, noise_level, script
from support.real_noise import through_jpeg

SETTINGS = data.PICTURE_SETTINGS | {
    "copies": Setting(160, whole(), "versions of every training picture, each with other noise"),
    "epochs": Setting(40, whole(), "passes over them"),
    "output": Setting(REQUIRED, name_ending(".pth"), "file to write, which must not exist", flag="-o"),
}  # fmt: skip
BATCH = 128


# ---- pictures ----------------------------------------------------------------------------------------------------


def scene(picture, random):
    """A clean picture (C, H, W) uint8 made from a photograph: of another size, cut, out of focus or grey."""
    image, size = Image.fromarray(picture.transpose(1, 2, 0)), np.array(picture.shape[:0:-1])
    if random.random() < 0.25:  # coarser or finer detail than a photograph of this size has
        size = (size * random.uniform(0.5, 2)).astype(int)
        image = image.resize(tuple(size), Image.Resampling.BICUBIC)
    if random.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 4)))
    size = np.minimum(size, random.integers(32, 300, 2) if random.random() < 0.3 else 481)
    left, top = random.integers(0, np.array(image.size) - size + 1)
    image = image.crop((left, top, left + size[0], top + size[1]))
    if random.random() < 0.1:
        image = image.convert("L").convert("RGB")
    return np.asarray(image).transpose(2, 0, 1)


def noise_like(clean, random):
    """Noise of unit variance, white or not; grey pictures get grey noise."""
    noise = random.standard_normal(clean.shape)
    if random.random() < 0.6:
        noise = blur(noise, random.uniform(0.2, 1.2))
    kind = random.random()
    if kind < 0.15 or (clean == clean[:1]).all():
        noise = colour(noise, 0)
    elif kind < 0.5:
        noise = colour(noise, random.uniform(0, 3))
    elif kind < 0.6:  # chroma is often coarser than luma
        luma = colour(noise, 0) / np.sqrt(3)
        noise = luma + blur(noise - noise.mean(axis=0), random.uniform(0.5, 2)) * random.uniform(0.5, 2)
    return noise / noise.std()


def processed(random):
    """A function of a picture, the same for the clean and the noisy one: resizing, sharpening or neither."""
    kind, factor = random.random(), random.choice([random.uniform(0.5, 0.95), random.uniform(1.05, 1.6)])
    radius, percent = random.uniform(0.6, 2), int(random.integers(40, 150))

    def process(pixels):
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        if kind < 0.12:
            image = image.resize([max(32, int(n * factor)) for n in image.size], Image.Resampling.BICUBIC)
        elif kind < 0.2:
            image = image.filter(ImageFilter.UnsharpMask(radius, percent, 0))
        return np.asarray(image).transpose(2, 0, 1)

    return process


def example(picture, seed):
    """(statistics, true level) of the picture (3, H, W), uint8, with random noise; None if there are no statistics."""
    random = np.random.default_rng(seed)
    clean = scene(picture, random)
    highest = 12 if random.random() < 0.4 else 90  # weak noise is the hardest to tell from texture
    sigma = np.exp(random.uniform(np.log(1), np.log(highest))) * (random.random() > 0.06)  # a few have none
    camera = random.random() < 0.15
    noise = demosaiced(random.standard_normal(clean.shape)) if camera else noise_like(clean, random)
    add = shot_and_read if random.random() < (0.7 if camera else 0.3) else white
    noisy = to_8_bits(add(clean.astype(float), sigma, noise))
    process = processed(random)
    clean, noisy = process(clean), process(noisy)
    if random.random() < 0.45:
        quality, chroma = int(random.integers(60, 99)), int(random.choice([0, 2, 2, 2]))  # 2: at half resolution
        noisy = through_jpeg(noisy, quality, subsampling=chroma)
        if random.random() < 0.2:  # cut afterwards, so that JPEG's blocks begin elsewhere
            y, x = random.integers(0, 16, 2)
            clean, noisy = clean[:, y:, x:], noisy[:, y:, x:]
    features, _ = noise_level.statistics(noise_level.windows(noisy))
    return None if features is None else (features, true_sigma(clean, noisy))


def examples(item):
    """Statistics (N, F) and levels (N,) of one picture; item: (its number, pixels, seeds)."""
    number, picture, seeds = item
    found = [found for seed in seeds if (found := example(picture, [number, seed])) is not None]
    return tuple(np.array(column, np.float32) for column in zip(*found))


def collect(split, copies, cfg):
    pictures = data.whole_pictures(split, cfg)
    # Other seeds for other splits: the held-out pictures have noise of their own.
    seeds = range(copies) if split == "train" else range(10**6, 10**6 + copies)
    items = ((number, read().numpy(), seeds) for number, read in enumerate(pictures))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        made = list(tqdm(pool.map(examples, items), f"{split} pictures", len(pictures), mininterval=2))
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*filter(None, made))]


# ---- fit ---------------------------------------------------------------------------------------------------------


def pinball(error, quantile):
    """The loss whose minimum is the quantile (Koenker & Bassett 1978); error: truth - estimate."""
    return torch.maximum(quantile * error, (quantile - 1) * error).mean()


def fit(features, levels, epochs):
    torch.manual_seed(0)
    model = noise_level.Regression()
    model.mean, model.std = features.mean(dim=0), features.std(dim=0) + 1e-3
    target, quantiles = noise_level.logarithm_of(levels)[:, None], torch.tensor(noise_level.OUTPUTS)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    if (steps := len(features) // BATCH) == 0:
        raise UserError(f"{len(features)} examples are too few; use more pictures or --copies")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * steps)
    for _ in tqdm(range(epochs), "epochs", mininterval=2):
        for batch in torch.randperm(len(features))[: steps * BATCH].view(steps, BATCH):
            x = features[batch] + 0.05 * model.std * torch.randn_like(features[batch])  # against overfitting
            loss = 3 * pinball(target[batch] - model(x), quantiles)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def report(model, features, levels):
    found = noise_level.from_logarithm(model(features))
    inside = (found[:, 1] <= levels) & (levels <= found[:, 2])
    for low, high in ((0, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 100)):
        chosen = (levels >= low) & (levels < high)
        ratio = found[chosen, 0] / levels[chosen].clamp(min=0.1)
        print(
            f"true level {low:3} to {high:3}: {chosen.sum():5} pictures, within 15%: "
            f"{((ratio - 1).abs() < 0.15).float().mean():.0%}, in the range given: {inside[chosen].float().mean():.0%}"
        )


def main():
    cfg = config.parse(__doc__, SETTINGS)
    files.refuse_existing(cfg.output)
    script.make_folder(Path(cfg.output).parent)
    torch.set_num_threads(1)  # the network is too small for more
    model = fit(*collect("train", cfg.copies, cfg), cfg.epochs)
    report(model, *collect("test", 10, cfg))
    checkpoint.save(cfg.output, {"model": model.state_dict()}, replace=False)
    print(f"saved: {cfg.output}")


if __name__ == "__main__":
    script.run(main)
