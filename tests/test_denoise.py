"""denoise.py: tiles, sizes, kinds of pictures, what it refuses, and the estimate of the noise level.

The model of known answer is the optimal one for independent Gaussian pixels N(MU, S^2): eps_hat = sigma (x - MU) /
(S^2 + sigma^2). Its one-step estimate is the precision-weighted mean of the pixel and MU, and the likeliest noise level
of an image is that of its mean square: sigma^2 = mean((x - MU)^2) - S^2.
"""

import io
import itertools
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import checkpoint
import config
import data
import denoise
import diffusion
import leaves
import train
import unet

T, MU, S = 10, 0.2, 0.5


def optimal_eps(x, t):
    sigma = diffusion.noise_level(t, T)
    return sigma * (x - MU) / (S**2 + sigma**2)


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.fixture(scope="module")
def small_unet():
    """An untrained network whose output depends strongly on everything in its reach."""
    torch.manual_seed(0)
    model = unet.UNet(widths=(4, 4, 4), t_dim=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    return model


# ---- pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, steps", [(3, 1), (3, 2), (1, 2)])
def test_tiles_make_no_difference(channels, steps, small_unet, monkeypatch):
    pixels = noise(channels, 134, 102, dtype=np.uint16)

    def run(tile, block, reach=denoise.REACH):
        for name, value in (("TILE", tile), ("BLOCK", block), ("REACH", reach)):
            monkeypatch.setattr(denoise, name, value)
        with torch.inference_mode():
            return denoise.denoise(small_unet, pixels, T, sigma=0.3, steps=steps)[0].astype(float)

    whole = run(1000, 1000)
    assert np.abs(run(24, 64) - whole).max() <= 1e-3 * 65535 / 2
    assert np.abs(run(24, 64, reach=12) - whole).max() > 1e-3 * 65535 / 2  # tiles too narrow would be seen


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 50), (1, 50, 1), (3, 33, 35), (1, 33, 35)])
def test_any_size_and_depth(shape, dtype):
    pixels, top = noise(*shape, dtype=dtype), np.iinfo(dtype).max
    clean, sigma = denoise.denoise(optimal_eps, pixels, T, sigma=0.4)
    # Grey: the noise is sqrt(3) times as strong along (1, 1, 1) / sqrt(3), where the model knows a spread of S too.
    variance = 0.4**2 * (3 if shape[0] == 1 else 1)
    x = pixels / top * 2 - 1
    expected = (S**2 * x + variance * MU) / (S**2 + variance)
    assert (clean.shape, clean.dtype, sigma) == (shape, dtype, 0.4)
    np.testing.assert_allclose(clean, (expected + 1) / 2 * top, atol=0.51 if dtype == np.uint8 else 1)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 50), (1, 33, 35)])
def test_the_network_takes_any_size(shape, small_unet):
    with torch.inference_mode():
        clean, sigma = denoise.denoise(small_unet, noise(*shape), T)
    assert clean.shape == shape and 0 < sigma < 1


def test_the_network_sees_a_bounded_part():
    seen = []

    def model(x, t):
        seen.append(x.shape)
        return torch.zeros_like(x)

    pixels = noise(3, 1000, 1500)
    clean, _ = denoise.denoise(model, pixels, T, sigma=0.2, steps=2)
    np.testing.assert_array_equal(clean, pixels)  # each pixel comes back in its place
    assert max(shape.numel() for shape in seen) <= 3 * 256**2
    x = [denoise.spread_crops(pixels[:, :h, :w]) for h, w in ((1000, 1500), (32, 1500), (40, 50))]
    assert [sum(crop[0].size for crop in crops) for crops in x] == [16 * 32 * 32, 16 * 32 * 32, 40 * 50]


# ---- the noise level --------------------------------------------------------------------------------------------


def test_the_likeliest_noise_level():
    t = torch.tensor([0.1, 0.5, 1, 1.7, 3, 5, 7.3, 9.9])
    x_t = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x_t *= ((S**2 + (t / T) ** 2) / x_t.square().mean(dim=(1, 2, 3))).sqrt()[:, None, None, None]
    x_t += MU  # with exactly the mean square that the noise level makes likeliest
    sigma = diffusion.estimate_sigma(optimal_eps, x_t, T, iterations=14)
    torch.testing.assert_close(sigma, t / T, rtol=0, atol=2**-14)
    # Iterations halve the error; the ends of the scale stand for what lies beyond.
    coarse = diffusion.estimate_sigma(optimal_eps, x_t, T, iterations=5)
    assert 2**-8 < (coarse - t / T).abs().max() <= 2**-6
    beyond = torch.stack([torch.full((3, 8, 8), MU), torch.full((3, 8, 8), 5.0)])
    assert diffusion.estimate_sigma(optimal_eps, beyond, T).tolist() == [2**-10, 1 - 2**-10]


