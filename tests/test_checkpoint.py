"""Checkpoints: what is saved comes back, and a file from anywhere is used rightly or refused with one line."""

import contextlib
import copy
import dataclasses
import errno
import math
import os
import pickle
import random
import re
import shlex
import socket
import stat
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import config
import data
import train
import unet
from benchmarks import export
from config import UserError
from support import archive, checkpoint, entries, files, lock, muon
from support.checkpoint import CheckpointError, DamagedError, NoCheckpointError

CFG = config.defaults(unet.SETTINGS | data.SETTINGS, widths=(4, 4, 8), t_dim=8)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def make(kind=torch.optim.AdamW, layout=torch.channels_last, cfg=CFG):
    """A network and its optimizer."""
    torch.manual_seed(0)
    model = unet.build(**unet.describe(cfg)).to(memory_format=layout)
    return model, kind(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.01, fused=True)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 8, 8)
    model(x, torch.tensor([1.0, 2.0])).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model, optimizer, cfg=CFG):
    """What a run saves after its second epoch of one step each."""
    numbers = dict(train_loss=1.0, test_loss=0.9, lr=1e-3, images_per_second=50.0, seconds=2.5)
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "given"}
    return copy.deepcopy(
        dict(
            model=model.state_dict(),
            network=unet.describe(cfg),
            optimizer=optimizer.state_dict(),
            epoch=1,
            step=2,
            config=settings | dict(lr=1e-3, preset="default"),
            data=dict(source="16 images", test_source="4 images", fingerprint="0123456789abcdef"),
            log=[dict(epoch=i, step=i + 1, **numbers, of_block="enc1", channels_in_use=0.9) for i in range(2)],
            loss_sums=torch.zeros(1),
            seconds=0.0,
        )
    )


def trained(**options):
    model, optimizer = make(**options)
    for seed in range(2):
        step(model, optimizer, seed)
    return model, optimizer


@pytest.fixture(scope="module")
def whole():
    """The state of a trained network; tests change copies of it."""
    return state_of(*trained())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "unet32_e1.pth"


