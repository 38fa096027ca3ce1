"""Checkpoints: one plain dict a file, written atomically and read as data, never as code.

save(path, state)
state = load(path)                    # model, optimizer, epoch, step, config, ...
model, config = load_model(path, device)
"""

import io
import os
import re
from pathlib import Path

import torch

import unet


class CheckpointError(Exception):
    """A checkpoint that cannot be used: the text names the file and says why."""


def path_of(folder, epoch):
    """The file of an epoch, counted from 0."""
    return Path(folder) / f"unet32_e{epoch}.pth"


def epoch_of(path):
    """The epoch in a checkpoint's name; None for any other file."""
    match = re.fullmatch(r"unet32_e(\d+)\.pth", Path(path).name)
    return int(match[1]) if match else None


def in_folder(folder):
    """The checkpoints that a run left in a folder, oldest first."""
    return sorted((path for path in Path(folder).glob("unet32_e*.pth") if epoch_of(path) is not None), key=epoch_of)


def newest(folder):
    """The newest checkpoint of a folder. Raises CheckpointError if there is none."""
    found = in_folder(folder)
    if not found:
        raise CheckpointError(
            f"no checkpoint (unet32_e*.pth) in {folder}; run train.py first, or name another folder or file"
        )
    return found[-1]


def save(path, state):
    """Write a dict of tensors and plain values so that `path` is, at any moment, absent, the old file or the new one."""
    buffer = io.BytesIO()  # so that a full disk is an OSError, not an error of PyTorch's own writer
    torch.save(state, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def write_atomically(path, write):
    """write(file) to a temporary file beside path, onto the disk, then renamed to path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path, device="cpu", needs=()):
    """The dict that `save` wrote. Raises CheckpointError if the file is absent, damaged, foreign, or lacks `needs`."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; train.py names every checkpoint that it saves") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except Exception:  # a dozen kinds, by where the damage lies
        raise CheckpointError(f"{path} is damaged or not a checkpoint; use another one") from None
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or not {"model", "t_dim", "noise_steps", "dataset", "data_dir"} <= config.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this project; use another one")
    missing = {"model", *needs} - state.keys()
    if missing:
        raise CheckpointError(f"{path} lacks what is needed here ({', '.join(sorted(missing))}); use another one")
    return state


def load_model(path, device):
    """The trained network, in evaluation mode on `device`, and the config (a dict) it was trained with."""
    state = load(path, device)
    config = state["config"]
    model = unet.build(config["model"], config["t_dim"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise CheckpointError(f"{path} does not hold the weights of {config['model']!r}; use another one") from None
    return model.to(device, memory_format=torch.channels_last).eval(), config
