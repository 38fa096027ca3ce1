"""Runs that are stopped, killed, out of disk or on damaged files: nothing is lost, nothing wrong is accepted."""

import errno
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, states_equal

import data
from config import UserError
from support import checkpoint, lock, loggers, muon
from support import run as runs
from support.world import Signals, Stopped, World


@pytest.fixture
def start(pictures, tmp_path):
    """start("--epochs", 2): train.py on the pictures as a process, in an empty folder; torchrun with processes=2."""
    started = []

    def start(*args, processes=1, file_limit=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        where = [] if "--resume" in args else ["--dataset", "folder", "--data-dir", pictures]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))) if file_limit else None
        process = subprocess.Popen(
            [sys.executable, *launcher, ROOT / "train.py", *where, *map(str, args)],
            cwd=tmp_path,
            stdout=stdout,
            stderr=stderr,
            text=True,
            preexec_fn=limit,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # torchrun ends its workers, which have sessions of their own
        process.communicate()


@pytest.fixture
def not_ignored():
    """Signals are not ignored, even where nohup started the tests."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def wait_for(process, condition):
    """Until the condition holds; a process that ends before is a failure. No clock decides."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def at_step(monkeypatch, action):
    """Call action(step) before every update, where the noise of the step is drawn."""
    draw = data.draw_noise

    def draw_and_act(shape, cfg, device, step):
        action(step)
        return draw(shape, cfg, device, step)

    monkeypatch.setattr(data, "draw_noise", draw_and_act)


# ---- stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_every_steps", [None, 3])
def test_a_run_stopped_at_any_step_is_the_same_run(run, monkeypatch, save_every_steps):
    """Stopped after each of 8 steps and once during the evaluation: weights, optimizer, log as if never stopped."""
    every = ("--save-every-steps", save_every_steps) if save_every_steps else ()
    run("--epochs", 2, "--out-dir", "straight", *SMALL, *every)
    held_out_noise, interrupted, this_start = data.held_out_noise, [], []

    def interrupt(moment):
        if moment not in interrupted and not this_start:  # a second signal would end the process at once
            interrupted.append(moment)
            this_start.append(moment)
            signal.raise_signal(signal.SIGINT)

    def noise_and_interrupt(*args):
        interrupt("evaluation")
        return held_out_noise(*args)

    at_step(monkeypatch, interrupt)
    monkeypatch.setattr(data, "held_out_noise", noise_and_interrupt)
    while True:
        this_start.clear()
        there = checkpoint.in_folder("model")
        try:
            run(*(("--resume", "auto", "--device", "cpu") if there else ("--epochs", 2, *SMALL, *every)))
            break
        except SystemExit as stop:
            assert stop.code == 130
    assert len(interrupted) == 9
    names = [path.name for path in checkpoint.in_folder("model")]
    assert names == ["unet32_e0.pth", "unet32_e1.pth"]  # what was saved inside an epoch is superseded
    for name in names:
        assert states_equal(checkpoint.load(f"straight/{name}"), checkpoint.load(f"model/{name}")), name


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_go_on(run, monkeypatch, capsys, not_ignored, signum, code):
    at_step(monkeypatch, lambda step: signal.raise_signal(signum) if step == 2 else None)
    with pytest.raises(SystemExit) as stop:
        run("--epochs", 500, *SMALL)
    assert stop.value.code == code
    assert (
        "stopped after step 3\nmodel saved: model/unet32_e0_s3.pth\ngo on with --resume auto" in capsys.readouterr().out
    )
    assert checkpoint.load("model/unet32_e0_s3.pth")["step"] == 3


def test_a_second_ctrl_c_ends_the_process_at_once():
    code = """
import signal, torch
from support.world import Signals, World
with Signals(World(torch.device("cpu"))):
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
        print("noted", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "noted\n")


def test_processes_stop_at_the_same_step(monkeypatch):
    asked = []

    def all_reduce(x, op):  # another rank has noted a SIGTERM
        asked.append(int(x))
        x.fill_(int(signal.SIGTERM))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    signals = Signals(World(torch.device("cpu"), rank=0, size=2))
    signals.came = int(signal.SIGINT)
    for step in range(1, 8):
        signals.check(step)
    assert not asked
    with pytest.raises(Stopped) as stop:
        signals.check(8)
    assert asked == [signal.SIGINT] and stop.value.signum == signal.SIGTERM


def test_only_the_first_ctrl_c_is_caught():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals(World(torch.device("cpu"))) as signals:
        signals.note(signal.SIGTERM, None)
        assert signals.came == signal.SIGTERM and signal.getsignal(signal.SIGINT) == signals.note
        signals.note(signal.SIGINT, None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_nohup_ignores_stays_ignored(not_ignored):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals(World(torch.device("cpu"))) as signals:
        signal.raise_signal(signal.SIGHUP)
        assert not signals.came and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_damaged_saves_do_not_crowd_out_whole_ones(run, monkeypatch):
    at_step(monkeypatch, lambda step: signal.raise_signal(signal.SIGINT))
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

    def reached():
        """The step of the newest save by its name: the run may delete the file at any moment."""
        found = checkpoint.in_folder(folder)
        epoch, step = checkpoint.epoch_and_step(found[-1]) if found else (0, 0)
        return min(step, 4 * (epoch + 1))  # of four steps an epoch; that of a finished one is infinite

    moments = random.Random(0)
    for trial in range(2):
        saves = ("--save-every-steps", 1)
        process = start("--resume", "auto", "--device", "cpu") if trial else start("--epochs", 100_000, *SMALL, *saves)
        beyond = step + 2
        wait_for(process, lambda beyond=beyond: reached() > beyond)
        time.sleep(moments.random() / 5)
        process.kill()
        output, _ = process.communicate()
        if trial:
            assert f"resumed: {path.relative_to(tmp_path)}, {step:,} steps" in output
        path, state = checkpoint.load_newest(folder)
        assert state["step"] > beyond
        step = state["step"]
    lock.take(folder).close()
    assert not list(folder.glob(".tmp*"))


def test_one_command_starts_and_goes_on(run, capsys):
    """As a cluster repeats it: --resume auto begins a new run in an empty folder, and resumes it afterwards."""
    run("--resume", "auto", "--epochs", 1, *SMALL, fresh=True)
    assert "model holds no checkpoint yet: a new run starts" in capsys.readouterr().out
    run("--resume", "auto", "--epochs", 2, *SMALL, fresh=True)
    assert "resumed: model/unet32_e0.pth" in capsys.readouterr().out
    assert [path.name for path in checkpoint.in_folder("model")] == ["unet32_e0.pth", "unet32_e1.pth"]


def test_a_run_of_two_processes_goes_on_in_one_with_the_mean_of_their_losses(run, monkeypatch, capsys):
    run("--epochs", 1, "--out-dir", "straight", *SMALL)
    at_step(monkeypatch, lambda step: signal.raise_signal(signal.SIGINT) if step == 1 else None)
    with pytest.raises(SystemExit):
        run("--epochs", 1, *SMALL)
    state = checkpoint.load("model/unet32_e0_s2.pth")
    sums = state["loss_sums"].item() * torch.tensor([0.5, 1.5])
    checkpoint.save("model/unet32_e0_s2.pth", dict(state, loss_sums=sums))
    run("--resume", "auto", "--device", "cpu")
    assert "processes: 1, no longer 2" in capsys.readouterr().out
    one, two = (checkpoint.load(f"{folder}/unet32_e0.pth")["log"][0]["train_loss"] for folder in ("straight", "model"))
    assert two == pytest.approx(one, rel=1e-5)


# ---- a disk that fails ------------------------------------------------------------------------------------------


def test_a_full_disk_spares_what_is_there_and_is_said_at_the_end(start, run, tmp_path):
    run("--epochs", 1, *SMALL)
    before = (tmp_path / "model/unet32_e0.pth").read_bytes()
    process = start(
        "--resume", "auto", "--epochs", 3, "--device", "cpu", file_limit=2**14
    )  # a checkpoint is larger than 16 KiB
    out, err = process.communicate()
    assert process.returncode == 1
    assert err.count("could not be saved") == 3  # after two epochs, and in the last line
    assert re.fullmatch(r"error: model/unet32_e2.pth could not be saved .*--resume auto", err.splitlines()[-1])
    assert "epoch 3/3" in out and "Traceback" not in err
    assert [path.name for path in checkpoint.in_folder(tmp_path / "model")] == ["unet32_e0.pth"]
    assert (tmp_path / "model/unet32_e0.pth").read_bytes() == before
    assert not list((tmp_path / "model").glob(".tmp*"))


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_messages_that_cannot_be_written_do_not_end_the_run(start, tmp_path):
    with open("/dev/full", "w") as full:
        process = start("--epochs", 1, *SMALL, stdout=full, stderr=full)
        assert process.wait() == 0
    assert checkpoint.load(tmp_path / "model/unet32_e0.pth")["step"] == 4


def test_a_folder_removed_under_the_run_is_made_again(run, monkeypatch):
    at_step(monkeypatch, lambda step: shutil.rmtree("model") if step == 5 else None)
    run("--epochs", 2, *SMALL)
    assert [path.name for path in checkpoint.in_folder("model")] == ["unet32_e1.pth"]


def test_a_clock_that_stands_still_ends_nothing(run, monkeypatch):
    monkeypatch.setattr(runs.time, "monotonic", lambda: 7.0)
    monkeypatch.setattr(runs, "SHOW_EVERY", 0)
    run("--epochs", 2, *SMALL)
    assert checkpoint.load("model/unet32_e1.pth")["log"][1]["seconds"] == 0


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(script, pictures, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    process = script("train.py", "--dataset", "folder", "--data-dir", pictures, "--out-dir", "file")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert re.fullmatch(r"error: .*file.*", process.stderr.splitlines()[-1])


def test_two_runs_in_one_folder(run, start, tmp_path):
    held = lock.take("model")
    process = start("--epochs", 1, *SMALL)
    _, err = process.communicate()
    assert process.returncode == 1
    assert f"model is in use by process {os.getpid()} on" in err.splitlines()[-1]
    held.close()
    run("--epochs", 1, *SMALL)  # the lock dies with its holder


# ---- files that are not what they seem --------------------------------------------------------------------------


@pytest.mark.parametrize("spoilt", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved(run, monkeypatch, spoilt):
    """The loss is still finite: it was computed before the update."""
    step, count = muon.Muon.step, itertools.count(1)

    def spoil(self):
        step(self)
        bias = self.param_groups[0]["params"][-1]
        if next(count) == 2:
            (bias.data if spoilt == "weight" else self.state[bias]["exp_avg"])[0] = math.nan

    monkeypatch.setattr(muon.Muon, "step", spoil)
    with pytest.raises(UserError, match=r"not finite by step 2 .*nothing was saved"):
        run("--epochs", 1, "--save-every-steps", 1, *SMALL)
    assert [path.name for path in checkpoint.in_folder("model")] == ["unet32_e0_s1.pth"]


def test_a_damaged_checkpoint_is_passed_over(run, capsys):
    run("--epochs", 2, *SMALL)
    path = Path("model/unet32_e1.pth")
    path.write_bytes(path.read_bytes()[:-1000])
    run("--resume", "auto", "--device", "cpu")
    assert "WARNING: model/unet32_e1.pth is damaged" in capsys.readouterr().err
    assert checkpoint.load(path)["step"] == 8


@pytest.mark.parametrize("log", [b"\xff\x00junk", b"a" * 200_000, b"epoch,step\n1" + b"0" * 400 + b",4\n"])
def test_a_log_of_any_content_is_written_anew(run, log):
    run("--epochs", 1, *SMALL)
    Path("model/log.csv").write_bytes(log)
    run("--resume", "auto", "--epochs", 2, "--device", "cpu")
    assert len(Path("model/log.csv").read_text().splitlines()) == 3


# ---- several processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(start, run, tmp_path, capsys):
    process = start("--epochs", 100_000, *SMALL, processes=2)
    wait_for(process, lambda: len(checkpoint.in_folder(tmp_path / "model")) > 1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode != 0
    assert "if another process of the run ended, see its message" in err
    capsys.readouterr()
    _, state = checkpoint.load_newest("model")
    run("--resume", "auto", "--epochs", len(state["log"]) + 1, "--device", "cpu")
    assert "processes: 1, no longer 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK='', which is not a number"),
        ({"WORLD_SIZE": "3"}, "--batch-size 4 cannot be split over 3 processes; use a multiple of 3"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is not a number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "contradict each other"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "no"}, "the processes cannot connect"),
        ({"WORLD_SIZE": "2"}, "the processes cannot connect"),
    ],
)
def test_an_environment_that_is_no_torchruns_is_refused(run, monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run("--epochs", 1, *SMALL)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("lost connection")])
def test_a_logger_that_fails_does_not_end_the_run(run, monkeypatch, capsys, error):
    class Broken(loggers.CSV):
        def log(self, rows):
            raise error

    monkeypatch.setitem(loggers.LOGGERS, "csv", Broken)
    run("--epochs", 1, *SMALL)
    assert "the log could not be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, message",
    [
        (ImportError("no", name="wandb.sdk"), "--loggers csv needs the package wandb; pip install wandb"),
        (RuntimeError("not logged in"), r"--loggers csv cannot start \(not logged in\); leave it out"),
    ],
)
def test_a_logger_that_cannot_start_is_refused_in_one_line(run, monkeypatch, error, message):
    def fail(*args):
        raise error

    monkeypatch.setitem(loggers.LOGGERS, "csv", fail)
    with pytest.raises(UserError, match=message):
        run("--epochs", 1, *SMALL)
