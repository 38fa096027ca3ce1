"""Every setting of every script, with its unit and default; each command line is built from this table.

cfg = parse(__doc__, "dataset epochs")      # the flags --dataset and --epochs, and --help
run(main, DataError)                        # main(), a mistake of the user's said in one line
"""

import argparse
import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

REQUIRED = object()  # the default of a setting that has none


class Setting(NamedTuple):
    default: Any
    kind: Any  # bool, a tuple of choices, a function from text to value, or list: one or more words without a flag
    help: str
    short: str = ""  # a second, short flag


def number(kind, low, high=math.inf, above=False):
    """Converter for argparse: text to an int or a float from low to high (above: greater than low)."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if above else value >= low) or not value <= high or math.isinf(value):
            name = "a whole number" if kind is int else "a number"
            top = "" if math.isinf(high) else f" and at most {high}"
            raise argparse.ArgumentTypeError(
                f"must be {name} {'above' if above else 'of at least'} {low}{top}, not {text!r}"
            )
        return value

    return convert


def count(low=1):
    return number(int, low, 2**31 - 1)


positive = number(float, 0, above=True)


def ending(suffix):
    """Converter for argparse: a file's name, which must end so, lest a slip overwrites a file of another kind."""

    def convert(text):
        if not text.endswith(suffix):
            raise argparse.ArgumentTypeError(f"must be a file name ending in {suffix}, not {text!r}")
        return text

    return convert


