"""A folder of pictures: DIR/train and DIR/test if both are there, else a fixed tenth of its files is held out.

A picture larger than --crop-size gives several crops: random ones for training (fixed, or drawn anew every epoch), and
evenly spread ones for testing, so that the held-out images are at least HELD_OUT_CROPS.
"""

import argparse
import contextlib
import hashlib
import math
import os
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from tqdm import tqdm

from config import Setting, number, whole
from support import pictures
from support.cache import cached
from support.pictures import SIZE, DataError
from support.streams import choice

HELD_OUT = 10  # of a folder without train/ and test/, one file in this many is a test image
HELD_OUT_CROPS = 256  # at least, where the test pictures are large enough
SEED = 0  # of the fixed crops, so that runs with other seeds train on the same images
SAMPLED = 100  # files whose size is looked up, to foresee the memory that all take


def multiple_of_4(text):
    value = whole(SIZE, 256)(text)
    if value % 4:
        raise argparse.ArgumentTypeError(f"must be a multiple of 4, not {text!r}")
    return value


SETTINGS = {
    "crop_size": Setting(SIZE, multiple_of_4, "pixels, height and width of the crops of a folder's pictures"),
    "crops_per_image": Setting(64, whole(1, 100_000), "random crops from each larger training image of a folder"),
    "fresh_crops": Setting(False, bool, "draw the crops anew every epoch; the pictures are held in memory"),
    "scales": Setting((1.0,), number(float, 0, 1, above=True), "scales of the copies to train on, at most 1", "+"),
    "skip_bad_images": Setting(False, bool, "leave out unreadable or too small images of a folder, with a count"),
} | pictures.SETTINGS  # fmt: skip


def load(split, cfg):
    """See support/datasets/__init__.py."""
    named = files(split, cfg)
    return full_pictures(named, cfg) if split == "train" and cfg.fresh_crops else fixed_crops(split, named, cfg)


def full_pictures(named, cfg):
    """(pictures, source) to draw new crops from: uint8 (3, H, W), every training picture at each of cfg.scales."""
    squares, crops = sum(scale**2 for scale in cfg.scales), len(cfg.scales) * cfg.crops_per_image
    check_memory(
        named,
        cfg,
        lambda width, height: 3 * width * height * squares + 32 * crops,  # of a crop, what crops.Crops.draw keeps
        what=f"{len(named):,} pictures",
        remedy="lower --limit or use fewer --scales",
    )
    good = read_all("train", named, cfg, lambda name, path: copies(path, cfg, cfg.scales))
    return [torch.from_numpy(x).permute(2, 0, 1) for some in good for _, x in some], describe(len(good), cfg)


def fixed_crops(split, named, cfg):
    """(images, source): crops (N, 3, S, S), stored in data_dir until a file or an option changes,
    unless a picture had to be left out."""
    count = cfg.crops_per_image * len(cfg.scales) if split == "train" else math.ceil(HELD_OUT_CROPS / len(named))

    def crops(name, path):
        if split == "train":
            return np.concatenate([random_crops(name, scale, x, cfg) for scale, x in copies(path, cfg, cfg.scales)])
        ((_, picture),) = copies(path, cfg, scales=(1.0,))
        return windows(picture, spread_corners(picture, cfg.crop_size, count), cfg.crop_size)

    def make():
        size = cfg.crop_size
        check_memory(
            named,
            cfg,
            lambda width, height: 3 * size**2 * (count if max(width, height) > size else 1),
            what=f"the crops of {len(named):,} pictures",
            remedy="lower --crop-size or --limit"
            + (", or --crops-per-image, or use fewer --scales" if split == "train" else ""),
        )
        good = read_all(split, named, cfg, crops)
        return torch.from_numpy(np.concatenate(good)), {"pictures": len(good)}

    def lasting(about):  # a picture that could not be read must not be left out forever
        return about["pictures"] == len(named)

    if len(named) == cfg.limit:  # a few of the files must not replace what is stored of all
        images, about = make()
    else:
        path = cache_file(split, named, count, cfg)
        images, about = cached(path, cfg.crop_size, make, lasting=lasting)
        remove_outdated(path)
    if split == "test" and about["pictures"] < 2 and cfg.limit != 1:
        print(
            f"WARNING: only one picture of {cfg.data_dir} is held out, so a held-out loss says little; add pictures, "
            "or sort them into train/ and test/",
            file=sys.stderr,
        )
    return images, describe(about["pictures"], cfg)


def describe(count, cfg):
    return f"{count:,} {'picture' if count == 1 else 'pictures'} in {cfg.data_dir}"


def files(split, cfg):
    """The pictures of a split, [(relative name, path)], at most cfg.limit: a fixed random choice. Raises DataError."""
    root = Path(cfg.data_dir)
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder; --data-dir must name a folder of images")
    has_splits = is_sorted(root)
    root = root / split if has_splits else root
    out_dir = getattr(cfg, "out_dir", None)
    if out_dir and Path(out_dir).resolve().is_relative_to(root.resolve()):
        raise DataError(f"--out-dir {out_dir} is inside {root}, where its figures would become images; choose another")
    names = pictures.image_files(root)
    names = names if has_splits else hold_out(names)[split == "test"]
    if not names:
        raise DataError(f"no {split} images in {root}; put at least two image files there (.png, .jpg, ...)")
    chosen = choice(len(names), cfg.limit)
    return [(name, root / name) for name in (names if chosen is None else [names[i] for i in chosen])]


def is_sorted(root):
    """Whether a folder has its own splits."""
    return os.path.isdir(Path(root, "train")) and os.path.isdir(Path(root, "test"))


