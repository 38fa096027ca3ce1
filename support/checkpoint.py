"""Checkpoints: one plain dict per file, written atomically and read as data, never as code.

    save(path, state)
    state = load(path)                          # model, network, optimizer, epoch, step, config, ...
    model, train_cfg = load_model(path, device)

A file from anywhere gives either a sound dict or a CheckpointError, and takes no more memory than its size suggests.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import os
import re
import sys
from pathlib import Path

import torch

import config
import data
import unet
from config import Setting
from support import entries, files, memory
from support.archive import CheckpointError, DamagedError, read
from support.devices import memory_format

SHIPPED = Path(__file__).resolve().parent.parent / "model" / "unet32.pth"  # the trained weights that come with the code
PHOTO = SHIPPED.with_name("photo.pth")  # those trained on photographs
KNOWN = unet.SETTINGS | data.SETTINGS | data.NOISE_SETTINGS  # the settings by which a network is built, fed and used
SETTINGS = {
    "weights": Setting(None, config.file_name, "checkpoint; None: the newest of --out-dir, else the weights provided"),
}


class NoCheckpointError(CheckpointError):
    """There is no checkpoint in the folder."""


# ---- names -------------------------------------------------------------------------------------------------------


def path_of(folder, epoch, step=None):
    """The file of a finished epoch, counted from 0, or of a step inside it."""
    return Path(folder) / (f"unet32_e{epoch}.pth" if step is None else f"unet32_e{epoch}_s{step}.pth")


def epoch_and_step(path):
    """(epoch, step) in the name of a checkpoint; the step of a finished epoch is infinite. None: another file."""
    match = re.fullmatch(r"unet32_e([0-9]{1,18})(?:_s([0-9]{1,18}))?\.pth", Path(path).name)
    return match and (int(match[1]), int(match[2]) if match[2] else math.inf)


def in_folder(folder):
    """The checkpoints that a run left in a folder, oldest first."""
    return sorted((path for path in Path(folder).glob("unet32_e*.pth") if epoch_and_step(path)), key=epoch_and_step)


def newest(folder):
    """The newest checkpoint of a folder, by epoch and step. Raises NoCheckpointError."""
    found = in_folder(folder)
    if not found:
        raise NoCheckpointError(
            f"no checkpoint (unet32_e*.pth) in {folder}; run train.py first, or name another folder or file"
        )
    return found[-1]


def choose(named, folder):
    """The checkpoint to use: the one that is named; else the newest of the folder; else SHIPPED.

    Raises NoCheckpointError if there is none.
    """
    if named is not None:
        return Path(named)
    return newest(folder) if in_folder(folder) or not SHIPPED.exists() else SHIPPED


# ---- writing -----------------------------------------------------------------------------------------------------


def save(path, state, replace=True):
    """Write a dict of tensors and plain values so that `path` is, at any moment, absent, the old file or the new one.

    Tensors of a GPU are written as those of a CPU, so that any machine can read them. replace: whether to replace a
    file that is there. Raises OSError.
    """
    state = map_tensors(lambda x: x.cpu(), state)
    buffer = io.BytesIO()  # so that a full disk is an OSError, not an error of PyTorch's own writer
    torch.save(state | {"checksum": checksum(state)}, buffer)
    files.write_atomically(path, lambda file: file.write(buffer.getbuffer()), replace)


def map_tensors(f, value):
    """The same dict, list, tuple or plain value with f(tensor) in place of every tensor."""
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, dict):
        return {name: map_tensors(f, item) for name, item in value.items()}
    return type(value)(map_tensors(f, item) for item in value) if isinstance(value, list | tuple) else value


def checksum(state):
    """SHA-256 of names, values, shapes and bytes: tells damage that still parses."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)},".encode())
            sha.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
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


# ---- reading -----------------------------------------------------------------------------------------------------


def load(path, needs=(), settings=KNOWN):
    """The dict that `save` wrote, its tensors contiguous, on the CPU.

    needs: the entries that must be there. settings: what the saved config is held to. Raises DamagedError if the file
    is not what was saved, CheckpointError if it is absent, foreign, lacks `needs`, has a wrong value in an entry, or if
    there is not enough memory.
    """
    with errors_naming(path):
        state = read(path)
        saved = state.get("config") if isinstance(state, dict) else None
        if not isinstance(saved, dict) or not saved.keys() >= entries.ALWAYS_SAVED:
            raise CheckpointError(f"{path} is not a checkpoint of this project; use another one")
        verify(path, state)
        missing = {"model", *needs} - state.keys()
        if missing:
            raise CheckpointError(f"{path} lacks what is needed here ({', '.join(sorted(missing))}); use another one")
        entries.check(state, settings)
        # Contiguous, and none sharing memory with another.
        return map_tensors(lambda x: x.clone(memory_format=torch.contiguous_format), state)


