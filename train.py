"""Train the U-Net to predict the noise in images: MSE on eps, x_t = x0 + eps * t / T.

    python train.py                                       one device (CUDA, Apple's MPS or the CPU)
    torchrun --nproc_per_node=4 train.py                  several
    python train.py --resume auto                         go on from the newest checkpoint
    python train.py --dataset folder --data-dir pictures  your own images
    python train.py --preset reference                    the textbook recipe, to compare with

Writes model/unet32_e{epoch}.pth (epochs counted from 0) and model/log.csv, a row an epoch.
"""

import argparse
import contextlib
import csv
import functools
import io
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config
import data
import diffusion
import muon
import unet
import visualize

SETTINGS = (
    "dataset data_dir crops_per_image limit noise_steps continuous_t model t_dim preset optimizer epochs batch_size "
    "lr beta2 weight_decay warmup_steps schedule flip loader seed device precision compile out_dir save_model_epochs "
    "sample_every_epochs resume save_every_steps overwrite tensorboard skip_bad_images max_pixels"
)
# A resumed run takes every setting that was not typed from its checkpoint, but for these, which belong to a start;
PER_START = {"device", "compile", "out_dir", "resume", "overwrite", "tensorboard"}
# and a setting that was typed must not contradict the checkpoint, but for these, which do not make it another run.
MAY_CHANGE = PER_START | {"data_dir", "epochs", "save_model_epochs", "sample_every_epochs", "save_every_steps"}
MISTAKES = (data.DataError, checkpoint.CheckpointError, FloatingPointError)
LOG_COLUMNS = ("epoch", "step", "train_loss", "test_loss", "lr", "images_per_second", "seconds")


class World(NamedTuple):
    """The processes that train together; a single one is a world of size 1. Rank 0 speaks and writes."""

    rank: int
    size: int
    local_rank: int  # on its machine
    device: torch.device


class Stopped(Exception):
    """A signal asks the run to end: Ctrl-C, or SIGTERM, with which clusters take a machine back."""

    signal = 0  # the one that came, 0 before; kept here by the handler, which must do no more than note it


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


def make_optimizer(cfg, model):
    kind = muon.Muon if cfg.optimizer == "muon" else torch.optim.AdamW
    return kind(model.parameters(), cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)


def draw_noise(shape, T, device, seed, step, continuous=False):
    """The noise of a step: t (B,), uniform on 1 ... T-1, and standard Gaussian eps of `shape`.

    continuous: t is uniform from 1/2 to T - 1/2, the integers spread over the half on either side.
    """
    random = data.generator(device, seed, data.NOISE, step)
    t = torch.randint(1, T, shape[:1], generator=random, device=device)
    eps = torch.randn(shape, generator=random, device=device)
    return t + torch.rand(shape[:1], generator=random, device=device) - 0.5 if continuous else t, eps


@torch.no_grad()
def held_out_loss(model, images, T, precision, world):
    """The loss over uint8 `images`, on the same noise in every run: t is 1 ... T-1 in turn, eps follows from the place."""
    device = images.device
    total = torch.zeros((), device=device)
    model.eval()
    for buffer in model.buffers() if world.size > 1 else ():  # each rank has BatchNorm statistics of its own share
        dist.broadcast(buffer, 0)
    starts = range(0, len(images), world.size * data.TEST_BATCH)
    for start in progress_bar(starts, "held-out loss", world, delay=2, leave=False):
        i = start + world.rank * data.TEST_BATCH
        if i < len(images):
            x0 = data.scale(images[i : i + data.TEST_BATCH])
            t = 1 + torch.arange(i, i + len(x0), device=device) % (T - 1)
            eps = data.held_out_noise(x0, i)
            with config.autocast(device, precision):
                # .forward: uncompiled, as compiling for this batch is not worth it.
                total += len(x0) * diffusion.noise_loss(model.forward, x0, eps, t, T)
        heed_signals(world)
    model.train()
    return float(sum_over_ranks(total, world)) / len(images)


def sum_over_ranks(x, world):
    if world.size > 1:
        dist.all_reduce(x)
    return x


def finite(loss, step, lr):
    """The loss, a number or a tensor, as a float."""
    loss = float(loss)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} by step {step} at a learning rate of {lr:.1e}; lower --lr")
    return loss


def heed_signals(world, turn=0):
    """Raise Stopped if a signal came to any rank; ranks ask one another every 8 turns, so that all stop at the same."""
    if world.size > 1 and turn % 8 == 0:
        came = torch.tensor(Stopped.signal, device=world.device)
        dist.all_reduce(came, dist.ReduceOp.MAX)
        if came:
            raise Stopped(int(came))
    elif world.size == 1 and Stopped.signal:
        raise Stopped(Stopped.signal)


