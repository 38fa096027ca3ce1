"""Make model/unet32.pth, the trained weights that come with the repository, from a checkpoint of train.py.

    python -m benchmarks.export --weights model/muon/unet32_e9.pth --dataset cifar10

Run from the root of the repository, on the machine that trained. Halves the size (float16), measures what that costs on the test images
and refuses if it is 0.0002 or more. The file holds weights, config and provenance, no optimizer.
"""

import platform

import torch
import torchvision

import checkpoint
import config
import data
import train
import unet

MOST = 0.0002  # of loss that float16 may cost
WHERE_THE_IMAGES_LAY = {"dataset", "data_dir"}


def command(settings):
    """The train.py command of a checkpoint's config: what differs from the defaults, but where the images lay."""
    flags = ["python train.py"]
    for name, value in settings.items():
        if name in WHERE_THE_IMAGES_LAY or value == config.SETTINGS[name].default:
            continue
        flag = "--" + name.replace("_", "-")
        flags.append(flag if value is True else flag.replace("--", "--no-") if value is False else f"{flag} {value}")
    return " ".join(flags)


def main():
    cfg = config.parse(__doc__, "weights out_dir dataset data_dir device")
    path = cfg.weights or checkpoint.newest(cfg.out_dir)
    state = checkpoint.load(path, needs=("log", "data"))
    settings, last = state["config"], state["log"][-1]
    device = config.pick_device(cfg.device)
    images, source = data.load("test", cfg.dataset, cfg.data_dir)
    images, world = images.to(device), train.World(0, 1, 0, device)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in state["model"].items()}
    losses = {}
    for name, weights in (("float32", state["model"]), ("float16", halved)):
        model = unet.build(settings["model"], settings["t_dim"])
        model.load_state_dict(weights)
        model.to(device, memory_format=data.memory_format(device))
        losses[name] = train.held_out_loss(model, images, settings["noise_steps"], torch.float32, world)
        print(f"held-out loss with {name} weights: {losses[name]:.5f} ({source})")
    if abs(losses["float16"] - losses["float32"]) >= MOST:
        raise config.ConfigError("float16 costs too much here; the weights are not exported")
    provenance = dict(
        command=command(settings),
        epochs=last["epoch"] + 1,
        steps=last["step"],
        seconds=last["seconds"],
        seed=settings["seed"],
        held_out_loss=losses["float16"],
        data=state["data"]["source"],
        torchvision=str(torchvision.__version__),
        system=platform.machine(),
        **config.machine(device),
    )
    # The images are looked for anew wherever the file is used.
    settings = settings | dict(dataset="auto", data_dir=config.SETTINGS["data_dir"].default)
    checkpoint.save(checkpoint.SHIPPED, dict(model=halved, config=settings, provenance=provenance))
    for name, value in provenance.items():
        print(f"{name}: {value}")
    print(f"saved: {checkpoint.SHIPPED}, {checkpoint.SHIPPED.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    config.run(main, data.DataError, checkpoint.CheckpointError)
