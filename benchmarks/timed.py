"""Training by the clock: the textbook loop, evaluated on its way, and train.py's loop for a number of updates.

Only training counts as time, not start-up and not evaluation.
"""

import itertools
import time

import torch

import data
import train
import unet
from benchmarks import reference
from support import devices, held_out
from support.world import Signals


def reference_curve(seconds, evaluations, x_train, x_test, world):
    """The textbook loop for so many seconds, its schedule that of all 20 epochs: [(seconds, held-out loss), ...]."""
    torch.manual_seed(reference.RECIPE.seed)
    model = unet.UNet().to(world.device)
    losses = reference.training(model, x_train.cpu())
    next(losses)  # not timed: it starts threads and kernels
    curve, taken = [], 0.0
    for i in range(evaluations):
        started = time.perf_counter() - taken
        for _ in losses:
            if time.perf_counter() - started >= seconds * (i + 1) / evaluations:
                break
        torch.get_device_module(world.device).synchronize()
        taken = time.perf_counter() - started
        curve.append((taken, held_out.held_out_loss(reference.RECIPE, world, model, x_test)))
        print(f"  {taken:.0f} s, held-out loss {curve[-1][1]:.4f}", flush=True)
    return curve


class TimedRun:
    """What train.train asks of a run (see support/run.py), for `steps` updates by the clock, as a single epoch."""

    def __init__(self, cfg, steps, world):
        self.cfg, self.steps_per_epoch, self.signals = cfg, steps, Signals(world)
        self.step, self.log = 0, []

    def epoch(self, images):
        self.epoch_length, started = len(images) // self.cfg.batch_size, time.perf_counter()
        endless = itertools.chain.from_iterable(data.batches(images, self.cfg, epoch) for epoch in itertools.count())
        yield from itertools.islice(endless, self.steps_per_epoch)
        torch.get_device_module(images.device).synchronize()
        self.seconds = time.perf_counter() - started

    def recycling_is_due(self):
        return self.step % self.epoch_length == 0 and self.step // self.epoch_length < self.cfg.recycle

    def after_step(self, loss):
        self.step += 1

    def after_epoch(self, test_loss, shares):
        self.log.append(test_loss)


def train_for(steps, factory, cfg, x_train, x_test, world):
    """(seconds, held-out loss) of train.py's training of a new network over so many updates."""
    torch.manual_seed(cfg.seed)
    model = factory().to(world.device, memory_format=devices.memory_format(world.device))
    run = TimedRun(cfg, steps, world)
    train.train(cfg, world, model, train.make_optimizer(cfg, model), x_train, x_test, run)
    return run.seconds, run.log[0]
