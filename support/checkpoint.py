"""Checkpoints: one plain dict a file, written atomically and read as data, never as code.

    save(path, state)
    state = load(path)                          # model, network, optimizer, epoch, step, config, ...
    model, trained = load_model(path, device)

`load` believes nothing: a file from anywhere either gives a sound dict or a CheckpointError of one line, and takes no
more memory than its size suggests.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import keyword
import math
import os
import pickletools
import re
import socket
import stat
import sys
import zipfile
from pathlib import Path

import torch

import config
import data
import unet
from config import UserError
from support import files
from support.device import memory_format

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None


SHIPPED = Path(__file__).parent.parent / "model" / "unet32.pth"  # the trained weights that come with the code
PHOTO = SHIPPED.with_name("photo.pth")  # those trained on photographs
REQUIRED = {"model", "t_dim", "noise_steps", "dataset", "data_dir"}  # the settings that every version has saved
# All that torch.save refers to in a dict of plain values and tensors of these three types.
GLOBALS = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2"),
    *("torch FloatStorage", "torch HalfStorage", "torch LongStorage"),
}
DEEPEST = 10  # levels of dicts and lists inside one another


class CheckpointError(UserError):
    """A checkpoint that cannot be used: the text names the file and says why."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint in the folder."""


class DamagedError(CheckpointError):
    """The file is not what was saved."""


# ---- names -------------------------------------------------------------------------------------------------------


def path_of(folder, epoch, step=None):
    """The file of a finished epoch, counted from 0, or of a step inside it."""
    return Path(folder) / (f"unet32_e{epoch}.pth" if step is None else f"unet32_e{epoch}_s{step}.pth")


def place_of(path):
    """(epoch, step) in the name of a checkpoint; the step of a finished epoch is infinite. None: another file."""
    match = re.fullmatch(r"unet32_e([0-9]{1,18})(?:_s([0-9]{1,18}))?\.pth", Path(path).name)
    return match and (int(match[1]), int(match[2]) if match[2] else math.inf)


def in_folder(folder):
    """The checkpoints that a run left in a folder, oldest first."""
    return sorted((path for path in Path(folder).glob("unet32_e*.pth") if place_of(path)), key=place_of)


def newest(folder):
    """The newest checkpoint of a folder, by epoch and step. Raises NoCheckpointError."""
    found = in_folder(folder)
    if not found:
        raise NoCheckpointError(
            f"no checkpoint (unet32_e*.pth) in {folder}; run train.py first, or name another folder or file"
        )
    return found[-1]


def choose(named, folder):
    """The checkpoint to use: the one that is named; else the newest of the folder; else SHIPPED.

    Raises NoCheckpointError if there is none of them.
    """
    if named is not None:
        return Path(named)
    return newest(folder) if in_folder(folder) or not SHIPPED.exists() else SHIPPED


# ---- writing -----------------------------------------------------------------------------------------------------