@pytest.fixture
def little_memory():
    """Half a gigabyte more than now, so that a file that would take gigabytes fails here and harms nobody."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def write(path, state):
    """As checkpoint.save does, but without waiting for the disk."""
    torch.save(state | {"checksum": checkpoint.checksum(state)}, path)


def refusal(path, action=checkpoint.load):
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        action(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is saved comes back ------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(whole, path):
    checkpoint.save(path, whole)
    assert equal(checkpoint.load(path), whole)
    assert torch.load(path, weights_only=True).keys() == whole.keys() | {"checksum"}
    model, found = checkpoint.load_model(path, "cpu")
    reference, _ = trained()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    assert torch.equal(model(x, t), reference.eval()(x, t)) and not model.training
    assert (found.widths, found.lr, found.dataset) == ((4, 4, 8), 1e-3, "auto")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.lr = 1


def test_the_network_is_built_as_the_file_says(path):
    for values in (dict(noise_steps=100, blocks=2), dict(model="plain")):
        cfg = dataclasses.replace(CFG, **values)
        checkpoint.save(path, state_of(*make(cfg=cfg), cfg))
        model, found = checkpoint.load_model(path, "cpu")
        assert unet.describe(found) == unet.describe(cfg)
        assert not hasattr(model, "t_scale") or model.t_scale == 0.1


def test_a_file_of_an_earlier_version_means_what_it_meant(path):
    """It has no "network", half the precision, the widths of old, and its time MLP saw t itself whatever T was."""
    torch.manual_seed(0)
    reference = unet.UNet(t_dim=8)
    settings = dict(model="unet", t_dim=8, noise_steps=100, dataset="leaves", data_dir="data", loader="tensor")
    halves = {name: value.half() for name, value in reference.state_dict().items()}
    checkpoint.save(path, dict(model=halves, config=settings, provenance={"epochs": 10}))
    model, found = checkpoint.load_model(path, "cpu")
    assert (found.noise_steps, found.widths, found.blocks, found.loader) == (100, (64, 128, 256), 1, "tensor")
    reference.load_state_dict(halves)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([50])
    assert model.final.weight.dtype == torch.float32
    torch.testing.assert_close(model(x, t), reference(x, t))


class OnGPU(torch.Tensor):
    """Stands for a tensor of a GPU: whatever is not moved to the CPU shows in the file."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_file_written_with_a_gpu_is_read_without_one(path):
    state = state_of(*trained())
    elsewhere = dict(state, model={name: value.as_subclass(OnGPU) for name, value in state["model"].items()})
    moments = elsewhere["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].as_subclass(OnGPU)
    checkpoint.save(path, elsewhere)
    found = torch.load(path, weights_only=True)
    assert all(type(value) is torch.Tensor for value in found["model"].values())
    assert equal(checkpoint.load(path), state)


# ---- names -------------------------------------------------------------------------------------------------------


def test_places_are_read_from_names():
    assert checkpoint.epoch_and_step("model/unet32_e10.pth") == (10, math.inf)
    assert checkpoint.epoch_and_step("unet32_e10_s7.pth") == (10, 7)
    for other in (
        "unet32.pth",
        "unet32_e.pth",
        "unet32_e1_s.pth",
        "unet32_e-1.pth",
        "unet32_e١.pth",
        "unet32_e1.pth.x",
    ):
        assert checkpoint.epoch_and_step(other) is None
    assert checkpoint.epoch_and_step(f"unet32_e{'9' * 5000}.pth") is None
    assert checkpoint.epoch_and_step(checkpoint.path_of("model", 3, 4)) == (3, 4)


def test_the_newest_is_that_of_the_last_step_not_of_the_last_hour(tmp_path):
    assert checkpoint.choose("mine.pth", tmp_path) == Path("mine.pth")
    assert checkpoint.choose(None, tmp_path) == checkpoint.SHIPPED
    for name in ("unet32_e10_s300.pth", "unet32_e9.pth", "unet32_e10.pth", "unet32_e10_s99.pth", "unet32_best.pth"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / "unet32_e10.pth", (0, 0))
    order = ["unet32_e9.pth", "unet32_e10_s99.pth", "unet32_e10_s300.pth", "unet32_e10.pth"]
    assert [found.name for found in checkpoint.in_folder(tmp_path)] == order
    assert checkpoint.choose(None, tmp_path) == checkpoint.newest(tmp_path) == tmp_path / "unet32_e10.pth"


def test_a_folder_without_a_checkpoint_is_told_from_one_with_damaged_ones(whole, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NoCheckpointError, match="no checkpoint"):
            checkpoint.load_newest(folder)
    checkpoint.save(tmp_path / "unet32_e0.pth", whole)
    (tmp_path / "unet32_e1.pth").write_bytes(b"damaged")
    found, state = checkpoint.load_newest(tmp_path)
    assert found.name == "unet32_e0.pth" and equal(state, whole)
    assert f"WARNING: {tmp_path}/unet32_e1.pth is damaged" in capsys.readouterr().err
    (tmp_path / "unet32_e0.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged") as caught:
        checkpoint.load_newest(tmp_path)
    assert not isinstance(caught.value, NoCheckpointError)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("... DefaultCPUAllocator: can't allocate memory ...")])
def test_a_lack_of_memory_is_no_damage(whole, tmp_path, monkeypatch, error):
    """Else a run would go on from the checkpoint before."""
    checkpoint.save(tmp_path / "unet32_e0.pth", whole)
    checkpoint.save(tmp_path / "unet32_e1.pth", whole)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"not enough memory to load .*unet32_e1\.pth") as caught:
        checkpoint.load_newest(tmp_path)
    assert not isinstance(caught.value, DamagedError)


