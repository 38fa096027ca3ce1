"""Where the arithmetic runs, and in which precision."""

import platform
import sys
from pathlib import Path

import torch

from config import Setting, UserError

SETTINGS = {
    "device": Setting("auto", str, "auto (CUDA, then Apple's MPS, then the CPU), cpu, cuda, cuda:N or mps"),
    "precision": Setting(
        "auto", ("auto", "bfloat16", "float32"), "of the network; auto: bfloat16 where the hardware is fast at it"
    ),
}


def pick(name, local_rank=0, world_size=1):
    """The torch.device of --device; auto: CUDA (this process's own GPU), then Apple's MPS, then the CPU.

    Raises UserError if it cannot be used; one process with auto falls back to the CPU with a warning instead.
    """
    auto = name == "auto"
    if auto:
        mps = torch.backends.mps.is_available() and world_size == 1  # several processes cannot share Apple's GPU
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name != "cpu" and not name.startswith("cuda") and world_size > 1:
        raise UserError(f"--device {name} cannot be used by several processes; use --device cuda or cpu")
    if name.startswith("cuda") and (name == "cuda" or world_size > 1):
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.ones(2, device=device).sum().item()  # a kernel must run: an old GPU can lack it
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]  # some name all devices there are
        if not auto or world_size > 1:
            remedy = "use another, or fewer processes" if world_size > 1 else "use another, such as --device cpu"
            raise UserError(f"--device {name} cannot be used ({reason}); {remedy}") from None
        print(f"WARNING: {name} cannot be used ({reason}); using the CPU", file=sys.stderr)
        device = torch.device("cpu")
    return device


def pick_precision(name, device):
    """What --precision stands for; auto: "bfloat16" where the hardware multiplies it fast, else "float32"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and bfloat16_is_fast()
    return "bfloat16" if fast else "float32"


def bfloat16_is_fast():
    """Whether this CPU multiplies bfloat16 in hardware; torch.backends.mkldnn's test is true where it is emulated."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device, precision):
    """The context in which the network runs; weights and loss stay in float32."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def memory_format(device):
    """The layout in which convolutions are fastest: channels_last.

    Not on Apple's MPS, where it is slower and, in some versions, wrong (PyTorch's issues 107214, 180984 and 193349).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def describe(device):
    """What a figure of speed depends on, as a dict of plain values."""
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        threads=torch.get_num_threads(),
        bfloat16=pick_precision("auto", device) == "bfloat16",
        python=platform.python_version(),
        torch=str(torch.__version__),
    )


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
