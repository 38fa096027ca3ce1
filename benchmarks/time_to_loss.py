"""How much sooner than the reference recipe the others reach its held-out loss, on the same images and held-out noise.

    python -m benchmarks.time_to_loss --dataset cifar10 --minutes 10
    python -m benchmarks.time_to_loss --dataset cifar10 --contenders peers.py     other networks on the same track

The reference recipe trains for --minutes. A contender's learning rate schedule spans the time it is given, so each point of its
curve is a training of its own; the shortest one that reaches the reference's loss is searched for, to 10%.
Only training counts as time, not evaluation and no start-up. peers.py must define
CONTENDERS = {"name": (factory, settings)}: factory() returns a network model(x, t), settings override the defaults.
--limit bounds the test images alone.

Run from the root of the repository, on an otherwise idle machine. Writes model/res/time_to_loss.png and .json.
"""

import argparse
import itertools
import json
import math
import runpy
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import checkpoint
import config
import data
import diffusion
import train
import unet
import visualize
from benchmarks.speed import synchronize

CONTENDERS = {"AdamW": (unet.UNet, {}), "Muon": (unet.UNet, dict(optimizer="muon", warmup_steps=30))}
PRECISION = 1.1  # the shortest time is found to this factor
EVALUATIONS = 8  # of the reference on its way
FIRST_STEPS = 20  # untimed, then as many to tell the speed


def recipe(device, **settings):
    """All settings, as train.py would have them."""
    cfg = argparse.Namespace(**{name: setting.default for name, setting in config.SETTINGS.items()} | settings)
    cfg.precision = config.pick_precision(cfg.precision, device)
    return cfg


def endless_batches(cfg, images):
    make_batches = data.pil_batches if cfg.loader == "pil" else data.batches
    for epoch in itertools.count():
        yield from make_batches(images, cfg.batch_size, cfg.seed, epoch, cfg.flip)


class Training:
    """A network in training; `seconds` counts the time spent in `go`."""

    def __init__(self, factory, cfg, images, device, steps_per_epoch):
        torch.manual_seed(cfg.seed)
        self.model = factory().to(device, memory_format=data.memory_format(device))
        self.optimizer = train.make_optimizer(cfg, self.model)
        self.cfg, self.device, self.steps_per_epoch = cfg, device, steps_per_epoch
        self.batches = endless_batches(cfg, images)
        self.step, self.seconds = 0, 0.0

    def go(self, steps=math.inf, seconds=math.inf):
        """Train on to `steps` updates or `seconds` in all, whichever is first."""
        started = time.perf_counter() - self.seconds
        while self.step < steps and self.seconds < seconds:
            for group in self.optimizer.param_groups:
                group["lr"] = train.lr_at(self.step, self.cfg, self.steps_per_epoch)
            x0 = next(self.batches).to(self.device, memory_format=data.memory_format(self.device))
            t, eps = train.draw_noise(
                x0.shape, self.cfg.noise_steps, self.device, self.cfg.seed, self.step, self.cfg.continuous_t
            )
            with config.autocast(self.device, self.cfg.precision):
                loss = diffusion.noise_loss(self.model, x0, eps, t, self.cfg.noise_steps)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            self.seconds = time.perf_counter() - started
        synchronize(self.device)
        self.seconds = time.perf_counter() - started

    def held_out_loss(self, images):
        world = train.World(0, 1, 0, self.device)
        return train.held_out_loss(self.model, images, self.cfg.noise_steps, self.cfg.precision, world)