def save(path, state):
    """Write a dict of tensors and plain values so that `path` is, at any moment, absent, the old file or the new one.

    Raises OSError.
    """
    buffer = io.BytesIO()  # so that a full disk is an OSError, not an error of PyTorch's own writer
    torch.save(state | {"checksum": checksum(state)}, buffer)
    files.write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def checksum(state):
    """SHA-256 of names, values, shapes and bytes: tells damage that still parses."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)},".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, list | tuple):
            sha.update(f"{len(value)} of,".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r},".encode(errors="surrogatepass"))

    add(state)
    return sha.hexdigest()


def lock(folder):
    """Hold the folder for this process until the file returned is closed. Deletes what a killed save left there.

    Raises CheckpointError if another process holds it. The lock dies with its process, however that ends. Between
    hosts it holds where the file system passes flock on (NFS since Linux 2.6.12 does, some cluster file systems do
    not). A folder that is removed and made again under a run is not locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = open_lock(folder / ".lock")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(200).strip() or "another process"
        file.close()
        raise CheckpointError(
            f"{folder} is in use by {holder}; wait for it to end or choose another --out-dir"
        ) from None
    except OSError as error:
        print(f"WARNING: {folder} cannot be locked ({error}); start no second run in it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    clean(folder)
    return file


def open_lock(path):
    """Open or make a lock file, and no other kind: what a link leads to would be overwritten."""
    other_kind = CheckpointError(f"{path} is not a lock file of train.py; delete it or choose another --out-dir")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if path.is_symlink() or path.is_dir():
        raise other_kind
    file = open(os.open(path, flags, 0o666), "r+", errors="replace")  # noqa: SIM115 - the open file holds the lock
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise other_kind
    return file


def clean(folder):
    """Delete the temporary files of killed processes, also under the names that earlier versions gave them."""
    files.clean(folder)
    files.clean(folder / "res")
    leftovers = [*folder.glob(".log.csv.*.tmp"), *folder.glob("res/.*.png.*.tmp")]
    if in_folder(
        folder
    ):  # else an earlier version, killed as it replaced checkpoints, left its only one under this name
        leftovers += folder.glob(".unet32_e*.tmp")
    for path in leftovers:
        with contextlib.suppress(OSError):
            path.unlink()


# ---- reading -----------------------------------------------------------------------------------------------------


def load(path, device="cpu", needs=(), settings=unet.SETTINGS | data.SETTINGS):
    """The dict that `save` wrote, its tensors on `device`.

    needs: the entries that must be there. settings: what the saved config is held to. Raises DamagedError if the file
    is not what was saved, CheckpointError if it is absent, foreign, lacks `needs`, has a wrong value in an entry, or if
    the memory does not suffice.
    """
    with memory_for(path):
        state = read(path)
        saved = state.get("config") if isinstance(state, dict) else None
        if not isinstance(saved, dict) or not saved.keys() >= REQUIRED:
            raise CheckpointError(f"{path} is not a checkpoint of this project; use another one")
        if "checksum" not in state:
            raise CheckpointError(
                f"{path} has no checksum: an older version or another program saved it; use another one"
            )
        if state.pop("checksum") != checksum(state):
            raise DamagedError(f"{path} is damaged: its checksum is wrong; use another one")
        missing = {"model", *needs} - state.keys()
        if missing:
            raise CheckpointError(f"{path} lacks what is needed here ({', '.join(sorted(missing))}); use another one")
        check_entries(state, unet.SETTINGS | settings, path)
        return moved(state, device)


def load_newest(folder, needs=()):
    """(path, state) of the newest checkpoint of a folder; passes over a damaged one with a warning.

    Raises NoCheckpointError if there is none at all, CheckpointError if all are damaged or one cannot be used.
    """
    newest(folder)
    for path in reversed(in_folder(folder)):
        try:
            return path, load(path, needs=needs)
        except DamagedError as error:
            print(f"WARNING: {error}", file=sys.stderr)
    raise CheckpointError(
        f"every checkpoint in {folder} is damaged; start anew with --overwrite or in another --out-dir"
    )


def load_model(path, device):
    """(model, trained): the network, in evaluation mode on `device`, and its settings, a frozen cfg.

    `trained` has all of unet.SETTINGS and data.SETTINGS, at their defaults where the file lacks them. Raises
    CheckpointError.
    """
    with memory_for(path):
        state = load(path)
        with torch.device("meta"):  # shapes alone, which take no memory until the file proves to have such weights
            model = unet.build(**network_of(state))
        model.load_state_dict(matching_weights(model, state, path), assign=True)
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in state["config"].items()}
        trained = config.defaults(unet.SETTINGS | data.SETTINGS, **saved)
    return model.to(device, memory_format=memory_format(device)).eval(), trained


def load_weights(model, state, path):
    """Put the weights of a checkpoint, `state` as `load` returns it, into the network. Raises CheckpointError."""
    model.load_state_dict(matching_weights(model, state, path))


@torch.no_grad()
def load_optimizer(optimizer, state, path):
    """Put the moments of a checkpoint, `state` as `load` returns it, into `optimizer`. Raises CheckpointError.

    They are copied into tensors that the optimizer itself has laid out: its fused kernels walk a parameter and its
    moments in the order of memory, and the file's order is that of the device which it was saved on. Rates and decays
    stay those of `optimizer`: they follow from the settings.
    """
    make_moments(optimizer)
    saved, own, must = state["optimizer"], optimizer.state_dict(), functools.partial(demand, path)
    must(same_keys(saved, own), "optimizer", f"a dict of {' and '.join(own)}")
    groups = [group["params"] for group in own["param_groups"]]
    fit = isinstance(saved["param_groups"], list) and all(isinstance(group, dict) for group in saved["param_groups"])
    must(fit and [group.get("params") for group in saved["param_groups"]] == groups, "optimizer.param_groups", "ours")
    must(same_keys(saved["state"], own["state"]), "optimizer.state", f"a dict of {len(own['state'])} parameters")
    for i, moments in own["state"].items():
        found = saved["state"][i]
        must(same_keys(found, moments), f"optimizer.state[{i}]", f"a dict of {', '.join(moments)}")
        for name, moment in moments.items():
            signed = name != "step" and not name.endswith("_sq")
            fit = is_finite(found[name], moment.dtype, moment.shape) and (signed or (found[name] >= 0).all())
            what = f"finite{'' if signed else ', not below 0'}, {moment.dtype} and of shape {tuple(moment.shape)}"
            must(fit, f"optimizer.state[{i}].{name}", what)
    for i, moments in own["state"].items():
        for name, moment in moments.items():
            moment.copy_(saved["state"][i][name])


