"""Train the U-Net to predict the noise in images: MSE on eps, x_t = x0 + eps * t / T.

    python train.py                                       one device (CUDA, Apple's MPS or the CPU)
    torchrun --nproc_per_node=4 train.py                  several
    python train.py --resume auto                         go on from the newest checkpoint
    python train.py --dataset folder --data-dir pictures  your own images
    python train.py --preset reference                    the textbook recipe, to compare with

Writes model/unet32_e{epoch}.pth (epochs counted from 0) and model/log.csv, a row an epoch.
"""

import csv
import functools
import io
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config
import data
import diffusion
import unet
import visualize

SETTINGS = (
    "dataset data_dir crops_per_image limit noise_steps model t_dim preset epochs batch_size lr beta2 weight_decay "
    "warmup_steps schedule flip loader seed device precision out_dir save_model_epochs sample_every_epochs resume "
    "overwrite tensorboard"
)
# A resumed run takes every setting that was not typed from its checkpoint, but for these, which belong to a start;
PER_START = {"device", "out_dir", "resume", "overwrite", "tensorboard"}
# and a setting that was typed must not contradict the checkpoint, but for these, which do not make it another run.
MAY_CHANGE = PER_START | {"data_dir", "epochs", "save_model_epochs", "sample_every_epochs"}
LOG_COLUMNS = ("epoch", "step", "train_loss", "test_loss", "lr", "images_per_second", "seconds")


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


def draw_noise(shape, T, device, seed, step):
    """The noise of a step: t (B,), uniform on 1 ... T-1, and standard Gaussian eps of `shape`."""
    random = data.generator(device, seed, data.NOISE, step)
    t = torch.randint(1, T, shape[:1], generator=random, device=device)
    return t, torch.randn(shape, generator=random, device=device)


@torch.no_grad()
def held_out_loss(model, images, T, precision, rank=0, world=1, batch_size=250):
    """The loss over uint8 `images`, on the same noise in every run: t is 1 ... T-1 in turn, eps follows from the place."""
    device = images.device
    total = torch.zeros((), device=device)
    model.eval()
    for buffer in model.buffers() if world > 1 else ():  # each rank has BatchNorm statistics of its own share
        dist.broadcast(buffer, 0)
    starts = range(rank * batch_size, len(images), world * batch_size)
    for i in tqdm(starts, "held-out loss", delay=2, leave=False, disable=rank > 0):
        x0 = data.scale(images[i : i + batch_size])
        t = 1 + torch.arange(i, i + len(x0), device=device) % (T - 1)
        # Drawn on the CPU: the same noise on every kind of device.
        eps = torch.randn(x0.shape, generator=data.generator("cpu", 0, data.HELD_OUT_NOISE, i)).to(device)
        with config.autocast(device, precision):
            total += len(x0) * diffusion.noise_loss(model, x0, eps, t, T)
    model.train()
    return float(sum_over_ranks(total, world)) / len(images)


def finite(loss, step, lr):
    """The loss, a tensor, as a float."""
    loss = loss.item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} by step {step} at a learning rate of {lr:.1e}; lower --lr")
    return loss


def sum_over_ranks(x, world):
    if world > 1:
        dist.all_reduce(x)
    return x


