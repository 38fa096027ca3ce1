"""The scripts as a user runs them: what they print, write, and say when something is wrong."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import evaluate
import overfit
import train
import unet
import visualize
from config import Setting, whole
from support import checkpoint, devices, figures
from support import script as scripts

SCRIPTS = ["train.py", "overfit.py", "visualize.py", "evaluate.py", "denoise.py"]
WORDS = {"denoise.py": ("noisy.png", "-o", "clean.png")}  # what a script cannot do without
TINY = ("--widths", 4, 4, 8, "--t-dim", 8, "--device", "cpu")


@pytest.fixture
def run_script(run_script, monkeypatch, tmp_path):
    """run_script(visualize, "--curves"), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run_script


def looks_like_a_figure(path):
    return np.asarray(Image.open(path).convert("L")).std() > 10  # not blank


# ---- every script -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_gives_every_default_and_a_mistake_one_line(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    monkeypatch.setenv("PYTHON_COLORS", "0")
    module = __import__(name[:-3])
    for args, code in ((["--help"], 0), ([*WORDS.get(name, ()), "--no-such-flag"], 2)):
        monkeypatch.setattr(sys, "argv", [name, *args])
        with pytest.raises(SystemExit) as caught:
            module.main()
        assert caught.value.code == code
        out, err = capsys.readouterr()
        if code == 0:
            flags = re.findall(r"^  (?:-\w .*, )?--([a-z0-9-]+)", out, re.MULTILINE)
            assert len(flags) >= 6 and len(flags) + 1 >= len(module.SETTINGS)
            optional = [setting for setting in module.SETTINGS.values() if setting.default is not config.REQUIRED]
            assert all(f"{setting.help} (default: {setting.default})" in out for setting in optional)
            assert out.split("usage:")[1].find(f"python {name}") > 0  # the docstring's commands
        else:
            assert re.fullmatch(r"error: .*--no-such-flag.*\n", err)


def test_importing_the_scripts_does_nothing_and_needs_no_matplotlib(script, tmp_path):
    modules = ", ".join(name[:-3] for name in SCRIPTS)
    code = f"import sys; sys.path.insert(0, sys.argv[1][: -len('train.py')]); import {modules}"
    process = script("train.py", launcher=("-c", f"{code}; assert 'matplotlib' not in sys.modules"))
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_in_one_line_without_a_traceback(script):
    process = script("visualize.py", "--weights", "nowhere.pth")
    assert process.returncode == 1
    assert re.fullmatch(r"settings: .*\n", process.stdout)
    assert re.fullmatch(r"error: nowhere.pth does not exist.*\n", process.stderr)


