"""Memory: what a training step frees is kept for the next step, and running out of it is reported in words."""

import ctypes
import platform
import re

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# What PyTorch says then in a plain RuntimeError: its allocators, oneDNN, and CUDA and its libraries.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator|MPS backend out of memory|could not create a (primitive|memory object)$|std::bad_alloc|"
    "CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
LARGEST_THRESHOLD = 32 * 2**20  # bytes, above which memory is not kept; mallopt refuses more


def keep_freed_memory():
    """Ask glibc not to return freed memory to the system, which would hand it out again page by page, zeroed.

    Blocks above LARGEST_THRESHOLD are still returned at once. Returns whether it took effect: Linux with glibc only.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def out_of_memory(error):
    """What to say of an out-of-memory error, as the beginning of a sentence; None for any other error."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
        return None
    request = re.search(r"allocate (\d+) bytes", str(error))
    gigabytes = int(request[1]) / 1e9 if request else 0
    return "there is not enough memory" + (f" for {gigabytes:,.1f} GB more" if gigabytes >= 0.05 else "")