# ---- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_save_that_fails_leaves_what_was_there(whole, path, monkeypatch, fails):
    checkpoint.save(path.with_name("unet32_e0.pth"), whole)
    checkpoint.save(path, whole)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, whole | {"step": 3})
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_folder_is_held_by_one_run(tmp_path):
    pytest.importorskip("fcntl")
    held = lock.take(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on {socket.gethostname()}"):
        lock.take(tmp_path)
    held.close()
    lock.take(tmp_path).close()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    lock.take(tmp_path).close()
    assert re.search(r"cannot be locked \(.*No locks available\); start no second run in it", capsys.readouterr().err)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes are POSIX")
@pytest.mark.parametrize("kind", ["symlink", "dangling link", "hard link", "pipe", "folder"])
def test_a_lock_that_is_no_file_of_ours_harms_nothing(tmp_path, kind):
    file, target = tmp_path / "run" / ".lock", tmp_path / "precious.txt"
    file.parent.mkdir()
    target.write_text("precious")
    if kind == "hard link":
        file.hardlink_to(target)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(target if kind == "symlink" else tmp_path / "absent")
    with pytest.raises(UserError, match=r"is not a lock file of train\.py; delete it"):
        lock.take(file.parent)
    assert target.read_text() == "precious" and not (tmp_path / "absent").exists()


def test_leftovers_go_and_nothing_else(tmp_path):
    host = socket.gethostname()
    dead, alive = 2**22 + 1, os.getpid()  # above Linux's largest process number
    ours = [f".tmp-{dead}-{host}.part", f"res/.tmp-{dead}-{host}.part"]
    others = [f".tmp-{alive}-{host}.part", f".tmp-{dead}-elsewhere.part", ".notes.tmp", "unet32_e0_s5.pth", "res/a.png"]
    (tmp_path / "res").mkdir()
    for name in [*ours, *others]:
        (tmp_path / name).write_bytes(b"")
    lock.take(tmp_path).close()
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {*others, ".lock"}


# ---- files that are not what was saved ---------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_named(whole, path):
    assert "does not exist; restore it, or name a checkpoint that train.py saved" in refusal(path)
    assert "cannot be read (File name too long)" in refusal(path.with_name(f"{'x' * 300}.pth"))
    path.write_bytes(b"")
    assert "is empty" in refusal(path)
    path.write_bytes(b"hello")
    assert "is damaged, or is not a checkpoint" in refusal(path)
    torch.save({"state_dict": {}}, path)
    assert "is not a checkpoint of this project" in refusal(path)
    torch.save(whole, path)
    assert "has no checksum" in refusal(path)
    write(path, {"model": whole["model"], "config": whole["config"], "network": whole["network"]})
    needs = ("optimizer", "log")
    assert "lacks what is needed here (log, optimizer)" in refusal(path, lambda p: checkpoint.load(p, needs=needs))
    assert "is not a file" in refusal(path.parent)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path.with_name("pipe.pth"))
        assert "is not a file" in refusal(path.with_name("pipe.pth"))


def test_no_damage_goes_unnoticed(whole, path):
    write(path, whole)
    content, rng = path.read_bytes(), random.Random(0)
    damaged = [content[:100], content[:-1000], content[: len(content) // 2], b"\0" * 5000]
    for _ in range(40):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 10))):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.append(changed)
    for changed in damaged:
        path.write_bytes(changed)
        try:
            assert equal(checkpoint.load(path), whole)  # a bit that means nothing, in the padding of the archive
        except DamagedError as error:
            assert str(path) in str(error)


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_checkpoint_is_data_not_code(whole, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    for payload in (Call(os.mkdir, "executed"), Call(bytearray, 10**12), Call(torch.Tensor, 10**6, 10**6)):
        torch.save(whole | {"payload": payload}, path)
        assert "or holds code" in refusal(path)
    path.write_bytes(pickle.dumps(Call(os.mkdir, "executed")))
    assert "or holds code" in refusal(path)
    assert not Path("executed").exists()


def shared_lists(state):
    for _ in range(40):
        state["data"] = [state["data"], state["data"]]


def cyclic_list(state):
    state["data"] = []
    state["data"].append(state["data"])


def deep_list(state):
    for _ in range(150):
        state["data"] = [state["data"]]


def expanded_tensor(state):
    state["loss_sums"] = torch.zeros(1).expand(3 * 2**29)  # 6 GB


def shared_tensor(state):
    state["log"] = [state["model"]["final.weight"]] * 10_000


def large_network(state):
    state["config"]["t_dim"] = state["network"]["t_dim"] = 40_000  # 6.4 GB of weights


@pytest.mark.parametrize(
    "hostile", [shared_lists, cyclic_list, deep_list, expanded_tensor, shared_tensor, large_network]
)
def test_a_small_file_takes_little_memory_and_time(whole, path, little_memory, hostile):
    state = copy.deepcopy(whole)
    cheap = hostile is large_network
    hostile(state)
    torch.save(state | {"checksum": checkpoint.checksum(state) if cheap else ""}, path)
    line = refusal(path, lambda p: checkpoint.load_model(p, "cpu"))
    assert ("model['bottleneck.t_proj.weight'] is not" if cheap else "is damaged, or is not a checkpoint") in line


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_compressed_file_is_not_unpacked(whole, path, monkeypatch):
    write(path, whole)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert equal(checkpoint.load(path), whole)
    for method, copies in ((zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_STORED, 2)):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in parts.items():
                for _ in range(copies):
                    archive.writestr(name, content)
        monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("unpacked"))
        assert "is damaged, or is not a checkpoint" in refusal(path)


