"""Memory: what a step of training, or a tile, frees is kept for the next, and running out of it is put into words."""

import ctypes
import platform
import re

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
# What PyTorch says then in a plain RuntimeError: its allocators, oneDNN, and CUDA and its libraries.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator|MPS backend out of memory|could not create a (primitive|memory object)$|std::bad_alloc|"
    "CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
LARGEST_THRESHOLD = 32 * 2**20  # bytes; mallopt refuses more


def keep_freed_memory(of_any_size=False):
    """Ask glibc not to return freed memory to the system, which would hand it out again page by page, zeroed.

    of_any_size: whether blocks above LARGEST_THRESHOLD are kept too, among the smaller ones: for large pictures, since
    training is slower so. Returns whether it took effect: Linux with glibc only.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    large_blocks = (M_MMAP_MAX, 0) if of_any_size else (M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    return bool(mallopt(*large_blocks) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def out_of_memory(error):
    """What to say of an out-of-memory error, as the beginning of a sentence; None for any other error."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
        return None
    request = re.search(r"allocate (\d+) bytes", str(error))
    gigabytes = int(request[1]) / 1e9 if request else 0
    return "there is not enough memory" + (f" for {gigabytes:,.1f} GB more" if gigabytes >= 0.05 else "")