def note_signal(signum, frame):
    Stopped.signal = signum
    if signum == signal.SIGINT:  # a second Ctrl-C ends the process at once; launchers repeat the other signals
        signal.signal(signum, signal.SIG_DFL)


def train(cfg, world, model, optimizer, x_train, x_test, run, save, report):
    """The training loop, from where `run` stands to the last epoch.

    run: step, log (a row an epoch), and loss_sum and seconds of the epoch under way. save(): called when a checkpoint
    is due; report(seconds_left): called after an epoch. Raises FloatingPointError when the loss is not finite.
    """
    device, precision, T = world.device, getattr(torch, cfg.precision), cfg.noise_steps
    net = wrap(model, cfg, world)  # `model` stays the raw module, which is what is saved
    make_batches = data.pil_batches if cfg.loader == "pil" else data.batches
    share = slice(world.rank * cfg.batch_size // world.size, (world.rank + 1) * cfg.batch_size // world.size)
    steps_per_epoch = len(x_train) // cfg.batch_size
    shown = time.time()

    def seconds_left():
        spent = (run.log[-1]["seconds"] if run.log else 0) + run.seconds
        return spent / run.step * (cfg.epochs * steps_per_epoch - run.step)

    for epoch in range(len(run.log), cfg.epochs):
        done = run.step - epoch * steps_per_epoch  # not 0 where the run was stopped inside this epoch
        epoch_started, lr = time.time() - run.seconds, lr_at(run.step - 1, cfg, steps_per_epoch)
        batches = make_batches(x_train, cfg.batch_size, cfg.seed, epoch, cfg.flip, world.rank, world.size, done)
        bar = progress_bar(batches, f"Epoch {epoch + 1}/{cfg.epochs}", world, initial=done, total=steps_per_epoch)
        for i, x0 in enumerate(bar, done + 1):
            lr = lr_at(run.step, cfg, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x0 = x0.to(device, memory_format=data.memory_format(device))
            # Every rank draws the noise of the whole batch and takes its share: the same noise on any number of ranks.
            t, eps = draw_noise((cfg.batch_size, *x0.shape[1:]), T, device, cfg.seed, run.step, cfg.continuous_t)
            with config.autocast(device, precision):
                loss = diffusion.noise_loss(net, x0, eps[share], t[share], T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step += 1
            run.loss_sum += loss.detach()
            run.seconds = time.time() - epoch_started
            if time.time() - shown > 1:  # reading the loss waits for the device, so not at every step
                shown, mean = time.time(), finite(run.loss_sum / i, run.step, lr)
                speed, left = cfg.batch_size * i / run.seconds, tqdm.format_interval(seconds_left())
                bar.set_postfix_str(f"loss {mean:.4f}, lr {lr:.1e}, {speed:.0f} images/s, run {left} left", False)
            if cfg.save_every_steps and run.step % cfg.save_every_steps == 0:
                save()
            heed_signals(world, run.step)
        train_loss = sum_over_ranks(run.loss_sum.clone(), world) / world.size / steps_per_epoch
        train_loss, speed = finite(train_loss, run.step, lr), cfg.batch_size * steps_per_epoch / run.seconds
        test_loss = finite(held_out_loss(model, x_test, T, precision, world), run.step, lr)
        seconds = (run.log[-1]["seconds"] if run.log else 0) + time.time() - epoch_started
        row = (epoch, run.step, train_loss, test_loss, lr, round(speed, 1), round(seconds, 1))
        run.log.append(dict(zip(LOG_COLUMNS, row)))
        run.loss_sum, run.seconds = torch.zeros_like(run.loss_sum), 0.0
        if (epoch + 1) % cfg.save_model_epochs == 0 or epoch + 1 == cfg.epochs:
            save()
        report(seconds_left())


def wrap(model, cfg, world):
    """The network as the loop calls it: compiled in place if cfg.compile says so, and averaging gradients over the ranks."""
    cuda = world.device.type == "cuda"
    if world.size > 1 and cuda:  # BatchNorm over the whole batch, as on one device; PyTorch has it for CUDA only
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if cfg.compile or (cfg.compile is None and cuda):
        # CUDA graphs launch the whole network at once: small batches would wait for the launches.
        model.compile(mode="reduce-overhead" if cuda and world.size == 1 else "default", dynamic=False)
        try_compiled(model, cfg, world)
    return DistributedDataParallel(model, [world.device] if cuda else None) if world.size > 1 else model


def try_compiled(model, cfg, world):
    """Compile before the clock starts, on a batch of zeros; go on uncompiled where that fails."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    x0 = data.scale(torch.zeros(cfg.batch_size // world.size, 3, data.SIZE, data.SIZE, device=world.device))
    t, eps = draw_noise(x0.shape, cfg.noise_steps, world.device, 0, 0, cfg.continuous_t)
    try:
        for _ in range(3):  # the first compiles, the second records CUDA graphs, the third replays them
            with config.autocast(world.device, getattr(torch, cfg.precision)):
                loss = diffusion.noise_loss(model, x0, eps, t, cfg.noise_steps)
            loss.backward()
            model.zero_grad()
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old: each has its own kind
        torch.compiler.set_stance("force_eager")
        speak(
            f"WARNING: the network cannot be compiled here ({data.describe(error)}); training without", file=sys.stderr
        )
    model.zero_grad()
    for buffer, before in zip(model.buffers(), buffers):  # BatchNorm has seen the zeros
        buffer.copy_(before)


def progress_bar(items, name, world, **options):
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; in a file a line every half minute is enough
    return tqdm(items, name, file=Unfailing(sys.stderr), disable=world.rank > 0, mininterval=interval, **options)


def take_settings_of(saved, cfg):
    """The settings of a resumed run. Raises CheckpointError if one that was typed contradicts the checkpoint's."""
    for name, value in saved["config"].items():
        typed = name in cfg.given and getattr(cfg, name) != "auto"
        if typed and name not in MAY_CHANGE and getattr(cfg, name) != value:
            flag = "--" + name.replace("_", "-")
            raise checkpoint.CheckpointError(
                f"{cfg.resume} was trained with {flag} {value}, not {getattr(cfg, name)}; "
                f"leave {flag} out to go on with it, or start anew in another --out-dir"
            )
        if not typed and name not in PER_START:
            setattr(cfg, name, value)


def find_start(cfg):
    """The state to resume from (None: a new run) and the checkpoints to delete; refuses to harm those of another run."""
    saved, in_the_way = None, checkpoint.in_folder(cfg.out_dir)
    if cfg.resume is not None:
        needs = ("optimizer", "epoch", "step", "log", "loss_sums", "seconds", "data")
        if cfg.resume == "auto":
            cfg.resume, saved = checkpoint.load_newest(cfg.out_dir, needs)
            in_the_way = []  # what is newer is damaged
        else:
            saved = checkpoint.load(cfg.resume, needs=needs)
            if Path(cfg.out_dir).resolve() == Path(cfg.resume).resolve().parent:
                place = checkpoint.place_of(cfg.resume) or (saved["epoch"], 0)
                in_the_way = [path for path in in_the_way if checkpoint.place_of(path) > place]
        take_settings_of(saved, cfg)
    if in_the_way and not cfg.overwrite:
        raise checkpoint.CheckpointError(
            f"{cfg.out_dir} already holds {in_the_way[-1].name}; go on from it with --resume auto, "
            "choose another --out-dir, or delete what is there with --overwrite"
        )
    return saved, in_the_way


def lock_folder(cfg):
    """Take --out-dir for this run, by default the folder of the checkpoint that --resume names."""
    if cfg.resume is not None:
        if not (Path(cfg.out_dir).is_dir() if cfg.resume == "auto" else Path(cfg.resume).is_file()):
            return None  # find_start refuses it; a folder must not come into being by a wrong name
        if cfg.resume != "auto" and "out_dir" not in cfg.given:
            cfg.out_dir = str(Path(cfg.resume).parent)
    return checkpoint.lock(cfg.out_dir) if os.environ.get("RANK", "0") == "0" else None


def join_world(cfg):
    """This process's World: of size 1 by the defaults, which torchrun replaces."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in config.RANKS)
    device = config.pick_device(cfg.device, local_rank, size)
    if cfg.batch_size % size:
        raise config.ConfigError(
            f"--batch-size {cfg.batch_size} cannot be split over {size} processes; use a multiple of {size}"
        )
    if device.type == "cuda":  # the same bits in every run, as on the CPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.cuda.set_device(device)
    if size > 1:
        backend, own_gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=own_gpu)  # a download can take long
    return World(rank, size, local_rank, device)


def load_images(cfg, world):
    """x_train, x_test (uint8, on the device) and what is known of them; cfg.dataset becomes what auto stood for."""
    if world.rank == 0:
        cfg.dataset = data.resolve(cfg.dataset, cfg.data_dir)
    if world.size > 1:  # one answer for all: a download can fail on one machine and not on another
        answer = [cfg.dataset]
        dist.broadcast_object_list(answer)
        cfg.dataset = answer[0]
    if world.local_rank > 0:  # the first process of a machine downloads or makes the images, ...
        dist.barrier()
    options = (cfg.dataset, cfg.data_dir, cfg.crops_per_image, cfg.limit, 0, cfg.skip_bad_images, cfg.max_pixels)
    x_train, source = data.load("train", *options)
    x_test, test_source = data.load("test", *options)
    if world.local_rank == 0 and world.size > 1:  # ... the others find them
        dist.barrier()
    if len(x_train) < cfg.batch_size:
        raise config.ConfigError(
            f"{len(x_train)} training images do not fill a batch of {cfg.batch_size}; lower --batch-size"
        )
    about = dict(source=source, test_source=test_source, fingerprint=data.fingerprint(x_train, x_test))
    return x_train.to("cpu" if cfg.loader == "pil" else world.device), x_test.to(world.device), about


def resume(saved, cfg, world, model, optimizer, run, say):
    """Put weights, optimizer and `run` where the checkpoint stands. Raises CheckpointError if it saw other images."""
    if saved["data"]["fingerprint"] != run.data["fingerprint"]:
        raise checkpoint.CheckpointError(
            f"{cfg.resume} was trained on other images ({saved['data']['source']}) than these ({run.data['source']}); "
            "give --dataset and --data-dir as then (built-in images can differ between machines: copy data/leaves-*), "
            "or start anew in another --out-dir"
        )
    checkpoint.load_weights(model, saved, cfg.resume)
    optimizer.load_state_dict(saved["optimizer"])
    run.step, run.log, run.seconds = saved["step"], saved["log"], saved["seconds"]
    sums = saved["loss_sums"].to(world.device)
    say(f"resumed: {cfg.resume}, {run.step:,} steps and {len(run.log)} of {cfg.epochs} epochs done")
    if len(sums) == world.size:
        run.loss_sum = sums[world.rank].clone()
    else:
        run.loss_sum = sums.mean()
        say(f"{world.size} processes go on where {len(sums)} stood: the same images and noise, but not bit for bit")
    if cfg.epochs != saved["config"]["epochs"]:
        say(f"the learning rate schedule now spans {cfg.epochs} epochs, not {saved['config']['epochs']}")
    if world.rank == 0 and run.log:
        write_log(Path(cfg.out_dir) / "log.csv", run.log)  # which may have run ahead, or be in another folder
    if len(run.log) >= cfg.epochs:
        say("nothing is left to train; give a larger --epochs to go on")


def save_run(cfg, world, model, optimizer, run, say):
    """Save where the run stands; returns whether it is on the disk. If the disk fails, the next save tries again."""
    sums = torch.zeros(world.size, device=world.device)
    sums[world.rank] = run.loss_sum
    sum_over_ranks(sums, world)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    if not all(x.isfinite().all() for x in (sums, *model.state_dict().values(), *moments)):
        lr = optimizer.param_groups[0]["lr"]
        raise FloatingPointError(f"not finite by step {run.step} at a learning rate of {lr:.1e}, not saved; lower --lr")
    if world.rank > 0 or run.step == 0:
        return False
    finished = bool(run.log) and run.log[-1]["step"] == run.step
    epoch = len(run.log) - finished
    path = checkpoint.path_of(cfg.out_dir, epoch, None if finished else run.step)
    state = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        epoch=epoch,
        step=run.step,
        config={name: getattr(cfg, name) for name in SETTINGS.split() if name not in PER_START},
        data=run.data,
        log=run.log,
        loss_sums=sums.cpu(),
        seconds=run.seconds,
    )
    try:
        checkpoint.save(path, state, instead_of=run.in_the_way)
    except OSError as error:
        run.unsaved = f"{path} could not be saved ({error})"
        say(f"WARNING: {run.unsaved}; training goes on, the next save tries again", file=sys.stderr)
        return False
    run.unsaved, run.in_the_way = None, []
    say(f"model saved: {path}")
    # Saves inside an epoch are kept until a finished one takes their place; of themselves, the last two. (Later ones than
    # this are damaged: the run went on from before them.)
    inside = [old for old in checkpoint.in_folder(cfg.out_dir) if checkpoint.place_of(old)[1] < math.inf]
    so_far = [old for old in inside if checkpoint.place_of(old) <= checkpoint.place_of(path)]
    for old in inside if finished else so_far[:-2]:
        with contextlib.suppress(OSError):
            old.unlink()
    return True


def report_epoch(cfg, model, x_test, run, board, seconds_left, say):
    """Print, log and draw what the last epoch gave."""
    row = run.log[-1]
    say(
        f"epoch {row['epoch'] + 1}/{cfg.epochs}: train loss {row['train_loss']:.4f}, "
        f"held-out loss {row['test_loss']:.4f}, {row['images_per_second']:.0f} images/s, "
        f"{tqdm.format_interval(seconds_left)} left"
    )
    try:
        write_log(Path(cfg.out_dir) / "log.csv", run.log)
        grid = None
        if cfg.sample_every_epochs and (row["epoch"] + 1) % cfg.sample_every_epochs == 0:
            grid = Path(cfg.out_dir) / "res" / f"comparison_result_unet32_e{row['epoch']}.png"
            visualize.comparison_grid(model, x_test, cfg.noise_steps, grid)
            say(f"figure saved: {grid}")
        if board:
            to_tensorboard(board, row, grid)
    except OSError as error:  # the next checkpoint holds the log too
        say(f"WARNING: log or figure could not be saved ({error}); training goes on", file=sys.stderr)


class Unfailing:
    """A stream that drops what cannot be written: a full disk or a closed pipe must not end a training."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def speak(*text, file=None):
    print(*text, file=Unfailing(file or sys.stdout), flush=True)


def main():
    cfg = config.parse(__doc__, SETTINGS)
    lock = lock_folder(cfg)  # before anything is looked up in it
    saved, in_the_way = find_start(cfg)
    if cfg.loader == "pil" and cfg.flip:
        raise config.ConfigError("--loader pil does not mirror images; add --no-flip")
    world = join_world(cfg)
    say = speak if world.rank == 0 else lambda *text, file=None: None
    cfg.precision = str(config.pick_precision(cfg.precision, world.device)).removeprefix("torch.")
    x_train, x_test, about = load_images(cfg, world)
    say(f"data: {about['source']}; {about['test_source']}")

    torch.manual_seed(cfg.seed)
    model = unet.build(cfg.model, cfg.t_dim).to(world.device, memory_format=data.memory_format(world.device))
    optimizer = make_optimizer(cfg, model)
    say(
        f"{cfg.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {world.device}, "
        f"{cfg.precision}; {cfg.epochs} epochs of {cfg.batch_size}-image batches"
    )
    run = argparse.Namespace(
        step=0,
        log=[],
        seconds=0.0,  # of the epoch under way
        loss_sum=torch.zeros((), device=world.device),  # of the steps of the epoch under way, on this rank
        data=about,
        in_the_way=in_the_way,  # checkpoints of an older run, to be deleted by --overwrite
        unsaved=None,  # what was wrong with the last save
    )
    if saved:
        resume(saved, cfg, world, model, optimizer, run, say)

    board = open_tensorboard(cfg.out_dir) if cfg.tensorboard and world.rank == 0 else None
    save = functools.partial(save_run, cfg, world, model, optimizer, run, say)

    def report(seconds_left):
        if world.rank == 0:
            report_epoch(cfg, model, x_test, run, board, seconds_left, say)

    code, Stopped.signal = 0, 0
    handlers = {signum: signal.signal(signum, note_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(cfg, world, model, optimizer, x_train, x_test, run, save, report)
    except Stopped as stop:
        code = 128 + stop.args[0]
        say(f"stopped after step {run.step:,}")
        if save():
            say(f"go on with --resume auto --out-dir {cfg.out_dir}")
    finally:
        # torchrun sends SIGTERM when a peer is gone: it must not cut short what there is to say of it.
        for signum, handler in handlers.items() if world.size == 1 else ():
            signal.signal(signum, handler)
    if world.size > 1:
        dist.barrier()  # nobody ends, and is taken for a failure, before rank 0 has saved
        dist.destroy_process_group()
    if lock:
        lock.close()
    if run.unsaved:
        raise checkpoint.CheckpointError(f"{run.unsaved}; make room and go on with --resume auto")
    if code:
        sys.exit(code)


def write_log(path, log):
    """All rows anew, so that the file always tells of one run, resumed or not."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_COLUMNS)
    writer.writeheader()
    writer.writerows(log)
    checkpoint.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def open_tensorboard(out_dir):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        speak(
            "--tensorboard: the package is not installed (pip install tensorboard); training without it",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(Path(out_dir) / "tensorboard")


def to_tensorboard(board, row, grid):
    for name in ("train_loss", "test_loss", "lr", "images_per_second"):
        board.add_scalar(name, row[name], row["step"])
    if grid:
        board.add_image("comparison", visualize.read_figure(grid), row["step"])
    board.flush()


if __name__ == "__main__":
    config.run(main, *MISTAKES)