# None as a default means: see the help text.
SETTINGS = {
    # data
    "dataset": Setting("auto", ("auto", "cifar10", "folder", "leaves"), "images; auto: cifar10 if it is on disk or can be downloaded, else leaves"),
    "data_dir": Setting("data", str, "folder the images are in, or are downloaded or cached to"),
    "crops_per_image": Setting(64, number(int, 1, 100_000), "random 32x32 crops from each larger training image of a folder"),
    "skip_bad_images": Setting(False, bool, "count and leave out unreadable or too small images of a folder, instead of stopping"),
    "max_pixels": Setting(100_000_000, count(), "pixels of the largest image that is read; a small file can hold a huge one"),
    "limit": Setting(None, count(), "use at most this many images of each split; None: all"),
    # noise
    "noise_steps": Setting(10, count(2), "T: noise steps; sigma = t / T with t from 1 to T-1"),
    "continuous_t": Setting(False, bool, "train on all noise levels, t within 1/2 of the integers, not on the integers alone"),
    # network
    "model": Setting("unet", ("unet", "plain"), "network; plain: the control without time conditioning"),
    "t_dim": Setting(256, number(int, 1, 65536), "width of the time embedding, channels"),
    # optimization
    "preset": Setting("default", ("default", "reference"), "defaults of this group; reference: the textbook recipe"),
    "optimizer": Setting("adamw", ("adamw", "muon"), "AdamW; or Muon for the matrices and AdamW for the rest"),
    "epochs": Setting(10, count(), "passes over the training images; the learning rate schedule spans them"),
    "batch_size": Setting(16, count(), "images an optimizer update, over all ranks together"),
    "lr": Setting(2e-3, positive, "peak learning rate"),
    "beta2": Setting(0.95, number(float, 0, 0.999999), "AdamW's decay rate of the squared gradient; beta1 is 0.9"),
    "weight_decay": Setting(0.01, number(float, 0), "decoupled weight decay"),
    "warmup_steps": Setting(100, count(0), "updates over which the learning rate rises linearly from 0"),
    "schedule": Setting("linear", ("linear", "cosine", "constant"), "learning rate: linear to 0 by step, cosine to 0 by epoch, or constant"),
    "flip": Setting(True, bool, "mirror each training image with probability 1/2"),
    "loader": Setting("tensor", ("tensor", "pil"), "batches from one uint8 tensor, or from a DataLoader over PIL images"),
    # the run
    "seed": Setting(0, count(0), "every random number of a run follows from it"),
    "device": Setting("auto", str, "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps"),
    "precision": Setting("auto", ("auto", "bfloat16", "float32"), "arithmetic of the network; auto: bfloat16 where the hardware has it"),
    "compile": Setting(None, bool, "compile the network, which takes about a minute at the start; None: on CUDA"),
    "out_dir": Setting("model", str, "folder for checkpoints, log.csv and figures (in res/)"),
    "save_model_epochs": Setting(1, count(), "epochs from one checkpoint to the next; the last epoch is always saved"),
    "save_every_steps": Setting(None, count(), "save inside an epoch too, every so many updates; None: only after epochs"),
    "sample_every_epochs": Setting(0, count(0), "epochs from one comparison grid to the next; 0: none"),
    "resume": Setting(None, str, "checkpoint to go on from; auto: the newest of --out-dir; None: start anew"),
    "overwrite": Setting(False, bool, "replace what is there: the checkpoints of --out-dir (train.py), output files (denoise.py)"),
    "tensorboard": Setting(False, bool, "send numbers and grids to TensorBoard too, under --out-dir"),
    # evaluate.py
    "control": Setting(None, str, "checkpoint of a second network to compare with; None: none"),
    "subset": Setting(100, count(), "images for what takes many passes: several steps and the blind estimate"),
    "baselines": Setting(100, count(0), "images on which the classical denoisers run too; 0: none"),
    "json": Setting(None, ending(".json"), "file to write the tables to as JSON; None: none"),
    "markdown": Setting(None, ending(".md"), "file to write the tables to as Markdown; None: none"),
    # overfit.py, visualize.py and benchmarks/
    "t": Setting(5, count(), "time step of the noise, from 1 to T-1"),
    "iterations": Setting(1000, count(), "optimizer updates at most"),
    "target": Setting(1e-5, positive, "loss at which the check has passed"),
    "weights": Setting(None, str, "checkpoint to use; None: the newest of --out-dir, or model/unet32.pth if that is newer"),
    "images": Setting(6, number(int, 1, 40), "test images in the figure"),
    "trials": Setting(20, count(), "kills; ten times as many files are damaged"),
    "rounds": Setting(3, count(), "rounds of measurement, each of every recipe"),
    "minutes": Setting(10.0, positive, "time that the reference recipe trains"),
    "contenders": Setting(None, str, "Python file with more to race; None: the recipes of this repository"),
    "strip": Setting(False, bool, "draw 1, 2, 3, ... t denoising steps from noise level --t, not the grid"),
    "curves": Setting(False, bool, "draw the loss curves of log.csv in --out-dir, not the grid"),
    # denoise.py
    "inputs": Setting(REQUIRED, list, "picture files, or folders of them"),
    "output": Setting(REQUIRED, str, "file for one picture, else a folder", "-o"),
    "sigma": Setting(None, number(float, 0, 255, above=True), "noise level, its standard deviation on the 0-255 scale; None: estimated"),
    "steps": Setting(None, number(int, 1, 50), "steps from noisy to clean: 1 has the best PSNR, more are sharper; None: 1, in evaluate.py one a unit of t"),
    "compare": Setting(False, bool, "write a before-after figure beside each output, {name}_compare.png"),
}  # fmt: skip

# The recipe to compare with: AdamW as in PyTorch's defaults (betas, weight decay), cosine annealing, no tricks.
PRESETS = {
    "default": {},
    "reference": dict(
        epochs=20,
        batch_size=8,
        lr=2e-4,
        beta2=0.999,
        weight_decay=0.01,
        warmup_steps=0,
        schedule="cosine",
        flip=False,
        loader="pil",
        precision="float32",
    ),
}


# What torchrun sets for each process, and the world of one that holds without it.
RANKS = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


