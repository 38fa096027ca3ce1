"""What the benchmarks compute, without timing anything."""

import itertools
import json
import math
import re
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, TINY
from PIL import Image

import config
import data
import train
import unet
from benchmarks import real_noise, reference, speed, time_to_loss, timed
from support import checkpoint
from support.world import World

CPU = World(torch.device("cpu"))


@pytest.fixture
def settings(pictures):
    """settings(lr=1): all of train.py's, for the pictures."""

    def settings(**values):
        where = dict(dataset="folder", data_dir=str(pictures), precision="float32")
        return config.defaults(train.SETTINGS, **(where | values))

    return settings


UNet = unet.UNet  # tests put `tiny` in its place


def tiny():
    return UNet(widths=(4, 4, 8), t_dim=8)


def test_the_textbook_loop_gives_the_weights_of_train(run, settings):
    run("--preset", "reference", "--epochs", 3, *TINY, "--device", "cpu")
    trained = checkpoint.load("model/unet32_e2.pth")
    images, _ = data.load("train", settings())
    torch.manual_seed(0)
    model = tiny()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    cfg = config.defaults(train.SETTINGS, **train.PRESETS["reference"] | dict(epochs=3))
    losses = torch.stack(list(reference.training(model, images, cfg)))
    assert len(losses) == trained["step"] == 6
    for epoch, row in enumerate(trained["log"]):
        assert losses[2 * epoch : 2 * epoch + 2].mean().item() == pytest.approx(row["train_loss"], rel=1e-4)
    for name, value in model.state_dict().items():
        # Relative to the way it went: Adam turns the rounding of a vanishing gradient into a step of visible size.
        difference = (trained["model"][name] - value).norm() / (value - initial[name]).norm()
        assert difference < 0.02, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_by_the_clock_is_that_of_train(run, settings, optimizer):
    run("--epochs", 1, "--optimizer", optimizer, *SMALL, "--precision", "float32")
    state = checkpoint.load("model/unet32_e0.pth")
    cfg = settings(batch_size=4, warmup_steps=0, epochs=1, optimizer=optimizer)
    (x_train, _), (x_test, _) = data.load("train", cfg), data.load("test", cfg)
    models = []

    def factory():
        models.append(tiny())
        return models[-1]

    _, loss = timed.train_for(4, factory, cfg, x_train, x_test, CPU)
    assert loss == state["log"][0]["test_loss"]
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    # Longer than an epoch, the images are shuffled anew, as in the second epoch of train.py.
    timed_run = timed.TimedRun(cfg, 6, CPU)
    seen = list(timed_run.epoch(x_train))
    expected = [*data.batches(x_train, cfg, 0), *data.batches(x_train, cfg, 1)][:6]
    assert all(map(torch.equal, seen, expected)) and len(seen) == 6
    assert train.lr_at(3, cfg, timed_run.steps_per_epoch) == pytest.approx(cfg.lr / 2)


def test_the_textbook_curve_ends_with_the_training(settings, monkeypatch):
    """A reference that has run all its epochs before the time is up is evaluated as it is."""
    monkeypatch.setattr(unet, "UNet", tiny)
    images, _ = data.load("train", settings())
    monkeypatch.setattr(reference, "training", lambda model, images: iter(torch.zeros(5)))
    curve = timed.reference_curve(1e6, 3, images, images[:4], CPU)
    assert len(curve) == 3 and len({loss for _, loss in curve}) == 1
    assert [seconds for seconds, _ in curve] == sorted(seconds for seconds, _ in curve)