def make_moments(optimizer):
    """Have the optimizer make its moments, by a step that changes nothing: gradients and learning rate are 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates, before = [group["lr"] for group in optimizer.param_groups], [p.clone() for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    for p, value in zip(parameters, before):  # the step may have changed the sign of a zero
        p.copy_(value)


def network_of(state):
    """The arguments of unet.build for a checkpoint. Those without "network" are older than its last three arguments."""
    saved = state["config"]
    old = {"name": saved["model"]} | ({"t_dim": saved["t_dim"]} if saved["model"] == "unet" else {})
    return state.get("network", old)


def matching_weights(model, state, path):
    """The weights as the network has them: by name, in its dtypes. Raises CheckpointError if they are another's."""
    own, saved = model.state_dict(), state["model"]
    shapes, saved_shapes = ({name: tuple(x.shape) for name, x in weights.items()} for weights in (own, saved))
    for name in sorted(shapes.keys() | saved_shapes.keys()):
        shape, saved_shape = shapes.get(name, "absent"), saved_shapes.get(name, "absent")
        if shape != saved_shape or own[name].is_floating_point() != saved[name].is_floating_point():
            raise CheckpointError(
                f"{path} does not hold the weights of this network: {name:.80} is {saved_shape}, not {shape}; "
                "use another file, or the network that it was trained with"
            )
    return {name: saved[name].to(x.dtype) for name, x in own.items()}


def moved(value, device):
    """A structure of dicts, lists and tuples with its tensors on `device`."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


# ---- reading a file that may hold anything -----------------------------------------------------------------------


@contextlib.contextmanager
def memory_for(path):
    """Tell a lack of memory, which says nothing about the file, from damage."""
    try:
        yield
        return
    except MemoryError:
        pass
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
    raise CheckpointError(f"there is not enough memory to load {path}; end other programs or use a larger machine")


def read(path):
    """What torch.save wrote to a file. Raises DamagedError for other content, CheckpointError if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise CheckpointError(f"{path} is not a file; name a checkpoint, unet32_e*.pth")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise DamagedError(f"{path} is empty; use another one")
            values = check_archive(file, size)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            check_size(state, values, size)
            return state
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; train.py names every checkpoint that it saves") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a dozen kinds, by where the damage lies
        if "DefaultCPUAllocator" in str(error):
            raise
        raise DamagedError(f"{path} is damaged, or is not a checkpoint, or holds code; use another one") from None


