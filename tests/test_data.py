"""The data sets, what is said when they are wrong, what is stored of them, the batches and the noise."""

import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import runpy
import shutil
import sys
import tarfile
import threading
import types
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import config
import data
import diffusion
import support.datasets
import train
from support import files, pictures, streams
from support.cache import cached
from support.datasets import cifar10, folder, leaves
from support.pictures import DataError

ROOT = Path(data.__file__).parent


def settings(dataset="folder", data_dir="", **values):
    return config.defaults(train.SETTINGS, dataset=dataset, data_dir=str(data_dir), **values)


def load(split, dataset, data_dir, **values):
    return data.load(split, settings(dataset, data_dir, **values))[0]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_folder(path, count, height, width):
    """`count` pictures of noise, and their pixels by name."""
    path.mkdir(parents=True, exist_ok=True)
    made = {f"{i}.png": noise(height, width, i) for i in range(count)}
    for name, pixels in made.items():
        Image.fromarray(pixels).save(path / name)
    return made


def find(crop, picture):
    """The places (y, x) at which a crop (3, S, S) is cut out of a picture (H, W, 3)."""
    size = crop.shape[1]
    view = np.lib.stride_tricks.sliding_window_view(picture, (size, size, 3))[:, :, 0]
    first = np.argwhere((view[:, :, 0, 0] == crop[:, 0, 0].numpy()).all(2))
    return [(y, x) for y, x in first if (view[y, x] == crop.permute(1, 2, 0).numpy()).all()]


# ---- the table of data sets --------------------------------------------------------------------------------------


def test_a_data_set_is_added_by_a_file_and_a_line(monkeypatch):
    checks = types.ModuleType("checks")
    checks.SETTINGS = {"squares": config.Setting(4, config.whole(), "squares on a side")}

    def load(split, cfg):
        board = np.indices((cfg.squares, cfg.squares)).sum(0) % 2 * 255
        image = torch.from_numpy(np.kron(board, np.ones((8, 8)))).to(torch.uint8)
        return image.expand(10, 3, -1, -1).clone(), "checkerboards"

    checks.load = load
    monkeypatch.setitem(support.datasets.DATASETS, "checks", checks)
    module = runpy.run_path(str(ROOT / "data.py"))  # what a script imports once the line is there
    cfg = config.parse("", module["SETTINGS"], argv=["--dataset", "checks", "--squares", "4", "--limit", "6"])
    images, source = module["load"]("train", cfg)
    assert images.shape == (6, 3, 32, 32) and source == "6 train images of checkerboards"
    assert images[0, 0, 0, ::8].tolist() == [0, 255, 0, 255]


def test_an_option_of_another_data_set_is_refused(tmp_path):
    cfg = config.parse("", data.SETTINGS, argv=["--dataset", "leaves", "--crop-size", "64", "--data-dir", "x"])
    with pytest.raises(config.UserError, match="--crop-size is an option of --dataset folder, not of leaves"):
        data.load("train", cfg)


@pytest.mark.parametrize("typed", [("--data-dir", ""), ("--crop-size", "34"), ("--crop-size", "28"), ("--scales", "2")])
def test_values_that_cannot_be_are_refused(typed, capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse("", data.SETTINGS, argv=typed)
    assert caught.value.code == 2 and f"argument {typed[0]}: must be" in capsys.readouterr().err


# ---- CIFAR-10, through torchvision's own download ---------------------------------------------------------------


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A local HTTP server with a small archive in the CIFAR-10 format: (folder served, pixels by batch name)."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pixels = {name: random.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for name in names}
    contents = {name: pickle.dumps({"data": p.reshape(4, 3072), "labels": [0] * 4}) for name, p in pixels.items()}
    contents["batches.meta"] = pickle.dumps({"label_names": ["airplane"]})
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(cifar, "tgz_md5", md5((served / "cifar-10-python.tar.gz").read_bytes()))
    monkeypatch.setattr(cifar, "train_list", [[name, md5(contents[name])] for name in names[:5]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5(contents["test_batch"])]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5(contents["batches.meta"])})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    support.datasets.automatic.cache_clear()
    yield served, pixels
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once(cifar_server, tmp_path):
    served, pixels = cifar_server
    images, source = data.load("train", settings("cifar10", tmp_path / "data"))
    assert images.dtype == torch.uint8
    expected = np.concatenate([pixels[f"data_batch_{i}"] for i in range(1, 6)])
    np.testing.assert_array_equal(images.numpy(), expected)
    assert source.startswith("20 train images of CIFAR-10")
    (served / "cifar-10-python.tar.gz").unlink()  # from here on it is on disk or nowhere
    np.testing.assert_array_equal(load("test", "auto", tmp_path / "data").numpy(), pixels["test_batch"])


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_archive_is_refused(cifar_server, tmp_path, damage):
    archive = cifar_server[0] / "cifar-10-python.tar.gz"
    content = archive.read_bytes()
    archive.write_bytes(content[:500] if damage == "truncated" else content[:-9] + bytes(9))
    with pytest.raises(DataError, match="checksum") as caught:
        load("train", "cifar10", tmp_path / "data")
    assert "\n" not in str(caught.value) and "--dataset leaves" in str(caught.value)


