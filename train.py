"""Train the U-Net to predict the noise in images: MSE on eps, x_t = x0 + eps * t / T.

    python train.py                                       one device (CUDA, Apple's MPS or the CPU)
    torchrun --nproc_per_node=4 train.py                  several
    python train.py --resume auto                         resume from the newest checkpoint, if there is one
    python train.py --dataset folder --data-dir pictures  your own images
    python train.py --preset reference                    the textbook recipe, to compare with

Writes model/unet32_e{epoch}.pth (epochs counted from 0) and model/log.csv, one row per epoch. Every run needs a folder
of its own: --out-dir.
"""

import dataclasses
import math
import os
import shlex
import sys

import torch

import config
import data
import diffusion
import unet
from config import Setting, UserError, real, whole
from support import channels, checkpoint, devices, memory, muon, real_noise, script, streams
from support.held_out import channels_in_use, held_out_loss
from support.loggers import LOGGERS
from support.run import Run, begin, load_images
from support.world import Signals, Stopped, join

PRESETS = {
    "default": {},
    # The recipe to compare with: AdamW with PyTorch's other defaults, cosine annealing, no tricks.
    "reference": dict(optimizer="adamw", epochs=20, batch_size=8, lr=2e-4, beta2=0.999, recycle=0, warmup_steps=0,
                      schedule="cosine", flip=False, precision="float32"),
    # Photographs at full resolution, for denoise.py.
    "photographs": dict(dataset="folder", crop_size=96, fresh_crops=True, crops_per_image=48, augment=True,
                        noise="mixed", sigma_range=(1.0, 75.0), sigma_power=0.75, init="model/unet32.pth",
                        batch_size=8, epochs=16, beta2=0.99, recycle=2),
}  # fmt: skip

SETTINGS = data.SETTINGS | unet.SETTINGS | data.NOISE_SETTINGS | {
    # the optimization
    "preset":              Setting("default", tuple(PRESETS), "recipe whose defaults to use: PRESETS in train.py"),
    "init":                Setting(None, config.file_name, "checkpoint whose weights to start from; none: random ones"),
    "optimizer":           Setting("muon", ("muon", "adamw"), "Muon for the matrices and AdamW for the rest; or AdamW"),
    "epochs":              Setting(10, whole(), "passes over the training images; the schedule spans them"),
    "batch_size":          Setting(32, whole(), "images per update, over all ranks together"),
    "lr":                  Setting(4e-4, real(0, 1000), "peak learning rate"),
    "beta2":               Setting(0.95, real(0, 0.999999), "AdamW's decay of the squared gradient; beta1 is 0.9"),
    "recycle":             Setting(3, whole(0), "how many first epochs begin with new kernels for unused channels"),
    "weight_decay":        Setting(0.01, real(0), "decoupled weight decay"),
    "warmup_steps":        Setting(100, whole(0), "updates over which the learning rate rises linearly from 0"),
    "schedule":            Setting("linear", ("linear", "cosine", "constant"),
                                   "learning rate: linear to 0 by step, cosine to 0 by epoch, or constant"),
    "flip":                Setting(True, bool, "mirror each training image with probability 1/2"),
    "augment":             Setting(False, bool, "mirror and rotate: all eight orientations, in place of flip"),
    # the run
    "seed":                Setting(0, whole(0), "every random number of a run follows from it"),
    **devices.SETTINGS,
    "compile":             Setting(None, bool, "compile the network, which takes a minute; None: on CUDA"),
    "out_dir":             Setting("model", config.file_name, "folder for checkpoints, log.csv and figures (in res/)"),
    "save_model_epochs":   Setting(1, whole(), "epochs between checkpoints; the last is always saved"),
    "save_every_steps":    Setting(None, whole(), "save inside an epoch too, every so many updates; None: never"),
    "sample_every_epochs": Setting(0, whole(0), "epochs between comparison grids; 0: none"),
    "resume":              Setting(None, config.file_name, "checkpoint to resume from; auto: the newest of --out-dir"),
    "overwrite":           Setting(False, bool, "replace the checkpoints of another run in --out-dir"),
    "loggers":             Setting(("csv",), tuple(LOGGERS), "where the numbers of an epoch go", "*"),
}  # fmt: skip


