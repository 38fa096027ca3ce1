"""denoise.py and what it is made of: tiles, types and sizes of images, files and what is refused, honest messages.

The model of known answer is the optimal one for independent Gaussian pixels N(MU, S^2): eps_hat = sigma (x - MU) /
(S^2 + sigma^2). Its one-step estimate is the precision-weighted mean of the pixel and MU.
"""

import dataclasses
import errno
import itertools
import math
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin
from torch import nn

import config
import data
import denoise
import diffusion
import unet
from support import checkpoint, devices, metrics, picture_files, pictures, pixels, script, sheets, tiles
from support.datasets import leaves

T, MU, S = 10, 0.2, 0.5
CFG = config.defaults(unet.SETTINGS | data.SETTINGS | data.NOISE_SETTINGS, widths=(4, 4, 8), t_dim=8)


def optimal_eps(x, t):
    sigma = diffusion.sigma_of_images(t, T, x)
    return sigma * (x - MU) / (S**2 + sigma**2)


def network(model, margin=0):
    return denoise.Network(model, CFG, Path("x.pth"), torch.device("cpu"), "float32", margin)


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.fixture(scope="module")
def small_unet():
    """An untrained network whose output depends strongly on everything in its receptive field."""
    torch.manual_seed(0)
    model = unet.UNet(widths=(4, 4, 4), t_dim=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    return model


# ---- tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_receptive_field_of_the_unet(blocks):
    # Two 3x3 convolutions a block, at scales of 1, 2, 4, 2 and 1 pixels, and up to 3 pixels within a cell of 4.
    model = unet.UNet(widths=(4, 8, 4), t_dim=4, blocks=blocks)
    assert tiles.receptive_field(model) == 2 * blocks * (1 + 2 + 4 + 2 + 1) + 3


class Wrapped(nn.Module):
    """Layers of x alone as a model(x, t)."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t):
        return self.layers(x)


@pytest.mark.parametrize(
    "layers, reach",
    [
        ([nn.Identity()], 0),
        ([nn.Conv2d(3, 3, 5, padding=2)], 2),
        ([nn.Conv2d(3, 3, (1, 7), padding=(0, 3))], 3),
        ([nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.ReLU(), nn.BatchNorm2d(3)], 2),
        ([nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)], math.inf),  # the mean is that of the whole image
        ([nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)], math.inf),
    ],
)
def test_the_receptive_field_of_other_networks(layers, reach):
    assert tiles.receptive_field(Wrapped(*layers)) == reach


def test_looking_for_the_receptive_field_changes_nothing():
    model = unet.PlainUNet(widths=(4, 4, 4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tiles.receptive_field(model) == math.inf and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parts_are_the_fewest_that_fit():
    random = np.random.default_rng(0)
    for length, size, margin in random.integers((1, 5, 0), (3000, 60, 6), (300, 3)).tolist():
        size, margin = 4 * size, 4 * margin
        parts = tiles.spans(length, size, margin)
        size = max(size, 4 * margin)
        assert [0, *(end for _, end in parts)] == [*(start for start, _ in parts), length]
        assert all(start % 4 == 0 < end - start for start, end in parts)
        assert all(min(end + margin, length) - max(start - margin, 0) <= size for start, end in parts)
        most = len(parts) - 1  # so many parts would not do: the outer two can be size - margin long
        assert most == 0 or length > most * (size - 2 * margin) + 2 * margin or (most == 1 and length > size)
    assert tiles.spans(5000, 64, math.inf) == [(0, 5000)]


@pytest.mark.parametrize("channels, steps", [(3, 1), (1, 1), (3, 2), (1, 2)])
def test_tiles_make_no_difference(channels, steps, small_unet, monkeypatch):
    noisy = torch.from_numpy(noise(channels, 134, 158, dtype=np.uint16))

    def run(tile, margin=24):
        monkeypatch.setattr(denoise, "TILE", {"float32": tile})
        return denoise.denoise_pixels(network(small_unet, margin), noisy, 38.25, steps=steps).clean.float()

    whole = run(1000)
    assert (run(96) - whole).abs().max() <= 1e-3 * 65535 / 2
    assert (run(96, margin=12) - whole).abs().max() > 1e-3 * 65535 / 2  # margins too narrow would be seen


@pytest.mark.parametrize(
    "takes_inner, channels, ensemble, decoded",
    [
        (True, 3, 1, [96, 80, 80, 96]),
        (True, 1, 1, [96, 80, 80, 96]),
        (True, 3, 2, [112] * 8),
        (False, 3, 1, [112] * 4),
    ],
)
def test_margins_are_not_decoded(takes_inner, channels, ensemble, decoded, small_unet, monkeypatch):
    monkeypatch.setattr(denoise, "TILE", {"float32": 112})  # 304 = 88 + 64 + 64 + 88 pixels, with margins of 24
    monkeypatch.setattr(unet.UNet, "takes_inner", takes_inner)
    widths = []
    hook = small_unet.final.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[3]))
    noisy = torch.from_numpy(noise(channels, 64, 304))
    denoise.denoise_pixels(network(small_unet, 24), noisy, 38.25, ensemble=ensemble)
    hook.remove()
    assert widths == decoded


def test_a_network_that_cannot_be_tiled_sees_the_whole(monkeypatch):
    model, seen = unet.PlainUNet(widths=(4, 4, 4)).eval(), []
    plain = network(model, tiles.margin_of(tiles.receptive_field(model)))
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    monkeypatch.setattr(denoise, "TILE", {"float32": 16})
    noisy = torch.from_numpy(noise(3, 50, 64))
    denoise.denoise_pixels(plain, noisy, 38.25, steps=2)
    assert seen == [(52, 64)] * 2
    monkeypatch.setattr(denoise, "WHOLE", 50 * 64 - 1)
    with pytest.raises(config.UserError, match=r"x.pth must see a picture as a whole, of at most 3,199 pixels"):
        denoise.denoise_pixels(plain, noisy, 38.25)


@pytest.mark.parametrize("shape, most", [((1000, 1500), 1.3), ((1, 10_000), 4.6), ((10_000, 3), 1.6)])
def test_the_network_sees_bounded_tiles_and_little_twice(shape, most, monkeypatch):
    monkeypatch.setattr(denoise, "TILE", {"float32": 400})
    seen = []

    def model(x, t):
        seen.append(x.shape)
        return torch.zeros_like(x)

    noisy = torch.from_numpy(noise(3, *shape))
    clean = denoise.denoise_pixels(network(model, 24), noisy, 25.5).clean
    assert torch.equal(clean, noisy)  # each pixel comes back in its place
    assert max(max(s[2:]) for s in seen) <= 400
    assert sum(s[2] * s[3] for s in seen) <= most * math.prod(shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (7, 4), (9, 33)])
def test_padding_reflects(shape):
    x = torch.from_numpy(noise(2, 3, *shape))
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), *((0, -n % 4) for n in shape)], "reflect")
    np.testing.assert_array_equal(tiles.pad(x), expected)


# ---- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("length", [300, 500, 1300, 2500])
def test_any_number_of_steps_and_any_length(steps, length, small_unet):
    """The margin grows with the steps, and may be wider than the picture."""
    pixels = torch.from_numpy(noise(3, 8, length))
    whole = denoise.denoise_pixels(network(small_unet, math.inf), pixels, 25.5, steps=steps).clean
    in_tiles = denoise.denoise_pixels(network(small_unet, 24), pixels, 25.5, steps=steps).clean
    assert (in_tiles.int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 50), (1, 50, 1), (3, 33, 35), (1, 33, 35)])
def test_any_size_and_depth(shape, dtype):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    noisy = np.random.default_rng(0).standard_normal(shape, dtype) if top == 1 else noise(*shape, dtype=dtype)
    result = denoise.denoise_pixels(network(optimal_eps), torch.from_numpy(noisy), sigma=25.5, strength=2)
    # Grey: the model is told sqrt(3) times the level, and what it finds is sqrt(3) times as much.
    gain = math.sqrt(3) if shape[0] == 1 or (noisy == noisy[0]).all() else 1
    x, level = noisy if top == 1 else noisy / top * 2 - 1, gain * 0.4
    expected = x - 0.4 * gain * level * (x - MU) / (S**2 + level**2)
    assert (tuple(result.clean.shape), result.level.sigma) == (shape, 25.5)
    expected, off = (expected, 1e-5) if top == 1 else ((expected + 1) / 2 * top, 0.51 if top == 255 else 1)
    np.testing.assert_allclose(result.clean.numpy(), expected, atol=off)


def test_grey_stored_as_colours_is_grey(small_unet):
    grey = torch.from_numpy(noise(1, 20, 24))
    clean = denoise.denoise_pixels(network(small_unet, 24), grey, 25.5).clean
    colour = denoise.denoise_pixels(network(small_unet, 24), grey.expand(3, -1, -1), 25.5).clean
    assert torch.equal(colour, clean.expand(3, -1, -1))


def test_what_a_network_is_told_of_a_grey_picture():
    """Of independent noise alone it is told sqrt(3) times the level; one that knows equal noise too, the level."""
    told = []

    def model(x, t):
        told.append(t.item())
        return torch.zeros_like(x)

    for kind, shares in (("white", (0.25, 0.1)), ("mixed", (0.25, 0.1)), ("mixed", (0.0, 0.1))):
        known = network(model)._replace(train_cfg=dataclasses.replace(CFG, noise=kind, noise_shares=shares))
        assert math.isfinite(denoise.denoise_pixels(known, torch.from_numpy(noise(1, 20, 24)), 25.5).level.sigma)
    assert told == pytest.approx([2 * math.sqrt(3), 2, 2 * math.sqrt(3)])


@pytest.mark.parametrize("sigma", [10, 25, 50])
@pytest.mark.parametrize("size", [32, 96])
def test_grey_pictures_gain_as_much_with_either_of_the_weights_provided(sigma, size):
    """Also where the level is estimated, in small pictures by the likelihood."""
    small = leaves.dead_leaves(4, torch.Generator().manual_seed(3)).float().mean(dim=1, keepdim=True)
    clean = nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 255) if size > 32 else small
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    noisy = noisy.round().clamp(0, 255).to(torch.uint8)

    def psnr(x):
        return metrics.psnr(x.float() / 127.5 - 1, clean / 127.5 - 1).mean().item()

    found = {}
    for weights in (checkpoint.SHIPPED, checkpoint.PHOTO):
        for level in (sigma, None):
            found[weights.stem, level] = psnr(denoise.denoise(noisy, level, weights=weights))
    assert min(found.values()) > psnr(noisy) + (2 if sigma == 10 else 4), found
    assert found["photo", sigma] > found["unet32", sigma] - 1, found


def test_small_grey_pictures_are_not_taken_for_noisier_than_the_network_knows():
    small = leaves.dead_leaves(8, torch.Generator().manual_seed(3)).float().mean(dim=1, keepdim=True)
    noisy = small + 90 * torch.randn(small.shape, generator=torch.Generator().manual_seed(4))
    network = denoise.load(checkpoint.SHIPPED)
    for one in noisy.round().clamp(0, 255).to(torch.uint8):
        assert denoise.denoise_pixels(network, one).level.sigma < 127.5 / math.sqrt(3) + 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_does_not_know_t_leaves_the_level_to_the_statistics(channels, weights):
    found = denoise.denoise_pixels(denoise.load(weights["plain"]), torch.from_numpy(noise(channels, 40, 40))).level
    assert found == denoise.noise_level.estimate(noise(channels, 40, 40))


def test_a_network_may_use_its_input_again(monkeypatch):
    """Its layers are called as they are: an activation must not be made to overwrite what the network still needs."""

    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x, t):
            return x + self.relu(x)

    x = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    expected = diffusion.denoise(PreActivation(), x, torch.tensor([2.0]), T)[0]
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: (PreActivation().eval(), CFG))
    torch.testing.assert_close(denoise.denoise_pixels(denoise.load("any.pth"), x[0], 25.5).clean, expected)


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 40, 40), (3, 200, 170)])
def test_constant_pictures(shape, value, small_unet):
    flat = torch.full(shape, value, dtype=torch.uint8)
    for model in (optimal_eps, small_unet):
        result = denoise.denoise_pixels(network(model, 24), flat)
        assert result.level.sigma == 0 and torch.equal(result.clean, flat)


def test_the_change_in_grey_levels():
    before, after = noise(3, 200, 150), noise(3, 200, 150, seed=1)
    rms = np.sqrt(np.square(before.astype(float) - after).mean())
    assert pixels.rms_change(torch.from_numpy(before), torch.from_numpy(after)) == pytest.approx(rms, rel=1e-5)
    half = [torch.from_numpy(x).float() / 127.5 - 1 for x in (before, after)]
    assert pixels.rms_change(*half) == pytest.approx(rms, rel=1e-5)


# ---- from Python -------------------------------------------------------------------------------------------------


def make_weights(folder, name="unet", **settings):
    """A checkpoint of an untrained network; like those that are shipped, without an optimizer."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(CFG, model=name)
    saved = {key: value for key, value in dataclasses.asdict(cfg).items() if key != "given"} | settings
    weights = {key: 2 * value for key, value in unet.build(**unet.describe(cfg)).state_dict().items()}  # see small_unet
    state = {"model": weights, "network": unet.describe(cfg), "config": saved}
    checkpoint.save(folder / f"{name}.pth", state)
    return folder / f"{name}.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {name: make_weights(folder, name) for name in ("unet", "plain")}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "pick", lambda name, *_: torch.device("cpu"))
    monkeypatch.setattr(devices, "pick_precision", lambda *_: "float32")
    denoise.load_once.cache_clear()


COLOUR, GREY, DEEP = noise(33, 35, 3), noise(33, 35, seed=1), noise(33, 35, dtype=np.uint16)


def test_what_goes_in_comes_out(weights):
    """Every type holds the same picture, so the same must come out of it."""
    rgba = Image.fromarray(np.dstack([COLOUR, GREY]))
    rgba.info["dpi"] = (72, 72)
    x = torch.from_numpy(COLOUR).permute(2, 0, 1) / 127.5 - 1
    same = {
        "Pillow": (Image.fromarray(COLOUR), np.asarray),
        "alpha": (rgba, lambda image: np.asarray(image.convert("RGB"))),
        "uint8": (COLOUR, lambda array: array),
        "uint16": (COLOUR.astype(np.uint16) * 257, lambda array: array / 257),
        "big-endian": ((COLOUR * 257.0).astype(">u2"), lambda array: array / 257),
        "mirrored": (COLOUR[:, ::-1][:, ::-1], lambda array: array),
        "float64": (COLOUR / 255, lambda array: 255 * array),
        "float16": ((COLOUR / 255).astype(np.float16), lambda array: 255 * array.astype(float)),
        "uint8 tensor": (torch.from_numpy(COLOUR).permute(2, 0, 1), lambda x: x.permute(1, 2, 0).numpy()),
        "tensor": (x, lambda x: 127.5 * (x.permute(1, 2, 0).numpy() + 1)),
        "batch": (x[None].repeat(2, 1, 1, 1).requires_grad_(), lambda x: 127.5 * (x[1].permute(1, 2, 0).numpy() + 1)),
    }
    expected = denoise.denoise_pixels(denoise.load(weights["unet"]), x, 30).clean.permute(1, 2, 0).numpy()
    expected = 127.5 * (expected + 1)
    assert np.abs(expected - COLOUR).mean() > 1
    for name, (image, values) in same.items():
        before = np.array(image) if not isinstance(image, torch.Tensor) else image.detach().clone()
        clean = denoise.denoise(image, sigma=20, strength=1.5, weights=weights["unet"])
        assert type(clean) is type(image), name
        if isinstance(image, Image.Image):
            assert (clean.mode, clean.size, clean.info) == (image.mode, image.size, image.info), name
        else:
            assert (
                clean.shape == image.shape and clean.dtype == np.dtype(image.dtype).newbyteorder("=")
                if (isinstance(image, np.ndarray))
                else clean.dtype == image.dtype
            ), name
        atol = 1 if "float" not in name and name not in ("tensor", "batch") else 0.3
        np.testing.assert_allclose(values(clean).clip(0, 255), expected.clip(0, 255), atol=atol, err_msg=name)
        assert np.array_equal(before, np.array(image) if not isinstance(image, torch.Tensor) else image.detach()), name
    np.testing.assert_array_equal(denoise.denoise(rgba, 20, weights=weights["unet"]).getchannel("A"), GREY)


def test_the_mean_over_orientations_does_not_depend_on_the_orientation(weights):
    def clean(image, ensemble):
        return denoise.denoise(image, 20, weights=weights["unet"], ensemble=ensemble)

    image = COLOUR[:32, :28] / 255
    assert abs(clean(image[:, ::-1], 1)[:, ::-1] - clean(image, 1)).max() > 1e-3
    np.testing.assert_allclose(clean(image[:, ::-1], 2)[:, ::-1], clean(image, 2), atol=1e-5)
    np.testing.assert_allclose(np.rot90(clean(np.rot90(image), 8), -1), clean(image, 8), atol=1e-5)
    for count in (0, 9, 1.5, 2.0):
        with pytest.raises(ValueError, match="ensemble must be a whole number from 1 to 8"):
            clean(image, count)


@pytest.mark.parametrize("image", [GREY, GREY[..., None], DEEP, Image.fromarray(GREY), Image.fromarray(DEEP)])
def test_grey_stays_grey(image, weights):
    clean = denoise.denoise(image, 40, weights=weights["unet"])
    assert np.asarray(clean).shape == np.asarray(image).shape and np.asarray(clean).dtype == np.asarray(image).dtype
    assert not np.array_equal(clean, image)


def test_the_default_dtype_of_the_program_makes_no_difference(weights):
    expected = denoise.denoise(COLOUR, 20, weights=weights["unet"])
    denoise.load_once.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(denoise.denoise(COLOUR, 20, weights=weights["unet"]), expected)
        denoise.denoise(COLOUR, weights=weights["unet"])  # estimated
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_of_the_program_makes_no_difference(weights):
    expected = denoise.denoise(COLOUR, 20, weights=weights["unet"])
    denoise.load_once.cache_clear()
    torch.set_default_device("meta")  # on which nothing can be computed
    try:
        np.testing.assert_array_equal(denoise.denoise(COLOUR, 20, weights=weights["unet"]), expected)
        denoise.denoise(COLOUR, weights=weights["unet"])  # estimated
    finally:
        torch.set_default_device(None)


def test_python_is_left_as_it_was(weights):
    x = torch.zeros(3, 8, 8, requires_grad=True)
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    clean = denoise.denoise(x, weights=weights["unet"])
    clean.clamp_(-1, 1)  # three planes of their own, though they are equal
    assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    denoise.noise_level.regression.cache_clear()  # as in a program that denoises for the first time
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    denoise.denoise(noise(96, 96, 3), weights=weights["unet"])
    assert torch.rand(1) == expected
    assert not clean.requires_grad
    (x * clean).sum().backward()  # which an inference tensor would not take part in


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4, 2), np.uint8), r"1 or 3 channels is needed, not an array of the shape \(4, 4, 2\)"),
        (np.zeros((3, 4, 4), np.uint8), r"not an array of the shape \(3, 4, 4\)"),
        (np.zeros(4, np.uint8), "1 or 3 channels"),
        (np.zeros((0, 4), np.uint8), "1 or 3 channels"),
        (np.zeros((4, 4), np.int64), "floating, of at most 64 bits, not int64"),
        (np.full((4, 4), 255.0), r"floats must be in \[0, 1\]"),
        (np.full((4, 4), np.nan), "without NaN"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "needed, not a torch.strided tensor of torch.int64 on cpu"),
        (np.zeros((4, 4), np.longdouble), "of at most 64 bits, not"),
        (torch.full((3, 4, 4), 200.0), r"a tensor in \[-1, 1\]"),
        (torch.zeros(3, 4, 4).to_sparse(), r"a tensor \(dense;"),
        (torch.zeros(3, 4, 4, device="meta"), r"a tensor \(dense;"),
        (torch.zeros(3, 4, 4).to(torch.float8_e4m3fn), "needed, not a torch.strided tensor of torch.float8_e4m3fn"),
        (torch.zeros(4, 4), "1 or 3 channels"),
        (torch.zeros(0, 3, 4, 4), "1 or 3 channels"),
        (Image.new("CMYK", (4, 4)), "mode CMYK must be converted"),
        (Image.new("F", (4, 4)), "mode F must be converted"),
        (Image.new("RGB", (0, 4)), "0x4 pixels is empty"),
        ("noisy.png", "needed, not str"),
    ],
)
def test_images_that_are_refused(image, message, weights):
    with pytest.raises(ValueError, match=message):
        denoise.denoise(image, weights=weights["unet"])