def test_a_lack_of_memory_is_said_with_its_amount(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # script.run replaces the streams
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as caught:
        scripts.run(lambda: torch.empty(10**15, dtype=torch.uint8))
    assert caught.value.code == 1
    assert re.fullmatch(r"error: there is not enough memory for 1,000,000.0 GB more; use .*\n", capsys.readouterr().err)


# ---- settings ---------------------------------------------------------------------------------------------------

MISTAKES = (
    "epochs 0, epochs 1.5, lr -1, lr inf, lr nan, lr x, lr 1e40, weight-decay -1, beta2 1, noise-steps 1, "
    "noise-steps 1001, batch-size -3, limit 0, seed -1, model big, t-dim 65537, blocks 0, resume="
)


@pytest.mark.parametrize("flag, value", [re.split("[ =]", mistake) for mistake in MISTAKES.split(", ")])
def test_values_out_of_range_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse("", train.SETTINGS, argv=[f"--{flag}", value])
    assert caught.value.code == 2
    assert re.fullmatch(rf"error: argument --{flag}: .*\n", capsys.readouterr().err)


def test_flags_go_before_presets_and_presets_before_defaults(capsys):
    settings = {
        "preset": Setting("default", ("default", "small"), "recipe"),
        "size": Setting(10, whole(), "pixels"),
        "count": Setting(3, whole(), "images"),
        "widths": Setting((1, 2), whole(), "channels", 2),
    }
    presets = {"small": dict(size=5, count=2)}
    cfg = config.parse("", settings, presets, ["--preset", "small", "--size", "7", "--widths", "3", "4"])
    assert (cfg.size, cfg.count, cfg.widths) == (7, 2, (3, 4)) and cfg.given == {"preset", "size", "widths"}
    assert capsys.readouterr().out == "settings: preset=small size=7 count=2 widths=(3, 4)\n"
    assert config.parse("", settings, presets, []).size == 10
    assert capsys.readouterr().out == ""  # nothing differs
    with pytest.raises(AttributeError):
        cfg.size = 8


def test_the_recipes_are_those_of_the_documents():
    expected = {
        "default": dict(optimizer="muon", lr=4e-4, batch_size=32, epochs=10, recycle=3, noise_steps=10, noise="white"),
        "reference": dict(optimizer="adamw", lr=2e-4, batch_size=8, epochs=20, schedule="cosine", flip=False),
        "photographs": dict(
            **dict(dataset="folder", fresh_crops=True, crop_size=96, batch_size=8, augment=True, noise="mixed"),
            **dict(noise_shares=(0.25, 0.1), sigma_range=(1, 75), sigma_power=0.75, init="model/unet32.pth"),
            **dict(crops_per_image=48, epochs=16, lr=4e-4),
        ),
    }
    for name, values in expected.items():
        cfg = config.parse("", train.SETTINGS, train.PRESETS, ["--preset", name])
        assert {key: getattr(cfg, key) for key in values} == values


def test_the_weights_for_photographs_were_trained_with_their_preset():
    saved = checkpoint.load(checkpoint.PHOTO)["config"]
    cfg = config.parse("", train.SETTINGS, train.PRESETS, ["--preset", "photographs"])
    free = {"precision", "save_every_steps", "dataset"}  # no part of the recipe; exported weights name no data set
    recipe = (train.SETTINGS.keys() & saved.keys()) - free
    assert {key: config.as_tuple(saved[key]) for key in recipe} == {key: getattr(cfg, key) for key in recipe}


def test_the_word_none_undoes_what_a_preset_has_set():
    cfg = config.parse("", train.SETTINGS, train.PRESETS, ["--preset", "photographs"])
    assert cfg.init == "model/unet32.pth"
    cfg = config.parse("", train.SETTINGS, train.PRESETS, ["--preset", "photographs", "--init", "none"])
    assert cfg.init is None and "init" in cfg.given


def test_auto_picks_what_the_hardware_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    cpu = devices.pick("auto")
    assert cpu.type == "cpu"
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda a=avx512: a)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda a=amx: a)
        expected = "bfloat16" if avx512 or amx else "float32"
        assert devices.pick_precision("auto", cpu) == expected
    assert devices.pick_precision("float32", cpu) == "float32"
    for capability, expected in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert devices.pick_precision("auto", torch.device("cuda:0")) == expected


@pytest.mark.parametrize("name", ["hpu:0", "cuda:x", "", "nothing"])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(config.UserError, match="cannot be used"):
        devices.pick(name)


def test_a_gpu_that_cannot_compute_is_passed_over_unless_it_was_asked_for(monkeypatch, capsys):
    def no_kernel(*size, device):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert devices.pick("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert said == "WARNING: cuda:0 cannot be used (no kernel image is available); using the CPU\n"
    with pytest.raises(config.UserError, match=r"--device cuda:1 cannot be used .*; use another, such as --device cpu"):
        devices.pick("cuda:1")
    with pytest.raises(config.UserError, match=r"--device cuda:1 cannot be used .*; use another, or fewer processes"):
        devices.pick("auto", local_rank=1, world_size=2)


@pytest.mark.parametrize(
    "name, cuda, mps, rank, processes, expected",
    [
        *(("auto", True, True, 0, 1, "cuda:0"), ("auto", True, False, 2, 4, "cuda:2")),
        *(("cuda:0", True, False, 2, 4, "cuda:2"), ("cuda:3", True, False, 0, 1, "cuda:3")),
        *(("auto", False, True, 0, 1, "mps"), ("auto", False, True, 1, 2, "cpu")),
    ],
)
def test_every_process_has_a_gpu_of_its_own_and_apples_is_for_one(
    name, cuda, mps, rank, processes, expected, monkeypatch
):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))  # whatever there is
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.pick(name, rank, processes) == torch.device(expected)
    with pytest.raises(config.UserError, match="--device mps cannot be used by several processes"):
        devices.pick("mps", 0, 2)
    assert devices.pick_precision("auto", torch.device("mps")) == "float32"
    assert devices.memory_format("mps") == torch.contiguous_format
    assert devices.memory_format("cpu") == torch.channels_last


