"""What the benchmarks compute, without timing anything."""

import math
import sys

import pytest
import torch
from conftest import SMALL

import checkpoint
import train
import unet
from benchmarks import export, speed, time_to_loss


@pytest.mark.parametrize("target", [0.11, 0.1417, 0.2, 0.7])
def test_the_search_finds_the_shortest_time(monkeypatch, target):
    """On trainings whose loss is known: 0.1 + 5 / steps, at 10 ms a step."""

    class Training:
        def __init__(self, factory, cfg, images, device, steps_per_epoch):
            self.step, self.seconds = 0, 0.0

        def go(self, steps):
            self.seconds += 0.01 * (steps - self.step)
            self.step = steps

        def held_out_loss(self, images):
            return 0.1 + 5 / self.step

    monkeypatch.setattr(time_to_loss, "Training", Training)
    shortest = 0.01 * math.ceil(5 / (target - 0.1))
    runs = time_to_loss.fastest("any", None, {}, target, 10.0, None, None, torch.device("cpu"))
    found = min(seconds for seconds, loss in runs if loss <= target)
    assert shortest <= found <= 1.11 * shortest + 0.01 and len(runs) <= 6
    # More than the reference's time is never given, and a contender that needs more is not said to have won.
    runs = time_to_loss.fastest("any", None, {}, target, 0.5 * shortest, None, None, torch.device("cpu"))
    assert all(loss > target for _, loss in runs) and max(seconds for seconds, _ in runs) <= 0.5 * shortest + 0.001


def test_a_training_of_the_race_is_that_of_train(run):
    """The loop of the race, which stops by the clock, gives the weights of train.py's."""
    run("--epochs", 1, "--batch-size", 4, "--warmup-steps", 2, "--device", "cpu", "--precision", "float32")
    state = checkpoint.load("model/unet32_e0.pth")
    images = train.data.load("train", "folder", state["config"]["data_dir"])[0]
    cfg = time_to_loss.recipe(torch.device("cpu"), batch_size=4, warmup_steps=2, precision="float32", epochs=1)
    training = time_to_loss.Training(unet.UNet, cfg, images, torch.device("cpu"), 4)
    training.go(steps=4)
    for name, value in training.model.state_dict().items():
        torch.testing.assert_close(value, state["model"][name])


def test_flops_of_a_known_network():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    model = lambda x, t: conv(x)  # noqa: E731
    forward = 2 * 3 * 5 * 9 * 32 * 32  # multiply-adds count as two
    assert speed.flops(model, backward=False) == forward
    assert speed.flops(model, backward=True) == 2 * forward  # no gradient of the image is needed


def test_exported_weights(run, pictures, monkeypatch, tmp_path, capsys):
    run("--epochs", 1, "--seed", 3, "--no-flip", *SMALL)
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped.pth")
    flags = ("--dataset", "folder", "--data-dir", str(pictures), "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["export", *flags])
    export.main()
    state = checkpoint.load(tmp_path / "shipped.pth")
    assert state.keys() == {"model", "config", "provenance"}
    assert state["config"]["dataset"] == "auto" and state["config"]["noise_steps"] == 10
    words = state["provenance"]["command"].split(" --")
    assert str(pictures) not in state["provenance"]["command"]
    assert {"seed 3", "no-flip", "t-dim 8", "batch-size 4"} <= set(words) and words[0] == "python train.py"
    shipped, _ = checkpoint.load_model(tmp_path / "shipped.pth", "cpu")
    trained, _ = checkpoint.load_model("model/unet32_e0.pth", "cpu")
    for a, b in zip(shipped.parameters(), trained.parameters()):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