def check_archive(file, size):
    """Refuse, before it is unpacked, what torch.save does not write: compressed entries, and references to other code.

    Returns an upper bound of the number of values. Raises ValueError, and what zipfile and pickletools raise.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise ValueError("compressed")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two entries of one name")
        structure = archive.read(entries[0].filename.partition("/")[0] + "/data.pkl")
    if {argument for opcode, argument, _ in pickletools.genops(structure) if opcode.name == "GLOBAL"} - GLOBALS:
        raise ValueError("code")
    return len(structure)  # each value takes a byte at least, unless it is shared


def check_size(state, values, size):
    """Refuse what is larger than its file: lists in lists in lists, shared, tensors of one number expanded.

    values, size: the most values and the most bytes of tensors. Raises ValueError.
    """
    queue = [(state, 0)]
    for value, depth in queue:
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            parts = value.values()
        elif type(value) in (list, tuple):
            parts = value
        elif type(value) is torch.Tensor and not value.requires_grad:
            parts, size = (), size - value.nbytes
        elif value is None or type(value) in (bool, int, float, str):
            parts = ()
        else:
            raise ValueError("other types")
        queue += ((part, depth + 1) for part in parts)
        if len(queue) > values or size < 0 or depth > DEEPEST:
            raise ValueError("larger than its file")


# ---- the entries of a checkpoint ---------------------------------------------------------------------------------


def demand(path, fits, entry, what):
    if not fits:
        raise CheckpointError(f"{path} cannot be used: its entry {entry:.100} is not {what}; use another one")


def check_entries(state, settings, path):
    """Hold the entries to what the scripts expect of them: a wrong one is named, not used."""
    must, saved = functools.partial(demand, path), state["config"]
    for name, value in saved.items():
        fits = isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name)
        must(fits and name != "given" and is_plain(value), f"config[{name!r}]", "a setting with a plain value")
    held_to(saved, settings, path)
    must(isinstance(state["model"], dict), "model", "a dict of tensors")
    for name, value in state["model"].items():
        must(isinstance(name, str) and is_finite(value), f"model[{name!r}]", "a tensor of finite numbers")
    check_network(state, path)
    for name in {"epoch", "step"} & state.keys():
        must(is_number(state[name], int), name, "a whole number of at least 0")
    must(is_number(state.get("seconds", 0)), "seconds", "a number of at least 0")
    sums = state.get("loss_sums", torch.zeros(1))
    must(is_finite(sums, torch.float32) and sums.ndim == 1 and len(sums), "loss_sums", "a finite float32 per process")
    images = state.get("data", dict(source="", fingerprint=""))
    fits = isinstance(images, dict) and is_plain(images)
    must(fits and all(isinstance(images.get(key), str) for key in ("source", "fingerprint")), "data", "a dict of texts")
    must(is_plain(state.get("provenance", {})), "provenance", "plain values")
    if "log" in state:
        check_log(state, must)


def held_to(values, settings, path):
    try:
        config.check(values, settings, path)
    except UserError as error:
        raise CheckpointError(str(error)) from None


def check_network(state, path):
    """The network must be one of ours, with arguments in range which agree with the settings."""
    must, saved, network = functools.partial(demand, path), state["config"], network_of(state)
    must(isinstance(network, dict) and is_plain(network), "network", "a dict of plain values")
    must("network" in state or "widths" not in saved, "network", "there")
    must(
        network.get("name") in unet.NETWORKS and network["name"] == saved["model"], "network['name']", "config['model']"
    )
    parameters = inspect.signature(unet.NETWORKS[network["name"]]).parameters
    for name in network.keys() - {"name"}:
        must(name in parameters and name in unet.SETTINGS, f"network[{name!r}]", "an argument of the network")
    held_to(network, unet.SETTINGS, path)
    for name in saved.keys() & parameters.keys() if "network" in state else ():
        built, stated = (
            tuple(x) if isinstance(x, list) else x for x in (network.get(name, parameters[name].default), saved[name])
        )
        must(built == stated, f"network[{name!r}]", f"config[{name!r}]")


def check_log(state, must):
    """A row an epoch, and epoch and step where they say that the run stands."""
    log = state["log"]
    must(isinstance(log, list), "log", "a list of rows")
    step = 0
    for epoch, row in enumerate(log):
        must(isinstance(row, dict) and is_plain(row), f"log[{epoch}]", "a dict of plain values")
        must(row.get("epoch") == epoch, f"log[{epoch}]['epoch']", epoch)
        for name in ("step", "train_loss", "test_loss", "lr", "images_per_second", "seconds"):
            must(is_number(row.get(name)), f"log[{epoch}][{name!r}]", "a number of at least 0")
        must(
            is_number(row["step"], int) and row["step"] > step, f"log[{epoch}]['step']", f"a whole number above {step}"
        )
        step = row["step"]
    if "step" in state:
        must(state["step"] >= step, "step", f"at least {step}, that of the last row of the log")
        finished = bool(log) and state["step"] == step
        must(state.get("epoch", len(log) - finished) == len(log) - finished, "epoch", "that of the log")


def is_plain(value):
    """Whether there is no tensor in it. (`read` lets nothing else through.)"""
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(is_plain, value)) if isinstance(value, list | tuple) else not isinstance(value, torch.Tensor)


def is_number(value, *kinds):
    return type(value) in (kinds or (int, float)) and 0 <= value < 2**63


def is_finite(value, dtype=None, shape=None):
    """Whether it is a tensor of finite numbers, of this dtype and shape."""
    if not isinstance(value, torch.Tensor) or dtype not in (None, value.dtype) or shape not in (None, value.shape):
        return False
    return bool(value.isfinite().all())


def same_keys(value, other):
    return isinstance(value, dict) and value.keys() == other.keys()