def test_the_strongest_noise_that_a_network_knows_is_taken(weights):
    """The extremes of a million numbers around white lie beyond 5, far from [-1, 1]."""
    noisy = 1 + 0.9 * torch.randn(3, 576, 576, generator=torch.Generator().manual_seed(0))
    assert noisy.max() > 5
    denoise.denoise(noisy, sigma=0.9 * diffusion.GREY_LEVELS, weights=weights["unet"])


@pytest.mark.parametrize(
    "settings", [dict(sigma=0), dict(sigma=math.inf), dict(strength=1001), dict(strength=0), dict(sigma=math.nan)]
)
def test_settings_that_are_refused(settings, weights):
    with pytest.raises(ValueError, match="must be above 0 and at most 1000"):
        denoise.denoise(GREY, weights=weights["unet"], **settings)


def test_weights_are_read_once_and_those_for_photographs_first(tmp_path, monkeypatch):
    shipped, photo, read = tmp_path / "shipped", tmp_path / "photo", []
    for folder in (shipped, photo):
        folder.mkdir()
        monkeypatch.setattr(checkpoint, folder.name.upper(), folder / "unet.pth")
    load_model = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda path, where: read.append(path) or load_model(path, where))
    with pytest.raises(checkpoint.CheckpointError):
        denoise.denoise(GREY, 20)
    read.clear()
    make_weights(shipped)
    for _ in range(2):
        denoise.denoise(GREY, 20)
    assert read == [checkpoint.SHIPPED]
    make_weights(photo)
    for _ in range(2):
        denoise.denoise(GREY, 20)
    os.utime(make_weights(photo), (1, 1))
    denoise.denoise(GREY, 20)
    assert read == [checkpoint.SHIPPED, checkpoint.PHOTO, checkpoint.PHOTO]
    denoise.denoise(GREY, 20, weights=checkpoint.SHIPPED)
    assert read[3:] == [checkpoint.SHIPPED]


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(weights, tmp_path, monkeypatch):
    """run("in.png", "-o", "out.png"): what `python denoise.py` does, in an empty folder; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    pictures.said.clear()

    def run(*args, model="unet"):
        own = () if "--weights" in args else ("--weights", weights[model])
        monkeypatch.setattr(sys, "argv", ["denoise.py", *map(str, (*args, *own))])
        try:
            script.run(denoise.main)
        except SystemExit as end:
            return end.code
        finally:
            sys.stdout, sys.stderr = (getattr(stream, "stream", stream) for stream in (sys.stdout, sys.stderr))
        return 0

    return run


def write(name, array, **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(name, **options)


def test_what_is_written_is_what_the_network_makes_of_it(run, weights):
    model = denoise.load(weights["unet"])
    assert model.margin == 24 and denoise.load(weights["plain"]).margin == math.inf
    for name, array in {"colour": noise(40, 33, 3), "deep": noise(40, 33, dtype=np.uint16)}.items():
        write(f"{name}.png", array)
        found = [array.astype(float)]
        for settings in (dict(steps=1), dict(steps=2), dict(strength=0.5)):
            target = f"{name}{len(found)}.png"
            flags = itertools.chain(*((f"--{key}", value) for key, value in settings.items()))
            assert run(f"{name}.png", "-o", target, "--sigma", 60, *flags) == 0
            planes = torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)
            expected = denoise.denoise_pixels(model, planes, 60, **settings).clean.permute(1, 2, 0)
            found.append(np.asarray(Image.open(target)).astype(float))
            np.testing.assert_array_equal(np.atleast_3d(found[-1]), expected)
        assert all(np.abs(a - b).mean() > 0.5 for a, b in itertools.combinations(found, 2))


def test_every_kind_of_picture_stays_what_it_is(run):
    colour, grey, alpha, deep = map(Image.fromarray, (COLOUR, GREY, noise(33, 35, seed=2), DEEP))
    all_kinds = {"colour.png": colour, "grey.png": grey, "deep.png": deep, "deep.tif": deep, "equal.bmp": None}
    all_kinds |= {"palette.png": colour.quantize(64), "bits.png": grey.convert("1"), "equal.bmp": grey.convert("RGB")}
    for name, picture in {"transparent.png": colour, "transparent_grey.png": grey}.items():
        all_kinds[name] = picture.copy()
        all_kinds[name].putalpha(alpha)
    all_kinds["clear.png"] = colour.quantize(8)
    for name, picture in all_kinds.items():
        write(f"in/{name}", picture, **({"transparency": 0} if name == "clear.png" else {}))
    assert run("in", "-o", "out", "--sigma", 25) == 0
    assert run("in/deep.png", "-o", "out/deep.jpg", "--sigma", 25) == 0
    out = {path.name: Image.open(path) for path in Path("out").iterdir()}
    modes = {"deep.png": "I;16", "deep.tif": "I;16", "deep.jpg": "L", "palette.png": "RGB", "bits.png": "L"}
    modes |= {"transparent.png": "RGBA", "transparent_grey.png": "LA", "clear.png": "RGBA", "equal.bmp": "RGB"}
    assert {n: p.mode for n, p in out.items()} == {"colour.png": "RGB", "grey.png": "L"} | modes
    assert all(picture.size == (35, 33) for picture in out.values())
    for name in ("transparent.png", "transparent_grey.png"):
        np.testing.assert_array_equal(out[name].getchannel("A"), alpha)
    np.testing.assert_array_equal(out["clear.png"].getchannel("A"), 255 * (np.asarray(all_kinds["clear.png"]) > 0))
    assert len(np.unique(out["deep.png"])) > 1000  # more than 8 bits
    np.testing.assert_array_equal(out["equal.bmp"], np.asarray(out["grey.png"])[..., None].repeat(3, 2))
    # The network has no use for alpha: the colours are those without it.
    np.testing.assert_array_equal(out["transparent.png"].convert("RGB"), out["colour.png"])


def test_exif_data_of_a_wrong_type_do_not_cost_the_picture(run, capsys):
    """A resolution (tag 282) that is a text, where Pillow expects a fraction and fails to write one."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHI4sI", 1, 282, 2, 3, b"72\0\0", 0)
    write("a.jpg", noise(40, 48, 3), exif=exif)
    assert run("a.jpg", "-o", "a.tif", "--sigma", 5) == 0
    assert "its EXIF data cannot be stored there" in capsys.readouterr().err
    assert Image.open("a.tif").size == (48, 40)