def test_the_noise_level_of_a_large_picture_is_the_median_of_its_crops():
    random = np.random.default_rng(0)
    levels = np.linspace(0.1, 0.6, 16)  # of 4x4 fields, one of which each crop lies in
    sigma = np.kron(random.permutation(levels).reshape(4, 4), np.ones((50, 50)))
    x = MU + np.sqrt(S**2 + sigma**2) * random.choice([-1, 1], (3, 200, 200))  # the mean square that is likeliest
    pixels = ((x + 1) / 2 * 65535).round().astype(np.uint16)
    assert denoise.denoise(optimal_eps, pixels, T)[1] == pytest.approx(np.median(levels), abs=0.002)


def test_the_noise_level_of_a_grey_picture():
    random = np.random.default_rng(0)
    # On the grey axis the optimal model knows the mean MU and the spread S of a coordinate, sqrt(3) times the grey.
    x = MU + S / math.sqrt(3) * random.standard_normal((1, 64, 64)) + 0.3 * random.standard_normal((1, 64, 64))
    pixels = ((x + 1) / 2 * 65535).clip(0, 65535).astype(np.uint16)
    seen = pixels / 65535 * 2 - 1
    _, sigma = denoise.denoise(optimal_eps, pixels, T)
    assert sigma == pytest.approx(math.sqrt(np.square(seen - MU).mean() - S**2 / 3), abs=0.002)
    assert sigma == pytest.approx(0.3, rel=0.1)


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoints of untrained networks, {"unet": path, "plain": path}; like shipped ones, without an optimizer."""
    folder = tmp_path_factory.mktemp("weights")
    settings = {"t_dim": 8, "noise_steps": 10, "dataset": "folder", "data_dir": "data"}
    torch.manual_seed(0)
    for name in ("unet", "plain"):
        state = {"model": unet.build(name, 8).state_dict(), "config": settings | {"model": name}}
        checkpoint.save(folder / f"{name}.pth", state)
    return {name: folder / f"{name}.pth" for name in ("unet", "plain")}


@pytest.fixture
def run(weights, tmp_path, monkeypatch):
    """run("in.png", "-o", "out.png"): what `python denoise.py` does, in an empty folder; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*args, model="unet"):
        own = ("--weights", weights[model], "--device", "cpu", "--precision", "float32")
        monkeypatch.setattr(sys, "argv", ["denoise.py", *map(str, (*args, *own))])
        try:
            config.run(denoise.main, data.DataError, checkpoint.CheckpointError)
        except SystemExit as end:
            print(end.code, file=sys.stderr)
            return 1
        return 0

    return run


def test_what_is_written_is_what_the_network_makes_of_it(run, weights, tmp_path):
    model, _ = checkpoint.load_model(weights["unet"], "cpu")
    for name, pixels in {"colour": noise(40, 33, 3), "deep": noise(40, 33, dtype=np.uint16)}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        found = [pixels.astype(float)]
        for steps in (1, 2):
            assert run(f"{name}.png", "-o", f"{name}{steps}.png", "--sigma", 60, "--steps", steps) == 0
            with torch.inference_mode():
                planes = np.atleast_3d(pixels).transpose(2, 0, 1)
                expected, _ = denoise.denoise(model, planes, T, 60 / 127.5, steps)
            found.append(np.asarray(Image.open(tmp_path / f"{name}{steps}.png")).astype(float))
            np.testing.assert_allclose(np.atleast_3d(found[-1]).transpose(2, 0, 1), expected, atol=1)
        assert all(np.abs(a - b).mean() > 0.5 for a, b in itertools.combinations(found, 2))


