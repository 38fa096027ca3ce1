"""The data sets. To add one: a file beside this one, and its line in DATASETS; its name then works with --dataset.

A data set is a module with

    SETTINGS           its own options, a dict of config.Setting
    load(split, cfg)   (images, source) of split "train" or "test": a uint8 tensor (N, 3, S, S), and a few words that
                       follow "of" ("CIFAR-10 in data"); or, for crops drawn anew every epoch, a list of whole pictures
                       (3, H, W). Raises support.pictures.DataError
"""

import functools
import os
import sys
from pathlib import Path

from support.datasets import cifar10, folder, leaves
from support.pictures import IMAGE_FILES, DataError, image_files

DATASETS = {"cifar10": cifar10, "folder": folder, "leaves": leaves}


@functools.lru_cache
def automatic(data_dir, typed):
    """What --dataset auto stands for: cifar10 if it is in data_dir or can be downloaded, else leaves, with a warning.

    Raises DataError for a folder of pictures, see refuse_pictures.
    """
    refuse_pictures(data_dir, typed)
    try:
        cifar10.read("test", data_dir)
        return "cifar10"
    except DataError as error:
        print(f"WARNING: using the built-in images instead of CIFAR-10: {error}", file=sys.stderr)
        return "leaves"


def refuse_pictures(data_dir, typed):
    """Raises DataError if data_dir holds pictures, which the user hardly means to be ignored.

    typed: the user named data_dir, so that pictures in the folders below it count too.
    """
    names = set(os.listdir(data_dir)) if os.path.isdir(data_dir) else set()
    below = names and typed and not cifar10.FILES & names and image_files(data_dir)
    if below or {"train", "test"} <= names or IMAGE_FILES & {Path(name).suffix.lower() for name in names}:
        raise DataError(f"{data_dir} holds pictures; add --dataset folder to use them, or --dataset cifar10 or leaves")
