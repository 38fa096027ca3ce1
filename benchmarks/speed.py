"""Speed and memory of training with AdamW, with Muon and in the textbook loop, beside what the machine can do.

    python -m benchmarks.speed --dataset cifar10

Run from the root of the repository, on Linux, on an otherwise idle machine. AdamW and Muon are `train.py --optimizer`,
the reference is benchmarks/reference.py, each in a process of its own. Their rounds alternate; the table shows medians.
Prints the table and writes model/res/speed.json.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from statistics import median

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import config
import data
import unet
from benchmarks import reference
from config import Setting, UserError, whole
from support import devices, files, pictures, script

SETTINGS = reference.DATA | {
    "limit": Setting(None, whole(64), "training images of a round; None: 3,200 on the CPU, else 50,000"),
    "rounds": Setting(5, whole(), "measurements of each recipe"),
    "device": devices.SETTINGS["device"],
    "out_dir": Setting("model", config.file_name, "folder for the numbers (in res/)"),
}
# A round of a recipe: what is run, and the part of the images that it gets, so that all take about as long. Nothing is
# recycled: what is done once an epoch would weigh too much in one so short.
RECIPES = {
    "AdamW": (("train", "--optimizer", "adamw", "--recycle", "0"), 1),
    "Muon": (("train", "--optimizer", "muon", "--recycle", "0"), 1),
    "reference": (("benchmarks.reference",), 1 / 2),
}
IMAGES_PER_SECOND = r"([\d.]+) images/s"  # in the line that both loops print after an epoch
# Runs a module, then prints the process's own peak (getrusage would count its parent's as well) and the GPU's, bytes.
RUN_AND_MEASURE = """
import re, runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
host = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(int(host[1]) * 1024, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


def train_and_measure(*command):
    """(images per second, peak memory, peak memory on the GPU) of an epoch of a module, given with its flags; bytes."""
    command = [sys.executable, "-c", RUN_AND_MEASURE, *map(str, command), "--epochs", "1"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [""])[-1]
        raise UserError(f"{' '.join(command[3:])} ended with code {process.returncode}: {last}")
    return float(re.findall(IMAGES_PER_SECOND, process.stdout)[-1]), *map(int, process.stdout.splitlines()[-1].split())


def flops(model, backward):
    """Floating-point operations of one 32x32 image, forward or forward and backward; a multiply-add counts as two."""
    x, t = torch.zeros(1, 3, pictures.SIZE, pictures.SIZE), torch.ones(1)
    with FlopCounterMode(display=False) as counter:
        y = model(x, t)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def calls_a_second(f, seconds=2.0):
    """Calls of f() a second, over at least `seconds`, after at least one that does not count."""
    timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    return 1 / timer.blocked_autorange(min_run_time=seconds).mean


def matrix_rate(precision, device):
    """FLOP/s of large square matrix products: the practical limit of convolutions."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, dtype=getattr(torch, precision), device=device)
    return 2 * n**3 * calls_a_second(lambda: a @ a)


@torch.inference_mode()
def inference_rate(precision, device):
    """Images a second through the network in evaluation mode."""
    batch_size = 250 if device.type == "cpu" else 2000
    model = unet.UNet().to(device, memory_format=devices.memory_format(device)).eval()
    x = data.scale(torch.zeros(batch_size, 3, pictures.SIZE, pictures.SIZE, device=device))
    t = torch.ones(batch_size, device=device)
    with devices.autocast(device, precision):
        return batch_size * calls_a_second(lambda: model(x, t))


def measure(recipe, cfg, limit, device):
    """One round of a recipe: {quantity: number}, quantities as the table names them."""
    precision = "float32" if recipe == "reference" else devices.pick_precision("auto", device)
    command, share = RECIPES[recipe]
    flags = ("--dataset", cfg.dataset, "--data-dir", cfg.data_dir, "--device", device, "--limit", round(share * limit))
    with tempfile.TemporaryDirectory() as folder:
        where = ("--out-dir", folder) if command[0] == "train" else ()
        images_per_second, memory, gpu_memory = train_and_measure(*command, *flags, *where)
    rate, inference, model = matrix_rate(precision, device), inference_rate(precision, device), unet.UNet()
    return {
        "training, images/s": images_per_second,
        "training, share of the matrix rate": images_per_second * flops(model, backward=True) / rate,
        "inference, images/s": inference,
        "inference, share of the matrix rate": inference * flops(model, backward=False) / rate,
        "matrix rate, GFLOP/s": rate / 1e9,
        "precision, bits": torch.finfo(getattr(torch, precision)).bits,
        "peak memory of training, GB": memory / 1e9,
        "peak memory on the GPU, GB": gpu_memory / 1e9,
    }


def main():
    cfg = config.parse(__doc__, SETTINGS)
    device = devices.pick(cfg.device)
    path = script.result_path(cfg.out_dir, "speed.json")
    cfg = dataclasses.replace(cfg, dataset=data.resolve(reference.settings_of(cfg)).dataset)
    data.load("train", reference.settings_of(cfg))  # downloaded or made before the rounds
    limit = cfg.limit or (3200 if device.type == "cpu" else 50_000)
    rounds = {recipe: [] for recipe in RECIPES}
    for i in range(cfg.rounds):
        for recipe, rows in rounds.items():
            rows.append(measure(recipe, cfg, limit, device))
            print(f"round {i + 1}/{cfg.rounds}, {recipe}: {rows[-1]['training, images/s']:.1f} images/s", flush=True)
    medians = {recipe: {key: median(row[key] for row in rows) for key in rows[0]} for recipe, rows in rounds.items()}
    print(f"\n{'':36}" + "".join(f"{recipe:>12}" for recipe in RECIPES))
    for key in medians["reference"]:
        print(f"{key:36}" + "".join(f"{row[key]:12.4g}" for row in medians.values()))
    adamw, muon, textbook = (medians[recipe]["training, images/s"] for recipe in RECIPES)
    ratios = {"AdamW / reference": adamw / textbook, "Muon / AdamW": muon / adamw}
    print("\ntraining:", ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print(", ".join(f"{name} {value}" for name, value in devices.describe(device).items()))
    result = dict(medians=medians, ratios=ratios, rounds=rounds, machine=devices.describe(device))
    files.write_text(path, json.dumps(result, indent=1))
    print(f"saved: {path}")


if __name__ == "__main__":
    script.run(main)
