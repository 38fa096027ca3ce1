"""The processes that train together: who they are, what they agree on, and the signals that stop them all."""

import contextlib
import os
import signal
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import diffusion
from config import UserError
from support import devices

AGREE_EVERY = 8  # steps from one exchange about signals to the next, on several ranks
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """A signal asks the run to end: Ctrl-C, a cluster's SIGTERM, or the SIGHUP of a lost connection."""

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


class World(NamedTuple):
    """One process of those that train together; alone, a world of size 1. Rank 0 prints and saves."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine

    @property
    def main(self):
        return self.rank == 0

    def say(self, text, file=None):
        if self.main:
            print(text, file=file or sys.stdout, flush=True)

    def warn(self, text):
        self.say(f"WARNING: {text}", sys.stderr)

    def bar(self, items, name, **options):
        """The items, with a progress bar."""
        interval = 0.5 if sys.stderr.isatty() else 30  # seconds; in a file a line every half minute is enough
        return tqdm(items, name, file=sys.stderr, disable=not self.main, mininterval=interval, **options)

    def sum(self, x):
        """The tensor x, replaced by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def share(self, batch):
        """This rank's equal part of a tensor (B, ...)."""
        return batch.tensor_split(self.size)[self.rank]

    def gather(self, share):
        """The whole batch (B, ...) of which every rank has a share."""
        if self.size == 1:
            return share
        share = share.contiguous()
        parts = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(parts, share)
        return torch.cat(parts)

    def agree(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def copy(self, *tensors):
        """Give every rank the values that rank 0 has in these tensors."""
        for x in tensors if self.size > 1 else ():
            dist.broadcast(x, 0)

    @contextlib.contextmanager
    def first_of_machine(self):
        """Local rank 0 runs the block first, for example to download; then the others of its machine."""
        if self.local_rank > 0:
            dist.barrier()
        yield
        if self.local_rank == 0 and self.size > 1:
            dist.barrier()

    def wrap(self, model, cfg):
        """The network as the loop calls it: compiled in place if cfg.compile, averaging gradients over the ranks."""
        cuda = self.device.type == "cuda"
        if self.size > 1 and cuda:  # BatchNorm over the whole batch, as on one device; PyTorch has it for CUDA only
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if cfg.compile or (cfg.compile is None and cuda):
            # CUDA graphs launch the whole network at once: small batches would wait for the launches.
            model.compile(mode="reduce-overhead" if cuda and self.size == 1 else "default", dynamic=False)
            self.try_compiled(model, cfg)
        return DistributedDataParallel(model, [self.device] if cuda else None) if self.size > 1 else model

    def try_compiled(self, model, cfg):
        """Compile before the clock starts, on a batch of black images; go on uncompiled where that fails."""
        buffers = [buffer.clone() for buffer in model.buffers()]
        shape = (cfg.batch_size // self.size, 3, cfg.crop_size, cfg.crop_size)
        x0 = data.scale(torch.zeros(shape, device=self.device))
        t, eps = data.draw_noise(shape, cfg, self.device, 0)
        try:
            for _ in range(3):  # the first compiles, the second records CUDA graphs, the third replays them
                with devices.autocast(self.device, cfg.precision):
                    loss = diffusion.noise_loss(model, x0, eps, t, cfg.noise_steps)
                model.zero_grad()  # as in the loop: a replayed graph overwrites the gradients, they must not add up
                loss.backward()
        except Exception as error:  # no C++ compiler, no Triton, a GPU too old: each raises its own kind
            torch.compiler.set_stance("force_eager")
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            self.warn(f"the network cannot be compiled here ({reason[0]}); it trains uncompiled")
        model.zero_grad()
        for buffer, before in zip(model.buffers(), buffers):  # BatchNorm has seen them
            buffer.copy_(before)

    def leave(self):
        if self.size > 1:
            dist.barrier()  # no rank may end, and be taken for failed, before rank 0 has saved
            dist.destroy_process_group()


def join(device, batch_size):
    """This process's World: of size 1, unless torchrun's environment says otherwise. Raises UserError."""
    rank, size, local_rank = ranks_of_environment()
    device = devices.pick(device, local_rank, size)
    if batch_size % size:
        raise UserError(f"--batch-size {batch_size} cannot be split over {size} processes; use a multiple of {size}")
    if device.type == "cuda":  # the same bits in every run, as on the CPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.cuda.set_device(device)
    if size > 1:
        backend, own_gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=own_gpu)  # a download can take long
        except (ValueError, RuntimeError) as error:  # MASTER_ADDR or MASTER_PORT missing, not a number, or in use
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the processes cannot connect ({reason}); use torchrun, on a free port") from None
    return World(device, rank, size, local_rank)


def ranks_of_environment():
    """(RANK, WORLD_SIZE, LOCAL_RANK), by default (0, 1, 0). Raises UserError if they are not valid."""
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"the environment says {name}={text!r}, which is not a number; unset it, or use torchrun")
        values.append(int(text))
    rank, size, local_rank = values
    if not (local_rank <= rank < size):
        raise UserError(f"RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE={size} contradict each other; unset them")
    return rank, size, local_rank


class Signals:
    """Within the block, signals are noted; `check` acts on them between two steps."""

    def __init__(self, world):
        self.world, self.came = world, 0

    def __enter__(self):
        # What nohup ignores stays ignored. SIGINT, which a script's background jobs ignore too, is noted nevertheless.
        noted = [signum for signum in SIGNALS if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN]
        self.handlers = {signum: signal.signal(signum, self.note) for signum in noted}
        return self

    def __exit__(self, *_):
        # torchrun sends SIGTERM when a peer has died: it must not keep this process from reporting the error.
        if self.world.size == 1:
            for signum, handler in self.handlers.items():
                signal.signal(signum, handler)

    def note(self, signum, frame):
        self.came = signum
        if signum == signal.SIGINT:  # a second Ctrl-C ends the process at once; launchers repeat the other signals
            signal.signal(signum, signal.SIG_DFL)

    def check(self, step=0):
        """Raise Stopped if any rank received a signal. Ranks ask one another every few steps, to stop at the same."""
        came = self.came
        if self.world.size > 1:
            if step % AGREE_EVERY:
                return
            common = torch.tensor(came, device=self.world.device)
            dist.all_reduce(common, dist.ReduceOp.MAX)
            came = int(common)
        if came:
            raise Stopped(came)