@pytest.mark.parametrize("ending", sorted(pictures.IMAGE_FILES))
def test_every_ending_can_be_written(ending, tmp_path):
    for mode, size in itertools.product(("L", "RGB"), ((9, 7), (1, 1), (3000, 1), (1, 300))):
        path = tmp_path / f"x{ending}"
        image = Image.new(mode, size, "white")
        options, lost = picture_files.options_for(image, path)
        picture_files.write(image, path, options, overwrite=True)
        assert lost == ["colours beyond 256"] * (mode == "RGB" and ending == ".gif")
        assert np.asarray(Image.open(path).convert("L")).min() >= 254


def test_upright_with_profile_and_without_doubled_orientation(run):
    array, exif = noise(20, 40, 3), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # to be turned by 90 degrees clockwise
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write("turned.png", array, exif=exif, icc_profile=profile)
    write("upright.png", np.rot90(array, -1))
    write("grey.png", array[..., 0], icc_profile=profile)  # a profile for colours
    assert run("turned.png", "upright.png", "grey.png", "-o", "out", "--sigma", 25) == 0
    turned, upright = (Image.open(f"out/{name}.png") for name in ("turned", "upright"))
    np.testing.assert_array_equal(turned, upright)
    assert turned.size == (20, 40)
    assert dict(turned.getexif()) == {0x010F: "maker"}
    assert turned.info["icc_profile"] == profile
    assert "icc_profile" not in Image.open("out/grey.png").info


