"""A training run apart from its arithmetic: its folder, resuming, checkpoints, the log, the progress bar, figures.

cfg, saved, folder = begin(cfg, SETTINGS)
run = Run(cfg, world, model, optimizer, images, folder, signals)
for x0 in run.epoch(x_train):              # from where the run stands
    ...; run.after_step(loss)
run.after_epoch(test_loss, shares)
"""

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import config
import data
import unet
from config import UserError
from support import checkpoint, devices, figures, files, lock, loggers

SHOW_EVERY = 1.0  # seconds from one look at the loss to the next: reading it waits for the device
# A resumed run takes the settings that were not typed from its checkpoint, except these, which belong to one start.
PER_START = {"device", "compile", "out_dir", "resume", "overwrite", "loggers"}
# A setting that was typed must not contradict the checkpoint, except these, which do not make it another run.
MAY_CHANGE = PER_START | {"data_dir", "epochs", "save_model_epochs", "sample_every_epochs", "save_every_steps"}
# For checkpoints that lack these settings: what earlier versions did, which is no longer the default.
CHANGED = {"optimizer": "adamw", "noise_shares": (1 / 3, 1 / 6), "recycle": 0}
NEEDS = ("optimizer", "epoch", "step", "log", "loss_sums", "seconds", "data")


# ---- before the run: its folder, and what is in it ---------------------------------------------------------------


@dataclasses.dataclass
class Folder:
    """The folder of a run, which it alone may use while `lock` is open."""

    lock: object
    obsolete: list  # checkpoints of another run, to be deleted once this one has saved (--overwrite)


def begin(cfg, settings):
    """Take the run's folder: (cfg, saved, Folder), where `saved` is the state to resume from, or None.

    A resumed run gets the settings of its checkpoint. Raises UserError if another process uses the folder, and
    CheckpointError if a setting that was typed contradicts the checkpoint, or checkpoints of another run would be
    harmed.
    """
    if cfg.resume not in (None, "auto") and "out_dir" not in cfg.given:
        cfg = dataclasses.replace(cfg, out_dir=str(Path(cfg.resume).parent))
    if cfg.resume not in (None, "auto") and not Path(cfg.resume).is_file():
        raise checkpoint.CheckpointError(f"--resume {cfg.resume}: there is no such file; name one that train.py saved")
    held = lock.take(cfg.out_dir) if config.is_main_process() else None
    saved, in_the_way = None, checkpoint.in_folder(cfg.out_dir)
    if cfg.resume == "auto":
        try:
            path, saved = checkpoint.load_newest(cfg.out_dir, NEEDS, settings)
            cfg, in_the_way = dataclasses.replace(cfg, resume=str(path)), []  # what is newer is damaged
        except checkpoint.NoCheckpointError:
            if held:
                print(f"{cfg.out_dir} holds no checkpoint yet: a new run starts")
    elif cfg.resume is not None:
        saved = checkpoint.load(cfg.resume, NEEDS, settings)
        if Path(cfg.out_dir).resolve() == Path(cfg.resume).resolve().parent:
            reached = checkpoint.epoch_and_step(cfg.resume) or (saved["epoch"], 0)
            in_the_way = [path for path in in_the_way if checkpoint.epoch_and_step(path) > reached]
    if in_the_way and not cfg.overwrite:
        raise checkpoint.CheckpointError(
            f"{cfg.out_dir} already holds {in_the_way[-1].name}; go on from it with --resume auto, "
            "choose another --out-dir, or replace what is there with --overwrite"
        )
    return settings_of(saved, cfg, settings) if saved else cfg, saved, Folder(held, in_the_way)


def settings_of(saved, cfg, settings):
    """cfg with the checkpoint's settings. Raises CheckpointError if one that was typed contradicts them.

    A setting that an earlier version did not have stands at the value at which it changes nothing.
    """
    usual = {name: setting.default for name, setting in settings.items()} | CHANGED
    values = {name: config.as_tuple(saved["config"].get(name, usual[name])) for name in settings.keys() - PER_START}
    for name in cfg.given & values.keys() - MAY_CHANGE:
        typed = getattr(cfg, name)
        if typed not in ("auto", values[name]):
            then, now = (" ".join(config.words_of(name, value)) for value in (values[name], typed))
            raise checkpoint.CheckpointError(
                f"{cfg.resume} was trained with {then}; "
                f"leave {now} out to go on with it, or start anew in another --out-dir"
            )
    typed = {name for name in cfg.given & MAY_CHANGE if getattr(cfg, name) != "auto"}
    return dataclasses.replace(cfg, **{name: value for name, value in values.items() if name not in typed})