def test_every_kind_of_picture_stays_what_it_is(run, tmp_path):
    colour, grey = Image.fromarray(noise(33, 35, 3)), Image.fromarray(noise(33, 35, seed=1))
    alpha = Image.fromarray(noise(33, 35, seed=2))
    deep = Image.fromarray(noise(33, 35, dtype=np.uint16))
    pictures = {"colour.png": colour, "grey.png": grey, "deep.png": deep, "deep.tif": deep, "deep.jpg": None}
    pictures |= {"palette.png": colour.quantize(64), "bits.png": grey.convert("1"), "equal.bmp": grey.convert("RGB")}
    for name, picture in {"transparent.png": colour, "transparent_grey.png": grey}.items():
        pictures[name] = picture.copy()
        pictures[name].putalpha(alpha)
    pictures["clear.png"] = colour.quantize(8)
    (tmp_path / "in").mkdir()
    for name, picture in pictures.items():
        if picture:
            picture.save(tmp_path / "in" / name, **({"transparency": 0} if name == "clear.png" else {}))
    assert run("in", "-o", "out", "--sigma", 25) == 0
    assert run("in/deep.png", "-o", "out/deep.jpg", "--sigma", 25) == 0
    out = {name: Image.open(tmp_path / "out" / name) for name in pictures}
    modes = {"deep.png": "I;16", "deep.tif": "I;16", "deep.jpg": "L", "palette.png": "RGB", "bits.png": "L"}
    modes |= {"transparent.png": "RGBA", "transparent_grey.png": "LA", "clear.png": "RGBA", "equal.bmp": "RGB"}
    assert {n: p.mode for n, p in out.items()} == {"colour.png": "RGB", "grey.png": "L"} | modes
    assert all(picture.size == (35, 33) for picture in out.values())
    for name in ("transparent.png", "transparent_grey.png"):
        np.testing.assert_array_equal(out[name].getchannel("A"), alpha)
    np.testing.assert_array_equal(out["clear.png"].getchannel("A"), 255 * (np.asarray(pictures["clear.png"]) > 0))
    assert len(np.unique(out["deep.png"])) > 1000  # more than 8 bits
    np.testing.assert_array_equal(out["equal.bmp"], np.asarray(out["grey.png"])[..., None].repeat(3, 2))
    # The network has no use for alpha: the colours are those without it.
    np.testing.assert_array_equal(out["transparent.png"].convert("RGB"), out["colour.png"])


@pytest.mark.parametrize("ending", sorted(data.IMAGE_FILES))
def test_every_ending_can_be_written(ending):
    for mode in ("L", "RGB"):
        file = io.BytesIO()
        denoise.encode(file, Image.new(mode, (9, 7), "white"), denoise.Path(f"x{ending}"), {})
        assert np.asarray(Image.open(file).convert("L")).min() >= 254


def test_upright_with_profile_and_without_doubled_orientation(run, tmp_path):
    pixels = noise(20, 40, 3)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # to be turned by 90 degrees clockwise
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif, icc_profile=profile)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png", icc_profile=profile)  # a profile for colours
    assert run("turned.png", "upright.png", "grey.png", "-o", "out", "--sigma", 25) == 0
    turned, upright = (Image.open(tmp_path / "out" / name) for name in ("turned.png", "upright.png"))
    np.testing.assert_array_equal(turned, upright)
    assert turned.size == (20, 40)
    assert dict(turned.getexif()) == {0x010F: "maker"}
    assert turned.info["icc_profile"] == profile
    assert "icc_profile" not in Image.open(tmp_path / "out" / "grey.png").info