def train(cfg, model, optimizer, x_train, x_test, rank, world, log, step, save, report):
    """The training loop, from `step` finished updates at the start of an epoch to the last epoch.

    cfg: the settings; x_train, x_test: uint8 images on the device that the model is on; log: the rows so far, to which
    one an epoch is added; save(epoch, step) and report(epoch, row, seconds_left): called after an epoch. Raises
    FloatingPointError when the loss is not finite.
    """
    device, precision, T = next(model.parameters()).device, getattr(torch, cfg.precision), cfg.noise_steps
    # The wrapper averages the gradients over ranks; `model` stays the raw module, which is what is saved.
    net = model
    if world > 1:
        if device.type == "cuda":  # BatchNorm over the whole batch, as on one device; PyTorch has it for CUDA only
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    make_batches = data.pil_batches if cfg.loader == "pil" else data.batches
    steps_per_epoch = len(x_train) // cfg.batch_size
    last_step = cfg.epochs * steps_per_epoch
    share = slice(rank * cfg.batch_size // world, (rank + 1) * cfg.batch_size // world)
    first_step, started = step, time.time()
    for epoch in range(step // steps_per_epoch, cfg.epochs):
        total, epoch_started, shown = torch.zeros((), device=device), time.time(), time.time()
        batches = make_batches(x_train, cfg.batch_size, cfg.seed, epoch, cfg.flip, rank, world)
        # Not on a terminal, a line every half minute is enough.
        bar = tqdm(
            batches,
            f"Epoch {epoch + 1}/{cfg.epochs}",
            steps_per_epoch,
            disable=rank > 0,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        for i, x0 in enumerate(bar, 1):
            lr = lr_at(step, cfg, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Every rank draws the noise of the whole batch and takes its share: the same noise on any number of ranks.
            t, eps = draw_noise((cfg.batch_size, *x0.shape[1:]), T, device, cfg.seed, step)
            with config.autocast(device, precision):
                loss = diffusion.noise_loss(net, x0.to(device), eps[share], t[share], T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total += loss.detach()
            if time.time() - shown > 1:  # reading the loss waits for the device, so not at every step
                shown, mean = time.time(), finite(total / i, step, lr)
                left = tqdm.format_interval((shown - started) / (step - first_step) * (last_step - step))
                speed = cfg.batch_size * i / (shown - epoch_started)
                bar.set_postfix_str(f"loss {mean:.4f}, lr {lr:.1e}, {speed:.0f} images/s, run {left} left", False)
        train_loss = finite(sum_over_ranks(total, world) / world / steps_per_epoch, step, lr)
        speed = cfg.batch_size * steps_per_epoch / (time.time() - epoch_started)
        test_loss = held_out_loss(model, x_test, T, precision, rank, world)
        seconds = (log[-1]["seconds"] if log else 0) + time.time() - epoch_started
        row = (epoch, step, train_loss, test_loss, lr, round(speed, 1), round(seconds, 1))
        log.append(dict(zip(LOG_COLUMNS, row)))
        report(epoch, log[-1], (time.time() - started) / (step - first_step) * (last_step - step))
        if (epoch + 1) % cfg.save_model_epochs == 0 or epoch + 1 == cfg.epochs:
            save(epoch, step)


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
    saved, epoch = None, -1
    if cfg.resume == "auto":
        cfg.resume = checkpoint.newest(cfg.out_dir)
    if cfg.resume:
        saved = checkpoint.load(cfg.resume, needs=("optimizer", "epoch", "step", "data", "log"))
        take_settings_of(saved, cfg)
        if "out_dir" not in cfg.given:
            cfg.out_dir = str(Path(cfg.resume).parent)
        if Path(cfg.out_dir).resolve() == Path(cfg.resume).resolve().parent:
            epoch = saved["epoch"]
    in_the_way = [path for path in checkpoint.in_folder(cfg.out_dir) if checkpoint.epoch_of(path) > epoch]
    if in_the_way and not cfg.overwrite:
        raise checkpoint.CheckpointError(
            f"{cfg.out_dir} already holds {in_the_way[-1].name}; go on from it with --resume auto, "
            "choose another --out-dir, or delete what is there with --overwrite"
        )
    return saved, in_the_way


def main():
    cfg = config.parse(__doc__, SETTINGS)
    # The defaults describe a world of one, without torchrun. Rank 0 speaks and writes.
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in config.RANKS)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    device = config.pick_device(cfg.device, local_rank, world)
    saved, in_the_way = find_start(cfg)
    cfg.precision = str(config.pick_precision(cfg.precision, device)).removeprefix("torch.")
    if cfg.batch_size % world:
        raise config.ConfigError(
            f"--batch-size {cfg.batch_size} cannot be split over {world} processes; use a multiple of {world}"
        )
    if cfg.loader == "pil" and cfg.flip:
        raise config.ConfigError("--loader pil does not mirror images; add --no-flip")
    if device.type == "cuda":  # the same bits in every run, as on the CPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.cuda.set_device(device)
    if world > 1:
        backend, own_gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=own_gpu)  # a download can take long

    if local_rank > 0:  # the first process of a machine downloads or makes the images, ...
        dist.barrier()
    cfg.dataset = data.resolve(cfg.dataset, cfg.data_dir)
    x_train, source = data.load("train", cfg.dataset, cfg.data_dir, cfg.crops_per_image, cfg.limit)
    x_test, test_source = data.load("test", cfg.dataset, cfg.data_dir, cfg.crops_per_image, cfg.limit)
    if local_rank == 0 and world > 1:  # ... the others find them
        dist.barrier()
    say(f"data: {source}; {test_source}")
    if len(x_train) < cfg.batch_size:
        raise config.ConfigError(
            f"{len(x_train)} training images do not fill a batch of {cfg.batch_size}; lower --batch-size"
        )
    fingerprint = data.fingerprint(x_train)
    if saved and saved["data"]["fingerprint"] != fingerprint:
        raise checkpoint.CheckpointError(
            f"{cfg.resume} was trained on other images ({saved['data']['source']}) than these ({source}); "
            "give --dataset and --data-dir as then (built-in images can differ between machines: copy data/leaves-*), "
            "or start anew in another --out-dir"
        )

    x_train, x_test = x_train.to("cpu" if cfg.loader == "pil" else device), x_test.to(device)
    torch.manual_seed(cfg.seed)
    model = unet.build(cfg.model, cfg.t_dim).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=device.type != "mps"
    )
    log, step = [], 0
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        log, step = saved["log"], saved["step"]
        say(f"resumed: {cfg.resume}, {saved['epoch'] + 1} of {cfg.epochs} epochs done")
        if saved["epoch"] + 1 >= cfg.epochs:
            say("nothing is left to train; give a larger --epochs to go on")
        elif cfg.epochs != saved["config"]["epochs"]:
            say(f"the learning rate schedule now spans {cfg.epochs} epochs, not {saved['config']['epochs']}")
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{cfg.model}: {parameters:,} parameters on {world} x {device}, {cfg.precision}; {cfg.epochs} epochs of {cfg.batch_size}-image batches"
    )

    board = open_tensorboard(cfg.out_dir) if cfg.tensorboard and rank == 0 else None

    def save(epoch, step):
        if rank == 0:
            state = dict(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                epoch=epoch,
                step=step,
                config={name: getattr(cfg, name) for name in SETTINGS.split() if name not in PER_START},
                data=dict(source=source, fingerprint=fingerprint),
                log=log,
            )
            path = checkpoint.path_of(cfg.out_dir, epoch)
            while in_the_way:  # of --overwrite: the old run is deleted when there is something to put in its place
                in_the_way.pop().unlink()
            checkpoint.save(path, state)
            say(f"model saved: {path}")

    def report(epoch, row, seconds_left):
        if rank == 0:
            say(
                f"epoch {epoch + 1}/{cfg.epochs}: train loss {row['train_loss']:.4f}, held-out loss {row['test_loss']:.4f}, "
                f"{row['images_per_second']:.0f} images/s, {tqdm.format_interval(seconds_left)} left"
            )
            write_log(Path(cfg.out_dir) / "log.csv", log)
            grid = None
            if cfg.sample_every_epochs and (epoch + 1) % cfg.sample_every_epochs == 0:
                grid = Path(cfg.out_dir) / "res" / f"comparison_result_unet32_e{epoch}.png"
                visualize.comparison_grid(model, x_test, cfg.noise_steps, grid)
                say(f"figure saved: {grid}")
            if board:
                to_tensorboard(board, row, grid)

    train(cfg, model, optimizer, x_train, x_test, rank, world, log, step, save, report)
    if world > 1:
        dist.destroy_process_group()


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
        print(
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
    config.run(main, data.DataError, checkpoint.CheckpointError, FloatingPointError)