def test_a_damaged_download_is_mended_by_the_next(cifar_server, tmp_path):
    target = tmp_path / "data"
    target.mkdir()
    content = (cifar_server[0] / "cifar-10-python.tar.gz").read_bytes()
    (target / "cifar-10-python.tar.gz").write_bytes(content[:500])
    assert len(load("train", "cifar10", target)) == 20


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/test_batch"])
def test_a_pipe_in_place_of_cifar10_is_refused_at_once(cifar_server, tmp_path, name):
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    os.mkfifo(tmp_path / "data" / name)
    with pytest.raises(DataError, match=f"{name} is not a regular file"):
        load("train", "cifar10", tmp_path / "data")


@pytest.fixture
def no_network(cifar_server, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:1/nothing.tar.gz")


@pytest.fixture
def few_leaves(monkeypatch):
    monkeypatch.setattr(leaves, "CHUNKS", {"train": range(2), "test": range(2, 3)})
    monkeypatch.setattr(leaves, "CHUNK", 50)


def test_without_a_network(no_network, few_leaves, tmp_path, capsys):
    with pytest.raises(DataError, match=r"downloading it failed.*connect to the network"):
        load("train", "cifar10", tmp_path / "data")
    images, source = data.load("train", settings("auto", tmp_path / "data"))
    load("test", "auto", tmp_path / "data")
    assert len(images) == 100 and "built-in" in source
    warnings = capsys.readouterr().err
    assert warnings.count("WARNING") == 1 and "downloading it failed" in warnings


def test_pictures_are_not_ignored_by_auto(pictures, tmp_path, monkeypatch):
    support.datasets.automatic.cache_clear()
    with pytest.raises(DataError, match="holds pictures; add --dataset folder"):
        load("train", "auto", pictures)
    Image.new("RGB", (32, 32)).save(tmp_path / "one.PNG")
    with pytest.raises(DataError, match="holds pictures; add --dataset folder"):
        load("train", "auto", tmp_path)
    (tmp_path / "below" / "cats").mkdir(parents=True)
    (tmp_path / "one.PNG").rename(tmp_path / "below" / "cats" / "one.PNG")
    typed = dataclasses.replace(settings("auto", tmp_path), given=frozenset({"data_dir"}))
    with pytest.raises(DataError, match="holds pictures; add --dataset folder"):
        data.resolve(typed)
    trained = dataclasses.replace(typed, dataset="leaves")  # the data set of a checkpoint, the folder typed
    with pytest.raises(DataError, match="holds pictures; add --dataset folder"):
        data.resolve(trained)
    assert data.resolve(dataclasses.replace(trained, given=frozenset({"data_dir", "dataset"}))).dataset == "leaves"
    (tmp_path / "cifar-10-batches-py").mkdir()  # a name that says what is meant
    with pytest.raises(DataError, match="holds pictures"):
        support.datasets.automatic(tmp_path / "below", typed=True)
    (tmp_path / "texts" / "books" / "train").mkdir(parents=True)
    (tmp_path / "texts" / "books" / "test").mkdir()
    monkeypatch.setattr(cifar10, "read", lambda split, data_dir: None)
    assert support.datasets.automatic(tmp_path / "texts", typed=True) == "cifar10"  # no pictures: nothing is ignored


# ---- a folder of pictures ---------------------------------------------------------------------------------------


def test_train_and_test_folders_are_the_splits(pictures):
    images, source = data.load("train", settings(data_dir=pictures))
    names = sorted(path.name for path in (pictures / "train").iterdir())
    expected = [np.asarray(Image.open(pictures / "train" / name)).transpose(2, 0, 1) for name in names]
    np.testing.assert_array_equal(images.numpy(), np.stack(expected))
    assert source == f"16 train images of 16 pictures in {pictures}"
    assert load("test", "folder", pictures).shape == (4, 3, 32, 32)


def test_a_fixed_tenth_is_held_out(tmp_path):
    for i in range(300):
        (tmp_path / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), i % 256, np.uint8)).save(tmp_path / str(i % 3) / f"{i}.bmp")
    names = pictures.image_files(tmp_path)
    train_names, test_names = folder.hold_out(names)
    assert sorted(train_names + test_names) == names
    assert test_names == [name for name in names if zlib.crc32(name.encode()) % 10 == 0]  # as in every earlier version
    # Which side a file is on does not depend on the other files.
    assert folder.hold_out(names[:200])[1] == [name for name in test_names if name in names[:200]]
    assert folder.hold_out(names[:2]) in (([names[0]], [names[1]]), ([names[1]], [names[0]]))
    assert len(load("train", "folder", tmp_path)) == len(train_names)


