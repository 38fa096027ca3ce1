"""The four data sets, what is said when they are wrong, and the batches."""

import errno
import functools
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import leaves

# ---- CIFAR-10, through torchvision's own download ---------------------------------------------------------------


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A local HTTP server with a small archive in the CIFAR-10 format; returns (folder served, pixels by batch name)."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pixels = {name: random.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for name in names}
    files = {name: pickle.dumps({"data": p.reshape(4, 3072), "labels": [0] * 4}) for name, p in pixels.items()}
    files["batches.meta"] = pickle.dumps({"label_names": ["airplane"]})
    folder = tmp_path / "served"
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(cifar, "tgz_md5", md5((folder / "cifar-10-python.tar.gz").read_bytes()))
    monkeypatch.setattr(cifar, "train_list", [[name, md5(files[name])] for name in names[:5]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5(files["batches.meta"])})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data.resolve.cache_clear()
    yield folder, pixels
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once(cifar_server, tmp_path):
    folder, pixels = cifar_server
    images, source = data.load("train", "cifar10", str(tmp_path / "data"))
    assert images.dtype == torch.uint8
    expected = np.concatenate([pixels[f"data_batch_{i}"] for i in range(1, 6)])
    np.testing.assert_array_equal(images.numpy(), expected)
    assert source.startswith("20 train images of CIFAR-10")
    (folder / "cifar-10-python.tar.gz").unlink()  # from here on it is on disk or nowhere
    np.testing.assert_array_equal(data.load("test", "auto", str(tmp_path / "data"))[0].numpy(), pixels["test_batch"])


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_archive_is_refused(cifar_server, tmp_path, damage):
    archive = cifar_server[0] / "cifar-10-python.tar.gz"
    content = archive.read_bytes()
    archive.write_bytes(content[:500] if damage == "truncated" else content[:-9] + bytes(9))
    with pytest.raises(data.DataError, match="checksum") as caught:
        data.load("train", "cifar10", str(tmp_path / "data"))
    assert "\n" not in str(caught.value) and "--dataset leaves" in str(caught.value)


def test_a_damaged_download_is_mended_by_the_next(cifar_server, tmp_path):
    target = tmp_path / "data"
    target.mkdir()
    content = (cifar_server[0] / "cifar-10-python.tar.gz").read_bytes()
    (target / "cifar-10-python.tar.gz").write_bytes(content[:500])
    assert len(data.load("train", "cifar10", str(target))[0]) == 20


@pytest.fixture
def no_network(cifar_server, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:1/nothing.tar.gz")


@pytest.fixture
def few_leaves(monkeypatch):
    monkeypatch.setattr(data, "LEAVES_CHUNKS", {"train": range(2), "test": range(2, 3)})


def test_without_a_network(no_network, few_leaves, tmp_path, capsys):
    with pytest.raises(data.DataError, match=r"downloading it failed.*connect to the network"):
        data.load("train", "cifar10", str(tmp_path / "data"))
    images, source = data.load("train", "auto", str(tmp_path / "data"))
    data.load("test", "auto", str(tmp_path / "data"))
    assert len(images) == 500 and "built-in" in source
    warnings = capsys.readouterr().err
    assert warnings.count("WARNING") == 1 and "downloading it failed" in warnings


def test_leaves_are_found_again_whatever_the_line_endings_of_their_code(few_leaves, tmp_path, monkeypatch):
    images = data.cached_leaves("test", str(tmp_path))
    code = data.Path(leaves.__file__).read_bytes()
    (tmp_path / "leaves.py").write_bytes(code.replace(b"\n", b"\r\n"))  # as Git leaves it under Windows
    monkeypatch.setattr(leaves, "__file__", str(tmp_path / "leaves.py"))
    monkeypatch.setattr(leaves, "dead_leaves", None)
    assert torch.equal(data.cached_leaves("test", str(tmp_path)), images)


# ---- a folder of pictures ---------------------------------------------------------------------------------------


def test_train_and_test_folders_are_the_splits(pictures):
    train, _ = data.load("train", "folder", str(pictures))
    test, _ = data.load("test", "folder", str(pictures))
    names = sorted(path.name for path in (pictures / "train").iterdir())
    expected = [np.asarray(Image.open(pictures / "train" / name)).transpose(2, 0, 1) for name in names]
    np.testing.assert_array_equal(train.numpy(), np.stack(expected))
    assert test.shape == (4, 3, 32, 32)


def test_a_fixed_tenth_is_held_out(tmp_path):
    for i in range(300):
        (tmp_path / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), i % 256, np.uint8)).save(tmp_path / str(i % 3) / f"{i}.bmp")
    files = data.image_files(tmp_path)
    train, test = data.hold_out(files)
    assert sorted(train + test) == files and 15 <= len(test) <= 45
    # Which side a file is on does not depend on the other files.
    assert data.hold_out(files[:200])[1] == [file for file in test if file in files[:200]]
    assert data.hold_out(files[:2]) in (([files[0]], [files[1]]), ([files[1]], [files[0]]))
    assert len(data.load("train", "folder", str(tmp_path))[0]) == len(train)


