"""Images as one uint8 tensor (N, 3, 32, 32), and batches of them as float32 in [-1, 1].

images, source = load("train", "auto", "data")       # "cifar10", "folder", "leaves" or "auto"
for x0 in batches(images, 16, seed=0, epoch=0): ...  # (16, 3, 32, 32)
"""

import contextlib
import functools
import hashlib
import http.client
import io
import os
import socket
import sys
import tarfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import leaves

SIZE = 32  # pixels, height and width of every image
Image.MAX_IMAGE_PIXELS = None  # read_image has a limit of its own
IMAGE_FILES = {
    f".{ending}" for ending in ("bmp", "gif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tga", "tif", "tiff", "webp")
}
HELD_OUT = 10  # of a folder without train/ and test/, one file in so many is a test image
TEST_BATCH = 250  # test images that are measured at once
DOWNLOAD_TIMEOUT = 20  # seconds without an answer
# Random numbers are drawn from generator(device, seed, one of these, index), so that no two uses share a stream.
ORDER, NOISE, HELD_OUT_NOISE, CHOICE, LEAVES = range(5)
LEAVES_CHUNKS = {"train": range(200), "test": range(200, 240)}  # of 250 images, each with its own random numbers


class DataError(Exception):
    """The images cannot be had: the text says why, names the file, and says what to do."""


def load(
    split,
    dataset="auto",
    data_dir="data",
    crops_per_image=64,
    limit=None,
    seed=0,
    skip_bad_images=False,
    max_pixels=100_000_000,
):
    """The images of a split ("train" or "test"), and where they come from.

    dataset: "cifar10", "folder", "leaves", or "auto" (see resolve).
    limit: at most so many images, a fixed random choice. seed: of the crops and of the leaves; the scripts leave it
    at 0, so that runs with other seeds train on the same images. skip_bad_images, max_pixels: see folder.
    Returns a uint8 tensor (N, 3, 32, 32) and a sentence. Raises DataError.
    """
    dataset = resolve(dataset, data_dir)
    if dataset == "cifar10":
        images, source = cifar10(split, data_dir), f"CIFAR-10 in {data_dir}"
    elif dataset == "folder":
        images, source = (
            folder(split, data_dir, crops_per_image, seed, skip_bad_images, max_pixels),
            f"the image files in {data_dir}",
        )
    else:
        images, source = cached_leaves(split, data_dir, seed), "built-in dead leaves"
    if limit is not None and limit < len(images):
        images = images[torch.randperm(len(images), generator=generator("cpu", seed, CHOICE, 0))[:limit]]
    return images, f"{len(images):,} {split} images of {source}"


@functools.lru_cache
def resolve(dataset, data_dir):
    """What "auto" stands for: "cifar10" if it is in data_dir or can be downloaded, else "leaves", with a warning.

    Raises DataError if data_dir holds pictures instead, which are hardly meant to be left aside.
    """
    if dataset != "auto":
        return dataset
    names = set(os.listdir(data_dir)) if os.path.isdir(data_dir) else set()
    if {"train", "test"} <= names or IMAGE_FILES & {Path(name).suffix.lower() for name in names}:
        raise DataError(f"{data_dir} holds pictures; add --dataset folder to use them, or --dataset cifar10 or leaves")
    try:
        cifar10("test", data_dir)
        return "cifar10"
    except DataError as error:
        print(f"WARNING: using the built-in images instead of CIFAR-10: {error}", file=sys.stderr)
        return "leaves"


def fingerprint(*splits):
    """16 hexadecimal digits that tell whether two runs have the same images."""
    sha = hashlib.sha256()
    for images in splits:
        sha.update(images.numpy().data)
    return sha.hexdigest()[:16]


# ---- batches ----------------------------------------------------------------------------------------------------


