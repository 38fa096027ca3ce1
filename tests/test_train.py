"""Training: schedule and textbook recipe against PyTorch's own, exact resume, what is refused, several ranks."""

import contextlib
import copy
import csv
import dataclasses
import errno
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL, SMALL_OF, TINY, states_equal
from PIL import Image

import config
import data
import diffusion
import train
import unet
from support import checkpoint, devices, figures, held_out, loggers, streams
from support import run as runs
from support.world import World

# ---- the recipe -------------------------------------------------------------------------------------------------


def test_learning_rates_are_those_of_pytorch():
    steps_per_epoch, epochs = 5, 4
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedulers = {
        "linear": (torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps_per_epoch * epochs), 1),
        "cosine": (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), steps_per_epoch),
        "constant": (torch.optim.lr_scheduler.ConstantLR(optimizer, 1), 1),
    }
    for name, (scheduler, period) in schedulers.items():
        optimizer.param_groups[0]["lr"] = 0.1
        cfg = config.defaults(train.SETTINGS, lr=0.1, epochs=epochs, warmup_steps=0, schedule=name)
        for step in range(steps_per_epoch * epochs):
            expected = optimizer.param_groups[0]["lr"]
            assert train.lr_at(step, cfg, steps_per_epoch) == pytest.approx(expected, rel=1e-6), (name, step)
            optimizer.step()
            if (step + 1) % period == 0:
                scheduler.step()
    cfg = config.defaults(train.SETTINGS, lr=0.1, epochs=10, warmup_steps=10, schedule="constant")
    assert [train.lr_at(step, cfg, 5) for step in (0, 4, 9, 30)] == pytest.approx([0.01, 0.05, 0.1, 0.1])
    cfg = dataclasses.replace(cfg, schedule="linear")  # of 50 steps: the lower of the two rates counts
    assert [train.lr_at(step, cfg, 5) for step in (0, 4, 9, 30, 49)] == pytest.approx([0.01, 0.05, 0.082, 0.04, 0.002])


