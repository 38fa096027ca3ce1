"""A soak of what the tests try quickly: small training runs killed with -9 at random moments, and damaged files.

    python -m benchmarks.faults --trials 200

Kills: a run of 24 steps that saves every 2 is killed at a random moment, inside saves too, and resumed until it is
done; its last checkpoint must equal, bit for bit, that of a run that nobody disturbed. Every other one replaces the
checkpoints of an older run (--overwrite), and at no moment may there be no whole one. Damage: ten times as many copies
of a checkpoint with flipped bits, cut off, or overwritten in part are loaded; each must be refused with one line, or
hold the very same content (a bit of the archive's padding). Prints a table. POSIX only.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # an optimizer's first step imports it: here, so that no forked process has to
from PIL import Image
from tqdm import tqdm

import train
from config import Setting, UserError, parse, whole
from support import checkpoint, script

SETTINGS = {"trials": Setting(200, whole(), "kills; there are ten times as many damaged files")}
EPOCHS, LAST = 3, "unet32_e2.pth"
RUN = (
    f"--dataset folder --data-dir pictures --epochs {EPOCHS} --batch-size 2 --widths 4 4 8 --t-dim 8 "
    "--save-every-steps 2 --device cpu"
).split()
BAD = {"runs not the same", "saved work lost", "failures", "accepted though wrong", "crashes"}


def make_pictures(folder):
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / split / f"{i}.png")


# ---- kills -------------------------------------------------------------------------------------------------------


def start_training(folder, *flags):
    """train.py in a forked process, which saves the seconds that importing takes; its output goes to output.txt."""
    child = os.fork()
    if child:
        return child
    sys.argv = ["train.py", "--out-dir", str(folder), *RUN, *map(str, flags)]
    code = 1
    with open("output.txt", "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            script.run(train.main)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print("Traceback", repr(error))
    os._exit(code)


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest_of_run(folder):
    """(path, step) of the newest whole checkpoint of the run with seed 0; the older run has seed 1."""
    for path in reversed(checkpoint.in_folder(folder)):
        state = checkpoint.load(path)  # a save that was killed left the file before, or none
        if state["config"]["seed"] == 0:
            return path, state["step"]
    return None, 0


def same(a, b):
    """Whether two checkpoints are the same bits, the clock's figures aside."""
    for state in (a, b):
        state["seconds"] = 0
        for row in state["log"]:
            row.update(seconds=0, images_per_second=0)
    return checkpoint.checksum(a) == checkpoint.checksum(b)


def kill_runs(kills):
    """Counts by name, after so many kills."""
    reference = Path("undisturbed") / LAST
    for folder, flags in (("undisturbed", ()), ("older", ("--seed", 1))):
        if finish(start_training(folder, *flags)):
            raise UserError(f"a run that nobody killed failed: {Path('output.txt').read_text()[-500:]}")
    began = time.monotonic()
    finish(start_training("timed"))
    longest = 1.2 * (time.monotonic() - began)
    names = (
        "kills",
        "inside a save",
        "runs finished",
        "with --overwrite",
        "runs not the same",
        "saved work lost",
        "failures",
    )
    counts = dict.fromkeys(names, 0)
    with tqdm(total=kills, desc="kills") as bar:
        for run in itertools.count():
            if counts["kills"] >= kills:
                break
            folder = Path(f"run{run}")
            if overwrite := run % 2 == 1:
                shutil.copytree("older", folder)
            killed, step = True, 0
            while killed and counts["kills"] < kills:
                path, _ = newest_of_run(folder)
                resume = ("--resume", path) if overwrite and path else () if overwrite else ("--resume", "auto")
                child = start_training(folder, *resume, *["--overwrite"] * overwrite)
                time.sleep(random.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
                code = finish(child)
                killed = code == -signal.SIGKILL
                counts["kills"] += killed
                bar.update(killed)
                counts["inside a save"] += bool(list(folder.glob(f".tmp-{child}-*")))
                before, (_, step) = step, newest_of_run(folder)
                counts["saved work lost"] += step < before or (overwrite and not checkpoint.in_folder(folder))
            if killed:
                break
            counts["runs finished"] += 1
            counts["with --overwrite"] += overwrite
            counts["failures"] += code != 0
            fine = code == 0 and same(checkpoint.load(reference), checkpoint.load(folder / LAST))
            counts["runs not the same"] += not fine
            shutil.rmtree(folder)
    return counts


# ---- damaged files -----------------------------------------------------------------------------------------------


def damage(content, rng):
    """A copy of `content` with one kind of damage."""
    content = bytearray(content)
    # Anywhere, or near the ends, where the archive's directory and the pickled structure are.
    edge = min(65536, len(content))
    ends = rng.choice((rng.randrange(edge), len(content) - 1 - rng.randrange(edge)))
    place = ends if rng.random() < 0.5 else rng.randrange(len(content))
    kind = rng.choice(("flip one bit", "flip ten bits", "cut off", "zero a block", "overwrite a block"))
    if kind.startswith("flip"):
        for _ in range(1 if "one" in kind else 10):
            content[place] ^= 1 << rng.randrange(8)
            place = min(len(content) - 1, place + rng.randrange(50))
    elif kind == "cut off":
        del content[place:]
    else:
        block = content[place : place + rng.randrange(1, 5000)]
        content[place : place + len(block)] = (
            bytes(len(block)) if kind.startswith("zero") else rng.randbytes(len(block))
        )
    return content


def damage_files(source, files):
    """Counts by name, of so many damaged files."""
    path, content, rng = Path("damaged.pth"), source.read_bytes(), random.Random(0)
    checksum = checkpoint.checksum(checkpoint.load(source))
    names = "damaged files", "refused with a line", "content untouched", "accepted though wrong", "crashes"
    counts = dict.fromkeys(names, 0) | {"damaged files": files}
    for _ in tqdm(range(files), "damaged files"):
        path.write_bytes(damage(content, rng))
        try:
            state = checkpoint.load(path)
            counts["content untouched" if checkpoint.checksum(state) == checksum else "accepted though wrong"] += 1
        except checkpoint.CheckpointError as error:
            counts["refused with a line" if "\n" not in str(error) else "crashes"] += 1
        except Exception:
            counts["crashes"] += 1
    return counts


def main():
    cfg = parse(__doc__, SETTINGS)
    torch.set_num_threads(1)  # a forked process must not inherit a pool of threads
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_pictures(Path("pictures"))
        source = Path("undisturbed") / LAST
        tables = [kill_runs(cfg.trials), damage_files(source, 10 * cfg.trials)]
        output = Path("output.txt").read_text()
        os.chdir("/")
    for counts in tables:
        for name, count in counts.items():
            print(f"{name:24}{count:6}")
        print()
    wrong = sum(count for counts in tables for name, count in counts.items() if name in BAD)
    if wrong or "Traceback" in output:
        raise UserError(f"{wrong} results are wrong, or a traceback was printed: ...{output[-500:]}")


if __name__ == "__main__":
    script.run(main)
