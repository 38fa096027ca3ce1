"""Speed and memory of the default recipe beside the reference recipe, and both beside what the machine can do.

    python -m benchmarks.speed --dataset cifar10

Run from the root of the repository, on Linux, on an otherwise idle machine. Rounds of the two recipes alternate; the table shows medians.
Training is train.py itself, in a process of its own. Prints the table and writes model/res/speed.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import config
import data
import unet

RECIPES = ("default", "reference")


def flops(model, backward):
    """Floating-point operations of one 32x32 image, forward or forward and backward; a multiply-add counts as two."""
    x, t = torch.zeros(1, 3, data.SIZE, data.SIZE), torch.ones(1)
    with FlopCounterMode(display=False) as counter:
        y = model(x, t)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def timed(f, device, seconds=2.0):
    """Calls of f() a second, over at least `seconds` and after one call that does not count."""
    f()
    synchronize(device)
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < seconds:
        f()
        synchronize(device)
        calls += 1
    return calls / (time.perf_counter() - started)


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matrix_rate(dtype, device):
    """FLOP/s of large square matrix products: the practical limit of convolutions."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, dtype=dtype, device=device)
    return 2 * n**3 * timed(lambda: a @ a, device)


@torch.inference_mode()
def inference_rate(dtype, device, batch_size):
    """Images a second through the network in evaluation mode."""
    model = unet.UNet().to(device, memory_format=data.memory_format(device)).eval()
    x = data.scale(torch.zeros(batch_size, 3, data.SIZE, data.SIZE, device=device))
    t = torch.ones(batch_size, device=device)
    with config.autocast(device, dtype):
        return batch_size * timed(lambda: model(x, t), device)


# train.py, then the process's own peak (Linux: getrusage would count the parent's as well), then the GPU's.
TRAIN_AND_MEASURE = """
import re, runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
host = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(int(host[1]) * 1024, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


class Trained(NamedTuple):
    images_per_second: float
    seconds: float  # of the whole command, from its start to its end
    memory: int  # peak of the process, bytes
    gpu_memory: int


def train_and_measure(*flags):
    """What `train.py --epochs 1 FLAGS` gives, in an --out-dir of its own."""
    with tempfile.TemporaryDirectory() as out:
        flags = ["--epochs", "1", "--out-dir", out, *map(str, flags)]
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-c", TRAIN_AND_MEASURE, "train.py", *flags], capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
        if process.returncode:
            raise config.ConfigError(f"train.py {' '.join(flags)} failed: {process.stderr.splitlines()[-1]}")
        log = checkpoint.load_newest(out)[1]["log"]
    return Trained(log[0]["images_per_second"], seconds, *map(int, process.stdout.splitlines()[-1].split()))


def measure(cfg, device):
    """{recipe: {quantity: median over the rounds}}, and the values of every round."""
    precisions = {"default": config.pick_precision("auto", device), "reference": torch.float32}
    limits = {"default": cfg.limit, "reference": max(8, cfg.limit // 2)}  # about as long
    cost = {backward: flops(unet.UNet(), backward) for backward in (False, True)}
    rounds = {recipe: [] for recipe in RECIPES}
    for i in range(cfg.rounds):
        for recipe in RECIPES:
            where = ("--dataset", cfg.dataset, "--data-dir", cfg.data_dir, "--device", device)
            run = train_and_measure("--preset", recipe, "--limit", limits[recipe], *where)
            rate = matrix_rate(precisions[recipe], device)
            inference = inference_rate(precisions[recipe], device, 250 if device.type == "cpu" else 2000)
            rounds[recipe].append(
                dict(
                    train_images_per_second=run.images_per_second,
                    train_fraction_of_limit=run.images_per_second * cost[True] / rate,
                    inference_images_per_second=inference,
                    inference_fraction_of_limit=inference * cost[False] / rate,
                    matrix_gflops=rate / 1e9,
                    peak_memory_gb=run.memory / 1e9,
                    peak_gpu_memory_gb=run.gpu_memory / 1e9,
                )
            )
            print(f"round {i + 1}/{cfg.rounds}, {recipe}: {run.images_per_second:.1f} training images/s", flush=True)
    medians = {recipe: {name: median(row[name] for row in rows) for name in rows[0]} for recipe, rows in rounds.items()}
    return dict(
        medians=medians,
        speedup=medians["default"]["train_images_per_second"] / medians["reference"]["train_images_per_second"],
        gflop_an_image=dict(forward=cost[False] / 1e9, training=cost[True] / 1e9),
        precision={recipe: str(precision).removeprefix("torch.") for recipe, precision in precisions.items()},
        rounds=rounds,
        machine=config.machine(device),
    )


def table(result):
    rows = [
        ("precision", "{}", result["precision"]),
        *(
            (name, form, {recipe: result["medians"][recipe][key] for recipe in RECIPES})
            for name, form, key in (
                ("training, images/s", "{:.1f}", "train_images_per_second"),
                ("  fraction of the matrix rate", "{:.2f}", "train_fraction_of_limit"),
                ("inference, images/s", "{:.0f}", "inference_images_per_second"),
                ("  fraction of the matrix rate", "{:.2f}", "inference_fraction_of_limit"),
                ("matrix rate, GFLOP/s", "{:.0f}", "matrix_gflops"),
                ("peak memory of training, GB", "{:.2f}", "peak_memory_gb"),
                ("  on the GPU", "{:.2f}", "peak_gpu_memory_gb"),
            )
        ),
    ]
    print(f"\n{'':32}{'default':>12}{'reference':>12}")
    for name, form, values in rows:
        print(f"{name:32}" + "".join(f"{form.format(values[recipe]):>12}" for recipe in RECIPES))
    print(f"\ntraining, default / reference: {result['speedup']:.2f}")
    cost = result["gflop_an_image"]
    print(f"an image costs {cost['forward']:.2f} GFLOP forward, {cost['training']:.2f} GFLOP in training")
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))


def main():
    cfg = config.parse(__doc__, "dataset data_dir limit rounds device out_dir")
    device = config.pick_device(cfg.device)
    cfg.dataset = data.resolve(cfg.dataset, cfg.data_dir)
    data.load("train", cfg.dataset, cfg.data_dir)  # downloaded or made before the rounds
    cfg.limit = cfg.limit or (3200 if device.type == "cpu" else 50_000)
    result = measure(cfg, device)
    table(result)
    path = Path(cfg.out_dir) / "res" / "speed.json"
    checkpoint.write_atomically(path, lambda file: file.write(json.dumps(result, indent=1).encode()))
    print(f"saved: {path}")


if __name__ == "__main__":
    config.run(main, data.DataError, checkpoint.CheckpointError)