@pytest.mark.parametrize(
    "error, processes, line",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "the GPU's memory is full; use --device cpu"),
        (
            RuntimeError("[gloo] Connection closed"),
            2,
            r"\[gloo\] Connection closed \(if another process",
        ),
        (config.UserError("two\n  lines"), 1, "two lines"),
        (RuntimeError("[gloo] Connection closed"), 1, None),
        (RuntimeError("shapes differ"), 2, None),
        (KeyError("x"), 1, None),
    ],
)
def test_what_is_no_fault_of_the_code_is_one_line_and_the_rest_a_traceback(error, processes, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # script.run replaces the streams
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setenv("WORLD_SIZE", str(processes))

    def fail():
        raise error

    with pytest.raises(SystemExit if line else type(error)) as caught:
        scripts.run(fail)
    if line:
        assert caught.value.code == 1 and re.fullmatch(rf"error: {line}.*\n", capsys.readouterr().err)
    else:
        assert caught.value is error


# ---- overfit.py -------------------------------------------------------------------------------------------------


def test_overfit_brings_the_loss_to_zero(run_script, pictures, tmp_path):
    args = ("--dataset", "folder", "--data-dir", pictures, "--widths", 16, 16, 32, "--t-dim", 8, "--device", "cpu")
    code, out, err = run_script(overfit, *args, "--lr", 5e-3, "--target", 3e-2)
    assert code == 0, err
    losses = [float(loss) for loss in re.findall(r"iteration +\d+  loss (\S+)", out)]
    assert 0.5 < losses[0] < 2 and losses[-1] < 3e-2
    assert Image.open(tmp_path / "model/res/comparison_result_overfit.png").width > 600


@pytest.mark.slow
def test_overfit_with_its_defaults_brings_the_loss_to_zero(run_script, pictures):
    code, out, err = run_script(overfit, "--dataset", "folder", "--data-dir", pictures)
    assert code == 0, err
    assert float(re.findall(r"loss (\S+)", out)[-1]) < 1e-5


def test_overfit_says_when_the_loss_does_not_get_there(run_script, pictures):
    args = (*TINY, "--dataset", "folder", "--data-dir", pictures)
    code, _, err = run_script(overfit, *args, "--iterations", 3)
    assert code == 1 and re.fullmatch(r"error: the loss stopped at .*lower --lr.*\n", err)
    code, _, err = run_script(overfit, *args, "--lr", 1e20, "--iterations", 9)
    assert code == 1 and "stopped at nan" in err
    code, _, err = run_script(overfit, "--t", 10)
    assert code == 1 and err == "error: --t 10 is outside 1 ... 9; lower it\n"


# ---- visualize.py -----------------------------------------------------------------------------------------------


def test_other_images_are_not_looked_for_where_those_of_the_training_were(monkeypatch):
    train_cfg = config.defaults(train.SETTINGS, dataset="folder", data_dir="pictures")
    monkeypatch.setattr(checkpoint, "choose", lambda *_: Path("model/unet32_e0.pth"))
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: (None, train_cfg))
    for dataset, expected in (("auto", "pictures"), ("folder", "pictures"), ("cifar10", "data")):
        typed = {"device", "dataset"} - ({"dataset"} if dataset == "auto" else set())
        cfg = config.defaults(visualize.SETTINGS, dataset=dataset, device="cpu")
        cfg = checkpoint.load_run(dataclasses.replace(cfg, given=frozenset(typed)), "cpu")[-1]
        assert (cfg.dataset, cfg.data_dir) == ("folder" if dataset == "auto" else dataset, expected)
    typed = dataclasses.replace(cfg, data_dir="mine", given=frozenset({"device", "dataset", "data_dir"}))
    assert checkpoint.load_run(typed, "cpu")[-1].data_dir == "mine"