def generator(device, *key):
    """A torch.Generator that is a pure function of its key, whole numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def memory_format(device):
    """The layout in which convolutions are fastest: channels_last.

    Not on Apple's MPS, where it is slower and, in some versions, wrong (PyTorch's issues 107214, 180984 and 193349).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def scale(images):
    """uint8 images as float32 in [-1, 1]; on the 0-255 scale a difference is 127.5 times as large."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=memory_format(images.device))


def held_out_noise(images, start):
    """Standard Gaussian noise for TEST_BATCH test images or fewer, of which the first is the start-th.

    An image's noise follows from its place alone, on every kind of device: it is drawn on the CPU, for a whole batch.
    """
    random = generator("cpu", 0, HELD_OUT_NOISE, start)
    return torch.randn(TEST_BATCH, *images.shape[1:], generator=random)[: len(images)].to(images.device)


def batches(images, batch_size, seed, epoch, flip=False, rank=0, world=1, start=0):
    """One epoch of batches x0, (batch_size / world, 3, 32, 32) float32 in [-1, 1], on the device of `images`.

    The order and the mirror images follow from (seed, epoch) alone. Of each batch, rank r of `world` gets the r-th of
    `world` equal parts. An incomplete last batch is left out (every epoch shuffles anew). start: batches to skip.
    """
    random = generator("cpu", seed, ORDER, epoch)
    order = torch.randperm(len(images), generator=random).to(images.device)
    mirrored = (torch.rand(len(images), generator=random) < 0.5).to(images.device)
    share = batch_size // world
    for i in range(start, len(images) // batch_size):
        part = slice(i * batch_size + rank * share, i * batch_size + (rank + 1) * share)
        x = images[order[part]]
        if flip:
            x = torch.where(mirrored[part, None, None, None], x.flip(3), x)
        yield scale(x)


class PILImages(torch.utils.data.Dataset):
    """The images as a torchvision data set would give them: PIL images through ToTensor and Normalize."""

    def __init__(self, images):
        import torchvision

        self.images = images.permute(0, 2, 3, 1).numpy()
        self.transform = torchvision.transforms.Compose(
            [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i]))


def pil_batches(images, batch_size, seed, epoch, flip=False, rank=0, world=1, start=0):
    """The same batches as `batches` (never mirrored), the textbook way: a DataLoader without workers."""
    order = torch.randperm(len(images), generator=generator("cpu", seed, ORDER, epoch))
    share = batch_size // world
    order = order[: len(images) // batch_size * batch_size].view(-1, world, share)[start:, rank].flatten()
    return torch.utils.data.DataLoader(PILImages(images), batch_size=share, sampler=order.tolist())


# ---- CIFAR-10 ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a split is checksummed and read once, also when resolve has tried it
def cifar10(split, data_dir):
    """CIFAR-10 (Krizhevsky 2009) as torchvision keeps it, downloaded and checksummed when absent."""
    import torchvision  # takes longer than PyTorch, and the other data sets have no use for it

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, about the age of the pickled arrays
            images = torchvision.datasets.CIFAR10(data_dir, train=split == "train", download=True).data
    except PermissionError as error:
        raise DataError(
            f"no permission to use {error.filename}; change its rights or choose another --data-dir"
        ) from None
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"CIFAR-10 is not whole in {data_dir} and downloading it failed ({describe(error)}); connect to the network "
            f"and try again, put {torchvision.datasets.CIFAR10.filename} there, or use --dataset leaves or folder"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def describe(error):
    """What an exception means, torchvision's among them, in a few words."""
    if "corrupted" in str(error):
        return "the archive does not have CIFAR-10's checksum: truncated or not the original"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---- a folder of pictures ---------------------------------------------------------------------------------------