# ---- right checksum, wrong inside --------------------------------------------------------------------------------

EDITS = [  # the way to an entry, what it becomes (None: it is gone), what the line says
    (["config", "noise_steps"], -3, "config['noise_steps']"),
    (["config", "noise_steps"], math.nan, "config['noise_steps']"),
    (["config", "noise_steps"], 20, "network['noise_steps']"),
    (["config", "t_dim"], "8", "config['t_dim']"),
    (["config", "sigma_range"], 5.0, "config['sigma_range']"),
    (["config", "sigma_range"], (1.0, 2.0, 3.0), "config['sigma_range']"),
    (["config", "sigma_range"], (None, 75.0), "config['sigma_range']"),
    (["config", "noise"], "pink", "config['noise']"),
    (["config", "continuous_t"], 1, "config['continuous_t']"),
    (["config", "widths"], (4, 4), "config['widths']"),
    (["config", "model"], ["unet"], "config['model']"),
    (["config", "class"], 1, "config['class']"),
    (["config", "given"], 1, "config['given']"),
    (["config", "mro"], 1, "config['mro']"),
    (["config", "a b"], 1, "config['a b']"),
    (["config", "data_dir"], None, "not a checkpoint of this project"),
    (["network"], None, "network"),
    (["network"], [], "network"),
    (["network", "name"], "plain", "network"),
    (["network", "name"], ["unet"], "network"),
    (["network", "noise_steps"], 100, "network['noise_steps']"),
    (["network", "t_dim"], None, "network['t_dim']"),
    (["network", "depth"], 3, "network['depth']"),
    (["model"], None, "lacks what is needed here (model)"),
    (["model"], 5, "model"),
    (["model", "final.bias"], None, "model['final.bias']"),
    (["model", "final.bias"], [0.0] * 3, "model['final.bias']"),
    (["model", "final.bias"], torch.zeros(4), "model['final.bias']"),
    (["model", "final.bias"], torch.zeros(3, dtype=torch.long), "model['final.bias']"),
    (["model", "final.bias"], torch.full((3,), math.inf), "model['final.bias']"),
    (["model", "more"], torch.zeros(3), "model['more']"),
    (["epoch"], "1", "epoch"),
    (["epoch"], 7, "epoch"),
    (["step"], 2.0, "step"),
    (["step"], -1, "step"),
    (["step"], 1, "step"),
    (["step"], 10**600, "step"),
    (["seconds"], math.inf, "seconds"),
    (["loss_sums"], torch.full((1,), math.nan), "loss_sums"),
    (["loss_sums"], torch.zeros(()), "loss_sums"),
    (["data"], "pictures", "data"),
    (["data", "fingerprint"], None, "data"),
    (["log"], {}, "log"),
    (["log", 1], 5, "log[1]"),
    (["log", 1, "test_loss"], "low", "log[1]['test_loss']"),
    (["log", 1, "step"], 1, "log[1]['step']"),
    (["log", 1, "channels_in_use"], "all", "log[1]['channels_in_use']"),
    (["log", 1, "channels_in_use"], None, "log[1]['channels_in_use']"),
    (["log", 1, "of_block"], 1, "log[1]['of_block']"),
    (["log", 1, "epoch"], 3, "log[1]['epoch']"),
    (["optimizer"], [], "optimizer"),
    (["optimizer", "state"], None, "optimizer"),
    (["optimizer", "state"], {}, "optimizer.state"),
    (["optimizer", "state", 5], {}, "optimizer.state[5]"),
    (["optimizer", "state", 0, "exp_avg"], torch.zeros(3), "optimizer.state[0]['exp_avg']"),
    (["optimizer", "state", 0, "exp_avg"], torch.zeros(8, 1).half(), "optimizer.state[0]['exp_avg']"),
    (["optimizer", "state", 0, "exp_avg_sq"], torch.full((8, 1), -1.0), "optimizer.state[0]['exp_avg_sq']"),
    (["optimizer", "state", 0, "step"], torch.tensor(math.nan), "optimizer.state[0]['step']"),
    (["optimizer", "state", 0, "step"], 2, "optimizer.state[0]['step']"),
    (["optimizer", "param_groups"], {}, "optimizer.param_groups"),
    (["optimizer", "param_groups", 0], 5, "optimizer.param_groups"),
    (["optimizer", "param_groups", 0, "params"], [0, 0, 1], "optimizer.param_groups"),
]


