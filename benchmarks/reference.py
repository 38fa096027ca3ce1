"""The textbook training loop, which the other benchmarks race against.

    python -m benchmarks.reference --dataset cifar10

PIL images through torchvision's transforms, a DataLoader without workers, AdamW at 2e-4 with PyTorch's other defaults,
batches of 8, cosine annealing by epoch, float32, 20 epochs. `train.py --preset reference` is the same recipe on batches
cut from one tensor: the same images in the same order, the same noise and, up to rounding, the same weights.

Run from the root of the repository. Prints the loss of every epoch and saves nothing.
"""

import dataclasses
import itertools
import time

import torch
from PIL import Image
from torchvision import transforms
from tqdm import tqdm

import config
import data
import diffusion
import train
import unet
from config import Setting, whole
from support import devices, script, streams

DATA = {name: data.SETTINGS[name] for name in ("dataset", "data_dir", "limit")}  # of every benchmark
RECIPE = config.defaults(train.SETTINGS, **train.PRESETS["reference"])
SETTINGS = DATA | {
    "epochs": Setting(RECIPE.epochs, whole(), "passes over the training images; the schedule spans them"),
    "device": devices.SETTINGS["device"],
}


def settings_of(cfg, **values):
    """The settings of train.py: its defaults, the images that the command line of a benchmark names, and `values`."""
    return config.defaults(train.SETTINGS, **({name: getattr(cfg, name) for name in DATA} | values))


class Images(torch.utils.data.Dataset):
    """uint8 images (N, 3, H, W) as a torchvision data set gives them: PIL images, transformed to [-1, 1] one by one."""

    def __init__(self, images):
        self.images = images.permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i]))


def training(model, images, cfg=RECIPE):
    """Train `model`, wherever it is, on uint8 images (N, 3, H, W) of the CPU. Yields the loss after every update."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.epochs)
    dataset, step = Images(images), 0
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(images), generator=streams.generator("cpu", cfg.seed, streams.ORDER, epoch)).tolist()
        for x0 in torch.utils.data.DataLoader(dataset, cfg.batch_size, sampler=order, drop_last=True):
            t, eps = data.draw_noise(x0.shape, cfg, device, step)
            loss = diffusion.noise_loss(model, x0.to(device), eps, t, cfg.noise_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            yield loss.detach()
        scheduler.step()


def main():
    cfg = config.parse(__doc__, SETTINGS)
    images, source = data.load("train", settings_of(cfg))
    steps = len(images) // RECIPE.batch_size
    if not steps:
        raise config.UserError(f"{len(images)} training images do not fill a batch of {RECIPE.batch_size}")
    print(f"data: {source}")
    torch.manual_seed(RECIPE.seed)
    losses = training(unet.UNet().to(devices.pick(cfg.device)), images, dataclasses.replace(RECIPE, epochs=cfg.epochs))
    for epoch in range(cfg.epochs):
        started = time.perf_counter()
        name = f"epoch {epoch + 1}/{cfg.epochs}"
        mean = float(sum(tqdm(itertools.islice(losses, steps), name, steps, mininterval=1))) / steps  # waits for a GPU
        speed = RECIPE.batch_size * steps / (time.perf_counter() - started)
        print(f"{name}: train loss {mean:.4f}, {speed:.1f} images/s", flush=True)


if __name__ == "__main__":
    script.run(main)
