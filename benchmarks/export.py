"""Make the weights that come with the repository from a checkpoint of train.py.

    python -m benchmarks.export --weights model/muon/unet32_e9.pth -o model/new.pth

Run from the root of the repository. Halves the size (float16), measures what that costs on the held-out images and
refuses if it is 0.0002 or more. The file holds weights, network, config and provenance, no optimizer. Checkpoints of
versions before 3.4 do not say on what they were trained: export those on the machine that trained them.
"""

import dataclasses
import shlex
from pathlib import Path

import config
import data
import train
import unet
from config import REQUIRED, Setting, UserError, name_ending, parse
from support import checkpoint, devices, entries, files, run, script
from support.datasets import DATASETS
from support.held_out import held_out_loss
from support.world import World

SETTINGS = {
    "weights": Setting(None, config.file_name, "checkpoint of train.py; None: the newest in out_dir"),
    "out_dir": Setting("model", config.file_name, "folder of the run, where no --weights are named"),
    "output": Setting(REQUIRED, name_ending(".pth"), "file to write, which must not exist", flag="-o"),
    "command": Setting(None, str, "the command that trained them; None: as their settings say"),
    "dataset": Setting("auto", data.SETTINGS["dataset"].kind, "held-out images to measure on; auto: those of the run"),
    "data_dir": Setting(None, config.file_name, "folder of these images; None: that of the run, or data"),
    "device": devices.SETTINGS["device"],
}
MOST = 0.0002  # of loss that float16 may cost
WHERE_THE_IMAGES_ARE = {"dataset", "data_dir"}


def command(saved):
    """The train.py command of a checkpoint's config, a dict: what differs from its preset, but data_dir."""
    usual = {name: setting.default for name, setting in train.SETTINGS.items()} | {"preset": saved.get("preset")}
    usual |= train.PRESETS.get(saved.get("preset"), {})
    flags = [] if saved.get("preset", "default") == "default" else ["--preset", saved["preset"]]
    foreign = {key for name, module in DATASETS.items() if name != saved["dataset"] for key in module.SETTINGS}
    for name, value in saved.items():
        value = config.as_tuple(value)
        if name in usual.keys() - foreign - {"data_dir"} and value != usual[name]:
            flags += config.words_of(name, value)
    return shlex.join(["python", "train.py", *flags])


def halved(weights):
    """The floating-point tensors of a state dict in float16."""
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def losses(state, path, cfg, images, device):
    """The held-out loss with the weights as they are and in float16: two numbers."""
    world, found = World(device), []
    for weights in (state["model"], halved(state["model"])):
        model = unet.build(**entries.network_of(state))
        checkpoint.load_weights(model, state | {"model": weights}, path)
        model.to(device, memory_format=devices.memory_format(device))
        found.append(held_out_loss(cfg, world, model, images.to(device)))
    return found


def main():
    cfg = parse(__doc__, SETTINGS)
    files.refuse_existing(cfg.output)
    script.make_folder(Path(cfg.output).parent)
    path = cfg.weights or checkpoint.newest(cfg.out_dir)
    state = checkpoint.load(path, needs=("log", "data", "step"), settings=train.SETTINGS)
    if not state["log"] or state["step"] > state["log"][-1]["step"]:
        raise UserError(f"{path} was saved inside an epoch; export one of a finished epoch")
    saved, last = state["config"], state["log"][-1]
    if not cfg.command and (missing := run.CHANGED.keys() - saved.keys()):
        raise UserError(f"{path} does not say its {' and '.join(sorted(missing))}; give --command, what trained it")
    train_cfg = config.defaults(train.SETTINGS, **saved)
    dataset = train_cfg.dataset if cfg.dataset == "auto" else cfg.dataset
    theirs = train_cfg.data_dir if dataset == train_cfg.dataset else data.SETTINGS["data_dir"].default
    measured = dataclasses.replace(train_cfg, dataset=dataset, data_dir=cfg.data_dir or theirs, precision="float32")
    device = devices.pick(cfg.device)
    images, source = data.load("test", measured)
    full, half = losses(state, path, measured, images, device)
    print(f"held-out loss on {source}: {full:.5f} with float32 weights, {half:.5f} with float16")
    if not abs(half - full) < MOST:
        raise UserError("float16 costs too much here; the weights are not exported")
    provenance = dict(
        command=cfg.command or command(saved),
        epochs=last["epoch"] + 1,
        steps=last["step"],
        seconds=last["seconds"],
        seed=train_cfg.seed,
        held_out_loss=half,
        data=state["data"]["source"],
    ) | state.get("hardware", devices.describe(device))
    # The images are looked for anew wherever the file is used.
    saved = saved | {name: data.SETTINGS[name].default for name in WHERE_THE_IMAGES_ARE}
    parts = {"network": state["network"]} if "network" in state else {}
    exported = dict(model=halved(state["model"]), config=saved, provenance=provenance) | parts
    checkpoint.save(cfg.output, exported, replace=False)
    checkpoint.load_model(cfg.output, "cpu")
    for name, value in provenance.items():
        print(f"{name}: {value}")
    print(f"saved: {cfg.output}")


if __name__ == "__main__":
    script.run(main)
