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


def pick(name, local_rank=0, world=1):
    """The torch.device of --device; auto: CUDA (this process's own GPU), then Apple's MPS, then the CPU.

    Raises UserError if a device that was named cannot be used; auto then falls back to the CPU with a warning.
    """
    auto = name == "auto"
    if auto:
        mps = torch.backends.mps.is_available() and world == 1  # several processes cannot share Apple's GPU
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name != "cpu" and not name.startswith("cuda") and world > 1:
        raise UserError(f"--device {name} cannot be used by several processes; use --device cuda or cpu")
    if name.startswith("cuda") and (name == "cuda" or world > 1):
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.ones(2, device=device).sum().item()  # a kernel must run: an old GPU can lack it
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if not auto or world > 1:
            remedy = "use another, or fewer processes" if world > 1 else "use another, such as --device cpu"
            raise UserError(f"--device {name} cannot be used ({reason}); {remedy}") from None
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
        fast = device.type == "cpu" and bfloat16_is_fast()
    return torch.bfloat16 if fast else torch.float32


def bfloat16_is_fast():
    """Whether this CPU multiplies bfloat16 in hardware; torch.backends.mkldnn's test is true where it is emulated."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Recorded:
    """A function of a list of tensors to a list of tensors, whose kernels are launched all at once on CUDA.

    There the first call with tensors of some shapes records a CUDA graph, which the later ones replay; they overwrite
    the results of the call before. Elsewhere, and where recording fails, it is the function itself.
    """

    def __init__(self, function):
        self.function, self.recordings = function, {}

    def __call__(self, tensors):
        if tensors[0].device.type != "cuda":
            return self.function(tensors)
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.recordings:
            try:
                self.recordings[shapes] = self.record(tensors)
            except RuntimeError as error:
                self.recordings[shapes] = None
                reason = str(error).splitlines()[0]
                print(f"WARNING: no CUDA graph can be recorded here ({reason}); going on without", file=sys.stderr)
        if self.recordings[shapes] is None:
            return self.function(tensors)
        graph, inputs, results = self.recordings[shapes]
        torch._foreach_copy_(inputs, tensors)
        graph.replay()
        return results

    def record(self, tensors):
        inputs = [tensor.clone() for tensor in tensors]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up at a first call, which cannot be recorded
            self.function(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's thread may go on meanwhile
            results = self.function(inputs)
        return graph, inputs, results


def autocast(device, precision):
    """The context in which the network runs; weights, loss and optimizer stay in float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def memory_format(device):
    """The layout in which convolutions are fastest: channels_last.

    Not on Apple's MPS, where it is slower and, in some versions, wrong (PyTorch's issues 107214, 180984 and 193349).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def describe(device):
    """What a figure of speed depends on, as a dict of plain values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    versions = dict(python=platform.python_version(), torch=str(torch.__version__))
    return (
        dict(device=name, threads=torch.get_num_threads(), bfloat16=pick_precision("auto", device) == torch.bfloat16)
        | versions
    )


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