def edited(state, way, value):
    """A copy of `state`, as far as it differs, with another value at the end of the way, or without one (None)."""
    key, *rest = way
    changed = copy.copy(state)
    if rest:
        changed[key] = edited(state[key], rest, value)
    elif value is None:
        del changed[key]
    else:
        changed[key] = value
    return changed


def use(path):
    """All that the scripts do with a checkpoint."""
    state = checkpoint.load(path)
    checkpoint.load_model(path, "cpu")
    model, optimizer = make()
    checkpoint.load_weights(model, state, path)
    if "optimizer" in state:
        checkpoint.load_optimizer(optimizer, state, path)


@pytest.fixture
def hold(path, monkeypatch):
    """hold(state): have `path` hold it, without the time that writing and parsing a file takes."""

    def hold(state):
        archive.check_size(state, 10**6, 10**9)
        monkeypatch.setattr(checkpoint, "read", lambda path: state | {"checksum": checkpoint.checksum(state)})

    return hold


@pytest.mark.parametrize("way, value, named", EDITS, ids=[f"{'.'.join(map(str, w))}={v}"[:60] for w, v, _ in EDITS])
def test_a_wrong_entry_is_named(whole, path, hold, way, value, named):
    hold(edited(whole, way, value))
    assert named in refusal(path, use)


def test_every_weight_must_be_a_number(whole):
    for name, value in whole["model"].items():
        spoilt = value.clone(memory_format=torch.contiguous_format)
        spoilt.view(-1)[-1] = math.nan
        with pytest.raises(entries.Wrong, match=re.escape(f"model[{name!r}] is not a tensor of finite numbers")):
            entries.check(edited(whole, ["model", name], spoilt), unet.SETTINGS | data.SETTINGS)


@pytest.mark.parametrize("options", [dict(dtype=torch.cfloat), dict(requires_grad=True), dict(layout=torch.sparse_coo)])
def test_tensors_of_other_kinds_are_refused(whole, path, options):
    write(path, whole)
    state = edited(whole, ["model", "final.bias"], torch.zeros(3, **options))
    torch.save(state | {"checksum": ""}, path)
    assert "is damaged, or is not a checkpoint" in refusal(path)


