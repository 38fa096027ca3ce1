"""Start-up time and memory as the data grow: `train.py --dataset folder`, stopped after one step.

    python -m benchmarks.startup

Run from the root of the repository, on Linux, on an otherwise idle machine. Makes folders of pictures of 64x64 pixels (noise, which is slow
to decode), each picture giving 64 training images, in a temporary folder; one step and the held-out loss of 16 images follow.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import config
from benchmarks.speed import train_and_measure

CROPS = 64
SIZES = (5_000, 50_000, 500_000)  # training images


def make_pictures(folder, count):
    """`count` pictures in folder/train and 16 in folder/test."""
    random = np.random.default_rng(0)
    for split, n in (("train", count), ("test", 16)):
        (folder / split).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / split / f"{i}.png")


def main():
    config.parse(__doc__, "")
    print(f"{'training images':>16}{'first start':>14}{'later start':>14}{'memory, GB: first':>20}{'later':>8}")
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            make_pictures(Path(folder), size // CROPS)
            flags = ("--dataset", "folder", "--data-dir", folder, "--crops-per-image", CROPS, "--limit", 16)
            first, later = (train_and_measure(*flags) for _ in range(2))
        times = f"{first.seconds:12.1f} s{later.seconds:12.1f} s"
        print(f"{size:16,}{times}{first.memory / 1e9:20.2f}{later.memory / 1e9:8.2f}", flush=True)


if __name__ == "__main__":
    config.run(main)
