"""Every kind of addition that the README names, made in a copy of the repository and used by its scripts."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import config
import data
import train

ADDITIONS = {
    "unet.py": (
        'NETWORKS = {"unet": UNet, "plain": PlainUNet}',
        """
class Scale(nn.Module):
    def __init__(self, image_channels=3, gain=2):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, image_channels, 1, 1), float(gain)))

    def forward(self, x, t):
        return self.scale * x


NETWORKS = {"unet": UNet, "plain": PlainUNet, "scale": Scale}
""",
        'SETTINGS = {\n    "model"',
        'SETTINGS = {\n    "gain": Setting(3, whole(1, 9), "factor at the start"),\n    "model"',
    ),
    "diffusion.py": (
        *("return t / T", "return (t / T) ** 2"),
        *("return sigma * T", "return T * sigma**0.5"),
        *("SAMPLERS = {", 'SAMPLERS = {"nothing": lambda model, x, ts, T: x, '),
    ),
    "support/metrics.py": (
        "METRICS = {",
        'METRICS = {"largest": Metric("largest error", lambda x, x0: (x - x0).abs().amax(dim=(1, 2, 3)), 3, False), ',
    ),
    "support/loggers.py": (
        "LOGGERS = {",
        """
class Text(CSV):
    def log(self, rows):
        self.path.with_name("log.txt").write_text(f"{rows[-1]['train_loss']:.6f}")


LOGGERS = {"text": Text, """,
    ),
    "support/datasets/__init__.py": (
        "from support.datasets import cifar10,",
        "from support.datasets import black, cifar10,",
        "DATASETS = {",
        'DATASETS = {"black": black, ',
    ),
}
BLACK = """
import torch

from config import Setting, whole

SETTINGS = {"black_images": Setting(8, whole(), "how many")}


def load(split, cfg):
    return torch.zeros(cfg.black_images, 3, 32, 32, dtype=torch.uint8), "nothing at all"
"""
RUN = """
import sys
import evaluate, train
sys.argv = "train.py --dataset black --black-images 4 --model scale --gain 4 --epochs 1 --batch-size 4".split()
sys.argv += "--device cpu --precision float32 --loggers text".split()
train.main()
sys.argv = "evaluate.py --baselines 0 --device cpu --markdown tables.md".split()
evaluate.main()
"""


def test_every_kind_of_addition(tmp_path):
    for path in [*ROOT.glob("*.py"), ROOT / "support"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    for name, edits in ADDITIONS.items():
        text = (tmp_path / name).read_text()
        for old, new in zip(edits[::2], edits[1::2]):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
    (tmp_path / "support/datasets/black.py").write_text(BLACK)
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout and "channels of" not in done.stdout  # there are none with a ReLU
    assert "scale: 3 parameters" in done.stdout and "4 train images of nothing at all" in done.stdout
    # x0 = -1, so eps_hat - eps = 4 (-1 + sigma eps) - eps, with sigma = (t / 10)^2 of the new schedule.
    loss = float((tmp_path / "model/log.txt").read_text())
    t, _ = data.draw_noise((4, 3, 32, 32), config.defaults(train.SETTINGS), "cpu", step=0)
    assert loss == pytest.approx((16 + (4 * (t / 10) ** 2 - 1) ** 2).mean().item(), rel=0.03)
    tables = (tmp_path / "tables.md").read_text()
    assert "largest error" in tables and "nothing" in tables