def ways(value, way=()):
    """The ways to all entries of a structure."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list | tuple) else ():
        yield (*way, key)
        yield from ways(value[key], (*way, key))


@pytest.mark.parametrize("trials", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_random_edits_are_used_or_refused(whole, path, hold, trials):
    """Nothing but a CheckpointError, whatever an entry becomes; a structure in place of any other included."""
    rng = random.Random(0)
    everywhere = [way for way in ways(whole) if not isinstance(way[-1], int) or way[0] in ("log", "optimizer")]
    shallow = [way for way in everywhere if way[0] not in ("model", "optimizer")]
    values = [
        *(None, True, 0, -3, 1.5, math.nan, math.inf, 10**30, "", "x\ny", "unet", "plain", [], {}, (), [[]], {"a": {}}),
        *(torch.zeros(()), torch.ones(3), torch.full((2, 2), math.nan), torch.zeros(4).half(), torch.arange(3)),
        *(torch.zeros(1).expand(50), torch.empty(0), torch.ones(8, 1).T),
    ]
    refused = 0
    for _ in range(trials):
        way = rng.choice(rng.choice((everywhere, shallow)))
        other = rng.choice(everywhere)
        value = rng.choice(values)
        if rng.random() < 0.2:  # an entry from elsewhere
            value = whole
            for key in other:
                value = value[key]
        if isinstance(way[-1], int) and value is None:
            continue
        try:
            state = edited(whole, way, copy.deepcopy(value))
        except TypeError:  # a tuple
            continue
        hold(state) if trials < 500 else write(path, state)
        try:
            use(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error)) < 1000
    assert refused > trials / 3


# ---- the file that is shipped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optimizer", "muon", "--no-flip", "--continuous-t", "--lr", "1e-3", "--widths", "4", "4", "8"),
        ("--preset", "reference", "--epochs", "3"),
        ("--preset", "photographs", "--sigma-range", "2", "50", "--no-augment", "--scales", "1", "0.5"),
        ("--preset", "photographs", "--dataset", "leaves"),  # the preset's crops are no settings of this data set
    ],
)
def test_the_command_in_a_provenance_leads_to_the_same_settings(flags):
    def settings(flags):  # as a run has them
        cfg = config.parse("", train.SETTINGS, train.PRESETS, flags)
        return cfg if cfg.dataset == "auto" else data.resolve(cfg)

    cfg = settings(flags)
    saved = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "given"}
    words = shlex.split(export.command(saved))
    assert words[:2] == ["python", "train.py"]
    again = settings(words[2:])
    differing = {name for name in saved if getattr(again, name) != saved[name]}
    assert differing <= {"data_dir"}


def test_an_exported_file_says_on_what_it_was_trained(tmp_path, monkeypatch):
    """Not on what it was exported."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), (200, 100, 0)).save(tmp_path / name)
    cfg = config.defaults(train.SETTINGS, dataset="folder", data_dir=str(tmp_path), widths=(4, 4, 8), t_dim=8)
    saved = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "given"}
    model, optimizer = trained(cfg=cfg)
    state = state_of(model, optimizer, cfg) | dict(config=saved, hardware=dict(device="a GPU far away", torch="2.11.0"))
    source, target = str(tmp_path / "unet32_e1.pth"), str(tmp_path / "new.pth")
    write(source, state)
    words = ["export.py", "--weights", source, "-o", target, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    export.main()
    found = torch.load(target, weights_only=True)
    assert (found["provenance"]["device"], found["provenance"]["torch"]) == ("a GPU far away", "2.11.0")
    assert found["model"]["final.weight"].dtype == torch.float16 and "optimizer" not in found
    torch.testing.assert_close(found["model"]["final.weight"].float(), model.final.weight.data, atol=1e-3, rtol=1e-3)
    del saved["recycle"]  # as of an early version: what its command was cannot be told from the present defaults
    write(source, state)
    monkeypatch.setattr(sys, "argv", [*words[:4], str(tmp_path / "other.pth"), *words[5:]])
    with pytest.raises(config.UserError, match="does not say its recycle; give --command"):
        export.main()


@pytest.mark.parametrize(
    "progress, most, message",
    [
        (dict(epoch=2, step=3), 1, "was saved inside an epoch"),
        (dict(epoch=1, step=2), 0, "float16 costs too much"),
        (dict(epoch=1, step=2), 1, None),
    ],
)
def test_what_is_not_exported(progress, most, message, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32), (200, 100, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), (200, 100, 0)).save(tmp_path / "b.png")
    state, target = state_of(*trained()), tmp_path / "new.pth"
    write(tmp_path / "a.pth", state | progress)
    monkeypatch.setattr(export, "MOST", most)
    files = ("--weights", tmp_path / "a.pth", "-o", target, "--command", "unknown")
    words = ("export.py", *files, "--dataset", "folder", "--data-dir", tmp_path, "--device", "cpu")
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with contextlib.nullcontext() if message is None else pytest.raises(config.UserError, match=message):
        export.main()
    assert target.exists() == (message is None)