def train(cfg, world, model, optimizer, x_train, x_test, run):
    """From where `run` stands to the last epoch. x_train, x_test: uint8 images, see data.load."""
    net = world.wrap(model, cfg)  # `model` stays the raw module, which is what is saved
    while len(run.log) < cfg.epochs:
        for x0 in run.epoch(x_train):  # (batch_size / world.size, 3, S, S) in [-1, 1]
            set_lr(optimizer, lr_at(run.step, cfg, run.steps_per_epoch))
            # Every rank draws the noise of the whole batch and takes its share: the same on any number of ranks.
            t, eps = map(world.share, data.draw_noise((cfg.batch_size, *x0.shape[1:]), cfg, world.device, run.step))
            if cfg.noise == "mixed":
                qualities = world.share(data.draw_qualities(cfg, run.step))
                t, eps = real_noise.compress(x0, t, eps, qualities, cfg.noise_steps)
            if run.recycling_is_due():
                recycle(cfg, world, model, optimizer, x0, eps, t, run)
            with devices.autocast(world.device, cfg.precision):
                loss = diffusion.noise_loss(net, x0, eps, t, cfg.noise_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.after_step(loss)  # counts it, shows the loss, saves when due, raises Stopped after a signal
        test_loss = held_out_loss(cfg, world, model, x_test, run.signals.check)
        run.after_epoch(test_loss, channels_in_use(cfg, model, x_test))


def recycle(cfg, world, model, optimizer, x0, eps, t, run):
    """New kernels for channels that are not in use, measured on the whole batch: the same on any number of ranks."""
    x_t, t = map(world.gather, (diffusion.add_noise(x0, eps, t, cfg.noise_steps), t))
    count = channels.recycle(model, optimizer, x_t, t, streams.generator("cpu", cfg.seed, streams.KERNELS, run.step))
    if count:
        world.say(f"channels that were not in use, and are recycled: {count}")


def lr_at(step, cfg, steps_per_epoch):
    """The learning rate of the update that follows `step` finished ones."""
    warmup = min(1, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1
    if cfg.schedule == "linear":
        decay = 1 - step / (cfg.epochs * steps_per_epoch)
    elif cfg.schedule == "cosine":  # by epoch, as torch's CosineAnnealingLR stepped after each one
        decay = (1 + math.cos(math.pi * (step // steps_per_epoch) / cfg.epochs)) / 2
    else:
        decay = 1
    return cfg.lr * min(warmup, decay)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(cfg, model):
    options = dict(lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "muon":
        return muon.Muon(model.parameters(), precision=cfg.precision, **options)
    return torch.optim.AdamW(model.parameters(), **options)


def start_from(path, model, world):
    """Give the network the weights of a checkpoint. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"--init {path}: there is no such file here; name another, or --init none")
    checkpoint.load_weights(model, checkpoint.load(path), path, "use another one, or --init none")
    world.say(f"starting from {path}")


def check_settings(cfg):
    """Raises UserError for settings that contradict each other, or one of which would be ignored."""
    if cfg.sigma_range and not cfg.sigma_range[0] < cfg.sigma_range[1]:
        raise UserError(f"--sigma-range {cfg.sigma_range[0]:g} {cfg.sigma_range[1]:g}: the first must be lower")
    if cfg.sigma_power and not cfg.sigma_range:
        raise UserError("--sigma-power is the density of the levels of --sigma-range; give that too")
    if "continuous_t" in cfg.given and cfg.continuous_t and cfg.sigma_range:
        raise UserError("the levels of --sigma-range are continuous already; leave --continuous-t out")
    if "noise_shares" in cfg.given and cfg.noise != "mixed":
        raise UserError("--noise-shares are those of --noise mixed; give that too")
    if "flip" in cfg.given and cfg.augment:
        raise UserError("--augment mirrors and rotates, in place of --flip; give one of them")
    if "recycle" in cfg.given and cfg.recycle and cfg.model == "plain":
        raise UserError("--recycle is for networks of residual blocks, not --model plain; leave it out")


def main():
    memory.keep_freed_memory()  # for the next step
    cfg, saved, folder = begin(config.parse(__doc__, SETTINGS, PRESETS), SETTINGS)
    check_settings(cfg)
    world = join(cfg.device, cfg.batch_size)
    precision = devices.pick_precision(cfg.precision, world.device)
    # Rank 0's answer for all: a download can fail on one machine and not on another.
    dataset = world.agree(data.resolve(cfg).dataset if world.main else None)
    cfg = data.resolve(dataclasses.replace(cfg, dataset=dataset, precision=precision))
    torch.manual_seed(cfg.seed)
    model = unet.build(**unet.describe(cfg)).to(world.device, memory_format=devices.memory_format(world.device))
    if cfg.init and not saved:
        start_from(cfg.init, model, world)
    optimizer = make_optimizer(cfg, model)
    images = load_images(cfg, world)
    world.say(f"data: {images.about['source']}; {images.about['test_source']}")
    world.say(
        f"{cfg.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {world.device}, "
        f"{cfg.precision}; {cfg.epochs} epochs of {cfg.batch_size}-image batches"
    )
    with Signals(world) as signals:
        run = Run(cfg, world, model, optimizer, images, folder, signals)
        if saved:
            run.resume(saved)
            set_lr(optimizer, lr_at(run.step - 1, cfg, run.steps_per_epoch))  # a save may come before the next update
        stopped = None
        try:
            train(cfg, world, model, optimizer, images.train, images.test, run)
        except Stopped as stop:
            stopped = stop.signum
            world.say(f"stopped after step {run.step:,}")
            if run.save():
                world.say(f"go on with --resume auto --out-dir {shlex.quote(cfg.out_dir)}")
    world.leave()
    run.close()
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    script.run(main)
