"""How much sooner than the textbook loop train.py reaches its held-out loss, on the same images and held-out noise.

    python -m benchmarks.time_to_loss --dataset cifar10 --minutes 10
    python -m benchmarks.time_to_loss --dataset cifar10 --contenders peers.py     other networks in the same race

The textbook loop (benchmarks/reference.py) trains for --minutes. A contender is train.py's own loop with a learning
rate that falls to 0 over the time it is given, so each point of its curve is a run of its own; the shortest that
reaches the reference's loss is searched for, to 10%. Only training counts as time, not start-up and not evaluation.
peers.py must define CONTENDERS = {"name": (factory, settings)}: factory() returns a network, a torch.nn.Module called
as model(x, t); settings are train.py's where they differ from its defaults, which are made for ten epochs: the two
contenders here have others (SHORT).

Run from the root of the repository, on an otherwise idle machine. Writes model/res/time_to_loss.png and .json.
"""

import itertools
import json
import math
import runpy

from matplotlib.ticker import LogLocator

import config
import data
import train
import unet
from benchmarks import reference, timed
from config import Setting, UserError, positive
from support import devices, figures, files, memory, script
from support.world import World, join

SETTINGS = reference.DATA | {
    "limit": data.SETTINGS["limit"]._replace(help="use at most this many test images; None: all"),
    "minutes": Setting(10.0, positive, "minutes that the reference trains"),
    "contenders": Setting(None, config.file_name, "Python file of more contenders; None: train.py's two optimizers"),
    "device": devices.SETTINGS["device"],
    "out_dir": Setting("model", config.file_name, "folder for the figure and the numbers (in res/)"),
}
# A short training bears a higher rate than the default, which is made for ten epochs.
SHORT = dict(batch_size=16, lr=2e-3, recycle=0)
CONTENDERS = {
    "AdamW": (unet.UNet, SHORT | dict(optimizer="adamw")),
    "Muon": (unet.UNet, SHORT | dict(optimizer="muon", warmup_steps=30)),
}
PRECISION = 1.1  # the shortest time is found to this factor
EVALUATIONS = 8  # of the reference on its way
FIRST_STEPS = 20  # untimed, then as many to tell the speed