def test_what_a_format_cannot_hold_is_dropped_with_a_line(run, capsys):
    text = PngImagePlugin.PngInfo()
    text.add_text("icc_profile", "no profile at all")
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000  # a description longer than JPEG has room for
    write("in/a.png", noise(8, 8, 3), pnginfo=text)
    write("in/b.png", noise(8, 8, 3), icc_profile=b"broken" * 30)
    write("long.png", noise(8, 8, 3), exif=exif)
    assert run("in", "-o", "out", "--sigma", 25) == 0
    assert run("long.png", "-o", "long.jpg", "--sigma", 25) == 0
    assert "WARNING: long.png: its EXIF data cannot be stored there" in capsys.readouterr().err
    write("deep.png", noise(8, 8, dtype=np.uint16))
    assert run("deep.png", "-o", "deep.jpg", "--sigma", 25) == 0
    assert "WARNING: deep.png: its depth of 16 bits cannot be stored there" in capsys.readouterr().err
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "b.png"]
    assert all("icc_profile" not in Image.open(f"out/{name}.png").info for name in "ab")


def test_a_folder_with_bad_pictures(run, capsys):
    for name in ("a.png", "sub/b.png", "sub/huge.png"):
        write(f"in/{name}", noise(*((200, 200, 3) if "huge" in name else (8, 8, 3))))
    Path("in/sub/bad.png").write_bytes(Path("in/a.png").read_bytes()[:90])
    Path("in/notes.txt").write_text("no picture")
    assert run("in", "-o", "out/here", "--max-pixels", 9999, "--compare") == 1
    written = sorted(str(path.relative_to("out/here")) for path in Path("out").rglob("*.*"))
    assert written == ["a.png", "a_compare.png", "sub/b.png", "sub/b_compare.png"]
    out, err = capsys.readouterr()
    found = re.findall(r"in/\S+ -> out/here/\S+  sigma [\d.]+ \(estimated; [\d.]+ to [\d.]+\)\n", out)
    assert len(found) == 2
    assert re.search(r"left out: .*in/sub/bad.png cannot be read", err) and "sub/huge.png" in err
    assert err.count("in/sub/bad.png") == 1
    assert err.splitlines()[-1] == "error: 2 of 4 pictures were left out, see above; the others are written"
    assert run("in/sub/bad.png", "in/sub/huge.png", "-o", "none/", "--max-pixels", 9999) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: 2 of 2 pictures were left out, see above"


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), MemoryError(), KeyError("x"), OSError(28, "disk full")])
def test_nothing_that_one_picture_does_ends_the_others(error, run, monkeypatch, capsys):
    for name in "abc":
        write(f"in/{name}.png", noise(8, 8 + 4 * (name == "b"), 3))
    real = denoise.denoise_pixels

    def failing(network, noisy, *args):
        if noisy.shape[2] == 12:
            raise error
        return real(network, noisy, *args)

    monkeypatch.setattr(denoise, "denoise_pixels", failing)
    assert run("in", "-o", "out", "--sigma", 25) == 1
    assert sorted(os.listdir("out")) == ["a.png", "c.png"]
    assert re.search(r"left out: in/b.png: \S", capsys.readouterr().err)