def hold_out(names):
    """(train, test): a file is a test image by a hash of its relative path, whatever other files there are."""
    rank = {name: zlib.crc32(os.fsencode(name)) for name in names}
    test = {name for name in names if rank[name] % HELD_OUT == 0}
    if not test or len(test) == len(names):
        test = set(sorted(names, key=rank.get)[:1])
    return [name for name in names if name not in test], sorted(test)


# ---- reading -----------------------------------------------------------------------------------------------------


def read_all(split, named, cfg, read, threads=None):
    """[read(name, path)] of all files, by default in a thread a core. A DataError ends it, or that file is left out."""

    def read_or_none(item):
        try:
            return read(*item)
        except DataError as error:
            if not cfg.skip_bad_images:
                raise DataError(f"{error}, or add --skip-bad-images") from None
            return None

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        results = pool.map(read_or_none, named)
        progress = tqdm(results, f"reading {split} images", len(named), delay=2, leave=False, mininterval=1)
        good = [result for result in progress if result is not None]
    if len(good) < len(named):
        bad = len(named) - len(good)
        print(f"WARNING: left out {bad} of {len(named)} {split} images of {cfg.data_dir}", file=sys.stderr)
    if not good:
        raise DataError(
            f"none of the {len(named)} {split} images in {cfg.data_dir} can be used; "
            "run without --skip-bad-images to see why"
        )
    return good


def copies(path, cfg, scales):
    """[(scale, uint8 (H, W, 3))]: the picture at every scale at which it is at least cfg.crop_size high and wide."""
    picture = pictures.read(path, cfg.max_pixels)
    height, width = picture.shape[:2]
    sizes = {scale: (round(scale * width), round(scale * height)) for scale in scales}
    sizes = {scale: size for scale, size in sizes.items() if min(size) >= cfg.crop_size}
    if not sizes:
        raise DataError(
            f"{path} is {width}x{height} pixels, smaller than {cfg.crop_size}x{cfg.crop_size}"
            f"{'' if max(scales) == 1 else f' at scale {max(scales)}; use a larger one in --scales'}; remove it"
            f"{' or lower --crop-size' if cfg.crop_size > SIZE else ''}"
        )
    return [
        (scale, picture if scale == 1 else np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)))
        for scale, size in sizes.items()
    ]


def random_crops(name, scale, picture, cfg):
    """Crops (N, 3, S, S) that follow from the file's name and the scale; a picture of size S x S is its only crop."""
    room = np.array(picture.shape[:2]) - cfg.crop_size
    if not room.any():
        return windows(picture, [(0, 0)], cfg.crop_size)
    key = [SEED, zlib.crc32(os.fsencode(name))] + ([] if scale == 1 else [round(1e6 * scale)])
    corners = np.random.default_rng(key).integers(0, room + 1, (cfg.crops_per_image, 2))
    return windows(picture, corners, cfg.crop_size)


def spread_corners(picture, size, count):
    """Upper left corners of at least `count` crops on a grid, or of as many as differ; of one, the centre crop."""
    k = math.isqrt(count - 1) + 1
    rows, columns = (sorted({int((i + 0.5) / k * (n - size)) for i in range(k)}) for n in picture.shape[:2])
    return [(y, x) for y in rows for x in columns]


def windows(picture, corners, size):
    crops = np.stack([picture[y : y + size, x : x + size] for y, x in corners])
    return np.ascontiguousarray(crops.transpose(0, 3, 1, 2))


# ---- memory ------------------------------------------------------------------------------------------------------


def check_memory(named, cfg, bytes_of, what, remedy):
    """Say how much memory is needed before it is taken. Raises DataError if it is not there.

    bytes_of(width, height): of a file of that size. what, remedy: words for what takes it, and what takes less.
    """
    sample = named[:: math.ceil(len(named) / SAMPLED)]
    sizes = [pictures.size_of(path) for _, path in sample]
    mean = sum(bytes_of(*size) for size in sizes if math.prod(size) <= cfg.max_pixels) / len(sample)
    need, free = 2 * mean * len(named), available_memory()  # twice: those of each file, then all together
    text = f"{what} take about {need / 1e9:.1f} GB of memory"
    if need > free:
        raise DataError(f"{text}, and {free / 1e9:.1f} GB are free; {remedy}")
    if need > 1e9:
        print(f"note: {text}", file=sys.stderr)


def available_memory():
    """Bytes that can be allocated without swapping, as far as the system tells."""
    sources = (
        lambda: 1024 * int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]),
        lambda: int(Path("/sys/fs/cgroup/memory.max").read_text()),  # of a container; "max" where it has no limit
        lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    known = [math.inf]
    for source in sources:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            known.append(source())
    return min(known)


# ---- the cache ---------------------------------------------------------------------------------------------------


def cache_file(split, named, count, cfg):
    """Where the crops are stored: the name changes with everything that they depend on."""
    of_split = (cfg.crops_per_image, cfg.scales) if split == "train" else ()
    key = hashlib.sha256(repr((count, cfg.crop_size, *of_split, cfg.max_pixels, PIL.__version__)).encode())
    for name, path in named:
        with contextlib.suppress(OSError):  # a file that vanishes meanwhile is reported when it is read
            status = os.stat(path)
            key.update(f"{name!r} {status.st_size} {status.st_mtime_ns}".encode())
    return Path(cfg.data_dir) / f".images-{split}-{key.hexdigest()[:16]}.bin"


def remove_outdated(cache):
    """Delete what earlier starts stored of the split whose file is `cache`, and nothing else."""
    split = cache.name.rpartition("-")[0]
    for path in cache.parent.glob(f"{split}-*"):
        if re.fullmatch(rf"{re.escape(split)}-[0-9a-f]{{16}}\.(bin|npy)", path.name) and path.name != cache.name:
            with contextlib.suppress(OSError):
                path.unlink()