def test_a_folder_with_bad_pictures(run, tmp_path, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "sub/huge.png"):
        Image.fromarray(noise(*((200, 200, 3) if "huge" in name else (8, 8, 3)))).save(tmp_path / "in" / name)
    (tmp_path / "in" / "sub" / "bad.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:90])
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    assert run("in", "-o", "out/here", "--max-pixels", 9999, "--compare") == 1
    written = sorted(str(path.relative_to(tmp_path / "out" / "here")) for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.png", "a_compare.png", "sub/b.png", "sub/b_compare.png"]
    out, err = capsys.readouterr()
    assert len(re.findall(r"in/\S+ -> out/here/\S+  sigma [\d.]+ \(estimated\)", out)) == 2
    assert re.search(r"left out: in/sub/bad.png cannot be read", err) and "sub/huge.png" in err
    assert err.splitlines()[-1] == "error: 2 of 4 pictures were left out, see above; the others are written"


REFUSED = {
    "none.png -o x.png": "none.png does not exist",
    "a.png -o x": "x has no ending of a picture",
    "a.png -o x.txt": "x.txt has no ending of a picture",
    "a.png -o a.png --overwrite": "a.png is an input, which is never overwritten",
    "a.png -o link.png --overwrite": "link.png is an input, which is never overwritten",
    "a.png -o hard.png --overwrite": "hard.png is an input, which is never overwritten",
    "a.png -o .": "a.png is an input, which is never overwritten",
    "a.png -o b.png": "b.png exists; choose another output, or add --overwrite",
    "a.png -o c.png --compare": "c_compare.png exists",
    "a.png -o folder.png/": "folder.png/a.png exists",
    "in a.png -o x/": "in/a.png and a.png would both be written to x/a.png",
    "a.png b.png -o b.png": "b.png is a file; several pictures need a folder",
    "in -o in": "the output in is inside the input in",
    "in -o in/out": "the output in/out is inside the input in",
    "empty -o x": "no pictures .* in empty",
    "a.png a.png -o x": "a.png and a.png would both be written to x/a.png",
    "alpha.png -o x.jpg": "x.jpg cannot be written .*choose another ending",
    "a.png -o a.png/x.png": "a.png",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_before_the_network_runs(line, run, tmp_path, monkeypatch, capsys):
    for folder in ("in", "folder.png", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "b.png", "in/a.png", "folder.png/a.png", "c_compare.png"):
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / name)
    Image.fromarray(noise(8, 8, 4)).save(tmp_path / "alpha.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(unet.UNet, "forward", None)  # which would be an error of another kind
    assert run(*line.split()) == 1
    assert re.match(f"error: .*({REFUSED[line]})", capsys.readouterr().err.splitlines()[-1])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_replaces_an_output(run, tmp_path):
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("what was there")
    original = (tmp_path / "a.png").read_bytes()
    assert run("a.png", "-o", "b.png", "--overwrite", "--sigma", 9, "--steps", 2) == 0
    assert Image.open(tmp_path / "b.png").size == (8, 8)
    assert (tmp_path / "a.png").read_bytes() == original


def test_an_interrupted_write_leaves_nothing(run, tmp_path, monkeypatch):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    save = Image.Image.save

    def interrupted(image, file, *args, **options):
        save(image, file, *args, **options)
        if not isinstance(file, io.BytesIO):  # the trial in memory
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert run("a.png", "-o", "out/b.png", "--sigma", 9) == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "sigma, picture, warns", [(25, "a", 0), (3, "a", 1), (130, "a", 1), (70, "grey", 0), (80, "grey", 1)]
)
def test_a_warning_outside_the_trained_levels(sigma, picture, warns, run, tmp_path, capsys):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    Image.fromarray(noise(8, 8)).save(tmp_path / "grey.png")
    assert run(f"{picture}.png", "-o", "x.png", "--sigma", sigma) == 0
    assert len(re.findall(rf"WARNING: {picture}.png: sigma {sigma}.0 is assumed", capsys.readouterr().err)) == warns


@pytest.mark.parametrize("continuous, trained_on", [(False, "12.8 to 114.8;"), (True, "6.4 to 121.1;")])
def test_the_warning_tells_the_trained_levels(continuous, trained_on, capsys):
    denoise.warn_outside("a.png", 0.02, False, {"noise_steps": 10, "continuous_t": continuous})
    assert f"was trained on {trained_on}" in capsys.readouterr().err


def test_a_network_without_time_needs_the_level(run, tmp_path, capsys):
    Image.fromarray(noise(40, 8, 3)).save(tmp_path / "a.png")
    assert run("a.png", "-o", "x.png", model="plain") == 1
    assert re.search("plain.pth does not know noise levels.*--sigma", capsys.readouterr().err)
    assert run("a.png", "-o", "x.png", "--sigma", 30, model="plain") == 0


def test_as_a_user_runs_it(script, weights, tmp_path):
    pixels = noise(300, 100, 3)
    Image.fromarray(pixels).save(tmp_path / "noisy.png")
    process = script(
        "denoise.py", "noisy.png", "-o", "clean.png", "--sigma", 25, "--compare", "--weights", weights["unet"]
    )
    assert process.returncode == 0, process.stderr
    assert "noisy.png -> clean.png  sigma 25.0 (given)" in process.stdout
    assert Image.open(tmp_path / "clean.png").size == (100, 300)
    assert Image.open(tmp_path / "clean_compare.png").width > 800
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.png", "clean_compare.png", "noisy.png"]


# ---- which weights ----------------------------------------------------------------------------------------------


def test_the_newer_of_own_and_shipped_weights(tmp_path, monkeypatch):
    shipped, own, older = tmp_path / "unet32.pth", tmp_path / "unet32_e1.pth", tmp_path / "unet32_e0.pth"
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    assert checkpoint.choose("named.pth", tmp_path).name == "named.pth"
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        checkpoint.choose(None, tmp_path)
    for path, time in ((own, 100), (older, 300), (shipped, 200)):
        path.write_bytes(b"")
        os.utime(path, (time, time))
    assert checkpoint.choose(None, tmp_path) == shipped
    assert checkpoint.choose(None, tmp_path / "empty") == shipped
    os.utime(own, (250, 250))
    assert checkpoint.choose(None, tmp_path) == own
    shipped.unlink()
    assert checkpoint.choose(None, tmp_path) == own


def test_the_shipped_weights():
    """Small, without an optimizer, and good on images that they were not trained on and that need no download."""
    assert checkpoint.SHIPPED.stat().st_size < 9e6
    state = checkpoint.load(checkpoint.SHIPPED)
    assert state.keys() == {"model", "config", "provenance"}
    assert {"command", "seconds", "seed", "device", "held_out_loss"} <= state["provenance"].keys()
    model, trained = checkpoint.load_model(checkpoint.SHIPPED, "cpu")
    images = leaves.dead_leaves(90, data.generator("cpu", 0, data.LEAVES, 10**6))
    world = train.World(0, 1, 0, torch.device("cpu"))
    # An untrained network has 1; one trained on 50,000 such images for an epoch has 0.099.
    assert train.held_out_loss(model, images, trained["noise_steps"], torch.float32, world) < 0.12
