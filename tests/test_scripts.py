"""The scripts as a user runs them: what they print, write, and say when something is wrong."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from PIL import Image

import config

SCRIPTS = ["train.py", "overfit.py", "visualize.py", "evaluate.py", "denoise.py"]
WORDS = {"denoise.py": ("noisy.png", "-o", "clean.png")}  # what a script cannot do without


def last_line(stderr):
    """Without what Matplotlib says when it is new on a machine."""
    return stderr.splitlines()[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_gives_every_default_and_a_mistake_one_line(name, script):
    process = script(name, "--help")
    assert process.returncode == 0
    flags = re.findall(r"^  --([a-z0-9-]+)", process.stdout, re.MULTILINE)
    assert len(flags) >= 6 and process.stdout.count("(default:") == len(flags)
    assert process.stdout.split("usage:")[1].find(f"python {name}") > 0  # the docstring's commands
    process = script(name, *WORDS.get(name, ()), "--no-such-flag")
    assert process.returncode == 2
    assert re.fullmatch(r"error: .*--no-such-flag.*\n", process.stderr)


OUT_OF_RANGE = "epochs 0, epochs 1.5, lr 0, lr inf, lr nan, lr x, weight-decay -1, beta2 1, noise-steps 1, batch-size -3, limit 0, seed -1, model big"


@pytest.mark.parametrize("flag, value", [mistake.split() for mistake in OUT_OF_RANGE.split(", ")])
def test_values_out_of_range_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse("", flag.replace("-", "_"), [f"--{flag}", value])
    assert caught.value.code == 2
    assert re.fullmatch(rf"error: argument --{flag}: .*\n", capsys.readouterr().err)


def test_flags_go_before_presets_and_presets_before_defaults(capsys):
    cfg = config.parse("", "preset lr batch_size seed", ["--preset", "reference", "--lr", "0.1"])
    assert (cfg.lr, cfg.batch_size, cfg.seed) == (0.1, 8, 0)
    assert capsys.readouterr().out == "settings: preset=reference lr=0.1 batch_size=8\n"
    assert config.parse("", "lr seed", []).lr == config.SETTINGS["lr"].default
    assert capsys.readouterr().out == ""  # nothing differs


def test_auto_picks_what_the_hardware_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    cpu = config.pick_device("auto")
    assert cpu.type == "cpu"
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda a=avx512: a)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda a=amx: a)
        expected = torch.bfloat16 if avx512 or amx else torch.float32
        assert config.pick_precision("auto", cpu) == expected
    assert config.pick_precision("float32", cpu) == torch.float32
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert config.pick_precision("auto", torch.device("cuda:0")) == expected


def test_overfit_brings_the_loss_to_zero(script, pictures, tmp_path):
    process = script("overfit.py", "--dataset", "folder", "--data-dir", pictures)
    assert process.returncode == 0, process.stderr
    losses = [float(loss) for loss in re.findall(r"iteration +\d+  loss (\S+)", process.stdout)]
    assert 0.5 < losses[0] < 2 and losses[-1] < 1e-5
    assert Image.open(tmp_path / "model/res/comparison_result_overfit.png").width > 600


def test_overfit_says_when_the_loss_does_not_get_there(script, pictures):
    process = script("overfit.py", "--dataset", "folder", "--data-dir", pictures, "--iterations", 3)
    assert process.returncode == 1
    assert re.fullmatch(r"error: the loss stopped at .*lower --lr.*", last_line(process.stderr))
    process = script("overfit.py", "--dataset", "folder", "--data-dir", pictures, "--lr", 1e6, "--iterations", 9)
    assert process.returncode == 1 and "stopped at nan" in process.stderr
    process = script("overfit.py", "--t", 10)
    assert process.returncode == 1
    assert last_line(process.stderr) == "error: --t 10 is outside 1 ... 9; lower it"


def test_train_then_visualize(script, pictures, tmp_path):
    process = script("visualize.py", "--curves")  # before there is anything to draw
    assert process.returncode == 1 and re.fullmatch(r"error: .*train.py first.*", last_line(process.stderr))
    args = ("--dataset", "folder", "--data-dir", pictures, "--epochs", 2, "--batch-size", 8)
    process = script("train.py", *args, "--tensorboard", "--save-model-epochs", 2)
    assert process.returncode == 0, process.stderr
    assert "model saved: model/unet32_e1.pth" in process.stdout
    # Where the package is missing: one line, and the run goes on.
    installed = importlib.util.find_spec("tensorboard") is not None
    assert process.stderr.count("pip install tensorboard") == (0 if installed else 1)
    assert (tmp_path / "model/tensorboard").is_dir() == installed
    process = script("visualize.py", "--images", 3)
    assert "figure saved: model/res/comparison_result_unet32_e1.png" in process.stdout, process.stderr
    process = script("visualize.py", "--curves")
    assert "figure saved: model/res/curves.png" in process.stdout, process.stderr
    process = script("visualize.py", "--strip", "--t", 4, "--images", 2)
    assert "figure saved: model/res/steps_unet32_e1.png" in process.stdout, process.stderr
    for name in ("comparison_result_unet32_e1.png", "curves.png", "steps_unet32_e1.png"):
        assert np.asarray(Image.open(tmp_path / "model/res" / name).convert("L")).std() > 10  # not blank
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_mistake_ends_in_one_line_without_a_traceback(script, tmp_path):
    process = script("train.py", "--dataset", "folder", "--data-dir", "nowhere")
    assert process.returncode == 1
    assert last_line(process.stderr) == "error: nowhere is not a folder; --data-dir must name a folder of images"
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_does_nothing(name, script, tmp_path):
    process = script(
        name, launcher=("-c", f"import sys; sys.path.insert(0, sys.argv[1][: -len('{name}')]); import {name[:-3]}")
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
