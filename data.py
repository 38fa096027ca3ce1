"""Images as one uint8 tensor (N, 3, S, S), batches of them as float32 x0 in [-1, 1], and the noise of a step.

images, source = load("train", cfg)                         # cfg.dataset: a name in DATASETS, or "auto"
for x0 in batches(images, cfg, epoch):                      # (cfg.batch_size, 3, S, S)
    t, eps = draw_noise(x0.shape, cfg, x0.device, step)     # (cfg.batch_size,), (cfg.batch_size, 3, S, S)
"""

import dataclasses
import functools
import hashlib

import torch

import config
import diffusion
from config import Setting, UserError, file_name, real, whole
from support import real_noise, streams
from support.crops import Crops
from support.datasets import DATASETS, automatic, folder, refuse_pictures
from support.devices import memory_format
from support.pictures import read

TEST_BATCH = 250  # test images measured at a time
SETTINGS = {
    "dataset": Setting("auto", ("auto", *DATASETS), "auto: cifar10 if it is there or can be downloaded, else leaves"),
    "data_dir": Setting("data", file_name, "folder of the images; downloads and caches go there too"),
    "limit": Setting(None, whole(), "use at most this many images of each split (--fresh-crops: pictures); None: all"),
} | {key: setting for module in DATASETS.values() for key, setting in module.SETTINGS.items()}  # fmt: skip
TRAINING_ONLY = {"crops_per_image", "fresh_crops", "scales"}
TEST_SETTINGS = {name: setting for name, setting in SETTINGS.items() if name not in TRAINING_ONLY}
PICTURE_SETTINGS = TEST_SETTINGS | {"dataset": SETTINGS["dataset"]._replace(default="folder")}  # of whole pictures
del PICTURE_SETTINGS["crop_size"]
NOISE_SETTINGS = {
    "continuous_t": Setting(False, bool, "train on all noise levels, t within 1/2 of the integers"),
    "sigma_range": Setting(None, real(0, 127), "lowest and highest sigma, 0-255; None: those of the steps", 2),
    "sigma_power": Setting(0.0, real(0, 9), "density of the levels in --sigma-range: sigma to this power"),
    "noise": Setting("white", ("white", "mixed"), "mixed: some of it correlated, some through JPEG"),
    "noise_shares": Setting((0.25, 0.1), real(0, 1), "mixed: share of correlated noise, share of JPEG", 2),
}


def load(split, cfg):
    """The images of a split ("train" or "test"), uint8 (N, 3, S, S), and a phrase that says where they come from.

    With cfg.fresh_crops, the training images are Crops. cfg.limit: a fixed random choice. Raises UserError.
    """
    cfg = resolve(cfg)
    images, source = DATASETS[cfg.dataset].load(split, cfg)
    if isinstance(images, list):
        images = Crops.of(images, cfg.crop_size, cfg.crops_per_image)
    elif (chosen := streams.choice(len(images), cfg.limit)) is not None:
        images = images[chosen]
    return images, f"{len(images):,} {split} images of {source}"


def resolve(cfg):
    """cfg with "auto", and other data settings left open, replaced by what they stand for. Raises UserError."""
    if cfg.dataset == "auto":
        cfg = dataclasses.replace(cfg, dataset=automatic(cfg.data_dir, typed="data_dir" in cfg.given))
    elif cfg.dataset != "folder" and "data_dir" in cfg.given and "dataset" not in cfg.given:
        refuse_pictures(cfg.data_dir, typed=True)  # the data set is that of a checkpoint
    chosen = DATASETS[cfg.dataset]
    for other, module in DATASETS.items():
        unused = (module.SETTINGS.keys() - chosen.SETTINGS.keys()) & vars(cfg).keys()
        config.refuse(cfg, unused, f"is an option of --dataset {other}, not of {cfg.dataset}")
        # What a preset has set for the other data set does not hold here.
        cfg = dataclasses.replace(cfg, **{key: module.SETTINGS[key].default for key in unused})
    return cfg


def whole_pictures(split, cfg):
    """The pictures of a split, as functions: read() -> uint8 (3, H, W), any size, or DataError. Raises UserError."""
    cfg = resolve(cfg)
    if cfg.dataset != "folder":
        raise UserError(f"--dataset {cfg.dataset} has no whole pictures; use --dataset folder")

    def reader(name, path):
        again = functools.partial(read_whole, path, cfg.max_pixels)
        again()  # an unreadable picture is met here, before the long work
        return again

    # In one thread: one picture at a time in memory.
    return folder.read_all(split, folder.files(split, cfg), cfg, reader, threads=1)


def read_whole(path, max_pixels):
    return torch.from_numpy(read(path, max_pixels)).permute(2, 0, 1)