class ConfigError(Exception):
    """Settings that contradict each other or the machine: the text says which, and what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists every setting)\n")


def parse(doc, names, argv=None, **defaults):
    """The settings `names` ("dataset epochs ...") from the command line, as a Namespace.

    A value is the flag's, else the preset's, else the default: the script's own in `defaults`, or the table's. `cfg.given`
    holds the names of the flags typed. Settings that differ from the defaults are echoed. An unknown flag or a value out
    of range ends the script with exit code 2.
    """
    names = names.split()
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    settings = {name: SETTINGS[name] for name in names}
    settings |= {name: SETTINGS[name]._replace(default=value) for name, value in defaults.items()}
    for name, setting in settings.items():
        if setting.kind is list:
            parser.add_argument(name, nargs="+", metavar="IN", help=setting.help)
            continue
        if setting.default is REQUIRED:
            options = dict(required=True, help=setting.help)
        else:
            options = dict(default=argparse.SUPPRESS, help=f"{setting.help} (default: {setting.default})")
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(setting.kind, tuple):
            options["choices"] = setting.kind
        else:
            options.update(type=setting.kind, metavar=name.split("_")[-1].upper())
        parser.add_argument(*filter(None, [setting.short, "--" + name.replace("_", "-")]), **options)
    given = vars(parser.parse_args(argv))
    preset = {name: value for name, value in PRESETS[given.get("preset", "default")].items() if name in names}
    values = {name: setting.default for name, setting in settings.items()} | preset | given
    echo({name: value for name, value in values.items() if settings[name].default not in (value, REQUIRED)})
    return argparse.Namespace(**values, given=frozenset(given))


def echo(changed):
    if changed and os.environ.get("RANK", "0") == "0":
        print("settings:", " ".join(f"{name}={value}" for name, value in changed.items()))


def run(main, *mistakes):
    """main(), with a mistake of the user's told in one line: `error: ...` on stderr and exit code 1, no traceback."""
    try:
        main()
    except (ConfigError, OSError, *mistakes) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full; use --device cpu, or in training a smaller --batch-size")
    except RuntimeError as error:
        # What gloo and NCCL say when a peer is gone: Connection closed, Connection reset, Broken pipe, ...
        if os.environ.get("WORLD_SIZE", "1") == "1" or not re.search("gloo|NCCL|onnection", str(error)):
            raise
        sys.exit(
            f"error: {' '.join(str(error).split())[:500]} (if another process of the run ended, see its message, and go on with "
            "--resume auto)"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def make_folder(folder):
    """Make a folder for what a script will write. Raises ConfigError or OSError before the work, not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"no permission to write into {folder}; change its rights or choose another output")


def check_t(t, T):
    """Raise ConfigError unless the time step t is one of T noise steps."""
    if t >= T:
        raise ConfigError(f"--t {t} is outside 1 ... {T - 1}; lower it")


def pick_device(name, local_rank=0, world=1):
    """The torch.device of --device; auto: CUDA (this process's own GPU), then Apple's MPS, then the CPU.

    Raises ConfigError if a device that was named cannot be used; auto then falls back to the CPU and says so.
    """
    auto = name == "auto"
    if auto:
        mps = torch.backends.mps.is_available() and world == 1  # several processes cannot share Apple's GPU
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name != "cpu" and not name.startswith("cuda") and world > 1:
        raise ConfigError(f"--device {name} cannot be used by several processes; use --device cuda or cpu")
    if name.startswith("cuda") and (name == "cuda" or world > 1):
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.ones(2, device=device).sum().item()  # a kernel must run: an old GPU can lack it
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises for a device that is not there
        reason = str(error).splitlines()[0]
        if not auto or world > 1:
            raise ConfigError(f"--device {name} cannot be used ({reason}); use another, or fewer processes") from None
        print(f"WARNING: {name} cannot be used ({reason}); using the CPU", file=sys.stderr)
        device = torch.device("cpu")
    return device


def pick_precision(name, device):
    """The torch.dtype of --precision; auto: bfloat16 where the hardware multiplies it fast, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # The wider test is torch.backends.mkldnn's, which is also true where bfloat16 is emulated, slowly.
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def autocast(device, precision):
    """The context in which the network runs; weights, loss and optimizer stay in float32."""
    torch.backends.cudnn.allow_tf32 = precision != torch.float32  # float32 means float32, on CUDA too
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def machine(device):
    """What a figure of speed depends on, as a dict of plain values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    versions = dict(python=platform.python_version(), torch=str(torch.__version__))
    return dict(device=name, threads=torch.get_num_threads(), **versions)


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