def run_reference(cfg, x_train, x_test, device):
    """[(seconds, held-out loss), ...] of the reference recipe, its schedule as it is, up to cfg.minutes."""
    reference = recipe(device, **config.PRESETS["reference"])
    images = x_train.cpu() if reference.loader == "pil" else x_train
    training = Training(unet.UNet, reference, images, device, len(images) // reference.batch_size)
    training.go(steps=1)  # starts threads and kernels
    training.seconds = 0.0
    curve = []
    for i in range(EVALUATIONS):
        training.go(seconds=60 * cfg.minutes * (i + 1) / EVALUATIONS)
        curve.append((training.seconds, training.held_out_loss(x_test)))
        print(f"reference: {curve[-1][0]:.0f} s, held-out loss {curve[-1][1]:.4f}", flush=True)
    return curve


def fastest(name, factory, settings, target, seconds, x_train, x_test, device):
    """All trainings of a contender on the way to the shortest that reaches `target`: [(seconds, held-out loss), ...].

    Starts at an eighth of `seconds` and follows a straight line through loss against log(steps). The search ends when
    the shortest success and the longest failure are within a factor PRECISION, or when `seconds` are not enough.
    """
    settings = dict(epochs=1, schedule="linear") | settings
    cfg = recipe(device, **settings)
    rehearsal = Training(factory, cfg, x_train, device, 2 * FIRST_STEPS)
    rehearsal.go(steps=FIRST_STEPS)
    rehearsal.seconds = 0.0
    rehearsal.go(steps=2 * FIRST_STEPS)
    per_step = rehearsal.seconds / FIRST_STEPS
    most = int(seconds / per_step)
    runs, steps, failed, reached = {}, max(2, most // 8), 1, None
    while steps not in runs:
        training = Training(factory, cfg, x_train, device, steps)
        training.go(steps=steps)
        runs[steps] = training.seconds, training.held_out_loss(x_test)
        print(f"{name}: {steps:,} steps, {runs[steps][0]:.0f} s, held-out loss {runs[steps][1]:.4f}", flush=True)
        if runs[steps][1] <= target:
            reached = min(steps, reached or steps)
        else:
            failed = max(steps, failed)
        if reached and reached <= PRECISION * failed:
            break
        steps = min(most, next_guess(runs, target, failed, reached))
    return list(runs.values())


def next_guess(runs, target, failed, reached):
    """The number of steps to try next, by the line through the two runs nearest to the target; inside the bracket."""
    nearest = sorted(runs, key=lambda steps: abs(runs[steps][1] - target))[:2]
    slope = -0.011  # of the loss by log(steps), before there are two runs
    if len(nearest) == 2:
        a, b = nearest
        slope = min(-1e-4, (runs[a][1] - runs[b][1]) / math.log(a / b))
    shift = (target - runs[nearest[0]][1]) / slope
    guess = nearest[0] * math.exp(min(1.0, max(-1.0, shift))) * PRECISION**0.4  # a little long: a success ends it
    if not reached:
        return max(failed + 1, round(guess))
    shortest, longest = failed * PRECISION**0.5, math.ceil(reached / PRECISION)  # a failure of the longest ends it
    guess = min(max(guess, shortest), longest) if shortest < longest else math.sqrt(failed * reached)
    return min(max(failed + 1, round(guess)), reached - 1)


def draw(path, reference, curves, target):
    figure = Figure((7, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(*zip(*reference), "o-", color="black", label="reference, on its way")
    for (name, curve), style in zip(curves.items(), itertools.cycle(visualize.STYLES)):
        ax.plot(*zip(*sorted(curve)), label=f"{name}, schedule fitted to the time", **style)
    ax.axhline(target, color="gray", lw=1)
    ax.set(xscale="log", xlabel="training time, seconds", ylabel="held-out loss")
    lowest = min(loss for curve in (reference, *curves.values()) for _, loss in curve)
    ax.set_ylim(0.97 * lowest, 1.6 * target)  # the first seconds say little and would flatten the rest
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.grid(alpha=0.3, which="both")
    ax.legend(frameon=False)
    visualize.save_figure(figure, path)


def main():
    cfg = config.parse(__doc__, "dataset data_dir limit minutes contenders device out_dir")
    device = config.pick_device(cfg.device)
    contenders = dict(CONTENDERS)
    if cfg.contenders:
        try:
            contenders |= runpy.run_path(cfg.contenders)["CONTENDERS"]
        except KeyError:
            raise config.ConfigError(
                f'{cfg.contenders} must define CONTENDERS = {{"name": (factory, settings)}}'
            ) from None
    x_train, source = data.load("train", cfg.dataset, cfg.data_dir)
    x_test, test_source = data.load("test", cfg.dataset, cfg.data_dir, limit=cfg.limit)
    print(f"data: {source}; {test_source}")
    x_train, x_test = x_train.to(device), x_test.to(device)
    reference = run_reference(cfg, x_train, x_test, device)
    seconds, target = reference[-1]
    curves, ratios = {}, {}
    for name, (factory, settings) in contenders.items():
        curves[name] = fastest(name, factory, settings, target, seconds, x_train, x_test, device)
        reached = [time for time, loss in curves[name] if loss <= target]
        ratios[name] = seconds / min(reached) if reached else None
    print(f"\nreference: held-out loss {target:.4f} in {seconds:.0f} s")
    for name, ratio in ratios.items():
        print(
            f"{name}: "
            + (f"{seconds / ratio:.0f} s, {ratio:.1f} times as fast" if ratio else "not reached in that time")
        )
    path = Path(cfg.out_dir) / "res" / "time_to_loss.png"
    draw(path, reference, curves, target)
    result = dict(reference=reference, contenders=curves, ratios=ratios, source=source, machine=config.machine(device))
    json_path = path.with_suffix(".json")
    checkpoint.write_atomically(json_path, lambda file: file.write(json.dumps(result, indent=1).encode()))
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print(f"saved: {path}, {json_path}")


if __name__ == "__main__":
    config.run(main, data.DataError)