def test_figures_lie_with_their_weights_and_the_limit_of_the_training_is_not_theirs(monkeypatch):
    train_cfg = config.defaults(train.SETTINGS, dataset="leaves", limit=5)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: (None, train_cfg))
    for given, expected in (((), "mine"), (("out_dir",), "figures")):
        cfg = config.defaults(visualize.SETTINGS, weights="mine/unet32_e0.pth", out_dir="figures", device="cpu")
        cfg = checkpoint.load_run(dataclasses.replace(cfg, given=frozenset(given)), "cpu")[-1]
        assert (cfg.out_dir, cfg.dataset, cfg.limit) == (expected, "leaves", None)


@pytest.mark.parametrize("script", [visualize, evaluate])
def test_a_mistyped_folder_is_not_taken_for_the_weights_provided(run_script, script, tmp_path):
    code, _, err = run_script(script, "--out-dir", tmp_path / "mien", "--device", "cpu")
    assert code == 1 and re.fullmatch("error: there is no folder .*mien; name that of a run, or .*--weights too\n", err)
    assert not (tmp_path / "mien").exists()


def test_train_then_visualize(run_script, pictures, tmp_path):
    code, _, err = run_script(visualize, "--curves")  # before there is anything to draw
    assert code == 1 and re.fullmatch(r"error: .*train.py first.*\n", err)
    args = (*TINY, "--dataset", "folder", "--data-dir", pictures, "--epochs", 2, "--batch-size", 8)
    code, out, err = run_script(train, *args, "--save-model-epochs", 2)
    assert code == 0 and "model saved: model/unet32_e1.pth" in out, err
    # The data are those of the training, the weights the newest by epoch, whatever the time of the file.
    os.utime("model/unet32_e1.pth", (0, 0))
    code, out, err = run_script(visualize, "--images", 3)
    assert "figure saved: model/res/comparison_result_unet32_e1.png" in out, err
    assert f"4 test images of 4 pictures in {pictures}; weights: model/unet32_e1.pth" in out
    code, out, err = run_script(visualize, "--curves")
    assert "figure saved: model/res/curves.png" in out, err
    code, out, err = run_script(visualize, "--strip", "--t", 4, "--images", 2)
    assert "figure saved: model/res/steps_unet32_e1.png" in out, err
    for name in ("comparison_result_unet32_e1.png", "curves.png", "steps_unet32_e1.png"):
        assert looks_like_a_figure(tmp_path / "model/res" / name)
    code, _, err = run_script(visualize, "--strip", "--t", 10)
    assert code == 1 and err == "error: --t 10 is outside 1 ... 9; lower it\n"
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("T", [2, 4])
def test_few_noise_levels(T, run_script, pictures, monkeypatch):
    """The strip begins at T / 2, and no row is drawn twice."""
    args = (*TINY, "--dataset", "folder", "--data-dir", pictures, "--epochs", 1, "--batch-size", 8)
    assert run_script(train, *args, "--noise-steps", T)[0] == 0
    drawn, counts = [], set()

    def grid(path, rows):
        drawn.append([name for name, *_ in rows])
        counts.update(len(images) for _, images, _ in rows)

    monkeypatch.setattr(figures, "grid", grid)
    for flags in (("--images", 3), ("--strip", "--images", 3)):
        code, _, err = run_script(visualize, *flags)
        assert code == 0, err
    rows = ["original", "t = 1\nnoisy", "1 step"]
    if T == 4:
        rows += ["t = 2\nnoisy", "1 step", "2 steps", "t = 3\nnoisy", "1 step", "3 steps"]
    assert drawn[0] == rows and drawn[1][1] == f"t = {T // 2}\nnoisy" and counts == {3}


@pytest.mark.parametrize(
    "args",
    [
        *(("--curves", "--strip"), ("--curves", "--weights", "x.pth"), ("--t", 3)),
        *(("--curves", "--images", 3), ("--curves", "--dataset", "leaves"), ("--curves", "--device", "cpu")),
    ],
)
def test_settings_of_two_figures_are_refused(args, run_script):
    code, _, err = run_script(visualize, *args)
    assert code == 1 and re.fullmatch(r"error: --(curves|t|images|dataset|device) .*; (draw|name|give|leave) .*\n", err)