def verify(path, state):
    """Take the checksum out of a dict that `read` returned, and hold the rest to it. Raises CheckpointError."""
    if "checksum" not in state:
        raise CheckpointError(f"{path} has no checksum: another program or an old version saved it; use another one")
    if state.pop("checksum") != checksum(state):
        raise DamagedError(f"{path} is damaged: its checksum is wrong; use another one")


def load_newest(folder, needs=(), settings=KNOWN):
    """(path, state) of the newest checkpoint of a folder, see `load`; passes over a damaged one with a warning.

    Raises NoCheckpointError if there is none at all, CheckpointError if all are damaged or one cannot be used.
    """
    newest(folder)  # raises if there is none
    for path in reversed(in_folder(folder)):
        try:
            return path, load(path, needs, settings)
        except DamagedError as error:
            print(f"WARNING: {error}", file=sys.stderr)
    raise CheckpointError(
        f"every checkpoint in {folder} is damaged; start anew with --overwrite or in another --out-dir"
    )


def load_model(path, device):
    """(model, train_cfg): the network, in evaluation mode on `device`, and its settings, a frozen cfg.

    `train_cfg` has all settings that are KNOWN, at their defaults where the file lacks them. Raises CheckpointError.
    """
    with errors_naming(path):
        state = load(path)
        with torch.device("meta"):  # shapes alone, which take no memory until the file proves to have such weights
            model = unet.build(**entries.network_of(state)).float()  # whatever the program's default dtype is
        entries.check_weights(state["model"], model.state_dict())
        weights = {name: state["model"][name].to(like.dtype) for name, like in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        saved = {name: config.as_tuple(value) for name, value in state["config"].items()}
        train_cfg = config.defaults(KNOWN, **saved)
    return model.to(device, memory_format=memory_format(device)).eval(), train_cfg


def load_run(cfg, device):
    """What --weights names: (path, model, train_cfg, cfg), see `load_model`.

    In the cfg returned, the data settings that were not typed are those the network was trained with, and the figures'
    folder is that of the weights. Raises CheckpointError.
    """
    if cfg.weights is None and "out_dir" in cfg.given and not os.path.isdir(cfg.out_dir):
        raise NoCheckpointError(f"there is no folder {cfg.out_dir}; name that of a run, or give --weights too")
    weights = choose(cfg.weights, cfg.out_dir)
    model, train_cfg = load_model(weights, device)
    values = {name: getattr(train_cfg, name) for name in data.TEST_SETTINGS.keys() - cfg.given - {"limit"}}
    if cfg.dataset not in ("auto", train_cfg.dataset):
        values.pop("data_dir", None)  # that of other images
    if "out_dir" not in cfg.given:
        values["out_dir"] = str(weights.parent)
    return weights, model, train_cfg, dataclasses.replace(cfg, **values)


def load_weights(model, state, path, remedy="use another one"):
    """Put the weights of a checkpoint, `state` as `load` returns it, into the network. Raises CheckpointError."""
    with errors_naming(path, remedy):
        entries.check_weights(state["model"], model.state_dict())
    model.load_state_dict(state["model"])


@torch.no_grad()
def load_optimizer(optimizer, state, path):
    """Put the moments of a checkpoint, `state` as `load` returns it, into `optimizer`. Raises CheckpointError.

    They are copied into tensors that the optimizer itself has laid out: its fused kernels walk a parameter and its
    moments in the order of memory, and the file's order is that of the device which it was saved on. Rates and decays
    stay those of `optimizer`: they follow from the settings.
    """
    make_moments(optimizer)
    own = optimizer.state_dict()
    with errors_naming(path):
        entries.check_optimizer(state["optimizer"], own)
    for i, moments in own["state"].items():
        for name, moment in moments.items():
            moment.copy_(state["optimizer"]["state"][i][name])


@torch.no_grad()
def make_moments(optimizer):
    """Have the optimizer make its moments, by a step that changes nothing: gradients and learning rate are 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates, before = [group["lr"] for group in optimizer.param_groups], [p.clone() for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    for p, value in zip(parameters, before):  # the step may have changed the sign of a zero
        p.copy_(value)


@contextlib.contextmanager
def errors_naming(path, remedy="use another one"):
    """Turn a wrong entry, or running out of memory (not the file's fault), into a CheckpointError naming the file."""
    try:
        yield
    except entries.Wrong as error:
        raise CheckpointError(f"{path} cannot be used: {error}; {remedy}") from None
    except (MemoryError, RuntimeError) as error:
        if not (problem := memory.out_of_memory(error)):
            raise
        raise CheckpointError(f"{problem} to load {path}; end other programs or use a larger machine") from None