def test_fixed_crops_of_a_larger_picture(tmp_path):
    pixels = make_folder(tmp_path / "train", 1, 40, 50)["0.png"]
    make_folder(tmp_path / "test", 1, 40, 50)
    crops = load("train", "folder", tmp_path, crops_per_image=30)
    places = {find(crop, pixels)[0] for crop in crops}
    assert crops.shape == (30, 3, 32, 32) and len(places) > 15
    # The places that every earlier version drew: by the file's name, in NumPy's default generator.
    corners = np.random.default_rng([0, zlib.crc32(b"0.png")]).integers(0, (9, 19), (30, 2))
    assert [find(crop, pixels)[0] for crop in crops] == list(map(tuple, corners))
    for stored in tmp_path.glob(".images-train-*"):
        stored.unlink()
    assert torch.equal(crops, load("train", "folder", tmp_path, crops_per_image=30, seed=5))
    load("test", "folder", tmp_path)
    (stored,) = tmp_path.glob(".images-test-*")
    load("test", "folder", tmp_path, crops_per_image=9)  # which makes no difference there
    assert list(tmp_path.glob(".images-test-*")) == [stored]


def test_held_out_crops_are_at_least_256_of_all_pictures(tmp_path, capsys):
    make_folder(tmp_path / "train", 1, 32, 32)
    made = make_folder(tmp_path / "test", 3, 64, 90)
    images, source = data.load("test", settings(data_dir=tmp_path, crop_size=48))
    assert source == f"{len(images)} test images of 3 pictures in {tmp_path}" and len(images) >= 256
    for crops, pixels in zip(images.split(len(images) // 3), made.values(), strict=True):
        ys, xs = zip(*(find(crop, pixels)[0] for crop in crops))
        for places, room in ((ys, 16), (xs, 42)):  # all over the picture
            assert (
                min(places) <= 0.1 * room
                and max(places) >= 0.9 * room
                and np.mean(places) == pytest.approx(room / 2, abs=1)
            )
    assert "WARNING" not in capsys.readouterr().err


def test_of_many_held_out_pictures_it_is_the_centre(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "HELD_OUT_CROPS", 3)
    make_folder(tmp_path / "train", 1, 32, 32)
    made = make_folder(tmp_path / "test", 3, 40, 50)
    expected = [pixels[4:36, 9:41].transpose(2, 0, 1) for pixels in made.values()]
    np.testing.assert_array_equal(load("test", "folder", tmp_path).numpy(), np.stack(expected))


def test_a_single_held_out_picture_is_warned_of(tmp_path, capsys):
    make_folder(tmp_path, 2, 32, 32)
    for _ in range(2):  # read, and stored
        assert len(load("test", "folder", tmp_path)) == 1
        assert "WARNING: only one picture" in capsys.readouterr().err


def test_limit_is_a_fixed_choice_made_before_decoding(pictures, tmp_path, monkeypatch):
    whole = load("train", "folder", pictures)
    read, seen = support.pictures.read, []
    monkeypatch.setattr(support.pictures, "read", lambda path, *rest: seen.append(path) or read(path, *rest))
    few, source = data.load("train", settings(data_dir=pictures, limit=5))
    rows = [int((whole == image).flatten(1).all(1).nonzero()) for image in few]
    assert rows == torch.randperm(16, generator=streams.generator("cpu", 0, streams.CHOICE, 0))[:5].tolist()
    assert len(seen) == 5 and source == f"5 train images of 5 pictures in {pictures}"
    assert len(list(pictures.glob(".images-train-*"))) == 1  # of all pictures
    make_folder(tmp_path, 4, 40, 40)
    assert load("train", "folder", tmp_path, limit=7, crops_per_image=9).shape == (7, 3, 32, 32)


def test_copies_of_a_smaller_scale_are_more_pictures(tmp_path):
    made = make_folder(tmp_path / "train", 2, 80, 100)
    make_folder(tmp_path / "test", 1, 32, 32)
    cfg = dict(scales=(1.0, 0.5, 0.3), crops_per_image=6)
    crops = load("train", "folder", tmp_path, **cfg).view(2, 2, 6, 3, 32, 32)  # at 0.3 they are too small
    for i, pixels in enumerate(made.values()):
        half = np.array(Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC))
        assert all(find(crop, pixels) for crop in crops[i, 0]) and all(find(crop, half) for crop in crops[i, 1])
    # As many crops of other scales: those that were stored are not taken for them.
    other = load("train", "folder", tmp_path, scales=(0.5, 0.4, 0.3), crops_per_image=6)
    assert len(other) == crops[..., 0, 0, 0].numel() and find(other[-12], half)
    assert len(load("train", "folder", tmp_path, fresh_crops=True, **cfg)) == 24
    with pytest.raises(DataError, match=r"100x80 pixels, smaller than 32x32 at scale 0.3"):
        load("train", "folder", tmp_path, scales=(0.3,))


def test_a_folder_on_a_read_only_disk(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, 2, 32, 32)

    def refuse(*args, **options):  # as a disk mounted read-only does, also of a file that does not exist
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "open", refuse, raising=False)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None if missing_ok else refuse())
    assert len(load("train", "folder", tmp_path)) == 1
    assert "note: the images are not stored for the next start ([Errno 30]" in capsys.readouterr().err