def test_reference_preset_is_the_textbook_loop(run, pictures):
    """Weights after `--preset reference` against a loop of PyTorch's and torchvision's own parts, on the same noise."""
    run("--preset", "reference", "--epochs", 2, *TINY, "--device", "cpu")
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
    )
    files = sorted((pictures / "train").iterdir(), key=lambda path: path.name)
    images = torch.stack([transform(Image.open(file)) for file in files])
    torch.manual_seed(0)
    model = unet.UNet(widths=(4, 4, 8), t_dim=8)
    initial = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    step = 0
    for epoch in range(2):
        order = torch.randperm(16, generator=streams.generator("cpu", 0, streams.ORDER, epoch))
        for batch in torch.utils.data.DataLoader(images, batch_size=8, sampler=order):
            t, eps = data.draw_noise(batch.shape, config.defaults(train.SETTINGS), "cpu", step)
            loss = torch.nn.functional.mse_loss(model(batch + eps * (t / 10).view(-1, 1, 1, 1), t), eps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        scheduler.step()
    trained = checkpoint.load("model/unet32_e1.pth")
    assert trained["step"] == step
    for name, parameter in model.state_dict().items():
        # Relative to the way it went: Adam turns the rounding of a vanishing gradient into a step of visible size.
        difference = (trained["model"][name] - parameter).norm() / (parameter - initial[name]).norm()
        assert difference < 0.02, name


def test_the_first_weights_follow_from_the_seed(run):
    run("--epochs", 1, "--lr", 0, "--recycle", 0, "--seed", 3, *SMALL)
    torch.manual_seed(3)
    expected = unet.UNet(widths=(4, 4, 8), t_dim=8).state_dict()
    found = checkpoint.load("model/unet32_e0.pth")["model"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_settings_reach_the_training(run, monkeypatch):
    seen, noise_loss = [], diffusion.noise_loss

    def seen_loss(model, x0, eps, t, T):
        seen.append((t, T))
        return noise_loss(model, x0, eps, t, T)

    monkeypatch.setattr(diffusion, "noise_loss", seen_loss)
    settings = ("--continuous-t", "--noise-steps", 7, "--beta2", 0.8, "--weight-decay", 0.3)
    run("--epochs", 1, *settings, *SMALL)
    (group,) = checkpoint.load("model/unet32_e0.pth")["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.8) and group["weight_decay"] == 0.3
    assert [T for _, T in seen] == [7] * 5  # four updates and the held-out loss
    t = torch.cat([t for t, _ in seen[:4]])
    assert (t != t.round()).all() and t.min() >= 0.5 and t.max() <= 6.5
    assert seen[4][0].tolist() == [1, 2, 4, 5]  # of 1 ... 6, for four images


def test_held_out_loss_is_that_of_fixed_noise_at_every_level():
    images = torch.zeros(900, 3, 32, 32, dtype=torch.uint8)  # x0 = -1: eps can be read off x_t

    class Half(torch.nn.Module):
        def forward(self, x, t):
            seen.append(t)
            return 0.5 * (x + 1) / (t / 10).view(-1, 1, 1, 1)

    seen = []
    world, cfg = World(torch.device("cpu")), config.defaults(train.SETTINGS, precision="float32")
    loss = held_out.held_out_loss(cfg, world, Half(), images)
    assert loss == pytest.approx(0.25, rel=0.01)  # half of each eps is missing
    assert torch.bincount(torch.cat(seen)).tolist() == [0] + [100] * 9
    assert loss == held_out.held_out_loss(cfg, world, Half(), images)


def test_held_out_levels_are_those_of_training():
    """Of --sigma-range as many quantiles as there are steps; large images a few at a time."""
    images, seen = torch.zeros(90, 3, 96, 96, dtype=torch.uint8), []

    class Network(torch.nn.Module):
        def forward(self, x, t):
            seen.append(t)
            return 0 * x

    for sigmas, power in (((10.0, 20.0), 0.0), ((1.0, 75.0), 0.75)):
        seen.clear()
        cfg = config.defaults(train.SETTINGS, sigma_range=sigmas, sigma_power=power, precision="float32")
        held_out.held_out_loss(cfg, World(torch.device("cpu")), Network(), images)
        assert max(map(len, seen)) * 96 * 96 <= 250 * 32 * 32
        drawn = np.sort(data.draw_noise((20_000, 1, 1, 1), cfg, "cpu", 0)[0])
        expected = np.quantile(drawn, (np.arange(9) + 0.5) / 9)
        np.testing.assert_allclose(torch.cat(seen).view(10, 9), expected[None].repeat(10, 0), rtol=0.02)


@pytest.mark.parametrize("count, T", [(4, 10), (256, 1000), (9, 10), (900, 10)])
def test_few_held_out_images_see_the_whole_range_of_levels(count, T):
    cfg = config.defaults(train.SETTINGS, noise_steps=T)
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    t = torch.cat([held_out.held_out_batch(cfg, images, start)[1] for start in range(0, count, data.TEST_BATCH)])
    assert t.min() == 1 and t.max() <= T - 1 and t.double().mean().item() == pytest.approx(T / 2, rel=0.35)
    assert t.max() > 0.7 * (T - 1) and (count < T - 1 or len(t.unique()) == T - 1)


@pytest.mark.parametrize("flags", [("--augment", "--no-flip"), ("--model", "plain", "--recycle", 1)])
def test_settings_that_would_be_ignored_are_refused(run, flags):
    with pytest.raises(config.UserError, match=r"give one of them|leave it out"):
        run("--epochs", 1, *SMALL_OF["plain"], *flags)


def test_measuring_leaves_running_statistics_alone():
    model, images = unet.PlainUNet(widths=(4, 4, 4)), torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    before, cfg = copy.deepcopy(model.state_dict()), config.defaults(train.SETTINGS, precision="float32")
    held_out.held_out_loss(cfg, World(torch.device("cpu")), model, images)
    held_out.channels_in_use(cfg, model, images)
    assert model.training and states_equal(before, model.state_dict())


def test_a_training_on_photographs_sees_jpegs_and_can_be_resumed(run, tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((48, 40), 60).convert("RGB").save(tmp_path / "photos" / split / f"{i}.png")
    seen, noise_loss = [], diffusion.noise_loss

    def seen_loss(model, x0, eps, t, T):
        if torch.is_grad_enabled():
            seen.append(diffusion.add_noise(x0, eps, t, T))
        return noise_loss(model, x0, eps, t, T)

    monkeypatch.setattr(diffusion, "noise_loss", seen_loss)
    data = ("--preset", "photographs", "--init", "none", "--data-dir", tmp_path / "photos", "--dataset", "folder")
    crops = ("--crop-size", 32, "--crops-per-image", 4, "--noise-shares", 0, 1)
    run(*data, *crops, "--epochs", 2, *TINY, "--device", "cpu")
    grey = 127.5 * (torch.cat(seen) + 1)
    assert len(grey) == 16 and (grey - grey.round()).abs().max() < 0.01  # what a JPEG file holds
    run("--resume", "model/unet32_e0.pth", "--out-dir", "again", "--device", "cpu")
    assert states_equal(*(checkpoint.load(f"{folder}/unet32_e1.pth") for folder in ("model", "again")))


# ---- what a run leaves ------------------------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_log_and_grids(run, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(loggers.CSV, "figure", lambda self, path, step: given.append((str(path), step)))
    run("--epochs", 3, "--save-model-epochs", 2, "--sample-every-epochs", 3, "--lr", 2e-3, *SMALL)
    names = sorted(path.name for path in checkpoint.in_folder("model"))
    assert names == ["unet32_e1.pth", "unet32_e2.pth"]  # after two epochs, and at the end
    with open("model/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("epoch", "step", "train_loss", "test_loss", "lr", "images_per_second", "seconds"),
        *("channels_in_use", "of_block"),
    ]
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "4"), ("1", "8"), ("2", "12")]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert os.listdir("model/res") == ["comparison_result_unet32_e2.png"]
    assert given == [("model/res/comparison_result_unet32_e2.png", 12)]
    assert Image.open("model/res/comparison_result_unet32_e2.png").width > 300
    output = capsys.readouterr()
    assert output.out.count("model saved: model/unet32_e") == 2
    assert "Epoch 3/3" in output.err and "images/s" in output.out

    state = torch.load("model/unet32_e2.pth", weights_only=True)
    assert (state["epoch"], state["step"]) == (2, 12)
    assert state["config"]["batch_size"] == 4 and state["config"]["noise_steps"] == 10
    unet.UNet(widths=(4, 4, 8), t_dim=8).load_state_dict(state["model"], strict=True)
    assert state.keys() == {
        *("model", "network", "optimizer", "epoch", "step", "config", "data", "hardware"),
        *("log", "loss_sums", "seconds", "checksum"),
    }


@pytest.mark.parametrize("why", ["figures need Matplotlib", "No space left on device"])
def test_a_grid_that_cannot_be_drawn_does_not_end_the_run(run, monkeypatch, capsys, why):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if "Matplotlib" in why:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError
    else:
        monkeypatch.setattr(figures, "save", full)
    run("--epochs", 2, "--sample-every-epochs", 1, *SMALL)
    said = re.findall(
        rf"WARNING: \S+_e\d\.png could not be saved \(.*{why}.*\); training goes on", capsys.readouterr().err
    )
    assert len(said) == 2 and checkpoint.load("model/unet32_e1.pth")["step"] == 8


def test_saves_inside_an_epoch_come_when_they_are_due(run, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(path.name) or save(path, state))
    run("--epochs", 2, "--save-every-steps", 3, *SMALL)
    assert saved == ["unet32_e0_s3.pth", "unet32_e0.pth", "unet32_e1_s6.pth", "unet32_e1.pth"]


@pytest.mark.parametrize("model, optimizer", [("unet", "muon"), ("plain", "adamw")])
def test_a_resumed_run_is_the_same_run(run, model, optimizer):
    run("--epochs", 3, "--model", model, "--optimizer", optimizer, *SMALL_OF[model])
    shutil.copytree("model", "straight")
    for later in ("unet32_e1.pth", "unet32_e2.pth", "log.csv"):
        (Path("model") / later).unlink()
    run("--resume", "auto", "--device", "cpu")
    for name in ("unet32_e1.pth", "unet32_e2.pth"):
        assert states_equal(checkpoint.load(f"straight/{name}"), checkpoint.load(f"model/{name}"))
    # Resumed in another folder, the run is the same too, and the first folder is left alone.
    run("--resume", "straight/unet32_e0.pth", "--out-dir", "elsewhere", "--device", "cpu")
    assert states_equal(checkpoint.load("straight/unet32_e2.pth"), checkpoint.load("elsewhere/unet32_e2.pth"))
    assert len(Path("elsewhere/log.csv").read_text().splitlines()) == 4


def test_the_time_left_is_told_at_the_pace_of_this_machine(run, capsys):
    run("--epochs", 1, *SMALL)
    state = checkpoint.load("model/unet32_e0.pth")
    state["log"][0]["seconds"] = 1e9  # as if it had run on a very slow one
    checkpoint.save("model/unet32_e0.pth", {name: value for name, value in state.items() if name != "checksum"})
    run("--resume", "auto", "--epochs", 3, "--device", "cpu")
    assert re.search(r"epoch 2/3: .*, \d\d:\d\d left", capsys.readouterr().out)  # minutes and seconds


def test_the_time_left_is_that_of_steps_not_of_measuring(run, capsys, monkeypatch):
    """An hour passes in every measurement; one process only measures, having come when the steps were done."""
    clock = types.SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(runs, "time", clock)

    def measure(*args):
        clock.now += 3600
        return 0.5

    monkeypatch.setattr(train, "held_out_loss", measure)
    after_step = runs.Run.after_step

    def step(self, loss):
        clock.now += 2
        after_step(self, loss)

    monkeypatch.setattr(runs.Run, "after_step", step)
    run("--epochs", 3, *SMALL)
    left = re.findall(r"epoch \d/3: .*, (\S+) left", capsys.readouterr().out)
    steps = checkpoint.load("model/unet32_e0.pth")["step"]
    assert left == [runs.tqdm.format_interval(2 * steps * epochs) for epochs in (2, 1, 0)]
    state = checkpoint.load("model/unet32_e0.pth")
    assert [state["log"][0][name] for name in ("images_per_second", "seconds")] == [4 / 2, 2 * steps + 3600]
    for path in Path("model").glob("*.pth"):
        path.unlink()
    checkpoint.save(f"model/unet32_e0_s{steps}.pth", dict(state, log=[]))
    run("--resume", "auto", "--device", "cpu")
    assert re.findall(r"epoch \d/3: .*, (\S+) left", capsys.readouterr().out)[0] == "?"


def test_tensorboard_and_wandb_are_given_the_newest_row(monkeypatch, tmp_path):
    calls = []

    def note(*args, **named):
        calls.append((args, named))

    board, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    board.SummaryWriter = lambda folder: types.SimpleNamespace(add_scalar=note, add_image=note, flush=lambda: None)
    wandb.Image, wandb.init = str, lambda **_: types.SimpleNamespace(log=note)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    names = (*loggers.SCALARS, "step")
    rows = [dict(zip(names, range(first, first + len(names)))) for first in (10, 20)]
    for name in ("tensorboard", "wandb"):
        loggers.start(name, tmp_path, {}).log(rows)
    *values, step = range(20, 20 + len(names))
    scalars = dict(zip(loggers.SCALARS, values))
    assert calls == [*(((*scalar, step), {}) for scalar in scalars.items()), ((scalars,), {"step": step})]
    calls.clear()
    Image.new("RGB", (3, 2), "red").save(tmp_path / "grid.png")
    for name in ("tensorboard", "wandb"):
        loggers.start(name, tmp_path, {}).figure(tmp_path / "grid.png", 7)
    ((name, image, step), named), of_wandb = calls
    assert (name, image.shape, step, named) == ("comparison", (2, 3, 3), 7, {"dataformats": "HWC"})
    assert of_wandb == (({"comparison": str(tmp_path / "grid.png")},), {"step": 7})


def test_a_finished_run_can_be_prolonged(run, capsys):
    run("--epochs", 1, *SMALL)
    run("--resume", "auto", "--device", "cpu")
    assert "nothing is left to train" in capsys.readouterr().out
    run("--resume", "auto", "--epochs", 2, "--device", "cpu")
    assert "now spans 2 epochs, not 1" in capsys.readouterr().out
    assert checkpoint.load("model/unet32_e1.pth")["step"] == 8


def test_another_run_is_never_overwritten(run):
    run("--epochs", 2, *SMALL)
    before = {path.name: path.read_bytes() for path in checkpoint.in_folder("model")}
    for args in (("--epochs", 1), ("--resume", "model/unet32_e0.pth")):
        with pytest.raises(checkpoint.CheckpointError, match=r"model already holds unet32_e1.pth.*--overwrite"):
            run(*args)
    assert {path.name: path.read_bytes() for path in checkpoint.in_folder("model")} == before
    run("--epochs", 1, "--overwrite", "--seed", 1, *SMALL)
    assert [path.name for path in checkpoint.in_folder("model")] == ["unet32_e0.pth"]
    assert len(Path("model/log.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "typed, was",
    [
        ("--seed 1", "--seed 0"),
        ("--batch-size 8", "--batch-size 4"),
        ("--noise-steps 20", "--noise-steps 10"),
        ("--model plain", "--model unet"),
        ("--lr 0.5", "--lr 0.0004"),
        ("--widths 4 8 8", "--widths 4 4 8"),
        ("--continuous-t", "--no-continuous-t"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(run, typed, was):
    run("--epochs", 1, *SMALL)
    with pytest.raises(checkpoint.CheckpointError, match=f"was trained with {was}; leave {typed} out"):
        run("--resume", "auto", "--epochs", 2, *typed.split())


def test_a_checkpoint_of_other_images_is_refused(run, pictures, tmp_path):
    run("--epochs", 1, *SMALL)
    moved = shutil.copytree(pictures, tmp_path / "moved")
    run("--resume", "auto", "--data-dir", moved, "--epochs", 2, "--device", "cpu")
    for split in ("train", "test"):
        others = shutil.copytree(pictures, tmp_path / f"other {split}")
        Image.new("RGB", (32, 32)).save(others / split / "0.png")
        with pytest.raises(checkpoint.CheckpointError, match="was trained on other images"):
            run("--resume", "auto", "--data-dir", others, "--epochs", 3)
    regrouped = shutil.copytree(pictures, tmp_path / "regrouped")
    first = min((regrouped / "test").iterdir())
    first.rename(regrouped / "train" / f"z{first.name}")  # in the same order as before, but no longer held out
    with pytest.raises(checkpoint.CheckpointError, match="was trained on other images"):
        run("--resume", "auto", "--data-dir", regrouped, "--epochs", 3)


def test_only_what_makes_no_other_run_may_change():
    free = {
        *("device", "compile", "out_dir", "resume", "overwrite", "loggers", "data_dir", "epochs"),
        *("save_model_epochs", "sample_every_epochs", "save_every_steps"),
    }
    saved = {"config": {name: setting.default for name, setting in train.SETTINGS.items()} | {"seed": 7}}
    for name in train.SETTINGS:
        cfg = config.defaults(train.SETTINGS, resume="r.pth")
        cfg = dataclasses.replace(cfg, **{name: "typed"}, given=frozenset({name}))
        if name in free:
            found = runs.settings_of(saved, cfg, train.SETTINGS)
            assert getattr(found, name) == "typed" and found.seed == 7
        else:
            flag = name.replace("_", "-")
            was = train.SETTINGS[name].default
            then = f"--{'' if was else 'no-'}{flag};" if isinstance(was, bool) else f"--{flag} "
            with pytest.raises(checkpoint.CheckpointError, match=f"trained with {then}.*leave --{flag} typed out"):
                runs.settings_of(saved, cfg, train.SETTINGS)


def test_a_run_keeps_the_precision_in_which_it_began(run, monkeypatch, capsys):
    forward, seen = unet.UNet.forward, set()

    def seen_forward(self, x, t):
        eps_hat = forward(self, x, t)
        seen.add((torch.is_grad_enabled(), eps_hat.dtype))
        return eps_hat

    monkeypatch.setattr(unet.UNet, "forward", seen_forward)
    monkeypatch.setattr(devices, "bfloat16_is_fast", lambda: False)
    run("--epochs", 1, "--precision", "bfloat16", *SMALL)
    run("--resume", "auto", "--epochs", 2, "--device", "cpu")
    training, held_out_loss, counting_channels = (True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)
    assert seen == {training, held_out_loss, counting_channels} and "goes on in bfloat16" in capsys.readouterr().err
    assert checkpoint.load("model/unet32_e1.pth")["model"]["final.weight"].dtype == torch.float32
    with pytest.raises(checkpoint.CheckpointError, match="with --precision bfloat16; leave --precision float32 out"):
        run("--resume", "auto", "--epochs", 3, "--precision", "float32")


@pytest.mark.parametrize(
    "of_process_0", [("b.pth", "mine", [16, 16]), ("a.pth", "other", [16, 16]), ("a.pth", "mine", [17, 15])]
)
def test_processes_that_start_from_different_things_are_refused(monkeypatch, of_process_0):
    """A machine may have other images, or see another --out-dir."""
    monkeypatch.setattr(data, "load", lambda split, cfg: (torch.zeros(16, 3, 32, 32, dtype=torch.uint8), split))
    monkeypatch.setattr(data, "fingerprint", lambda *splits: "mine")
    cfg = config.defaults(train.SETTINGS, batch_size=4, resume="a.pth")
    world = types.SimpleNamespace(rank=1, device="cpu", first_of_machine=contextlib.nullcontext)
    world.agree = lambda mine: of_process_0
    with pytest.raises(config.UserError, match=r"process 1 finds .* every machine needs the same --data-dir and"):
        runs.load_images(cfg, world)
    world.agree = lambda mine: ("a.pth", "mine", [16, 16])
    assert len(runs.load_images(cfg, world).train) == 16


def test_what_cannot_be_resumed_is_said(run):
    with pytest.raises(checkpoint.CheckpointError, match=r"nowhere/at.pth: there is no such file"):
        run("--resume", "nowhere/at.pth")
    assert not Path("nowhere").exists()
    run("--epochs", 1, *SMALL)
    state = checkpoint.load("model/unet32_e0.pth")
    checkpoint.save("model/unet32_e1_s9.pth", dict(state, epoch=1, step=9))  # an epoch has four steps
    with pytest.raises(checkpoint.CheckpointError, match="contradicts itself: its step is not in its epoch"):
        run("--resume", "model/unet32_e1_s9.pth", "--epochs", 3)


def test_a_run_resumed_by_name_goes_on_in_the_folder_of_its_checkpoint(run):
    run("--epochs", 1, "--out-dir", "mine", *SMALL)
    run("--resume", "mine/unet32_e0.pth", "--epochs", 2, "--device", "cpu")
    assert [path.name for path in checkpoint.in_folder("mine")] == ["unet32_e0.pth", "unet32_e1.pth"]
    assert not Path("model").exists()


def test_the_weights_that_a_run_started_from_are_needed_at_its_start_alone(run, capsys):
    run("--epochs", 1, "--out-dir", "first", *SMALL)
    run("--init", "first/unet32_e0.pth", "--epochs", 1, *SMALL)
    assert "starting from first/unet32_e0.pth\n" in capsys.readouterr().out
    Path("first/unet32_e0.pth").unlink()
    run("--resume", "auto", "--epochs", 2, "--device", "cpu")
    assert checkpoint.load("model/unet32_e1.pth")["step"] == 8
    with pytest.raises(
        config.UserError, match=r"--init first/unet32_e0.pth: there is no such file here; .*--init none"
    ):
        run("--init", "first/unet32_e0.pth", "--out-dir", "again", *SMALL)
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot be used: .*; use another one, or --init none"):
        run("--init", "model/unet32_e1.pth", "--out-dir", "wider", *SMALL, "--t-dim", 16)


def test_a_run_starts_from_the_weights_of_another(run):
    run("--epochs", 1, *SMALL)
    run("--init", "model/unet32_e0.pth", "--lr", 0, "--recycle", 0, "--epochs", 1, "--out-dir", "tuned", *SMALL)
    first, tuned = checkpoint.load("model/unet32_e0.pth"), checkpoint.load("tuned/unet32_e0.pth")
    assert tuned["step"] == 4 and tuned["config"]["init"] == "model/unet32_e0.pth"
    for name, value in first["model"].items():
        assert torch.equal(value, tuned["model"][name])


def test_a_run_of_an_earlier_version_goes_on_if_its_network_is_todays(run):
    for steps, message in ((10, None), (20, "whose network sees t unscaled")):
        folder = f"old{steps}"
        run("--epochs", 1, "--noise-steps", steps, "--out-dir", folder, "--t-dim", 8, *SMALL[6:])
        state = checkpoint.load(f"{folder}/unet32_e0.pth")
        del state["network"]
        newer = "widths", "blocks", "noise", "noise_shares", "sigma_range", "init", "recycle", "augment", "loggers"
        for name in newer:
            state["config"].pop(name, None)
        checkpoint.save(f"{folder}/unet32_e0.pth", state)
        if message:
            with pytest.raises(checkpoint.CheckpointError, match=message):
                run("--resume", "auto", "--epochs", 2, "--out-dir", folder, "--device", "cpu")
        else:
            with pytest.raises(
                checkpoint.CheckpointError, match="was trained with --noise white; leave --noise mixed out"
            ):
                run("--resume", "auto", "--epochs", 2, "--out-dir", folder, "--noise", "mixed")
            run("--resume", "auto", "--epochs", 2, "--out-dir", folder, "--device", "cpu")
            resumed = checkpoint.load(f"{folder}/unet32_e1.pth")
            then = resumed["config"]
            assert resumed["step"] == 8 and then["noise_shares"] == (1 / 3, 1 / 6) and then["recycle"] == 0


def test_weights_alone_cannot_be_resumed(run):
    run("--epochs", 1, *SMALL)
    state = checkpoint.load("model/unet32_e0.pth")
    checkpoint.save("weights.pth", {"model": state["model"], "config": state["config"]})
    with pytest.raises(checkpoint.CheckpointError, match=r"weights.pth lacks what is needed here \(data, epoch, log"):
        run("--resume", "weights.pth")


def test_overwrite_deletes_nothing_before_there_is_something_new(run, monkeypatch):
    run("--epochs", 1, *SMALL)
    with pytest.raises(config.UserError, match=r"finite|the loss is"):
        run("--epochs", 1, "--overwrite", "--lr", 1e3, *SMALL, "--precision", "float32")
    assert checkpoint.load("model/unet32_e0.pth")["config"]["lr"] == 4e-4

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"could not be saved .*No space left"):
        run("--epochs", 1, "--overwrite", "--seed", 1, *SMALL)
    assert checkpoint.load("model/unet32_e0.pth")["config"]["seed"] == 0


def test_settings_that_cannot_be_are_refused(run):
    with pytest.raises(config.UserError, match="16 training images do not fill a batch of 32"):
        run("--batch-size", 32)
    with pytest.raises(config.UserError, match="--sigma-range 50 10: the first must be lower"):
        run("--sigma-range", 50, 10)
    with pytest.raises(config.UserError, match=r"--sigma-power is .* --sigma-range"):
        run("--sigma-power", 1)
    with pytest.raises(config.UserError, match=r"--sigma-range .*; leave --continuous-t out"):
        run("--continuous-t", "--sigma-range", 5, 50)
    with pytest.raises(config.UserError, match="--noise-shares are those of --noise mixed"):
        run("--noise-shares", 0.5, 0)
    with pytest.raises(config.UserError, match=r"--device \S+ cannot be used "):
        run("--device", "cuda:99")


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    monkeypatch.setattr(runs, "SHOW_EVERY", 0)  # look at the loss after every step
    with pytest.raises(config.UserError, match=r"the loss is (nan|inf) by step 2 .* lower --lr"):
        run("--lr", 1e3, "--epochs", 2, *SMALL, "--precision", "float32")
    assert not checkpoint.in_folder("model")


# ---- compiling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["unet", "plain"])
def test_a_compiled_run_is_the_same_run(run, monkeypatch, model):
    args = ("--epochs", 2, "--model", model, "--precision", "float32", *SMALL_OF[model])
    run(*args, "--out-dir", "plainly")
    compiled = []

    def backend(graph, inputs):  # dynamo takes the network apart as on a GPU; no C++ compiler is needed
        compiled.append(graph)
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, dynamic: original(self, backend=backend))
    torch._dynamo.reset()
    run(*args, "--compile", "--out-dir", "compiled")
    assert len(compiled) == 1  # neither the second epoch nor the held-out loss compiles anew
    a, b = (checkpoint.load(f"{folder}/unet32_e1.pth") for folder in ("plainly", "compiled"))
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value)
    assert [row["test_loss"] for row in a["log"]] == pytest.approx([row["test_loss"] for row in b["log"]], rel=1e-4)


def test_gradients_do_not_add_up_while_compiling():
    """A replayed CUDA graph overwrites those of the one before; to add to them is an error there."""
    model = unet.UNet(widths=(4, 4, 8), t_dim=8)
    held = []  # at the moment of each call
    cfg = config.defaults(train.SETTINGS, batch_size=2, precision="float32")
    model.final.register_full_backward_pre_hook(lambda *_: held.append([p.grad for p in model.parameters()]))
    World(torch.device("cpu")).try_compiled(model, cfg)
    assert len(held) == 3 and all(grad is None for grads in held for grad in grads)
    assert all(p.grad is None for p in model.parameters())


def test_where_nothing_can_be_compiled_training_goes_on_without(run, monkeypatch, capsys):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, dynamic: original(self, backend=backend))
    torch._dynamo.reset()
    try:
        run("--epochs", 1, "--compile", *SMALL)
    finally:
        torch.compiler.set_stance("default")
    assert "WARNING: the network cannot be compiled here" in capsys.readouterr().err
    assert len(checkpoint.load("model/unet32_e0.pth")["log"]) == 1


# ---- several ranks ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one(run, script, pictures, tmp_path):
    """torchrun with two CPU processes: gradients of the first step to 1e-5, losses of 50 steps to 1e-3."""
    many = tmp_path / "many"
    shutil.copytree(pictures, many)
    for i in range(8, 16):
        (many / f"train/{i}.png").unlink()
    for i in range(300):  # more than a batch of the held-out loss, so that both processes have some
        shutil.copy(many / "test/0.png", many / f"test/more{i}.png")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for name, epochs, where, limit in (("first", 1, many, 304), ("fifty", 50, pictures, 8)):
        args = ("--dataset", "folder", "--data-dir", where, "--limit", limit, "--batch-size", 8, "--epochs", epochs)
        args += ("--save-model-epochs", 50, "--precision", "float32", "--device", "cpu", "--lr", 2e-4)
        args += ("--optimizer", "adamw")  # whose moments show the gradients
        run(*args, "--out-dir", f"{name}1")
        process = script("train.py", *args, "--out-dir", f"{name}2", launcher=launcher, OMP_NUM_THREADS="1")
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("model saved:") == 1  # by rank 0 alone
    one, two = (checkpoint.load(f"first{n}/unet32_e0.pth") for n in (1, 2))
    assert two["log"][0]["test_loss"] == pytest.approx(one["log"][0]["test_loss"], rel=1e-4)
    one, two = one["optimizer"]["state"], two["optimizer"]["state"]
    for i in one:  # after one step exp_avg is 0.1 times the gradient
        difference = (one[i]["exp_avg"] - two[i]["exp_avg"]).norm() / one[i]["exp_avg"].norm()
        assert difference < 1e-5
    one, two = (checkpoint.load(f"fifty{n}/unet32_e49.pth")["log"] for n in (1, 2))  # an epoch is one step here
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
    assert one[-1]["train_loss"] < 0.9 * one[0]["train_loss"]