def fastest(attempt, most, target):
    """All runs, {steps: (seconds, held-out loss)}, on the way to the shortest that reaches the loss `target`.

    attempt(steps) -> (seconds, loss). From an eighth of `most` steps they are doubled or halved, then bisected, until
    the shortest success is within a factor PRECISION of the longest failure, or `most` are not enough.
    """
    runs, steps = {}, max(1, most // 8)
    while steps not in runs:
        runs[steps] = attempt(steps)
        print(f"  {steps:,} steps, {runs[steps][0]:.0f} s, held-out loss {runs[steps][1]:.4f}", flush=True)
        failed = max((n for n, (_, loss) in runs.items() if not loss <= target), default=0)
        reached = min((n for n, (_, loss) in runs.items() if loss <= target), default=math.inf)
        if not failed:
            steps = max(1, reached // 2)
        elif reached == math.inf:
            steps = min(most, 2 * failed)
        elif reached > PRECISION * failed:
            steps = round(math.sqrt(failed * reached))
    return runs


def run_contender(factory, cfg, x_train, x_test, world, seconds, target):
    """[(seconds, held-out loss), ...] of the search for the shortest run that reaches `target` in `seconds`."""

    def attempt(steps, images=x_test):
        return timed.train_for(steps, factory, cfg, x_train, images, world)

    attempt(FIRST_STEPS, x_test[:1])
    seconds_a_step = attempt(FIRST_STEPS, x_test[:1])[0] / FIRST_STEPS
    return list(fastest(attempt, max(1, int(seconds / seconds_a_step)), target).values())


def draw(path, textbook, curves):
    """Save held-out loss against seconds: the reference on its way, and the runs of each contender."""
    figure, target = figures.new(7, 4), textbook[-1][1]
    ax = figure.subplots()
    ax.plot(*zip(*textbook), "o-", color="black", label="reference, on its way")
    for (name, curve), style in zip(curves.items(), itertools.cycle(figures.STYLES)):
        ax.plot(*zip(*sorted(curve)), label=f"{name}, schedule fitted to the time", **style)
    ax.axhline(target, color="gray", lw=1)
    ax.set(xscale="log", xlabel="training time, seconds", ylabel="held-out loss")
    lowest = min(loss for curve in (textbook, *curves.values()) for _, loss in curve)
    ax.set_ylim(0.97 * lowest, 1.6 * target)  # the first seconds say little and would flatten the rest
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.grid(alpha=0.3, which="both")
    ax.legend(frameon=False)
    figures.save(figure, path)


def is_contender(pair):
    return isinstance(pair, tuple) and len(pair) == 2 and callable(pair[0]) and isinstance(pair[1], dict)


def contenders_of(path):
    """CONTENDERS, and those that the Python file `path` defines, if there is one. Raises UserError."""
    found = runpy.run_path(path).get("CONTENDERS") if path else {}
    pairs = found.values() if isinstance(found, dict) else [None]
    if not all(map(is_contender, pairs)):
        raise UserError(f'{path} must define CONTENDERS = {{"name": (factory, settings)}}')
    for name, (_, settings) in found.items():
        for key, value in settings.items():
            if key not in train.SETTINGS:
                raise UserError(f"{path}: {name} has the setting {key}, which train.py does not have")
            if not config.allows(train.SETTINGS[key], value):
                raise UserError(f"{path}: {name} has {key} = {value}, which is out of range")
    return CONTENDERS | found


def main():
    cfg = config.parse(__doc__, SETTINGS)
    contenders = contenders_of(cfg.contenders)
    path = script.result_path(cfg.out_dir, "time_to_loss.png")
    world = World(devices.pick(cfg.device))
    x_train, source = data.load("train", reference.settings_of(cfg, limit=None))
    x_test, test_source = data.load("test", reference.settings_of(cfg))
    print(f"data: {source}; {test_source}")
    usual = train.SETTINGS["batch_size"].default
    batch = max(reference.RECIPE.batch_size, *(s.get("batch_size", usual) for _, s in contenders.values()))
    if len(x_train) < batch:
        raise UserError(f"{len(x_train)} training images do not fill a batch of {batch}; use more")
    x_train, x_test = x_train.to(world.device), x_test.to(world.device)
    print("reference:")
    textbook = timed.reference_curve(60 * cfg.minutes, EVALUATIONS, x_train, x_test, world)
    seconds, target = textbook[-1]
    world = join(cfg.device, 1)  # this and the next only now: the textbook loop does without
    memory.keep_freed_memory()
    curves, ratios = {}, {}  # a ratio of 0: the loss was not reached
    for name, (factory, settings) in contenders.items():
        print(f"{name}:")
        precision = devices.pick_precision(settings.get("precision", "auto"), world.device)
        settings = settings | dict(precision=precision, epochs=1)  # the schedule spans all steps, as one epoch
        race = x_train, x_test, world, seconds, target
        curves[name] = run_contender(factory, reference.settings_of(cfg, **settings), *race)
        ratios[name] = seconds / min((run[0] for run in curves[name] if run[1] <= target), default=math.inf)
    print(f"\nreference: held-out loss {target:.4f} in {seconds:.0f} s")
    for name, ratio in ratios.items():
        print(f"{name}:", f"{seconds / ratio:.0f} s, {ratio:.1f} times as fast" if ratio else "not in that time")
    result = dict(reference=textbook, contenders=curves, ratios=ratios, source=source)
    result = json.dumps(result | dict(machine=devices.describe(world.device)), indent=1)
    files.write_text(path.with_suffix(".json"), result)
    draw(path, textbook, curves)
    print(", ".join(f"{name} {value}" for name, value in devices.describe(world.device).items()))
    print(f"saved: {path}, {path.with_suffix('.json')}")


if __name__ == "__main__":
    script.run(main)