@pytest.mark.parametrize("target", [0.1051, 0.1103, 0.1417, 0.2, 0.7, 6])
def test_the_search_finds_the_shortest_training(target):
    """On runs whose loss is known: 0.1 + 5 / steps."""
    shortest = math.ceil(5 / (target - 0.1))
    runs = time_to_loss.fastest(lambda steps: (steps / 100, 0.1 + 5 / steps), 1000, target)
    found = min(steps for steps, (_, loss) in runs.items() if loss <= target)
    assert shortest <= found <= 1.1 * shortest + 1 and len(runs) <= 9
    # More than `most` steps are never tried, and a contender that needs more is not said to have won.
    runs = time_to_loss.fastest(lambda steps: (steps / 100, 0.1 + 5 / steps), shortest - 1 or 1, target)
    assert max(runs) == max(shortest - 1, 1)
    assert shortest == 1 or all(loss > target for _, loss in runs.values())
    # A training that diverges has failed: more steps are tried.
    runs = time_to_loss.fastest(lambda steps: (steps / 100, math.nan), 1000, target)
    assert max(runs) == 1000


def test_a_race(settings, pictures, tmp_path, monkeypatch, capsys):
    """The whole of time_to_loss on tiny networks: a figure, the numbers, a line for each contender."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unet, "UNet", tiny)
    monkeypatch.setattr(time_to_loss, "CONTENDERS", {"AdamW": (tiny, dict(lr=1e-2, batch_size=4))})
    monkeypatch.setattr(time_to_loss, "FIRST_STEPS", 2)
    monkeypatch.setattr(time_to_loss, "EVALUATIONS", 3)
    clock = types.SimpleNamespace(perf_counter=itertools.count(0, 0.01).__next__)  # 10 ms a look
    monkeypatch.setattr(timed, "time", clock)
    Path("peers.py").write_text(
        "import unet\nCONTENDERS = {'plain': (lambda: unet.PlainUNet(widths=(4, 4, 8)), {'batch_size': 4})}\n"
    )
    where = ("--dataset", "folder", "--data-dir", str(pictures), "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["race", *where, "--minutes", "0.002", "--contenders", "peers.py"])
    time_to_loss.main()
    result = json.loads(Path("model/res/time_to_loss.json").read_text())
    assert len(result["reference"]) == 3 and result["machine"]["threads"] >= 1
    seconds, target = result["reference"][-1]
    assert seconds == pytest.approx(0.12, abs=0.03)
    for name, runs in result["contenders"].items():
        assert all(took == pytest.approx(0.01) for took, _ in runs)  # one look at the clock after another
        reached = any(loss <= target for _, loss in runs)
        assert result["ratios"][name] == pytest.approx(seconds / 0.01 if reached else 0)
    assert result["contenders"].keys() == result["ratios"].keys() == {"AdamW", "plain"}
    assert Path("model/res/time_to_loss.png").stat().st_size > 1000
    assert "\nAdamW: " in capsys.readouterr().out
    monkeypatch.setattr(time_to_loss, "CONTENDERS", {"AdamW": (tiny, dict(batch_size=17))})
    with pytest.raises(config.UserError, match="16 training images do not fill a batch of 17"):
        time_to_loss.main()


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "must define CONTENDERS"),
        ("CONTENDERS = [1]", "must define CONTENDERS"),
        ("CONTENDERS = {'mine': print}", "must define CONTENDERS"),
        ("CONTENDERS = {'mine': (print, None)}", "must define CONTENDERS"),
        ("CONTENDERS = {'mine': (print, {'rate': 1})}", "mine has the setting rate"),
        ("CONTENDERS = {'mine': (print, {'lr': -1})}", "lr = -1, which is out of range"),
    ],
)
def test_contenders_that_cannot_race(text, message, tmp_path):
    (tmp_path / "peers.py").write_text(text)
    with pytest.raises(config.UserError, match=message):
        time_to_loss.contenders_of(str(tmp_path / "peers.py"))


def test_flops_of_a_known_network():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    model = lambda x, t: conv(x)  # noqa: E731
    forward = 2 * 3 * 5 * 9 * 32 * 32  # multiply-adds count as two
    assert speed.flops(model, backward=False) == forward
    assert speed.flops(model, backward=True) == 2 * forward  # no gradient of the image is needed


def test_the_table_of_speeds(pictures, tmp_path, monkeypatch, capsys):
    """Medians and ratios of rounds whose numbers are known."""
    monkeypatch.chdir(tmp_path)
    speeds = {"AdamW": iter((10, 30, 20)), "Muon": iter((8, 16, 90)), "reference": iter((5, 5, 1))}
    monkeypatch.setattr(speed, "measure", lambda recipe, *rest: {"training, images/s": next(speeds[recipe])})
    where = ("--dataset", "folder", "--data-dir", str(pictures), "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["speed", *where, "--rounds", "3"])
    speed.main()
    assert "AdamW / reference 4.00, Muon / AdamW 0.80" in capsys.readouterr().out
    result = json.loads(Path("model/res/speed.json").read_text())
    assert result["medians"]["AdamW"] == {"training, images/s": 20} and len(result["rounds"]["Muon"]) == 3


def test_both_loops_print_what_speed_reads(run, pictures, monkeypatch, capsys):
    run("--epochs", 1, *SMALL)
    assert len(re.findall(speed.IMAGES_PER_SECOND, capsys.readouterr().out)) == 1
    monkeypatch.setattr(unet, "UNet", tiny)
    where = ["reference", "--dataset", "folder", "--data-dir", str(pictures), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*where, "--epochs", "2"])
    reference.main()
    assert len(re.findall(speed.IMAGES_PER_SECOND, capsys.readouterr().out)) == 2
    monkeypatch.setattr(sys, "argv", [*where, "--limit", "7"])
    with pytest.raises(config.UserError, match="7 training images do not fill a batch of 8"):
        reference.main()


@pytest.mark.slow
def test_the_rates_of_matrix_products_and_of_inference(monkeypatch):
    cpu = torch.device("cpu")
    assert 1 / 0.2 < speed.calls_a_second(lambda: time.sleep(0.005), seconds=0.05) < 1 / 0.005
    monkeypatch.setattr(unet, "UNet", tiny)
    monkeypatch.setattr(speed, "calls_a_second", lambda f: 3.0 if f() is not None else 0)
    assert speed.matrix_rate("bfloat16", cpu) == 3 * 2 * 2048**3
    assert speed.inference_rate("float32", cpu) == 3 * 250


@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory is read from /proc")
def test_a_measured_training(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = (*SMALL, "--dataset", "folder", "--data-dir", pictures, "--out-dir", tmp_path / "model")
    images_per_second, memory, gpu_memory = speed.train_and_measure("train", *flags)
    assert images_per_second > 0 and 1e8 < memory < 1e11 and gpu_memory >= 0
    assert (tmp_path / "model/unet32_e0.pth").exists()
    with pytest.raises(config.UserError, match=r"ended with code 1: error: .* already holds"):
        speed.train_and_measure("train", *flags)


def test_the_table_of_real_noise(tmp_path, monkeypatch, capsys):
    """A grey ramp: white noise of sigma 20 means 20 log10(255 / 20) = 22.1 dB, of 10 28.1; a denoiser gains much."""
    ramp = Image.linear_gradient("L").resize((160, 160)).point(lambda value: 60 + value // 2).convert("RGB")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        ramp.save(tmp_path / split / "ramp.png")
    monkeypatch.setattr(sys, "argv", ["real_noise", "--data-dir", str(tmp_path), "--weights", str(checkpoint.PHOTO)])
    monkeypatch.setattr(real_noise, "KINDS", ["white"])
    real_noise.main()
    noisy, clean = map(float, re.search(r"\| white \| (\S+) \| (\S+) \|", capsys.readouterr().out).groups())
    assert noisy == pytest.approx(22.1, abs=0.2) and clean > 32
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--grey", "--sigma", "10"])
    monkeypatch.setattr(real_noise, "KINDS", ["white", "chroma", "equal", "camera"])
    real_noise.main()
    (values,) = re.findall(r"^\| (?!noise)\w+ \| (\S+) \| (\S+) \|", capsys.readouterr().out, re.M)
    noisy, clean = map(float, values)
    assert noisy == pytest.approx(28.1, abs=0.2) and clean > 35
