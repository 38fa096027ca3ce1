"""A soak of what tests/test_faults.py tests quickly: small trainings killed with -9 at random moments, damaged files.

    python -m benchmarks.faults --trials 200

Kills: a training of 24 steps that saves every 2 is killed at a random moment, inside saves too, and resumed until it is
done; its last checkpoint must equal, bit for bit, that of a run that nobody disturbed. Damage: ten times as many copies
of a checkpoint with flipped bits, cut off, or overwritten in part are loaded; each must be refused with one line, or
hold the very same content (a bit of the archive's padding). Prints a table. POSIX only.
"""

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import config
import train

EPOCHS, LAST = 3, "unet32_e2.pth"
RUN = f"--dataset folder --data-dir pictures --epochs {EPOCHS} --batch-size 2 --t-dim 8 --save-every-steps 2 --device cpu".split()


def make_pictures(folder):
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / split / f"{i}.png")


def start_process(work):
    """work() in a forked process, which saves the seconds that importing takes; its output goes to output.txt."""
    child = os.fork()
    if child == 0:
        code = 1
        with open("output.txt", "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                config.run(work, *train.MISTAKES)
                code = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code)
                code = end.code if isinstance(end.code, int) else 1
        os._exit(code)
    return child


def start_training(folder):
    found = checkpoint.in_folder(folder)
    sys.argv = ["train.py", "--out-dir", folder, *(["--resume", "auto", "--device", "cpu"] if found else RUN)]
    return start_process(train.main)


def same(a, b):
    """Whether two checkpoints are the same bits, the clock's figures aside."""
    for state in (a, b):
        state["seconds"] = 0
        for row in state["log"]:
            row.update(seconds=0, images_per_second=0)
    return checkpoint.checksum(a) == checkpoint.checksum(b)


def kill_runs(kills):
    """Counts by name, after so many kills."""
    os.waitpid(start_training("undisturbed"), 0)
    reference = Path("undisturbed") / LAST
    began = time.time()
    os.waitpid(start_training("timed"), 0)
    longest = 1.2 * (time.time() - began)
    counts = dict.fromkeys(("kills", "inside a save", "runs finished", "runs not the same", "work lost", "failures"), 0)
    folder, step = "run0", 0
    with tqdm(total=kills, desc="kills") as bar:
        while counts["kills"] < kills:
            child = start_training(folder)
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == -signal.SIGKILL:
                counts["kills"] += 1
                bar.update()
                counts["inside a save"] += bool(list(Path(folder).glob(f".*.{child}.tmp")))
                now = checkpoint.load(checkpoint.newest(folder))["step"] if checkpoint.in_folder(folder) else 0
                counts["work lost"] += now < step  # what was saved once is never gone
                step = now
                continue
            if status == 0:
                counts["runs finished"] += 1
                counts["runs not the same"] += not same(
                    checkpoint.load(reference), checkpoint.load(Path(folder) / LAST)
                )
            else:
                counts["failures"] += 1
                break
            folder, step = f"run{counts['runs finished'] + counts['failures']}", 0
            for path in Path(".").glob("run*/*.pth"):
                path.unlink()
    return counts


def damage(content, rng):
    """A copy of `content` with one kind of damage."""
    content = bytearray(content)
    # Anywhere, or near the ends, where the archive's directory and the pickled structure are.
    ends = [*range(65536), *range(len(content) - 65536, len(content))]
    place = rng.choice(ends) if rng.random() < 0.5 else rng.randrange(len(content))
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


def damage_files(files):
    """Counts by name, of so many damaged files."""
    path = Path("damaged.pth")
    whole = (Path("undisturbed") / LAST).read_bytes()
    checksum = checkpoint.checksum(checkpoint.load(Path("undisturbed") / LAST))
    counts = dict.fromkeys(("files", "refused with a line", "content untouched", "accepted though wrong", "crashes"), 0)
    rng = random.Random(0)
    for _ in tqdm(range(files), "damaged files"):
        path.write_bytes(damage(whole, rng))
        counts["files"] += 1
        try:
            state = checkpoint.load(path)
            counts["content untouched" if checkpoint.checksum(state) == checksum else "accepted though wrong"] += 1
        except checkpoint.CheckpointError as error:
            counts["refused with a line" if "\n" not in str(error) else "crashes"] += 1
        except Exception:
            counts["crashes"] += 1
    return counts


def main():
    cfg = config.parse(__doc__, "trials")
    torch.set_num_threads(1)  # a forked process must not inherit a pool of threads
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_pictures(Path("pictures"))
        kills = kill_runs(cfg.trials)
        damaged = damage_files(10 * cfg.trials)
        output = Path("output.txt").read_text()
        os.chdir("/")
    for counts in (kills, damaged):
        for name, count in counts.items():
            print(f"{name:24}{count:6}")
        print()
    bad = ("runs not the same", "work lost", "failures"), ("accepted though wrong", "crashes")
    wrong = sum(counts[name] for counts, names in zip((kills, damaged), bad) for name in names)
    if wrong or "Traceback" in output:
        sys.exit(f"error: {wrong} results are wrong, or a traceback was printed:\n{output[-3000:]}")


if __name__ == "__main__":
    config.run(main, *train.MISTAKES)
