"""What a checkpoint holds, entry by entry: a wrong one is named before it is used, whoever wrote the file.

    check(state, settings)                     # raises Wrong("its entry step is not a whole number of at least 0")
    check_weights(state["model"], model.state_dict())
    check_optimizer(state["optimizer"], optimizer.state_dict())

The types are those that archive.read lets through: dict, list, tuple, tensor, str, int, float, bool and None.
"""

import inspect
import keyword
import math
import re

import torch

import config
import unet

ALWAYS_SAVED = {"model", "t_dim", "noise_steps", "dataset", "data_dir"}  # settings that every version has saved
LOG_NUMBERS = ("step", "train_loss", "test_loss", "lr", "images_per_second", "seconds")  # those of every version


class Wrong(ValueError):
    """The text, a clause, names the entry and says what it should be."""


def must(fits, entry, what):
    if not fits:
        raise Wrong(f"its entry {entry:.100} is not {what}")


def check(state, settings):
    """Check all entries but the optimizer; the config against `settings`, where it has them. Raises Wrong."""
    check_config(state["config"], settings)
    must(isinstance(state["model"], dict), "model", "a dict of tensors")
    for name, value in state["model"].items():
        must(isinstance(name, str) and is_finite(value), f"model[{name!r}]", "a tensor of finite numbers")
    check_network(state)
    for name in {"epoch", "step"} & state.keys():
        must(is_number(state[name], int), name, "a whole number of at least 0")
    must(is_number(state.get("seconds", 0)), "seconds", "a number of at least 0")
    sums = state.get("loss_sums", torch.zeros(1, dtype=torch.float32))
    must(is_finite(sums, torch.float32) and sums.ndim == 1 and len(sums), "loss_sums", "a finite float32 per process")
    images = state.get("data", dict(source="", fingerprint=""))
    fits = isinstance(images, dict) and is_plain(images)
    must(
        fits and all(isinstance(images.get(key), str) for key in ("source", "fingerprint")),
        "data",
        "a dict with source and fingerprint",
    )
    for name in {"provenance", "hardware"} & state.keys():
        must(isinstance(state[name], dict) and is_plain(state[name]), name, "a dict of plain values")
    if "log" in state:
        check_log(state)


def check_config(saved, settings):
    for name, value in saved.items():
        fits = isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name)
        fits = fits and name not in ("given", "mro")  # which the dataclass of the settings cannot have
        must(fits and is_plain(value), f"config[{name!r}]", "a setting with a plain value")
        must(name not in settings or config.allows(settings[name], value), f"config[{name!r}]", "in its range")


def network_of(state):
    """The arguments of unet.build for a checkpoint. Those without "network" are older than the later arguments."""
    saved = state["config"]
    old = {"name": saved["model"]} | ({"t_dim": saved["t_dim"]} if saved["model"] == "unet" else {})
    return state.get("network", old)


def check_network(state):
    """It must be one of ours, its arguments in range and those of the settings."""
    saved, network = state["config"], network_of(state)
    must("network" in state or "widths" not in saved, "network", "present")
    fits = isinstance(network, dict) and is_plain(network) and network.get("name") == saved["model"]
    must(fits, "network", f"a description of {saved['model']!r}")
    parameters = inspect.signature(unet.NETWORKS[saved["model"]]).parameters
    for name, value in network.items():
        known = name == "name" or (name in parameters and name in unet.SETTINGS)
        must(known, f"network[{name!r}]", "an argument of the network")
        fits = name == "name" or config.allows(unet.SETTINGS[name], value)
        must(fits, f"network[{name!r}]", "in its range")
    if "network" in state:
        for name in saved.keys() & parameters.keys():
            value = network.get(name, parameters[name].default)
            must(config.as_tuple(value) == config.as_tuple(saved[name]), f"network[{name!r}]", f"config[{name!r}]")


def check_log(state):
    """One row per epoch; epoch and step say that the run stands at its end, or after it."""
    log, last = state["log"], 0
    must(isinstance(log, list), "log", "a list of rows")
    for i, row in enumerate(log):
        must(isinstance(row, dict) and is_plain(row), f"log[{i}]", "a dict of plain values")
        must(is_number(row.get("epoch"), int) and row["epoch"] == i, f"log[{i}]['epoch']", i)
        for name in LOG_NUMBERS:
            must(is_number(row.get(name)), f"log[{i}][{name!r}]", "a number of at least 0")
        if "of_block" in row:  # since version 3
            must(isinstance(row["of_block"], str), f"log[{i}]['of_block']", "a text")
            must(isinstance(row.get("channels_in_use"), float), f"log[{i}]['channels_in_use']", "a number")
        must(is_number(row["step"], int) and row["step"] > last, f"log[{i}]['step']", f"a whole number above {last}")
        last = row["step"]
    step = state.get("step", last)
    must(step >= last, "step", f"at least {last}, that of the last row of the log")
    finished = step == last and step > 0  # the checkpoint of a finished epoch has its row already
    epoch = len(log) - finished
    must(state.get("epoch", epoch) == epoch, "epoch", f"{epoch}, as the log says")


def check_weights(saved, own):
    """The weights of a file must be those of the network whose state dict is `own`. Raises Wrong."""
    for name in sorted(own.keys() | saved.keys()):
        here, there = (tuple(weights[name].shape) if name in weights else "absent" for weights in (own, saved))
        must(here == there, f"model[{name!r}]", f"{here}, as in this network, but {there}")
        same_kind = own[name].is_floating_point() == saved[name].is_floating_point()
        must(same_kind, f"model[{name!r}]", f"of a kind that becomes {own[name].dtype}")


def check_optimizer(saved, own):
    """The state of an optimizer must have the structure, shapes and dtypes of `own`, a state dict. Raises Wrong."""
    must(same_keys(saved, own), "optimizer", f"a dict of {' and '.join(own)}")
    groups = saved["param_groups"]
    fits = isinstance(groups, list) and is_plain(groups) and all(isinstance(group, dict) for group in groups)
    parameters = [group["params"] for group in own["param_groups"]]
    fits = fits and [group.get("params") for group in groups] == parameters
    must(fits, "optimizer.param_groups", "that of this network")
    must(same_keys(saved["state"], own["state"]), "optimizer.state", f"a dict of {len(own['state'])} parameters")
    for i, moments in own["state"].items():
        must(same_keys(saved["state"][i], moments), f"optimizer.state[{i}]", f"a dict of {', '.join(moments)}")
        for name, moment in moments.items():
            value, signed = saved["state"][i][name], name != "step" and not name.endswith("_sq")
            fits = is_finite(value, moment.dtype, moment.shape) and (signed or (value >= 0).all())
            what = f"finite{'' if signed else ', at least 0'}, {moment.dtype} and of shape {tuple(moment.shape)}"
            must(fits, f"optimizer.state[{i}][{name!r}]", what)


def is_plain(value):
    """Whether there is no tensor in it."""
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(is_plain, value)) if isinstance(value, list | tuple) else not isinstance(value, torch.Tensor)


def is_number(value, *kinds):
    return type(value) in (kinds or (int, float)) and 0 <= value < (2**63 if type(value) is int else math.inf)


def is_finite(value, dtype=None, shape=None):
    """Whether it is a tensor of finite numbers, of this dtype and shape."""
    if not isinstance(value, torch.Tensor) or dtype not in (None, value.dtype) or shape not in (None, value.shape):
        return False
    return bool(value.isfinite().all())


def same_keys(value, other):
    return isinstance(value, dict) and value.keys() == other.keys()