def folder(split, data_dir, crops_per_image=64, seed=0, skip_bad_images=False, max_pixels=100_000_000):
    """The images below data_dir: data_dir/train and data_dir/test if both are there, else a fixed tenth is held out.

    A larger training image gives crops_per_image random crops, a larger test image its centre crop. An image that is
    unreadable, too small or larger than max_pixels is an error that names it; skip_bad_images: it is left out. What was
    read is kept in data_dir, in one hidden file a split, for as long as no file changes.
    """
    root = Path(data_dir)
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder; --data-dir must name a folder of images")
    if os.path.isdir(root / "train") and os.path.isdir(root / "test"):
        root = root / split
        files = image_files(root)
    else:
        files = hold_out(image_files(root))[split == "test"]
    if not files:
        raise DataError(f"no {split} images in {root}; put at least two image files there (.png, .jpg, ...)")

    def crops(file):
        image = read_image(root / file, max_pixels)
        if min(image.shape[:2]) < SIZE:
            raise DataError(
                f"{root / file} is {image.shape[1]}x{image.shape[0]} pixels, smaller than {SIZE}x{SIZE}; remove it"
            )
        if image.shape[:2] == (SIZE, SIZE):
            corners = [(0, 0)]
        elif split == "train":
            random = np.random.default_rng([seed, zlib.crc32(os.fsencode(file))])
            corners = random.integers(0, np.array(image.shape[:2]) - SIZE + 1, (crops_per_image, 2))
        else:
            corners = [(np.array(image.shape[:2]) - SIZE) // 2]
        windows = np.stack([image[y : y + SIZE, x : x + SIZE] for y, x in corners])
        return np.ascontiguousarray(windows.transpose(0, 3, 1, 2))

    def crops_or_none(file):
        try:
            return crops(file)
        except DataError as error:
            if not skip_bad_images:
                raise DataError(f"{error}, or add --skip-bad-images") from None
            return None

    def read():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            progress = tqdm(
                pool.map(crops_or_none, files),
                f"reading {split} images",
                len(files),
                delay=2,
                leave=False,
                mininterval=1,
            )
            good = [image for image in progress if image is not None]
        if len(good) < len(files):
            print(
                f"WARNING: left out {len(files) - len(good)} of {len(files)} {split} images of {data_dir}",
                file=sys.stderr,
            )
        if not good:
            raise DataError(
                f"none of the {len(files)} {split} images in {root} can be used; see without --skip-bad-images why"
            )
        return torch.from_numpy(np.concatenate(good))

    crop_options = (crops_per_image, seed) if split == "train" else ()
    key = hashlib.sha256(repr((*crop_options, skip_bad_images, max_pixels)).encode())
    for file in files:
        with contextlib.suppress(OSError):  # what vanishes meanwhile is told when it is read
            status = os.stat(root / file)
            key.update(f"{file!r} {status.st_size} {status.st_mtime_ns}".encode())
    return kept(Path(data_dir) / f".images-{split}-{key.hexdigest()[:16]}.npy", read)


def kept(path, make):
    """make(), a uint8 tensor, or the file that an earlier start kept of it; other versions of the file are deleted."""
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        return torch.from_numpy(np.load(path))
    images = make()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.save(file, images.numpy())
        for old in path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.npy"):
            old.unlink()
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be deleted either
            temporary.unlink()
        print(f"note: the images are not kept for the next start ({error})", file=sys.stderr)
    return images


def image_files(root):
    """The files below root with an image file's ending, as sorted relative paths with / on every system.

    Links are followed, loops are not.
    """
    seen, files = set(), []

    def refuse(error):
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}; change its rights or remove it")

    for path, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(path) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(path))
        files += [
            Path(os.path.relpath(os.path.join(path, name), root)).as_posix()
            for name in names
            if Path(name).suffix.lower() in IMAGE_FILES
        ]
    return sorted(files)


def hold_out(files):
    """(train, test): a file is a test image by a hash of its relative path, whatever other files there are."""
    rank = {file: zlib.crc32(os.fsencode(file)) for file in files}
    test = {file for file in files if rank[file] % HELD_OUT == 0} or set(sorted(files, key=rank.get)[:1])
    return [file for file in files if file not in test], sorted(test)


def rgb(image):
    """A Pillow image as a uint8 array (H, W, 3): 16 bits scaled to 8, transparent parts on white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def read_image(path, max_pixels=100_000_000, convert=rgb):
    """convert(the picture in a file as an upright Pillow image); by default a uint8 array (H, W, 3), see rgb.

    Raises DataError if it cannot be read or has more than max_pixels, which are looked up before any is decoded.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width}x{image.height} pixels are more than --max-pixels {max_pixels}")
            with contextlib.suppress(Exception):  # a broken orientation tag is no reason to lose the picture
                ImageOps.exif_transpose(image, in_place=True)
            image.load()
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            return convert(image)
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise DataError(f"{path} cannot be read as an image ({error}); repair or remove it") from None


# ---- built-in images --------------------------------------------------------------------------------------------


def cached_leaves(split, data_dir, seed=0):
    """50,000 training or 10,000 test dead leaves, made once (under a minute on two cores) and kept in data_dir."""

    def make():
        progress = tqdm(LEAVES_CHUNKS[split], f"making {split} images", leave=False, mininterval=1)
        return torch.cat([leaves.dead_leaves(250, generator("cpu", seed, LEAVES, i)) for i in progress])

    recipe = zlib.crc32(Path(leaves.__file__).read_text("utf-8").encode())  # a changed leaves.py makes other images
    return kept(Path(data_dir) / f"leaves-{split}-{seed}-{recipe:08x}.npy", make)
