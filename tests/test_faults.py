"""Runs that are stopped, killed, out of disk, on damaged files or bad images: nothing is lost, nothing wrong is accepted."""

import errno
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, states_equal
from PIL import Image

import checkpoint
import data
import train


@pytest.fixture
def start(pictures, tmp_path):
    """start("--epochs", 2): train.py on the pictures as a process, in an empty folder; torchrun with processes=2."""
    started = []

    def start(*args, processes=1, file_limit=None):
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        where = [] if "--resume" in args else ["--dataset", "folder", "--data-dir", pictures]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))) if file_limit else None
        process = subprocess.Popen(
            [sys.executable, *launcher, ROOT / "train.py", *where, *map(str, args)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # torchrun ends its workers, which have sessions of their own
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.02)


# ---- stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_every_steps", [None, 3])
def test_a_run_stopped_at_any_step_is_the_same_run(run, monkeypatch, save_every_steps):
    """Stopped after each of 8 steps and once during the evaluation: weights, optimizer, log as if never stopped."""
    every = ("--save-every-steps", save_every_steps) if save_every_steps else ()
    run("--epochs", 2, "--out-dir", "straight", *SMALL, *every)
    monkeypatch.setattr(train.Stopped, "signal", 0)
    draw, finite, interrupted = train.draw_noise, train.finite, []

    def interrupt(name):
        if name not in interrupted:
            interrupted.append(name)
            signal.raise_signal(signal.SIGINT)

    def draw_and_interrupt(*args):
        interrupt(args[4])  # the step
        return draw(*args)

    def finite_and_interrupt(loss, step, lr):  # at step 4 it stands before the evaluation of the first epoch
        if step == 4:
            interrupt("evaluation")
        return finite(loss, step, lr)

    monkeypatch.setattr(train, "draw_noise", draw_and_interrupt)
    monkeypatch.setattr(train, "finite", finite_and_interrupt)
    for _ in range(20):
        args = (
            ("--resume", "auto", "--device", "cpu")
            if checkpoint.in_folder("model")
            else ("--epochs", 2, *SMALL, *every)
        )
        try:
            run(*args)
            break
        except SystemExit as stop:
            assert stop.code == 130
            train.Stopped.signal = 0
    assert len(interrupted) == 9
    names = [path.name for path in checkpoint.in_folder("model")]
    assert names == ["unet32_e0.pth", "unet32_e1.pth"]  # what was saved inside an epoch is superseded
    for name in names:
        assert states_equal(checkpoint.load(f"straight/{name}"), checkpoint.load(f"model/{name}")), name


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(start, tmp_path, signum, code):
    process = start("--epochs", 500, *SMALL, "--save-model-epochs", 1000)
    wait_for(lambda: (tmp_path / "model/log.csv").exists())
    process.send_signal(signum)
    asked = time.time()
    out, err = process.communicate(timeout=30)
    assert time.time() - asked < 5
    assert process.returncode == code, err
    assert "Traceback" not in err and "go on with --resume auto" in out
    (path,) = checkpoint.in_folder(tmp_path / "model")
    assert checkpoint.load(path)["step"] > 0


def test_a_second_ctrl_c_leaves_at_once_with_nothing_half_written(start, tmp_path):
    process = start("--epochs", 500, *SMALL, "--save-every-steps", 1)
    wait_for(lambda: len(checkpoint.in_folder(tmp_path / "model")) > 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in err
    for path in checkpoint.in_folder(tmp_path / "model"):
        checkpoint.load(path)


def test_only_the_first_ctrl_c_is_caught():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        train.note_signal(signal.SIGTERM, None)
        assert train.Stopped.signal == signal.SIGTERM
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        train.note_signal(signal.SIGINT, None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before[0])
        train.Stopped.signal = 0


def test_damaged_saves_do_not_crowd_out_whole_ones(run, monkeypatch):
    draw = train.draw_noise

    def draw_and_interrupt(*args):
        signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(train, "draw_noise", draw_and_interrupt)
    for step in range(1, 4):
        with pytest.raises(SystemExit):
            run("--epochs", 1, *SMALL) if step == 1 else run("--resume", "auto", "--device", "cpu")
        for damaged in ("unet32_e0_s8.pth", "unet32_e0_s9.pth"):
            Path("model", damaged).write_bytes(b"damaged")
        assert checkpoint.load_newest("model")[1]["step"] == step
    assert [path.name for path in checkpoint.in_folder("model")] == [f"unet32_e0_s{step}.pth" for step in (2, 3, 8, 9)]


def test_kill_9_loses_at_most_the_work_since_the_last_save(start, tmp_path):
    """Killed while it saves after every step: the newest file is whole, leftovers vanish, the run goes on."""
    folder, path, step = tmp_path / "model", None, 0
    for trial in range(3):
        saves = ("--save-every-steps", 1)
        process = start("--resume", "auto") if trial else start("--epochs", 500, *SMALL, *saves)
        beyond = step + 2
        wait_for(
            lambda beyond=beyond: checkpoint.in_folder(folder) and checkpoint.load_newest(folder)[1]["step"] > beyond
        )
        time.sleep(random.random() / 5)
        process.kill()
        output, _ = process.communicate()
        if trial:
            assert f"resumed: {path.relative_to(tmp_path)}, {step:,} steps" in output
        path, state = checkpoint.load_newest(folder)
        assert state["step"] > beyond
        step = state["step"]
    (folder / ".unet32_e0.pth.1.tmp").write_bytes(b"left by a killed save")
    checkpoint.lock(folder).close()
    assert not list(folder.glob(".*.tmp"))


# ---- a disk that fails ------------------------------------------------------------------------------------------


def test_a_full_disk_spares_what_is_there_and_is_said_at_the_end(start, run, tmp_path):
    run("--epochs", 1, *SMALL)
    before = (tmp_path / "model/unet32_e0.pth").read_bytes()
    process = start("--resume", "auto", "--epochs", 3, file_limit=2**20)  # a checkpoint is larger than 1 MiB
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("could not be saved") == 3  # after two epochs, and in the last line
    assert re.fullmatch(r"error: model/unet32_e2.pth could not be saved .*--resume auto", err.splitlines()[-1])
    assert "epoch 3/3" in out and "Traceback" not in err
    assert [path.name for path in checkpoint.in_folder(tmp_path / "model")] == ["unet32_e0.pth"]
    assert (tmp_path / "model/unet32_e0.pth").read_bytes() == before
    assert not list((tmp_path / "model").glob(".*.tmp"))


def test_a_save_that_failed_is_tried_again(run, monkeypatch, capsys):
    replace, failures = os.replace, iter([True, False, False, False])

    def sometimes(source, target):
        if str(target).endswith(".pth") and next(failures):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    run("--epochs", 2, *SMALL)
    assert [path.name for path in checkpoint.in_folder("model")] == ["unet32_e1.pth"]
    assert "No space left on device" in capsys.readouterr().err


def test_messages_that_cannot_be_written_do_not_end_the_run(run, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            attempts.append(text)
            raise OSError(errno.ENOSPC, "No space left on device")

    attempts, draw = [], train.draw_noise

    def draw_and_fill(*args):
        monkeypatch.setattr(sys, "stdout", Full())
        return draw(*args)

    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(train, "draw_noise", draw_and_fill)
    run("--epochs", 2, *SMALL)
    assert any("Epoch 1/2" in text for text in attempts) and any("model saved" in text for text in attempts)
    assert checkpoint.load("model/unet32_e1.pth")["step"] == 8


def test_a_folder_removed_under_the_run_is_made_again(run, monkeypatch):
    draw, removed = train.draw_noise, []

    def draw_and_remove(*args):
        if args[4] == 5:  # the step
            shutil.rmtree("model")
            removed.append("model")
        return draw(*args)

    monkeypatch.setattr(train, "draw_noise", draw_and_remove)
    run("--epochs", 2, *SMALL)
    assert removed
    assert checkpoint.load("model/unet32_e1.pth")["step"] == 8


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(script, pictures, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    process = script("train.py", "--dataset", "folder", "--data-dir", pictures, "--out-dir", "file")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert re.fullmatch(r"error: .*file.*", process.stderr.splitlines()[-1])


def test_two_runs_in_one_folder(run, start, tmp_path):
    held = checkpoint.lock("model")
    process = start("--epochs", 1, *SMALL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"model is in use by process {os.getpid()} on" in err.splitlines()[-1]
    held.close()
    run("--epochs", 1, *SMALL)  # the lock dies with its holder


# ---- files that are not what they seem --------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_is_data_not_code(run):
    torch.save({"model": {}, "config": {}, "payload": Malicious()}, "evil.pth")
    Path("evil2.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(checkpoint.CheckpointError, match="or holds code; use another one"):
            run("--resume", name)
    assert not Path("executed").exists()


def test_damaged_checkpoints_are_refused_and_passed_over(run, capsys):
    run("--epochs", 2, *SMALL)
    path = Path("model/unet32_e1.pth")
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = [b"", whole[:100], whole[:-1000], whole[: len(whole) // 2], b"\0" * 5000]
    for _ in range(12):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        try:
            state = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # a bit that means nothing, in the padding of the archive
            path.write_bytes(whole)
            assert states_equal(state, checkpoint.load(path))
    path.write_bytes(whole)
    for damage, message in (
        (lambda s: s["model"]["final.bias"].add_(1e-3), "checksum is wrong"),
        (lambda s: s["config"].update(lr=0.5), "checksum is wrong"),
        (lambda s: s.pop("checksum"), "has no checksum: an older version"),
    ):
        altered = torch.load("model/unet32_e0.pth", weights_only=True)
        damage(altered)
        torch.save(altered, "altered.pth")
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load("altered.pth")
    path.write_bytes(whole[:-1000])
    run("--resume", "auto", "--device", "cpu")
    assert "WARNING: model/unet32_e1.pth is damaged" in capsys.readouterr().err
    assert checkpoint.load(path)["step"] == 8


def test_bad_images_are_named_or_skipped(tmp_path, capsys):
    folder = tmp_path / "train"
    folder.mkdir()
    (tmp_path / "test").mkdir()
    good = Image.effect_noise((32, 32), 50).convert("RGB")
    good.save(tmp_path / "test" / "good.png")
    good.save(folder / "good.png")
    exif = Image.Exif()
    exif[274] = 6
    broken = exif.tobytes()[:-6]
    good.save(folder / "grün 画.png")
    good.save(folder / "broken-exif.jpg", exif=broken)
    good.convert("CMYK").save(folder / "cmyk.jpg")
    good.save(folder / "animated.gif", save_all=True, append_images=[good.rotate(90)])
    assert len(data.load("train", "folder", str(tmp_path))[0]) == 5
    bad = {"one.png": (1, 1), "zero.png": b"", "text.png": b"hello", "bomb.png": (20_000, 20_000)}
    for name, content in bad.items():
        if isinstance(content, tuple):
            Image.new("1", content).save(folder / name)
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(data.DataError, match=name) as caught:
            data.load("train", "folder", str(tmp_path))
        assert "\n" not in str(caught.value)
        assert len(data.load("train", "folder", str(tmp_path), skip_bad_images=True)[0]) == 5
        assert "left out 1 of 6 train images" in capsys.readouterr().err
        (folder / name).unlink()
    big = Image.new("RGB", (64, 64))
    big.save(folder / "big.png")
    with pytest.raises(data.DataError, match="64x64 pixels are more than --max-pixels 4000"):
        data.load("train", "folder", str(tmp_path), max_pixels=4000)
    (folder / "big.png").unlink()
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")  # as a file that vanishes while the folder is read
    with pytest.raises(data.DataError, match=r"gone.png cannot be read"):
        data.load("train", "folder", str(tmp_path))
    np.testing.assert_equal(data.load("train", "folder", str(tmp_path), skip_bad_images=True)[0].shape, (5, 3, 32, 32))


# ---- several processes ------------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(start, run, tmp_path, capsys):
    process = start("--epochs", 500, *SMALL, processes=2)
    wait_for(lambda: len(checkpoint.in_folder(tmp_path / "model")) > 1, seconds=120)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    asked = time.time()
    _, err = process.communicate(timeout=60)
    assert time.time() - asked < 30 and process.returncode != 0
    assert "if another process of the run ended, see its message" in err
    capsys.readouterr()
    _, state = checkpoint.load_newest("model")
    run("--resume", "auto", "--epochs", len(state["log"]) + 1, "--device", "cpu")
    assert "1 processes go on where 2 stood" in capsys.readouterr().out
