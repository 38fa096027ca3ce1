"""CIFAR-10 (Krizhevsky 2009) as torchvision stores it, downloaded and checksummed when absent."""

import contextlib
import functools
import http.client
import io
import socket
import tarfile
import warnings
import zlib
from pathlib import Path

import torch

from support.pictures import DataError

SETTINGS = {}
FILES = {"cifar-10-python.tar.gz", "cifar-10-batches-py"}  # torchvision's, as downloaded and unpacked
DOWNLOAD_TIMEOUT = 20  # seconds without an answer


def load(split, cfg):
    return read(split, cfg.data_dir), f"CIFAR-10 in {cfg.data_dir}"


@functools.lru_cache(maxsize=2)  # a split is checksummed and read once, also when --dataset auto has tried it
def read(split, data_dir):
    """50,000 training or 10,000 test images, uint8 (N, 3, 32, 32)."""
    try:
        import torchvision  # takes longer than PyTorch, and the other data sets have no use for it
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"torchvision cannot be used ({reason(error)}); install the version that matches PyTorch "
            f"{torch.__version__}, or use --dataset leaves or folder"
        ) from None

    cifar10 = torchvision.datasets.CIFAR10
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        for path in [Path(data_dir) / cifar10.filename, *(Path(data_dir) / cifar10.base_folder).glob("*")]:
            if path.exists() and not path.is_file():  # torchvision would wait forever at a pipe
                raise DataError(f"{path} is not a regular file; remove it, or choose another --data-dir")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, about the age of the pickled arrays
            images = cifar10(data_dir, train=split == "train", download=True).data
    except PermissionError as error:
        raise DataError(
            f"no permission to use {error.filename}; change its permissions or choose another --data-dir"
        ) from None
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"CIFAR-10 is not complete in {data_dir} and downloading it failed ({reason(error)}); connect to the "
            f"network and try again, put {cifar10.filename} there, or use --dataset leaves or folder"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def reason(error):
    """What an exception of torchvision's means, in a few words."""
    if "corrupted" in str(error):
        return "the archive does not have CIFAR-10's checksum: truncated or not the original"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