def test_crops_of_a_larger_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.fromarray(pixels).save(tmp_path / split / "large.png")
    train = data.load("train", "folder", str(tmp_path), crops_per_image=30)[0].permute(0, 2, 3, 1).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (32, 32, 3)).reshape(-1, 32, 32, 3)
    places = [np.flatnonzero((windows == crop).all((1, 2, 3))) for crop in train]
    assert len(train) == 30 and all(len(place) == 1 for place in places)
    assert len({int(place[0]) for place in places}) > 15
    for kept in tmp_path.glob(".images-train-*"):
        kept.unlink()
    again = data.load("train", "folder", str(tmp_path), crops_per_image=30)[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(train, again)
    test = data.load("test", "folder", str(tmp_path), crops_per_image=30)[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(test, pixels[None, 4:36, 9:41])
    (kept,) = tmp_path.glob(".images-test-*")
    data.load("test", "folder", str(tmp_path), crops_per_image=9)  # which is of no account there
    assert list(tmp_path.glob(".images-test-*")) == [kept]


def test_a_folder_on_a_read_only_disk(tmp_path, monkeypatch, capsys):
    for i in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")

    def refuse(*args, **options):  # as a disk mounted read-only does, also of a file that does not exist
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(data, "open", refuse, raising=False)
    monkeypatch.setattr(data.Path, "unlink", refuse)
    assert len(data.load("train", "folder", str(tmp_path))[0]) == 1
    assert "note: the images are not kept for the next start ([Errno 30]" in capsys.readouterr().err


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    ramp = np.linspace(0, 255, 32).round().astype(np.uint8)[None].repeat(32, 0)
    grey = Image.fromarray(ramp)
    colour = Image.merge("RGB", [grey, Image.new("L", grey.size, 7), Image.new("L", grey.size, 200)])
    alpha = Image.fromarray(np.where(np.arange(32) < 16, 0, 255).astype(np.uint8)[None].repeat(32, 0))
    transparent = colour.copy()
    transparent.putalpha(alpha)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    colour.quantize(64).save(tmp_path / "palette.png")
    transparent.save(tmp_path / "transparent.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.tif")
    exif = Image.Exif()
    exif[274] = 3  # upside down
    colour.rotate(180).save(tmp_path / "turned.png", exif=exif)

    def read(name):
        return data.read_image(tmp_path / name)

    np.testing.assert_array_equal(read("grey.png"), np.stack([ramp] * 3, 2))
    np.testing.assert_array_equal(read("grey16.png"), np.stack([ramp] * 3, 2))
    np.testing.assert_array_equal(read("turned.png"), np.asarray(colour))
    assert np.abs(read("palette.png").astype(int) - np.asarray(colour)).max() <= 8
    assert np.abs(read("cmyk.tif").astype(int) - np.asarray(colour)).max() <= 2
    assert (read("transparent.png")[:, :16] == 255).all()
    np.testing.assert_array_equal(read("transparent.png")[:, 16:], np.asarray(colour)[:, 16:])


def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path):
    def refusal():
        with pytest.raises(data.DataError) as caught:
            data.load("train", "folder", str(tmp_path / "pictures"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a folder" in refusal()
    (tmp_path / "pictures").mkdir()
    assert "no train images" in refusal()
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    assert "no train images" in refusal()
    for i in range(2):
        Image.new("RGB", (40, 20)).save(tmp_path / "pictures" / f"{i}.png")
    assert ".png is 40x20 pixels, smaller than 32x32" in refusal()
    for i in range(2):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(b"no picture")
    assert ".png cannot be read as an image" in refusal()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    for i in range(2):
        (tmp_path / "pictures" / f"{i}.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    assert ".png cannot be read as an image" in refusal()


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
        with pytest.raises(data.DataError, match=r"cannot read the folder .*closed.*Permission denied"):
            data.load("train", "folder", str(tmp_path))
        with pytest.raises(data.DataError, match=r"cannot read the folder .*closed.*Permission denied"):
            data.load("train", "folder", str(closed))
        with pytest.raises(data.DataError, match=r"no permission to use .*closed"):
            data.load("train", "cifar10", str(closed / "data"))
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o755)


def test_pictures_are_not_left_aside_by_auto(pictures, tmp_path):
    data.resolve.cache_clear()
    with pytest.raises(data.DataError, match="holds pictures; add --dataset folder"):
        data.load("train", "auto", str(pictures))
    Image.new("RGB", (32, 32)).save(tmp_path / "one.PNG")
    with pytest.raises(data.DataError, match="holds pictures; add --dataset folder"):
        data.load("train", "auto", str(tmp_path))


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert data.image_files(tmp_path) == [os.path.join("a", "x.png")]


def test_limit_is_a_fixed_choice_from_the_whole_split(pictures):
    whole, _ = data.load("train", "folder", str(pictures))
    few, source = data.load("train", "folder", str(pictures), limit=5)
    rows = [int((whole == image).flatten(1).all(1).nonzero()) for image in few]
    assert len(set(rows)) == 5 and rows != list(range(5)) and source.startswith("5 train images")
    assert torch.equal(few, data.load("train", "folder", str(pictures), limit=5)[0])


def test_a_folder_is_decoded_once_until_a_file_changes(pictures, tmp_path, monkeypatch):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    first = data.load("train", "folder", str(folder))[0]
    with monkeypatch.context() as no_decoding:
        no_decoding.setattr(data, "read_image", None)
        assert torch.equal(data.load("train", "folder", str(folder))[0], first)
    Image.new("RGB", (32, 32), "red").save(folder / "train" / "0.png")
    second = data.load("train", "folder", str(folder))[0]
    assert second[0].float().mean((1, 2)).tolist() == [255, 0, 0] and torch.equal(second[1:], first[1:])
    assert len(list(folder.glob(".images-train-*.npy"))) == 1  # the outdated one is gone


# ---- built-in images --------------------------------------------------------------------------------------------


def test_leaves_are_cached_and_the_same_for_the_same_seed(few_leaves, tmp_path, monkeypatch):
    images, _ = data.load("train", "leaves", str(tmp_path / "a"))
    assert images.shape == (500, 3, 32, 32) and images.dtype == torch.uint8
    again, _ = data.load("train", "leaves", str(tmp_path / "b"))
    assert torch.equal(images, again)
    assert not torch.equal(images, data.load("train", "leaves", str(tmp_path / "b"), seed=1)[0])
    test, _ = data.load("test", "leaves", str(tmp_path / "a"))
    distinct = {image.numpy().tobytes() for image in torch.cat([images, test])}
    assert len(distinct) == 750  # no image twice, in a split or across
    monkeypatch.setattr(leaves, "dead_leaves", None)  # from here on only the cache can answer
    assert torch.equal(images, data.load("train", "leaves", str(tmp_path / "a"))[0])


def test_a_damaged_cache_is_made_anew(few_leaves, tmp_path):
    test, _ = data.load("test", "leaves", str(tmp_path))
    (cache,) = tmp_path.glob("leaves-test*.npy")
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(test, data.load("test", "leaves", str(tmp_path))[0])


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


def test_an_epoch_shows_every_image_once_in_a_new_order():
    images = numbered(40)
    epochs = [[n for x in data.batches(images, 8, 0, epoch, flip=True) for n in numbers(x)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]
    (first, *_) = data.batches(images, 8, 0, 0)
    assert first.dtype == torch.float32 and first.min() >= -1 and first.max() <= 1
    assert len(list(data.batches(images, 16, 0, 0))) == 2  # the incomplete third batch is left out


def test_about_half_of_the_images_are_mirrored():
    batch = torch.cat(list(data.batches(numbered(100), 20, 0, 0, flip=True)))
    assert 30 < (batch[:, 0, 0, 0] > batch[:, 0, 0, -1]).sum() < 70
    batch = torch.cat(list(data.batches(numbered(100), 20, 0, 0, flip=False)))
    assert (batch[:, 0, 0, 0] < batch[:, 0, 0, -1]).all()


@pytest.mark.parametrize("make", [data.batches, data.pil_batches])
def test_ranks_share_the_batch_and_an_epoch_can_start_in_the_middle(make):
    images = numbered(40)
    whole = list(data.batches(images, 8, 0, 3))
    shares = [list(make(images, 8, 0, 3, rank=rank, world=2)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        torch.testing.assert_close(torch.cat(parts), batch)
    for batch, later in zip(whole[2:], make(images, 8, 0, 3, start=2), strict=True):
        torch.testing.assert_close(later, batch)


def test_generators_are_pure_functions_of_their_key():
    def draw(*key):
        return torch.rand(4, generator=data.generator("cpu", *key)).tolist()

    assert draw(0, data.NOISE, 5) == draw(0, data.NOISE, 5)
    keys = [(seed, use, i) for seed in range(3) for use in range(5) for i in range(4)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
