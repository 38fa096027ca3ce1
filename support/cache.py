"""Images that took long to make, stored in a file for the next start and checked whenever they are read again.

The file: a line with the checksum of all that follows, a line of JSON, and the pixels. Memory is taken for what the
file holds, never for what it claims to hold.
"""

import json
import stat
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from support import files


def cached(path, size, make, count=None, lasting=lambda about: True):
    """The images stored at `path` and what is known of them; if nothing valid is there, those of make(), stored.

    make() -> (uint8 tensor (N, 3, size, size), dict of plain values). count: N, where it is known beforehand.
    lasting(that dict): whether to store them.
    """
    path = Path(path)
    files.clean(path.parent)
    try:
        return read(path, size, count)
    except FileNotFoundError:
        pass
    except MemoryError:
        raise
    except Exception as error:  # the file can hold anything, and no content is worth stopping for
        print(f"note: {path} is damaged, or not a cache of these images ({error}); making them again", file=sys.stderr)
    images, about = make()
    try:
        if lasting(about):
            write(path, images, about)
    except OSError as error:
        print(f"note: the images are not stored for the next start ({error})", file=sys.stderr)
    return images, about


def write(path, images, about):
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is not a regular file")
    line = json.dumps(about | {"shape": list(images.shape)}).encode() + b"\n"
    pixels = images.numpy()
    checksum = zlib.crc32(pixels, zlib.crc32(line))

    def write_to(file):
        file.write(b"%08x\n" % checksum + line)
        file.write(pixels.data)

    files.write_atomically(path, write_to)


def read(path, size, count):
    """Raises FileNotFoundError if there is no file, ValueError or another exception if it is not as it was written."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        checksum, line = int(file.readline(10), 16), file.readline(1000)
        pixels = np.fromfile(file, np.uint8)
    if zlib.crc32(pixels, zlib.crc32(line)) != checksum:
        raise ValueError("wrong checksum")
    about = json.loads(line)
    shape = about.pop("shape")
    if shape[1:] != [3, size, size] or count not in (None, shape[0]):
        raise ValueError(f"images of shape {shape}")
    return torch.from_numpy(pixels.reshape(shape)), about