@pytest.mark.parametrize("module", [evaluate, overfit, visualize])
@pytest.mark.parametrize("args", [("--fresh-crops",), ("--scales", 1, 0.5), ("--crops-per-image", 3)])
def test_settings_of_training_images_are_refused_where_test_images_are_used(module, args, run_script):
    code, _, err = run_script(module, "--dataset", "folder", *args)
    typed = " ".join(map(str, args))
    assert code == 2 and re.fullmatch(rf"error: unrecognized arguments: {typed} \(.* --help lists .*\)\n", err)


def test_settings_that_the_network_does_not_take_are_refused(run_script):
    code, _, err = run_script(overfit, "--model", "plain", "--blocks", 2, "--device", "cpu")
    assert code == 1 and err == "error: --blocks is not a setting of --model plain; leave it out\n"


@pytest.mark.parametrize(
    "log", [b"", b"epoch\n", b"\xff\x00\x80", b"epoch,train_loss,test_loss\n1e400,1,1\n", b"epoch\n" + b"9" * 200_000]
)
def test_a_damaged_log_is_said_in_one_line(log, run_script, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/log.csv").write_bytes(log)
    code, _, err = run_script(visualize, "--curves")
    assert code == 1 and re.fullmatch(r"error: model.log.csv is empty or damaged.*\n", err)


def test_the_curves_are_both_losses_by_epochs_counted_from_one(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    rows = [dict(epoch=str(i), train_loss=f"0.{4 - i}", test_loss=f"0.{2 - i}") for i in range(2)]
    figures.curves(rows, "unused.png")
    found = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].axes[0].lines]
    assert found == [("training", [1, 2], [0.4, 0.3]), ("held out", [1, 2], [0.2, 0.1])]


def test_every_cell_shows_its_psnr(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    x0, off = torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.5)
    figures.panels("unused.png", [("original", x0, None), ("off", off, x0), ("same", x0, x0)])
    labels = [(ax.get_title(), ax.get_xlabel()) for ax in drawn[0].axes]
    assert labels == [("original", ""), ("off", "12.0 dB"), ("same", "∞ dB")]  # 20 log10(255 / 63.75)


def test_a_grid_of_any_number_of_steps_and_images(tmp_path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 16, 20), dtype=torch.uint8)
    calls = []

    class Counting(unet.UNet):
        def forward(self, x, t):
            calls.append(len(x))
            return super().forward(x, t)

    model = Counting(widths=(4, 4, 8), t_dim=8, noise_steps=1000).train()
    figures.comparison_grid(model, images, 1000, tmp_path / "grid.png", count=2)
    assert looks_like_a_figure(tmp_path / "grid.png") and model.training
    assert len(calls) == 3 * (1 + figures.MOST_STEPS) and set(calls) == {2}  # not a thousand
    calls.clear()
    figures.steps_strip(model, images, 1000, 900, tmp_path / "strip.png", count=2)
    assert len(calls) == 1 + 2 + 3 + figures.MOST_STEPS
    figures.panels(tmp_path / "one.png", [("white", torch.ones(3, 1, 1), torch.ones(3, 1, 1))])
    assert Image.open(tmp_path / "one.png").width > 200
    with pytest.raises(OSError):
        figures.comparison_grid(model, images, 10, tmp_path / "grid.png" / "in_a_file.png", count=2)
    assert model.training  # also after a figure that could not be written: the run goes on


@pytest.mark.parametrize(
    "count, values, allowed",
    [
        *[(2, (1, 2), True), (2, [1, 2], True), (2, (1,), False), (2, 1, False), (2, (1, 0), False), (2, "12", False)],
        *[("+", (1,), True), ("+", (1, 2, 3), True), ("+", (), False), ("*", (), True), ("*", (0,), False)],
    ],
)
def test_a_file_may_hold_what_the_command_line_could_give(count, values, allowed):
    assert config.allows(Setting((5, 5), whole(), "numbers", count), values) is allowed
