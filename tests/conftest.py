import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: threads would only wait for one another

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from support import script as scripts

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Not one of several processes, whatever the environment says."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with 16 training and 4 test images of 32x32: smooth random colours."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        (folder / split).mkdir()
        for i in range(count):
            small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / split / f"{i}.png")
    return folder


@pytest.fixture
def script(tmp_path):
    """script("train.py", "--epochs", 1): run it as a user does, in an empty folder; returns the finished process."""

    def run(*args, launcher=(), **environment):
        name, *rest = map(str, args)
        command = [sys.executable, *launcher, str(ROOT / name), *rest]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | environment)

    return run


@pytest.fixture
def run(pictures, tmp_path, monkeypatch):
    """run("--epochs", 2): train.main() on the pictures, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args, fresh=False):
        resumed = "--resume" in args and not fresh
        where = () if resumed or "--dataset" in args else ("--dataset", "folder", "--data-dir", pictures)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, (*where, *args))])
        train.main()

    return run


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script(visualize, "--curves"): in this process, as a user runs it: (exit code, stdout, stderr)."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        streams = sys.stdout, sys.stderr
        try:
            scripts.run(module.main)
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout, sys.stderr = streams
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def pair():
    """Smooth random colours x0 (3, 3, 32, 32) in [-1, 1], and noisy ones that leave that range."""
    random = torch.Generator().manual_seed(0)
    small = torch.rand(3, 3, 6, 6, generator=random) * 2 - 1
    x0 = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic").clamp(-1, 1)
    return x0, x0 + 0.3 * torch.randn(x0.shape, generator=random)


TINY = ("--widths", 4, 4, 8, "--t-dim", 8)
SMALL = (*TINY, "--batch-size", 4, "--warmup-steps", 0, "--device", "cpu")
SMALL_OF = {"unet": SMALL, "plain": (*TINY[:4], *SMALL[len(TINY) :])}  # which has no --t-dim


def states_equal(a, b):
    """Whether two checkpoints hold the same bits, times of day aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            states_equal(a[k], b[k]) for k in a if k not in ("seconds", "images_per_second")
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
