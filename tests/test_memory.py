"""Freed memory is kept where glibc can do so, and nothing happens elsewhere."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from support import memory

# Page faults of writing blocks that were freed before; 41 is PR_SET_THP_DISABLE: one huge page would hide many faults.
COUNT_FAULTS = """
import ctypes, resource, sys
from support import memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
if sys.argv[1] != "default":
    assert memory.keep_freed_memory(of_any_size=sys.argv[1] == "any")
def touch():
    blocks = [bytearray(int(sys.argv[2])) for _ in range(5)]
    for block in blocks:
        block[::4096] = bytes(len(block) // 4096)
touch()
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    def faults(*arguments):
        command = [sys.executable, "-c", COUNT_FAULTS, *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # other allocators
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout)

    assert faults("keep", 4 * 2**20) < 0.1 * faults("default", 4 * 2**20)
    assert faults("any", 40 * 2**20) < 0.1 * faults("keep", 40 * 2**20)


@pytest.mark.parametrize("system, libc", [("Darwin", ""), ("Windows", ""), ("Linux", "musl")])
def test_nothing_happens_elsewhere(monkeypatch, system, libc):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert memory.keep_freed_memory() is False


@pytest.mark.parametrize(
    "error, expected",
    [
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5000000000 bytes."), "5.0 GB"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "there is not enough memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"), "there is not enough memory"),
        (RuntimeError("could not create a primitive"), "there is not enough memory"),
        (RuntimeError("could not create a primitive descriptor for a convolution"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "not enough"),
        (RuntimeError("CUDA error: out of memory"), "there is not enough memory"),
        (RuntimeError("shapes differ"), None),
        (OSError("No space left on device"), None),
    ],
)
def test_a_lack_of_memory_is_recognized(error, expected):
    said = memory.out_of_memory(error)
    assert said is None if expected is None else expected in said