class Images(NamedTuple):
    """The images of a run, uint8, on its device."""

    train: Any  # see data.load
    test: torch.Tensor
    about: dict  # "source", "test_source", "fingerprint" and "counts", which the checkpoint stores


def load_images(cfg, world):
    """The Images of a run, the same on every rank. Raises UserError."""
    with world.first_of_machine():
        x_train, source = data.load("train", cfg)
        x_test, test_source = data.load("test", cfg)
    if len(x_train) < cfg.batch_size:
        raise UserError(f"{len(x_train)} training images do not fill a batch of {cfg.batch_size}; lower --batch-size")
    about = dict(source=source, test_source=test_source, fingerprint=data.fingerprint(x_train, x_test))
    about["counts"] = [len(x_train), len(x_test)]  # the fingerprint does not tell where one split ends
    start = cfg.resume, about["fingerprint"], about["counts"]
    if world.agree(start) != start:
        raise UserError(
            f"process {world.rank} finds other images or another checkpoint than process 0; "
            "every machine needs the same --data-dir and --out-dir"
        )
    return Images(x_train.to(world.device), x_test.to(world.device), about)


# ---- the run -----------------------------------------------------------------------------------------------------


class Run:
    """Where a run stands, and what happens after its steps and epochs."""

    def __init__(self, cfg, world, model, optimizer, images, folder, signals):
        self.cfg, self.world, self.model, self.optimizer = cfg, world, model, optimizer
        self.images, self.folder, self.signals = images, folder, signals
        self.steps_per_epoch = len(images.train) // cfg.batch_size
        self.step = 0
        self.log = []  # one row per epoch
        self.seconds = 0.0  # of the epoch under way
        self.own_steps, self.own_seconds = 0, 0.0  # of this process, see time_left
        self.loss_sum = torch.zeros((), device=world.device)  # of the epoch under way, on this rank
        self.unsaved = None  # what was wrong with the last save
        settings = dataclasses.asdict(cfg)
        self.settings = {name: value for name, value in settings.items() if name not in PER_START | {"given"}}
        names = dict.fromkeys(cfg.loggers) if world.main else ()
        self.loggers = [loggers.start(name, cfg.out_dir, self.settings) for name in names]

    def resume(self, saved):
        """Go to where the checkpoint stands. Raises CheckpointError if it saw other images."""
        cfg, world = self.cfg, self.world
        about = self.images.about
        same = saved["data"]["fingerprint"] == about["fingerprint"]
        if not same or saved["data"].get("counts", about["counts"]) != about["counts"]:
            raise checkpoint.CheckpointError(
                f"{cfg.resume} was trained on other images ({saved['data']['source']}; "
                f"{saved['data'].get('test_source', 'test images')}) than these ({about['source']}; "
                f"{about['test_source']}); give the same --dataset and --data-dir, or start anew in another --out-dir"
            )
        if not 0 <= saved["step"] - len(saved["log"]) * self.steps_per_epoch <= self.steps_per_epoch:
            raise checkpoint.CheckpointError(f"{cfg.resume} contradicts itself: its step is not in its epoch")
        if "network" not in saved and cfg.noise_steps != 10:
            raise checkpoint.CheckpointError(
                f"{cfg.resume} is of an earlier version, whose network sees t unscaled where --noise-steps is not 10; "
                "it can be used but not resumed: start anew in another --out-dir"
            )
        checkpoint.load_weights(self.model, saved, cfg.resume)
        checkpoint.load_optimizer(self.optimizer, saved, cfg.resume)
        self.step, self.log, self.seconds = saved["step"], saved["log"], saved["seconds"]
        sums = saved["loss_sums"].to(world.device)
        world.say(f"resumed: {cfg.resume}, {self.step:,} steps and {len(self.log)} of {cfg.epochs} epochs done")
        if len(sums) == world.size:
            self.loss_sum = sums[world.rank].clone()
        else:
            self.loss_sum = sums.mean()
            world.say(f"processes: {world.size}, no longer {len(sums)}: the same images and noise, but not bit for bit")
        if cfg.precision == "bfloat16" and devices.pick_precision("auto", world.device) == "float32":
            world.warn("the run goes on in bfloat16, in which it began, although this device is slow at it")
        if cfg.epochs != (before := saved["config"].get("epochs", cfg.epochs)):
            world.say(f"the learning rate schedule now spans {cfg.epochs} epochs, not {before}")
        if self.log:
            self.to_loggers(lambda logger: logger.log(self.log))  # log.csv may have run ahead, or be in another folder
        if len(self.log) >= cfg.epochs:
            world.say("nothing is left to train; give a larger --epochs to go on")

    @property
    def lr(self):
        """The learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def epoch(self, images):
        """What is left of the epoch under way, batch by batch, with a progress bar."""
        cfg, world, epoch = self.cfg, self.world, len(self.log)
        done = self.step - epoch * self.steps_per_epoch  # not 0 where the run was stopped inside this epoch
        self.started, self.shown = time.monotonic() - self.seconds, time.monotonic()
        batches = data.batches(images, cfg, epoch, world.rank, world.size, done)
        name = f"Epoch {epoch + 1}/{cfg.epochs}"
        self.bar = world.bar(batches, name, initial=done, total=self.steps_per_epoch)
        return self.bar

    def recycling_is_due(self):
        """At the first step of each of the first cfg.recycle epochs."""
        return self.step % self.steps_per_epoch == 0 and len(self.log) < self.cfg.recycle

    def after_step(self, loss):
        """Count the step, show it, save if that is due. Raises Stopped after a signal."""
        self.step += 1
        self.loss_sum += loss.detach()
        before, self.seconds = self.seconds, time.monotonic() - self.started
        self.own_steps, self.own_seconds = self.own_steps + 1, self.own_seconds + self.seconds - before
        if time.monotonic() - self.shown >= SHOW_EVERY:
            self.show()
        if self.cfg.save_every_steps and self.step % self.cfg.save_every_steps == 0:
            self.save()
        self.signals.check(self.step)

    def show(self):
        """The loss and the pace of the epoch under way, on the bar. Raises UserError if the loss is not finite."""
        self.shown = time.monotonic()
        done = self.step - len(self.log) * self.steps_per_epoch
        mean = self.finite(self.loss_sum / done)
        text = f"loss {mean:.4f}, lr {self.lr:.1e}, {self.speed(done):.0f} images/s"
        if self.log and self.log[-1].get("of_block"):
            text += f", {self.log[-1]['channels_in_use']:.0%} of {self.log[-1]['of_block']} in use"
        self.bar.set_postfix_str(f"{text}, run {self.time_left()} left", refresh=False)

    def after_epoch(self, test_loss, shares):
        """A row of the log, a checkpoint, a line, a figure. shares: see channels.in_use."""
        total = self.world.sum(self.loss_sum.clone()) / self.world.size
        block = min(shares, key=shares.get, default="")  # that with the smallest share
        before = self.log[-1]["seconds"] if self.log else 0.0
        self.log.append(
            dict(
                epoch=len(self.log),
                step=self.step,
                train_loss=self.finite(total / self.steps_per_epoch),
                test_loss=self.finite(test_loss),
                lr=self.lr,
                images_per_second=round(self.speed(self.steps_per_epoch), 1),
                seconds=round(before + time.monotonic() - self.started, 1),
                channels_in_use=round(shares.get(block, math.nan), 3),
                of_block=block,
            )
        )
        self.loss_sum, self.seconds = torch.zeros_like(self.loss_sum), 0.0
        if len(self.log) % self.cfg.save_model_epochs == 0 or len(self.log) == self.cfg.epochs:
            self.save()
        if self.world.main:
            self.report()

    def report(self):
        """Print, log and draw what the last epoch gave."""
        row, cfg = self.log[-1], self.cfg
        in_use = f"{row['channels_in_use']:.0%} of the channels of {row['of_block']} in use, "
        self.world.say(
            f"epoch {row['epoch'] + 1}/{cfg.epochs}: train loss {row['train_loss']:.4f}, "
            f"held-out loss {row['test_loss']:.4f}, {row['images_per_second']:.1f} images/s, "
            f"{in_use if row['of_block'] else ''}{self.time_left()} left"
        )
        self.to_loggers(lambda logger: logger.log(self.log))
        if cfg.sample_every_epochs and (row["epoch"] + 1) % cfg.sample_every_epochs == 0:
            path = Path(cfg.out_dir) / "res" / f"comparison_result_unet32_e{row['epoch']}.png"
            try:
                figures.comparison_grid(self.model, self.images.test, cfg.noise_steps, path)
            except (OSError, UserError) as error:
                self.world.warn(f"{path} could not be saved ({files.reason(error)}); training goes on")
                return
            self.world.say(f"figure saved: {path}")
            self.to_loggers(lambda logger: logger.figure(path, row["step"]))

    def to_loggers(self, action):
        for logger in self.loggers:
            try:
                action(logger)
            except Exception as error:  # each package raises its own kinds; the next checkpoint holds the log too
                self.world.warn(f"the log could not be written ({error}); training goes on")

    def save(self):
        """Save where the run stands; returns whether it is on the disk. After a failure the next save tries again."""
        world = self.world
        sums = torch.zeros(world.size, device=world.device)
        sums[world.rank] = self.loss_sum
        world.sum(sums)
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        if not all(x.isfinite().all() for x in (sums, *self.model.state_dict().values(), *moments)):
            raise UserError(
                f"weights, optimizer or loss are not finite by step {self.step} at a learning rate of {self.lr:.1e}, "
                "so nothing was saved; lower --lr"
            )
        if not world.main or self.step == 0:
            return False
        finished = bool(self.log) and self.log[-1]["step"] == self.step
        epoch = len(self.log) - finished
        path = checkpoint.path_of(self.cfg.out_dir, epoch, None if finished else self.step)
        state = dict(
            model=self.model.state_dict(),
            network=unet.describe(self.cfg),
            optimizer=self.optimizer.state_dict(),
            epoch=epoch,
            step=self.step,
            config=self.settings,
            data=self.images.about,
            log=self.log,
            loss_sums=sums.cpu(),
            seconds=self.seconds,
            hardware=devices.describe(world.device),
        )
        try:
            checkpoint.save(path, state)
        except OSError as error:
            self.unsaved = f"{path} could not be saved ({files.reason(error)})"
            world.warn(f"{self.unsaved}; the next save, if there is one, tries again")
            return False
        world.say(f"model saved: {path}")
        delete(old for old in self.folder.obsolete if old != path)
        self.unsaved, self.folder.obsolete = None, []
        prune(path, finished)
        return True

    def finite(self, loss):
        """The loss, a number or a tensor, as a float. Raises UserError."""
        loss = float(loss)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} by step {self.step} at a learning rate of {self.lr:.1e}; lower --lr")
        return loss

    def speed(self, steps):
        """Images a second in the epoch under way. The clock may not have advanced yet."""
        return self.cfg.batch_size * steps / max(self.seconds, 1e-9)

    def time_left(self):
        """As text, at the pace of this process's steps (earlier ones may have run elsewhere); "?" before the first."""
        if not self.own_steps:
            return "?"
        left = self.cfg.epochs * self.steps_per_epoch - self.step
        return tqdm.format_interval(self.own_seconds / self.own_steps * left)

    def close(self):
        """End the run: the lock is released. Raises CheckpointError if the last save failed."""
        if self.folder.lock:
            self.folder.lock.close()
        if self.unsaved:
            raise checkpoint.CheckpointError(f"{self.unsaved}; make room and go on with --resume auto")


def prune(saved, finished):
    """Delete saves inside an epoch when a finished epoch takes their place; until then the last two stay.

    Later ones than `saved` are damaged: the run went on from before them.
    """
    inside = [old for old in checkpoint.in_folder(saved.parent) if checkpoint.epoch_and_step(old)[1] < math.inf]
    so_far = [old for old in inside if checkpoint.epoch_and_step(old) <= checkpoint.epoch_and_step(saved)]
    delete(inside if finished else so_far[:-2])


def delete(paths):
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