def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path, capsys):
    def refusal(**options):
        with pytest.raises(DataError) as caught:
            load("train", "folder", tmp_path / "pictures", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a folder" in refusal()
    (tmp_path / "pictures").mkdir()
    assert "no train images" in refusal()
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    assert "no train images" in refusal()
    for i in range(2):
        Image.new("RGB", (40, 20)).save(tmp_path / "pictures" / f"{i}.png")
    assert ".png is 40x20 pixels, smaller than 32x32; remove it, or add --skip-bad-images" in refusal()
    assert "smaller than 64x64; remove it or lower --crop-size" in refusal(crop_size=64)
    assert "none of the 1 train images" in refusal(skip_bad_images=True)
    (tmp_path / "pictures" / "photo.heic").write_bytes(b"")
    make_folder(tmp_path / "pictures" / "good", 4, 32, 32)
    capsys.readouterr()
    pictures.said.clear()
    images, source = data.load("train", settings(data_dir=tmp_path / "pictures", skip_bad_images=True))
    assert source == f"{len(images)} train images of {len(images)} pictures in {tmp_path / 'pictures'}"
    said = capsys.readouterr().err
    assert "WARNING: left out" in said and "pictures left out: 1; HEIC files such as photo.heic are not read" in said


def test_a_picture_that_was_left_out_is_used_when_it_can_be_read(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "train", 3, 32, 32)
    make_folder(tmp_path / "test", 1, 32, 32)
    read = pictures.read

    def failing(path, *args):
        if path.name == "1.png":
            raise DataError("a disk that does not answer")
        return read(path, *args)

    cfg = settings(data_dir=tmp_path, skip_bad_images=True)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read", failing)
        for _ in range(2):  # the count is given at every start
            assert len(data.load("train", cfg)[0]) == 2
            assert "left out 1 of 3 train images" in capsys.readouterr().err
    assert len(data.load("train", cfg)[0]) == 3


def test_a_folder_without_permission_is_named(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    root = os.geteuid() == 0  # whom no permission stops: become nobody for a moment
    if root:
        tmp_path.chmod(0o755)
        for parent in list(tmp_path.parents)[:2]:
            parent.chmod(0o755)
        os.seteuid(65534)
    try:
        if not os.path.isdir(tmp_path):
            pytest.skip("nobody cannot get here")
        with pytest.raises(DataError, match=r"cannot read the folder .*closed.*Permission denied"):
            load("train", "folder", tmp_path)
        with pytest.raises(DataError, match=r"cannot read the folder .*closed.*Permission denied"):
            load("train", "folder", closed)
        with pytest.raises(DataError, match=r"no permission to use .*closed"):
            load("train", "cifar10", closed / "data")
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o755)


@pytest.mark.parametrize("sorted_", [False, True])
def test_figures_of_a_run_do_not_become_its_images(tmp_path, sorted_):
    for split in ("train", "test"):
        make_folder(tmp_path / split if sorted_ else tmp_path, 3, 32, 32)
    inside, beside = (tmp_path / "test" / "model", tmp_path / "model") if sorted_ else (tmp_path / "model", "model")
    with pytest.raises(DataError, match=r"--out-dir .* is inside .*; choose another"):
        load("test", "folder", tmp_path, out_dir=str(inside))
    load("test", "folder", tmp_path, out_dir=str(beside))


def test_memory_that_is_not_there_is_refused_before_it_is_taken(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, 12, 64, 64)
    assert 10**6 < folder.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(folder, "available_memory", lambda: 5e9)
    monkeypatch.setattr(pictures, "read", None)  # nothing is decoded
    for options in (dict(crops_per_image=100_000), dict(crops_per_image=100_000, fresh_crops=True, scales=(1.0,) * 99)):
        with pytest.raises(DataError, match=r"pictures take about \d+\.\d GB of memory, and 5\.0 GB are free; lower"):
            load("train", "folder", tmp_path, **options)
    with pytest.raises(TypeError):  # enough: the pictures are about to be read
        load("train", "folder", tmp_path, crops_per_image=20_000)
    assert "pictures take about 1.4 GB of memory" in capsys.readouterr().err


def test_whole_pictures(tmp_path, capsys):
    make_folder(tmp_path / "train", 2, 32, 32)
    made = make_folder(tmp_path / "test", 3, 40, 50)
    read = data.whole_pictures("test", settings(data_dir=tmp_path))
    for image, pixels in zip(read, made.values(), strict=True):
        np.testing.assert_array_equal(image().numpy(), pixels.transpose(2, 0, 1))
    assert len(data.whole_pictures("test", settings(data_dir=tmp_path, limit=2))) == 2
    whole = (tmp_path / "test" / "0.png").read_bytes()
    (tmp_path / "test" / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    with pytest.raises(DataError, match=r"cut\.png cannot be read .*, or add --skip-bad-images"):
        data.whole_pictures("test", settings(data_dir=tmp_path))  # before the long work
    read = data.whole_pictures("test", settings(data_dir=tmp_path, skip_bad_images=True))
    assert len(read) == len(made)
    assert "left out 1 of 4 test images" in capsys.readouterr().err
    for path in (tmp_path / "test").iterdir():
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"none of the 4 test images in .* can be used; run without --skip-bad-images"):
        data.whole_pictures("test", settings(data_dir=tmp_path, skip_bad_images=True))
    with pytest.raises(config.UserError, match="has no whole pictures; use --dataset folder"):
        data.whole_pictures("test", settings("leaves", tmp_path))


# ---- what is stored for the next start --------------------------------------------------------------------------


def test_a_folder_is_decoded_once_until_a_file_changes(pictures, tmp_path, monkeypatch):
    root = shutil.copytree(pictures, tmp_path / "pictures", ignore=shutil.ignore_patterns(".*"))
    theirs = [root / ".images-train-mine.npy", root / ".images-train-0123456789abcdef.txt"]
    ours = root / ".images-train-0123456789abcdef.npy"  # as earlier versions named them
    for path in (*theirs, ours):
        path.write_bytes(b"")
    first = load("train", "folder", root)
    assert not ours.exists()
    with monkeypatch.context() as no_decoding:
        no_decoding.setattr(support.pictures, "read", None)
        assert torch.equal(load("train", "folder", root), first)
    Image.new("RGB", (32, 32), "red").save(root / "train" / "0.png")
    second = load("train", "folder", root)
    assert second[0].float().mean((1, 2)).tolist() == [255, 0, 0] and torch.equal(second[1:], first[1:])
    path = root / "train" / "z.bmp"  # of the same size whatever its colour is
    for colour, time in (("black", 1), ("blue", 2)):
        Image.new("RGB", (32, 32), colour).save(path)
        os.utime(path, (time, time))
        third = load("train", "folder", root)
        assert torch.equal(third[:-1], second) and third[-1, 2].float().mean() == 255 * (colour == "blue")
    assert len(list(root.glob(".images-train-*.bin"))) == 1  # the outdated one is gone
    assert all(path.exists() for path in theirs)


@pytest.fixture
def stored(tmp_path):
    """(path of a valid file, its images): stored once."""
    images = torch.from_numpy(noise(32, 32 * 5).reshape(5, 3, 32, 32).copy())
    cached(tmp_path / "images.bin", 32, lambda: (images, {"pictures": 5}))
    return tmp_path / "images.bin", images


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_stored(array, **head):
    """What support/cache.py would write of another array, with a right checksum."""
    line = json.dumps({"pictures": 5, "shape": array.shape} | head).encode() + b"\n"
    return b"%08x\n" % zlib.crc32(array.tobytes(), zlib.crc32(line)) + line + array.tobytes()


WRONG = {
    "empty": lambda good, x: b"",
    "cut off": lambda good, x: good[:-1],
    "longer": lambda good, x: good + b"\0",
    "one bit": lambda good, x: good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
    "inverted": lambda good, x: good[: -x.size] + (255 - x).tobytes(),
    "another count of pictures": lambda good, x: good.replace(b'"pictures": 5', b'"pictures": 9'),
    "an array of NumPy": lambda good, x: as_npy(x),
    "floats in 0 ... 1": lambda good, x: as_npy(x / 255),
    "a claim of 10^12 images": lambda good, x: good.replace(b"[5,", b"[1000000000000,"),
    "a checked claim of 10^12 images": lambda good, x: as_stored(x, shape=[10**12, 3, 32, 32]),
    "64x64": lambda good, x: as_stored(x.repeat(2, 2).repeat(2, 3)),
    "channels last": lambda good, x: as_stored(x.transpose(0, 2, 3, 1)),
    "one image less": lambda good, x: as_stored(x[1:]),
    "no shape": lambda good, x: as_stored(x, shape=None),
    "deeply nested": lambda good, x: b"00000000\n" + b"[" * 10**5,
    "random bytes": lambda good, x: np.random.default_rng(0).bytes(20_000),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_with_the_right_name_and_the_wrong_contents(stored, kind, capsys):
    path, images = stored
    good = path.read_bytes()
    path.write_bytes(WRONG[kind](good, images.numpy()))
    again, about = cached(path, 32, lambda: (images, {"pictures": 5}), count=5)
    assert torch.equal(again, images) and about == {"pictures": 5} and path.read_bytes() == good
    assert f"note: {path} is damaged, or not a cache of these images" in capsys.readouterr().err
    again, about = cached(path, 32, None, count=5)  # from the file
    assert torch.equal(again, images) and about == {"pictures": 5} and not capsys.readouterr().err


def test_a_pipe_in_place_of_the_file_is_neither_opened_nor_replaced(stored, capsys):
    path, images = stored
    path.unlink()
    os.mkfifo(path)
    assert torch.equal(cached(path, 32, lambda: (images, {}))[0], images)
    assert path.is_fifo() and "not a regular file" in capsys.readouterr().err


def test_temporary_files_of_killed_processes_are_deleted_and_nothing_else(stored):
    path, images = stored
    theirs = [path.with_name(name) for name in (".tmp-1-elsewhere.part", ".tmp-x.part", "leaves.tmp", ".images.tmp")]
    ours = path.with_name(f".tmp-{2**22 + 1}-{files.socket.gethostname()}.part")  # above the highest process number
    for file in (*theirs, ours):
        file.write_bytes(b"")
    cached(path, 32, lambda: (images, {}))
    assert not ours.exists() and all(file.exists() for file in theirs)


# ---- built-in images --------------------------------------------------------------------------------------------


def test_without_torchvision_the_built_in_images_take_the_place_of_cifar10(few_leaves, tmp_path, monkeypatch):
    support.datasets.automatic.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it raises ImportError
    with pytest.raises(DataError, match=r"torchvision cannot be used .*install the version that matches PyTorch"):
        load("train", "cifar10", tmp_path / "data")
    assert "built-in" in data.load("train", settings("auto", tmp_path / "data"))[1]


def test_leaves_are_stored_and_the_same_in_every_run(few_leaves, tmp_path, monkeypatch):
    images = load("train", "leaves", tmp_path / "a")
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, load("train", "leaves", tmp_path / "b", seed=1))
    distinct = {image.numpy().tobytes() for image in torch.cat([images, load("test", "leaves", tmp_path / "a")])}
    assert len(distinct) == 150  # no image twice, in a split or across
    monkeypatch.setattr(leaves, "dead_leaves", None)  # from here on only the file can answer
    assert torch.equal(images, load("train", "leaves", tmp_path / "a"))


def test_leaves_of_another_recipe_have_a_file_of_their_own(few_leaves, tmp_path, monkeypatch):
    before, mine = load("train", "leaves", tmp_path), tmp_path / "leaves-train-0-mine.npy"
    mine.write_bytes(b"")
    (tmp_path / "leaves.py").write_bytes(Path(leaves.__file__).read_bytes() + b"# changed")
    monkeypatch.setattr(leaves, "__file__", str(tmp_path / "leaves.py"))
    monkeypatch.setattr(leaves, "SHADING", 0.1)
    assert not torch.equal(load("train", "leaves", tmp_path), before)
    assert mine.exists() and len(list(tmp_path.glob("leaves-train-*.bin"))) == 2


def test_leaves_are_found_again_whatever_the_line_endings_of_their_code(tmp_path, monkeypatch):
    recipe, code = leaves.recipe(), Path(leaves.__file__).read_bytes()
    (tmp_path / "leaves.py").write_bytes(code.replace(b"\n", b"\r\n"))  # as Git leaves it under Windows
    monkeypatch.setattr(leaves, "__file__", str(tmp_path / "leaves.py"))
    assert leaves.recipe() == recipe


def test_leaves_have_the_statistics_of_cifar10():
    """CIFAR-10's published mean and standard deviation, and the correlation of its colours, roughly."""
    pixels = leaves.dead_leaves(500, torch.Generator().manual_seed(0)).permute(1, 0, 2, 3).flatten(1) / 255
    np.testing.assert_allclose(pixels.mean(1), (0.4914, 0.4822, 0.4465), atol=0.03)
    np.testing.assert_allclose(pixels.std(1), (0.2470, 0.2435, 0.2616), atol=0.04)
    red_green, green_blue, red_blue = np.corrcoef(pixels)[[0, 1, 0], [1, 2, 2]]
    assert 0.7 < red_blue < min(red_green, green_blue) < 0.95


# ---- batches ----------------------------------------------------------------------------------------------------


def numbered(n):
    """n images whose left half is their number and whose right half is 255 minus it."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 32, 32)
    images[..., 16:] = 255 - images[..., 16:]
    return images


def numbers(batch):
    """The number of each image of a batch, mirrored or not."""
    left = ((batch[:, 0, 0, 0] + 1) * 127.5).round().int()
    return torch.minimum(left, 255 - left).tolist()


def epoch_of(images, epoch=0, rank=0, world=1, start=0, batch_size=8, **values):
    return list(data.batches(images, settings(batch_size=batch_size, **values), epoch, rank, world, start))


def test_an_epoch_shows_every_image_once_in_a_new_order():
    images = numbered(40)
    epochs = [[n for x in epoch_of(images, epoch) for n in numbers(x)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]
    # The order of every earlier version, and the mirror images drawn after it.
    random = streams.generator("cpu", 0, streams.ORDER, 0)
    order, mirrored = torch.randperm(40, generator=random), torch.rand(40, generator=random) < 0.5
    assert epochs[0] == order.tolist()
    batch = torch.cat(epoch_of(images))
    assert torch.equal(batch[:, 0, 0, 0] > batch[:, 0, 0, -1], mirrored)
    assert batch.dtype == torch.float32 and batch.min() >= -1 and batch.max() <= 1
    assert len(epoch_of(images, batch_size=16)) == 2  # the incomplete third batch is left out
    batch = torch.cat(epoch_of(images, flip=False))
    assert (batch[:, 0, 0, 0] < batch[:, 0, 0, -1]).all()


def test_augment_shows_all_eight_orientations():
    square = torch.arange(9).view(1, 1, 3, 3)
    images = torch.nn.functional.interpolate(square.float(), size=36).to(torch.uint8).repeat(800, 3, 1, 1)
    seen = torch.cat(epoch_of(images, augment=True))[:, 0, ::12, ::12]
    seen = ((seen + 1) * 127.5).round().long().flatten(1).tolist()
    turned = [torch.rot90(x, k).flatten().tolist() for x in (square[0, 0], square[0, 0].T) for k in range(4)]
    counts = [seen.count(orientation) for orientation in turned]
    assert sum(counts) == 800 and min(counts) > 60
    flat = numbered(40)[..., :1].expand(-1, -1, -1, 32).contiguous()
    assert [n for x in epoch_of(flat, augment=True) for n in numbers(x)] == [
        n for x in epoch_of(flat) for n in numbers(x)
    ]


@pytest.fixture
def crops():
    """Crops of pictures of two shapes, and the pictures."""
    whole = [torch.from_numpy(noise(40, 52, 1)).permute(2, 0, 1), torch.from_numpy(noise(36, 36, 2)).permute(2, 0, 1)]
    return data.Crops.of(whole, size=36, each=20), [x.permute(1, 2, 0).numpy() for x in whole]


def test_fresh_crops_are_others_every_epoch_and_the_same_again(crops):
    crops, whole = crops
    assert len(crops) == 40
    first, again, second, other = (crops.draw(*key)(torch.arange(40)) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert first.shape == (40, 3, 36, 36) and torch.equal(first, again)
    places = [[find(crop, whole[0])[0] for crop in drawn[:20]] for drawn in (first, second, other)]
    assert places[0] != places[1] and places[0] != places[2]
    ys, xs = map(set, zip(*itertools.chain(*places)))
    assert ys == set(range(5)) and {0, 16} <= xs <= set(range(17)) and len(xs) > 12  # up to both edges
    assert all((crop.permute(1, 2, 0).numpy() == whole[1]).all() for crop in first[20:])


def test_fresh_crops_of_a_folder(tmp_path):
    made = make_folder(tmp_path / "train", 3, 50, 60)
    make_folder(tmp_path / "test", 2, 50, 60)
    crops, source = data.load("train", settings(data_dir=tmp_path, crop_size=40, crops_per_image=4, fresh_crops=True))
    assert source == f"12 train images of 3 pictures in {tmp_path}"
    x0 = torch.cat(epoch_of(crops, batch_size=4, flip=False))
    drawn = ((x0 + 1) * 127.5).round().to(torch.uint8)
    of = [[name for name, pixels in made.items() if find(crop, pixels)] for crop in drawn]
    assert x0.shape == (12, 3, 40, 40) and sorted(itertools.chain(*of)) == sorted(4 * list(made))
    assert not list(tmp_path.glob(".images-train-*"))
    fewer = data.load("train", settings(data_dir=tmp_path, crop_size=40, crops_per_image=3, fresh_crops=True))[0]
    assert len({data.fingerprint(x) for x in (crops, fewer, fewer.to("cpu"))}) == 2


@pytest.mark.parametrize("kind", ["images", "crops"])
def test_ranks_share_the_batch_and_an_epoch_can_start_in_the_middle(kind, crops):
    images = numbered(40) if kind == "images" else crops[0]
    whole = epoch_of(images, 3, augment=kind == "crops")
    shares = [epoch_of(images, 3, rank, 2, augment=kind == "crops") for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat(parts), batch)
    for batch, later in zip(whole[2:], epoch_of(images, 3, start=2, augment=kind == "crops"), strict=True):
        assert torch.equal(later, batch)


# ---- random numbers ---------------------------------------------------------------------------------------------


def test_generators_are_pure_functions_of_their_key():
    def draw(*key):
        return torch.rand(4, generator=streams.generator("cpu", *key)).tolist()

    assert draw(0, streams.NOISE, 5) == draw(0, streams.NOISE, 5)
    keys = [(seed, use, i) for seed in range(3) for use in range(streams.JPEG + 1) for i in range(4)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_streams_are_those_of_every_earlier_version():
    names = ["ORDER", "NOISE", "HELD_OUT_NOISE", "CHOICE", "LEAVES", "CROPS", "KERNELS", "JPEG"]
    assert [getattr(streams, name) for name in names] == list(range(8))
    seed = int(np.random.SeedSequence((5, 1, 7)).generate_state(1, np.uint64)[0])
    expected = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.randn(4, generator=streams.generator("cpu", 5, 1, 7)), expected)
    eps = torch.randn(250, 3, 8, 8, generator=streams.generator("cpu", 0, 2, 0))
    assert torch.equal(data.held_out_noise(torch.zeros(4, 3, 8, 8), 0), eps[:4])


def test_the_noise_of_a_step():
    shape = (4000, 3, 2, 2)

    def draw(**values):
        return data.draw_noise(shape, settings(**values), "cpu", step=7)

    # The bits of every earlier version.
    random = streams.generator("cpu", 0, streams.NOISE, 7)
    integers, eps = torch.randint(1, 10, shape[:1], generator=random), torch.randn(shape, generator=random)
    between = integers + torch.rand(shape[:1], generator=random) - 0.5
    assert all(map(torch.equal, draw(), (integers, eps)))
    assert all(map(torch.equal, draw(continuous_t=True), (between, eps)))
    t, same = draw(sigma_range=(1.0, 75.0), noise_steps=100)
    sigma = 127.5 * diffusion.sigma_of(t, 100)
    assert torch.equal(same, eps) and sigma.min() >= 1 and sigma.max() <= 75
    assert sigma.mean() == pytest.approx(38, abs=1) and sigma.std() == pytest.approx(74 / math.sqrt(12), abs=1)
    # With a power p, the share of levels below s is (s^(p + 1) - low^(p + 1)) / (high^(p + 1) - low^(p + 1)).
    sigma = 127.5 * diffusion.sigma_of(draw(sigma_range=(5.0, 50.0), sigma_power=2.0)[0], 10)
    for level, share in ((5, 0), (20, 0.063), (35, 0.343), (45, 0.729), (50, 1)):
        assert (sigma < level + 1e-4).float().mean() == pytest.approx(share, abs=0.02)
    t, mixed = draw(noise="mixed")
    changed = (mixed != eps).flatten(1).any(1).float().mean()
    assert torch.equal(t, integers) and changed == pytest.approx(0.25, abs=0.03)
    assert mixed.std() == pytest.approx(1, abs=0.05)
    assert not torch.equal(eps, data.draw_noise(shape, settings(), "cpu", step=8)[1])


def test_another_seed_gives_other_orders_and_noise():
    def drawn(seed):
        cfg = settings(seed=seed, noise="mixed", batch_size=400)
        order = torch.cat(epoch_of(numbered(40), seed=seed))
        return order, *data.draw_noise((40, 3, 2, 2), cfg, "cpu", step=0), data.draw_qualities(cfg, step=0)

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert not any(map(torch.equal, drawn(0), drawn(1)))


def test_every_epoch_and_every_seed_cut_other_crops(crops):
    def cut(epoch, seed=0):  # whatever their order
        return {x.numpy().tobytes() for x in torch.cat(epoch_of(crops[0], epoch, seed=seed, flip=False))}

    assert cut(0) == cut(0) != cut(1) and cut(0) != cut(0, seed=1)


def test_held_out_noise_follows_from_the_place():
    images = torch.zeros(300, 3, 8, 8)
    noise = data.held_out_noise(images[:250], 0)
    assert noise.shape == (250, 3, 8, 8) and torch.equal(data.held_out_noise(images[:7], 0), noise[:7])
    assert not torch.equal(data.held_out_noise(images[250:], 250), noise[:50])
