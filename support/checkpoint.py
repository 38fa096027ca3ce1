"""Checkpoints: one plain dict a file, written atomically and read as data, never as code.

save(path, state)
state = load(path)                          # model, optimizer, epoch, step, config, ...
model, config = load_model(path, device)
"""

import contextlib
import hashlib
import io
import math
import os
import re
import socket
import sys
from pathlib import Path

import torch

import data
import unet

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None


SHIPPED = Path(__file__).parent / "model" / "unet32.pth"  # the trained weights that come with the code


class CheckpointError(Exception):
    """A checkpoint that cannot be used: the text names the file and says why."""


class DamagedError(CheckpointError):
    """A checkpoint that was whole once."""


def path_of(folder, epoch, step=None):
    """The file of a finished epoch, counted from 0, or of a step inside it."""
    return Path(folder) / (f"unet32_e{epoch}.pth" if step is None else f"unet32_e{epoch}_s{step}.pth")


def place_of(path):
    """(epoch, step) in a checkpoint's name, for ordering; the step of a finished epoch is infinite. None: another file."""
    match = re.fullmatch(r"unet32_e(\d+)(?:_s(\d+))?\.pth", Path(path).name)
    return match and (int(match[1]), int(match[2]) if match[2] else math.inf)


def in_folder(folder):
    """The checkpoints that a run left in a folder, oldest first."""
    return sorted((path for path in Path(folder).glob("unet32_e*.pth") if place_of(path)), key=place_of)


def newest(folder):
    """The newest checkpoint of a folder. Raises CheckpointError if there is none."""
    found = in_folder(folder)
    if not found:
        raise CheckpointError(
            f"no checkpoint (unet32_e*.pth) in {folder}; run train.py first, or name another folder or file"
        )
    return found[-1]


def choose(named, folder):
    """The checkpoint to use: the one that is named; if None, the newest of the folder, or SHIPPED if that is newer.

    Raises CheckpointError if there is none.
    """
    if named is not None:
        return Path(named)
    found = in_folder(folder)[-1:] + ([SHIPPED] if SHIPPED.exists() else [])
    return max(found, key=lambda path: path.stat().st_mtime) if found else newest(folder)


def load_newest(folder, needs=()):
    """The newest checkpoint of a folder that is whole, and what it holds; a damaged one is passed over with a warning."""
    newest(folder)
    for path in reversed(in_folder(folder)):
        try:
            return path, load(path, needs=needs)
        except DamagedError as error:
            print(f"WARNING: {error}", file=sys.stderr)
    raise CheckpointError(
        f"every checkpoint in {folder} is damaged; start anew with --overwrite or in another --out-dir"
    )


def save(path, state, instead_of=()):
    """Write a dict of tensors and plain values so that `path` is, at any moment, absent, the old file or the new one.

    instead_of: files to delete when the new one is on the disk. Raises OSError.
    """
    buffer = io.BytesIO()  # so that a full disk is an OSError, not an error of PyTorch's own writer
    torch.save(state | {"checksum": checksum(state)}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()), instead_of)


def checksum(state):
    """SHA-256 of names, values, shapes and bytes: tells damage that still parses."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)},".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, list | tuple):
            sha.update(f"{len(value)} of,".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r},".encode())

    add(state)
    return sha.hexdigest()


def lock(folder):
    """Hold the folder for this process, as long as the file returned is not closed. Clears what a killed save left.

    Raises CheckpointError if another process holds it. The lock dies with its process, however that ends. Between
    hosts it holds where the file system passes flock on (NFS since Linux 2.6.12 does, some cluster file systems do
    not). A folder that is removed and made again under a run is not locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - it is the open file that holds the lock
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise CheckpointError(
            f"{folder} is in use by {holder}; wait for it to end or choose another --out-dir"
        ) from None
    except OSError as error:
        print(f"WARNING: {folder} cannot be locked ({error}); start no second run in it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    for pattern in (".unet32_e*.tmp", ".log.csv.*.tmp", "res/.*.png.*.tmp"):
        for leftover in folder.glob(pattern):
            leftover.unlink()
    return file


def write_atomically(path, write, instead_of=()):
    """write(file) to a temporary file beside path, onto the disk, then renamed to path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for old in instead_of:
            old.unlink(missing_ok=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new name too should reach the disk, where a folder can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path, device="cpu", needs=()):
    """The dict that `save` wrote. Raises CheckpointError if the file is absent, damaged, foreign, or lacks `needs`."""
    try:
        if Path(path).stat().st_size == 0:
            raise DamagedError(f"{path} is empty; use another one")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; train.py names every checkpoint that it saves") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except CheckpointError:
        raise
    except Exception:  # a dozen kinds, by where the damage lies; code in it is refused unrun
        raise DamagedError(f"{path} is damaged, or is not a checkpoint, or holds code; use another one") from None
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or not {"model", "t_dim", "noise_steps", "dataset", "data_dir"} <= config.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this project; use another one")
    if "checksum" not in state:
        raise CheckpointError(f"{path} has no checksum: an older version or another program saved it; use another one")
    stated = state.pop("checksum")
    try:
        whole = stated == checksum(state)
    except (RuntimeError, NotImplementedError):  # kinds of tensor that no checkpoint here has
        whole = False
    if not whole:
        raise DamagedError(f"{path} is damaged: its checksum is wrong; use another one")
    missing = {"model", *needs} - state.keys()
    if missing:
        raise CheckpointError(f"{path} lacks what is needed here ({', '.join(sorted(missing))}); use another one")
    return state


def load_model(path, device):
    """The trained network, in evaluation mode on `device`, and the config (a dict) it was trained with."""
    state = load(path, device)
    config = state["config"]
    model = unet.build(config["model"], config["t_dim"])
    load_weights(model, state, path)
    return model.to(device, memory_format=data.memory_format(device)).eval(), config


def load_weights(model, state, path):
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError):
        raise CheckpointError(
            f"{path} does not hold the weights of {state['config']['model']!r}; use another one"
        ) from None