# ---- the optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, muon.Muon])
@pytest.mark.parametrize("saved, resumed", [LAYOUTS, LAYOUTS[::-1]])
def test_moments_arrive_whatever_the_memory_layout(path, kind, saved, resumed):
    """Fused kernels walk parameter, gradient and moments in the order of memory: all must be laid out alike."""
    model, optimizer = trained(kind=kind, layout=saved)
    write(path, state_of(model, optimizer))
    state = checkpoint.load(path)
    other, other_optimizer = make(kind, resumed)
    checkpoint.load_weights(other, state, path)
    checkpoint.load_optimizer(other_optimizer, state, path)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        for name, moment in optimizer.state[p].items():
            found = other_optimizer.state[q][name]
            assert torch.equal(moment, found), name
            assert moment.dim() == 0 or found.stride() == q.stride(), name
    assert other.enc2.conv1.weight.is_contiguous(memory_format=resumed)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, muon.Muon])
def test_a_resumed_optimizer_takes_the_same_steps(path, kind):
    model, optimizer = trained(kind=kind)
    write(path, state_of(model, optimizer))
    other, other_optimizer = make(kind)
    step(other, other_optimizer, 7)  # it may have gone elsewhere before
    state = checkpoint.load(path)
    checkpoint.load_weights(other, state, path)
    checkpoint.load_optimizer(other_optimizer, state, path)
    for network, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        step(network, its_optimizer, 2)
    assert equal(state_of(model, optimizer), state_of(other, other_optimizer))


def test_a_moment_of_one_number_is_given_memory_of_its_own(whole, path):
    """Expanded to the right shape, it would have the optimizer write past its end."""
    shape = whole["optimizer"]["state"][0]["exp_avg"].shape
    write(path, edited(whole, ["optimizer", "state", 0, "exp_avg"], torch.ones(1).expand(shape)))
    model, optimizer = make()
    checkpoint.load_optimizer(optimizer, checkpoint.load(path), path)
    moment = optimizer.state[next(model.parameters())]["exp_avg"]
    assert moment.untyped_storage().nbytes() == 4 * moment.numel() and (moment == 1).all()


def test_making_moments_changes_no_bit_of_the_weights():
    for kind in (torch.optim.AdamW, muon.Muon):
        model, optimizer = make(kind)
        with torch.no_grad():
            model.final.bias.fill_(-0.0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        checkpoint.make_moments(optimizer)
        for name, value in model.state_dict().items():
            assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
        assert optimizer.param_groups[0]["lr"] == 1e-3


# ---- files written whole or not at all --------------------------------------------------------------------------


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def seen_fsync(fd):
        status = os.fstat(fd)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: events.append("rename") or replace(*names))
    files.write_atomically(tmp_path / "a", lambda file: file.write(b"whole" * 10))
    assert events == [50, "rename", "folder"]


def test_without_hard_links_nothing_is_replaced_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files.write_atomically(tmp_path / "a", lambda file: file.write(b"mine"), replace=False)
    with pytest.raises(FileExistsError):
        files.write_atomically(tmp_path / "a", lambda file: file.write(b"yours"), replace=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_a_run_that_diverges_can_be_read():
    assert entries.is_number(1e30) and not entries.is_number(math.inf) and not entries.is_number(2**63)