REFUSED = {
    "none.png -o x.png": "none.png does not exist",
    "phone.heic -o x.png": "HEIC files such as phone.heic are not read; convert them",
    "phone.heic a.png -o x/": "HEIC files such as phone.heic",
    "a.png -o x": "x has no ending of a picture",
    "a.png -o x.txt": "x.txt has no ending of a picture",
    "a.png -o a.png --overwrite": "a.png is an input, which is never overwritten",
    "a.png -o link.png --overwrite": "link.png is an input, which is never overwritten",
    "a.png -o hard.png --overwrite": "hard.png is an input, which is never overwritten",
    "a.png -o .": "a.png is an input, which is never overwritten",
    "a.png -o b.png": "b.png exists; choose another output, or add --overwrite",
    "a.png -o c.png --compare": "c_compare.png exists",
    "a.png -o c.png --sheet": "c_sheet.png exists",
    "a.png a_sheet.png -o x --sheet": "a.png and a_sheet.png would both be written to x/a_sheet.png",
    "a.png -o folder.png/": "folder.png/a.png exists",
    "in a.png -o x/": "in/a.png and a.png would both be written to x/a.png",
    "a.png b.png -o b.png": "b.png is a file; several pictures need a folder",
    "a.png b.png -o new.png": "new.png has the ending of a picture; name a folder for several",
    "in -o new.jpg": "new.jpg has the ending of a picture; name a folder for several",
    "a.png -o dangling.png": "dangling.png exists",
    "a.png -o d.png --compare": "d_compare.png exists",
    "in -o in": "the output in is inside the input in",
    "in -o in/out": "the output in/out is inside the input in",
    "more -o .": "folder.png is a folder; choose another output",
    "empty -o x": "no pictures .* in empty",
    "alpha.png -o x.jpg": "x.jpg cannot be written .*choose another ending",
    "wide.png -o x.gif": "x.gif cannot be written",
    "wide.png -o x.tga": "x.tga cannot be written",
    "wide.png -o x.jpg": "x.jpg cannot be written",
    "wide.png -o x.webp": "x.webp cannot be written",
    "a.png -o a.png/x.png": "File exists: .a.png.",
    f"a.png -o {'x' * 252}.png": "x.png has a name of more than 255 bytes",
    f"a.png -o {'ü' * 123}.png --compare": "ü_compare.png has a name of more than 255 bytes",
    "a.png -o x.png --weights none.pth": "none.pth does not exist",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_before_the_network_runs(line, run, tmp_path, monkeypatch, capsys):
    names = "a.png", "b.png", "in/a.png", "folder.png/a.png", "c_compare.png", "c_sheet.png", "a_sheet.png"
    for name in (*names, "more/folder.png"):
        write(name, noise(8, 8, 3))
    Path("empty").mkdir()
    for link in ("dangling.png", "d_compare.png"):
        Path(link).symlink_to("nowhere.png")
    Path("phone.heic").write_bytes(b"ftypheic")
    write("alpha.png", noise(8, 8, 4))
    write("wide.png", np.zeros((1, 65_536, 3), np.uint8))
    Path("link.png").symlink_to("a.png")
    os.link("a.png", "hard.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(unet.UNet, "forward", None)  # which would be an error of another kind
    monkeypatch.setattr(tiles, "receptive_field", lambda model: 23)
    assert run(*line.split()) == 1
    assert re.match(f"error: .*({REFUSED[line]})", capsys.readouterr().err.splitlines()[-1])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_without_permission_is_refused_before_the_work(run, monkeypatch, capsys):
    write("a.png", noise(8, 8, 3))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(denoise, "denoise_pixels", None)
    assert run("a.png", "-o", "out/b.png") == 1
    assert "error: no permission to write into out; change its permissions" in capsys.readouterr().err


def test_the_device_and_the_precision_asked_for_reach_the_network(run, weights, monkeypatch):
    asked, load = [], denoise.load
    monkeypatch.setattr(denoise, "load", lambda *args: asked.append(args) or load(args[0]))
    write("a.png", noise(8, 8, 3))
    assert run("a.png", "-o", "b.png", "--sigma", 25, "--device", "cuda:7", "--precision", "bfloat16") == 0
    assert asked == [(str(weights["unet"]), "cuda:7", "bfloat16")]


def test_bfloat16_changes_little(small_unet):
    tiled, noisy = network(small_unet, 24), torch.from_numpy(noise(3, 40, 44, dtype=np.uint16))
    exact, fast = (
        denoise.denoise_pixels(tiled._replace(precision=precision), noisy, 25.5, ensemble=2).clean.float()
        for precision in ("float32", "bfloat16")
    )
    assert 0 < (fast - exact).abs().mean() < 0.1 * (exact - noisy.float()).abs().mean()


def test_pillows_own_limit_does_not_stand_in_the_way_of_max_pixels(run, monkeypatch):
    write("a.png", noise(20, 20, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # more than twice as many are an error
    assert run("a.png", "-o", "b.png", "--sigma", 25) == 0


def test_jpeg_files_are_of_quality_95_with_every_colour(run):
    write("a.png", noise(32, 32, 3))
    assert run("a.png", "-o", "b.jpg", "--sigma", 25) == 0
    written = Image.open("b.jpg")
    assert JpegImagePlugin.get_sampling(written) == 0  # 4:4:4
    assert written.quantization[0][0] == 2  # libjpeg's (16 * (200 - 2 * 95) + 50) // 100; 8 by default


@pytest.mark.parametrize("line", [("", "-o", "x/"), ("a.png", "", "-o", "x/"), ("a.png", "-o", "")])
def test_an_empty_name_is_not_the_folder_that_one_is_in(line, run, capsys):
    """As an unset variable of the shell gives it."""
    write("a.png", noise(8, 8, 3))
    assert run(*line) == 2
    assert "must be the name of a file or folder, not empty" in capsys.readouterr().err and not Path("x").exists()


@pytest.mark.parametrize("highest", [255, 4095, 65535])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_come_back_in_the_range_that_they_had(highest, ending, run):
    """Many cameras and microscopes write 12 bits, or 8, into 16; a format of 8 bits shows them at full brightness."""
    ramp = np.linspace(0, highest, 80 * 80).reshape(80, 80).round().astype(np.uint16)
    write(f"a.{ending}", ramp)
    assert run(f"a.{ending}", "-o", f"b.{ending}", "--sigma", 0.1) == 0
    assert run(f"a.{ending}", "-o", "b.jpg", "--sigma", 0.1) == 0
    b = Image.open(f"b.{ending}")
    assert b.mode == "I;16"
    np.testing.assert_allclose(np.asarray(b, float), ramp, atol=0.02 * highest)
    assert np.asarray(Image.open("b.jpg")).max() > 240


@pytest.mark.parametrize(
    "tags",
    [
        {256: 4000, 257: 3000},
        {256: 48, 257: 40, 274: 6},
        {262: 5, 258: 8, 277: 4},
        {262: 6},
        {339: 2},
        {273: 8, 279: 100, 322: 16},
    ],
)
def test_what_exif_says_of_its_own_file_does_not_spoil_a_tiff(tags, run):
    exif = Image.Exif()
    for tag, value in {**tags, 271: "maker"}.items():
        exif[tag] = value
    write("a.jpg", noise(40, 48, 3), exif=exif)
    assert run("a.jpg", "-o", "a.png", "--sigma", 25) == run("a.jpg", "-o", "a.tif", "--sigma", 25) == 0
    a, b = Image.open("a.tif"), Image.open("a.png")
    np.testing.assert_array_equal(a, b)
    assert a.mode == "RGB" and a.getexif()[271] == "maker"


def test_transparency_that_is_lost_is_said(run, capsys):
    write("a.png", noise(8, 8, 4))
    texts = dict(bmp="its transparency cannot", gif="its partial transparency cannot", png=None, tif=None, webp=None)
    for ending, text in texts.items():
        assert run("a.png", "-o", f"b.{ending}", "--sigma", 25) == 0
        said = capsys.readouterr().err
        assert "cannot be stored there" not in said if text is None else text in said
    write("grey.png", noise(8, 8, 2))
    assert run("grey.png", "-o", "grey.gif", "--sigma", 25) == 0
    assert "its transparency cannot" in capsys.readouterr().err
    holes = noise(8, 8, 4)
    holes[..., 3] = 255 * (np.arange(8) % 2)
    write("holes.png", holes)
    assert run("holes.png", "-o", "holes.gif", "--sigma", 25) == 0
    assert "transparency" not in capsys.readouterr().err
    np.testing.assert_array_equal(Image.open("holes.gif").convert("RGBA").getchannel("A"), holes[..., 3])


@pytest.mark.parametrize("ending", sorted(denoise.pictures.IMAGE_FILES))
def test_profile_and_exif_are_kept_or_their_loss_is_said(ending, run, capsys):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write("a.png", noise(32, 32, 3), exif=exif, icc_profile=profile)
    assert run("a.png", "-o", f"b{ending}", "--sigma", 25) == 0
    said, written = capsys.readouterr().err, Image.open(f"b{ending}")
    for name, kept in (("colour profile", "icc_profile" in written.info), ("EXIF data", bool(written.getexif()))):
        assert kept != (f"its {name} cannot be stored there" in said), name
    holds_both = {".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
    assert ("icc_profile" in written.info) == bool(written.getexif()) == (ending in holds_both)


def test_exif_of_every_source_reaches_every_target(run, capsys):
    """A WebP file has it without a prefix, and some programs write it into PNG files as text."""
    exif = Image.Exif()
    exif[0x010F] = "maker"
    write("a.webp", noise(32, 32, 3), exif=exif)
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}")
    write("b.png", noise(32, 32, 3), pnginfo=text)
    for source in ("a.webp", "b.png"):
        for ending in ("jpg", "png", "tif", "webp"):
            target = f"{source[0]}_clean.{ending}"
            assert run(source, "-o", target, "--sigma", 25) == 0
            assert Image.open(target).getexif()[0x010F] == "maker", target
    assert "WARNING" not in capsys.readouterr().err


def test_the_profile_of_a_grey_picture_does_not_go_into_a_format_without_grey(run, capsys):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"GRAY"
    write("a.png", noise(32, 32), icc_profile=bytes(profile))
    for ending, kept in (("png", True), ("webp", False)):
        assert run("a.png", "-o", f"b.{ending}", "--sigma", 25) == 0
        assert ("icc_profile" in Image.open(f"b.{ending}").info) == kept
        assert ("its colour profile cannot be stored there" in capsys.readouterr().err) != kept


@pytest.mark.parametrize("ending", ["jp2", "pgm"])
def test_other_formats_of_16_bits(ending, run, capsys):
    ramp = np.linspace(0, 65535, 80 * 80).reshape(80, 80).round().astype(np.uint16)
    write("a.png", ramp)
    assert run("a.png", "-o", f"b.{ending}", "--sigma", 0.1) == 0
    b = np.asarray(Image.open(f"b.{ending}"), float)
    np.testing.assert_allclose(b, ramp, atol=500)
    assert len(np.unique(b)) > 1000 and "depth" not in capsys.readouterr().err


def test_a_picture_named_twice_and_one_that_is_gone(run, capsys):
    write("in/a.png", noise(8, 8, 3))
    assert run("in/a.png", "./in/a.png", "-o", "out/", "--sigma", 25) == 0
    Path("in/gone.png").symlink_to("nowhere.png")
    assert run("in", "-o", "more", "--sigma", 25) == 1
    assert os.listdir("more") == ["a.png"] and "1 of 2 pictures were left out" in capsys.readouterr().err


def test_texts_in_a_file_are_not_taken_for_what_pillow_finds_there(run):
    texts = PngImagePlugin.PngInfo()
    for key in ("white", "dpi", "exif", "transparency"):
        texts.add_text(key, "300")
    write("a.png", noise(8, 8), pnginfo=texts)
    write("deep.png", noise(8, 8, dtype=np.uint16), pnginfo=texts)
    for name, ending in itertools.product(("a", "deep"), ("png", "bmp", "tif")):
        assert run(f"{name}.png", "-o", f"b_{name}.{ending}", "--sigma", 25) == 0


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_the_resolution_of_a_scan_stays(ending, run):
    write("a.png", noise(8, 8, 3), dpi=(300, 300))
    assert run("a.png", "-o", f"b.{ending}", "--sigma", 25) == 0
    assert [round(float(n)) for n in Image.open(f"b.{ending}").info["dpi"]] == [300, 300]


def test_a_picture_that_cannot_be_written_is_named(run, monkeypatch, capsys):
    write("a.png", noise(8, 8, 3))

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run("a.png", "-o", "out/b.png", "--sigma", 25) == 1
    assert capsys.readouterr().err.endswith("error: [Errno 28] No space left on device: 'out/b.png'\n")


@pytest.mark.parametrize("length", [240, 255])
def test_long_names_are_valid(length, run):
    write("a.png", noise(8, 8, 3))
    name = "ü" * ((length - 4) // 2) + "x" * ((length - 4) % 2) + ".png"
    assert len(name.encode()) == length
    assert run("a.png", "-o", name, "--sigma", 25) == 0
    assert Image.open(name).size == (8, 8)


def test_overwrite_replaces_an_output(run):
    write("a.png", noise(8, 8, 3))
    Path("b.png").write_text("what was there")
    original = Path("a.png").read_bytes()
    assert run("a.png", "-o", "b.png", "--overwrite", "--sigma", 9, "--steps", 2) == 0
    assert Image.open("b.png").size == (8, 8)
    assert Path("a.png").read_bytes() == original


@pytest.mark.parametrize("extra", ["", "_compare", "_sheet"])
def test_an_output_that_appears_meanwhile_is_not_overwritten(extra, run, monkeypatch, capsys):
    """Another run wrote it, after this one had looked."""
    for name in "ab":
        write(f"in/{name}.png", noise(8, 8, 3))
    flags = [f"--{extra[1:]}"] if extra else []
    real, theirs = denoise.denoise_pixels, Path(f"out/b{extra}.png")

    def slow(*args, **options):
        theirs.write_text("another run's")
        return real(*args, **options)

    monkeypatch.setattr(denoise, "denoise_pixels", slow)
    assert run("in", "-o", "out", "--sigma", 25, *flags) == 1
    assert theirs.read_text() == "another run's"
    assert Image.open("out/a.png").size == (8, 8)
    assert f"left out: in/b.png: {theirs} exists; choose another output" in capsys.readouterr().err
    assert run("in", "-o", "out", "--sigma", 25, "--overwrite", *flags) == 0
    assert Image.open(theirs).width >= 8


def test_an_interrupted_write_leaves_nothing(run, monkeypatch):
    write("a.png", noise(8, 8, 3))

    def interrupted(number):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert run("a.png", "-o", "out/b.png", "--sigma", 9) == 130
    assert list(Path("out").iterdir()) == []


def test_what_killed_runs_left_is_cleared_and_nothing_else(run):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    names = [f".tmp-{gone.pid}-{host}.part", f".tmp-{os.getpid()}-{host}.part", ".tmp-1-elsewhere.part", "my.part"]
    write("a.png", noise(8, 8, 3))
    Path("out").mkdir()
    for name in names:
        Path("out", name).write_text("")
    assert run("a.png", "-o", "out/", "--sigma", 25) == 0
    # That of this process would be overwritten by its own write, so it is gone too.
    assert sorted(os.listdir("out")) == sorted(["a.png", *names[2:]])


# ---- what it says ------------------------------------------------------------------------------------------------


def test_it_says_when_almost_nothing_was_removed(run, capsys):
    write("a.png", noise(40, 40, 3))
    assert run("a.png", "-o", "b.png", "--sigma", 0.1) == 0
    assert "WARNING: a.png: almost nothing was removed; try --sigma 15, 25 or 40" in capsys.readouterr().err
    assert run("a.png", "-o", "d.png", "--sigma", 25, "--strength", 0.01) == 0
    assert "almost nothing was removed; try a larger --strength" in capsys.readouterr().err
    assert run("a.png", "-o", "c.png", "--sigma", 40, "--strength", 1.5) == 0
    out, err = capsys.readouterr()
    assert "a.png -> c.png  sigma 40 (given), times 1.5\n" in out and "almost nothing" not in err


@pytest.mark.parametrize(
    "settings, grey, low, high",
    [
        ({}, False, 12.75, 114.75),
        ({"continuous_t": True}, False, 6.375, 121.125),
        ({"sigma_range": (1, 75)}, False, 1, 75),
        ({"sigma_range": (1, 75)}, True, 1 / math.sqrt(3), 75 / math.sqrt(3)),
    ],
)
def test_a_warning_outside_the_trained_levels(settings, grey, low, high):
    train_cfg = config.defaults(unet.SETTINGS | data.SETTINGS | data.NOISE_SETTINGS, **settings)
    noisy, clean = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    noisy[1] = 0.5  # colours
    model = network(None)._replace(train_cfg=train_cfg)

    def doubt(sigma):
        level = denoise.Level(sigma / 2, 0, 255)
        result = denoise.Result(clean, level, math.sqrt(3) if grey else 1)
        return denoise.doubt(noisy, result, model, strength=2)

    assert doubt(0.6 * low) is doubt(high) is None
    for sigma in (0.4 * low, 1.2 * high):
        text = doubt(sigma)
        assert f"was trained on {low:.1f} to {high:.1f}" in text and ("(grey)" in text) == grey
        assert text.endswith("; look at the result, or give another --sigma")
    model = model._replace(path=checkpoint.PHOTO)
    assert doubt(1.2 * high).endswith("for white noise try --weights model/unet32.pth")
    assert doubt(0.4 * low).endswith("give another --sigma")
    noisy[:] = 0.5  # grey, of which the other network knows less
    noisy = noisy[:1]
    assert doubt(1.2 * high).endswith("give another --sigma")


def blocks(array, y, x, size, scale):
    """The part of an array of which every scale x scale square is one pixel of an enlarged picture."""
    part = array[y : y + size * scale, x : x + size * scale]
    np.testing.assert_array_equal(part, part[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))
    return part[::scale, ::scale]


def test_compare_enlarges_the_middle(run):
    array = noise(300, 500, 3)
    write("a.png", array)
    assert run("a.png", "-o", "b.png", "--sigma", 30, "--compare") == 0
    figure = np.asarray(Image.open("b_compare.png"))
    size, gap = sheets.MIDDLE, sheets.GAP
    after = np.asarray(Image.open("b.png"))
    for column, picture in enumerate((array, after)):
        part = blocks(figure, len(figure) - gap - 3 * size, gap + column * (3 * size + gap), size, 3)
        np.testing.assert_array_equal(part, picture[50:250, 150:350])


@pytest.mark.parametrize("sigma, label", [(30, "strength"), (2, "sigma")])
def test_the_sheet_shows_the_strengths_side_by_side(sigma, label):
    array = torch.from_numpy(noise(3, 220, 260))
    asked = []

    def denoised(crop, level):
        asked.append(level)
        return crop // (len(asked) + 1)

    figure = np.asarray(sheets.strengths(array, sigma, denoised))
    levels = [sigma * s for s in sheets.STRENGTHS] if label == "strength" else sheets.SIGMAS
    assert asked == pytest.approx(levels)
    size, gap, line = sheets.MIDDLE, sheets.GAP, sheets.LINE
    for i in range(1 + len(levels)):
        y, x = gap + line + i // 4 * (2 * size + gap + line), gap + i % 4 * (2 * size + gap)
        part = blocks(figure, y, x, size, 2)
        np.testing.assert_array_equal(part, array[:, 10:210, 30:230].permute(1, 2, 0) // max(1, i + 1))
        assert (figure[y - line : y - 4, x : x + 100] < 100).any()  # its label


def test_sheets_of_small_and_deep_pictures(run):
    for name, array in {"tiny.png": noise(1, 1, 3), "thin.png": noise(2, 900), "deep.png": DEEP}.items():
        write(f"in/{name}", array)
    assert run("in", "-o", "out", "--sigma", 30, "--sheet", "--compare") == 0
    assert len(os.listdir("out")) == 9


def test_the_sheet_is_made_as_the_output_is(run):
    """In as many steps, and over as many orientations."""
    write("a.png", noise(40, 40, 3))
    size, gap, line = sheets.LEAST_WIDTH, sheets.GAP, sheets.LINE
    for name, flags in (("once", ()), ("steps", ("--steps", 4)), ("ensemble", ("--ensemble", 8))):
        assert run("a.png", "-o", f"{name}.png", "--sigma", 60, *flags, "--sheet") == 0
        sheet = np.asarray(Image.open(f"{name}_sheet.png"))
        column = 1 + sheets.STRENGTHS.index(1)
        part = blocks(sheet, gap + line, gap + column * (size + gap), 40, 2)
        np.testing.assert_array_equal(part, np.asarray(Image.open(f"{name}.png")))
    once = np.asarray(Image.open("once.png"))
    assert all((once != np.asarray(Image.open(f"{name}.png"))).any() for name in ("steps", "ensemble"))


def test_as_a_user_runs_it(script, weights, tmp_path):
    """With a name that the terminal cannot encode."""
    name = os.fsdecode(b"gr\xc3\xbcn\xff.png")
    Image.fromarray(noise(300, 100, 3)).save(tmp_path / name)
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(8, 8)).save(tmp_path / "in" / "b.png")
    command = ("denoise.py", name, "in", "-o", "out", "--sigma", 25, "--compare", "--weights", weights["unet"])
    process = script(*command, "--device", "cpu", PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert re.search(r"gr\?+n\?\S* -> out/gr\?+n\?\S*  sigma 25 \(given\)", process.stdout)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [name, name.replace(".png", "_compare.png"), "b.png", "b_compare.png"]
    )
    assert Image.open(tmp_path / "out" / name).size == (100, 300)
