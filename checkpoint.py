"""Checkpoints: one plain dict a file, written atomically and read as data, never as code.

save(path, state)
state = load(path)                    # model, optimizer, epoch, step, config, ...
model, config = load_model(path, device)
"""

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
    write_atomically(path, lambda file: torch.save(state, file))


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


def load(path, device="cpu"):
    """The dict that `save` wrote. Raises CheckpointError if the file is absent, damaged or of another kind."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; --resume auto or train.py's last line names the newest checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except Exception:  # a dozen kinds, by where the damage lies
        raise CheckpointError(f"{path} is damaged or not a checkpoint; use another one") from None
    if not isinstance(state, dict) or not {"model", "config"} <= state.keys():
        raise CheckpointError(
            f"{path} is not a checkpoint of this project (no model and config in it); use another one"
        )
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