def fingerprint(*splits):
    """16 hexadecimal digits that tell whether two runs have the same images."""
    sha = hashlib.sha256()
    for images in splits:
        if isinstance(images, Crops):
            sha.update(repr((images.shapes.tolist(), images.size, images.each)).encode())
            images = images.pixels
        sha.update(images.numpy().data)
    return sha.hexdigest()[:16]


# ---- batches -----------------------------------------------------------------------------------------------------


def scale(images):
    """Images on the 0-255 scale as float32 in [-1, 1]."""
    return (images.float() / diffusion.GREY_LEVELS - 1).contiguous(memory_format=memory_format(images.device))


def batches(images, cfg, epoch, rank=0, world_size=1, start=0):
    """One epoch of batches x0, (cfg.batch_size / world_size, 3, S, S) float32 in [-1, 1], on the device of `images`.

    The order, the crops and the orientations follow from (cfg.seed, epoch) alone. Of each batch, rank r gets the
    r-th of world_size equal parts. An incomplete last batch is left out (every epoch shuffles anew). start: batches to
    skip. cfg.flip: mirror with probability 1/2; cfg.augment: one of all eight orientations instead.
    """
    random = streams.generator("cpu", cfg.seed, streams.ORDER, epoch)
    order = torch.randperm(len(images), generator=random).to(images.device)
    turn = torch.zeros(len(images), dtype=torch.long)  # bit 0: mirror, bit 1: upside down, bit 2: swap the axes
    if cfg.augment:
        turn = torch.randint(8, (len(images),), generator=random)
    elif cfg.flip:
        turn = (torch.rand(len(images), generator=random) < 0.5).long()
    turn = turn.to(images.device)
    take = images.draw(cfg.seed, epoch) if isinstance(images, Crops) else images.__getitem__
    share = cfg.batch_size // world_size
    for i in range(start, len(images) // cfg.batch_size):
        part = slice(i * cfg.batch_size + rank * share, i * cfg.batch_size + (rank + 1) * share)
        x, turns = take(order[part]), turn[part, None, None, None]
        if cfg.augment or cfg.flip:
            x = torch.where(turns & 1 > 0, x.flip(3), x)
        if cfg.augment:
            x = torch.where(turns & 2 > 0, x.flip(2), x)
            x = torch.where(turns & 4 > 0, x.transpose(2, 3), x)
        yield scale(x)


# ---- noise -------------------------------------------------------------------------------------------------------


def draw_noise(shape, cfg, device, step):
    """The noise of a step: t (B,), uniform on 1 ... T-1, and standard Gaussian eps of `shape`, (B, C, H, W).

    cfg.sigma_range, two levels on the 0-255 scale: sigma lies between them, with a density proportional to
    sigma ** cfg.sigma_power, and t is real. Else cfg.continuous_t: each integer plus a uniform number from -1/2 to 1/2.
    cfg.noise "mixed": see real_noise.correlate; its JPEG part needs x0, see draw_qualities and real_noise.compress.
    """
    T, random = cfg.noise_steps, streams.generator(device, cfg.seed, streams.NOISE, step)
    # Drawn even where it is replaced below, so that eps is the same however t is drawn.
    t = torch.randint(1, T, shape[:1], generator=random, device=device)
    eps = torch.randn(shape, generator=random, device=device)
    if cfg.sigma_range:
        t = t_of_quantile(torch.rand(shape[:1], generator=random, device=device), cfg)
    elif cfg.continuous_t:
        t = t + torch.rand(shape[:1], generator=random, device=device) - 0.5
    if cfg.noise == "mixed":
        t, eps = t.float(), real_noise.correlate(eps, random, cfg.noise_shares[0])
    return t, eps


def t_of_quantile(quantile, cfg):
    """t at a quantile, a tensor from 0 to 1, of the noise levels that cfg.sigma_range and cfg.sigma_power describe."""
    low, high = (sigma / diffusion.GREY_LEVELS for sigma in cfg.sigma_range)
    power = 1 + cfg.sigma_power
    return diffusion.t_of((low**power + (high**power - low**power) * quantile) ** (1 / power), cfg.noise_steps)


def draw_qualities(cfg, step):
    """The JPEG quality of each noisy image of a step if cfg.noise is "mixed", (B,): 70 to 100, or 0: not compressed."""
    random = streams.generator("cpu", cfg.seed, streams.JPEG, step)
    qualities = torch.randint(70, 101, (cfg.batch_size,), generator=random)
    return torch.where(torch.rand(cfg.batch_size, generator=random) < cfg.noise_shares[1], qualities, 0)


def held_out_noise(images, start):
    """Standard Gaussian noise for the batch of at most TEST_BATCH test images that begins at `start`.

    An image's noise follows from its place alone, on every kind of device: it is drawn on the CPU, for a whole batch.
    """
    random = streams.generator("cpu", 0, streams.HELD_OUT_NOISE, start)
    return torch.randn(TEST_BATCH, *images.shape[1:], generator=random)[: len(images)].to(images.device)
