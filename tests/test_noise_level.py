"""Noise levels of synthetic pictures, whose noise is known because it was added."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.fit_noise_level
import diffusion
from benchmarks import noise_level as benchmark
from diffusion import GREY_LEVELS
from support import checkpoint, jpeg_traces, noise_level
from support.checkpoint import CheckpointError

T = 10


@pytest.fixture(scope="module")
def picture():
    """Smooth colours with edges, (3, 128, 192) uint8: no pixel is clipped, a third is a texture of strong contrast."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:128, :192] / 64
    waves = random.normal(0, 1, (3, 4, 3))
    smooth = sum(
        np.sin(w[:, 0, None, None] * x + w[:, 1, None, None] * y + w[:, 2, None, None])
        for w in waves.transpose(1, 0, 2)
    )
    clean = 128 + 15 * smooth
    clean[:, 40:90, 30:80] += np.array([30, -20, 10])[:, None, None]  # an edge
    clean[:, :, 128:] += random.normal(0, 25, (128, 64))  # a lawn, say
    return benchmark.to_8_bits(clean.clip(30, 225))


def found(pixels, *args):
    return np.array(noise_level.estimate(pixels, *args))


@pytest.mark.parametrize("sigma", [5, 20])
@pytest.mark.parametrize("kind", benchmark.KINDS)
def test_every_kind_of_noise(picture, kind, sigma):
    noisy = benchmark.degrade(kind, picture, sigma)
    assert found(noisy)[0] == pytest.approx(benchmark.true_sigma(picture, noisy), rel=0.15, abs=0.6)


def test_the_range_holds_the_level(picture):
    """Nine times out of ten is the promise; on so simple a picture more often."""
    outside, widths = [], []
    for kind, sigma in itertools.product(benchmark.KINDS, (5, 10, 20, 40)):
        noisy = benchmark.degrade(kind, picture, sigma)
        _, low, high = found(noisy)
        widths.append(high / max(low, 1e-6))
        if not low <= benchmark.true_sigma(picture, noisy) <= high:
            outside.append((kind, sigma))
    assert len(outside) <= 1, outside
    assert np.median(widths) < 1.5  # any range that begins at 0 would hold the level, too


@pytest.mark.parametrize("quality", [60, 75])
def test_the_steps_to_which_jpeg_rounds_are_those_of_the_file(quality):
    file, sigma = io.BytesIO(), 40
    noisy = np.random.default_rng(0).normal(128, sigma, (256, 256)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).convert("RGB").save(file, "JPEG", quality=quality)
    image = Image.open(file)
    table = np.array(image.quantization[0]).reshape(8, 8)  # of luma
    diagonal = np.add.outer(np.arange(8), np.arange(8))
    blocks, _ = noise_level.usable_blocks(noise_level.windows(np.asarray(image).transpose(2, 0, 1)))
    rows = jpeg_traces.quantization(blocks)
    for (low, high), (share_of_zeros, smallest, _) in zip(itertools.pairwise(jpeg_traces.DIAGONALS), rows):
        steps = table[(low <= diagonal) & (diagonal < high)]
        assert 0.9 * steps.min() < np.exp(smallest) < 1.1 * steps.max()
        # Of white noise every coefficient has the standard deviation sigma, and what is below half a step becomes 0.
        least, most = (math.erf(step / 2 / sigma / math.sqrt(2)) for step in (steps.min(), steps.max()))
        assert 0.85 * least < share_of_zeros < 1.15 * most


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("part", [np.s_[:, :40], np.s_[:, :, -24:], np.s_[:, 100:130, 30:150]])
def test_what_was_drawn_over_the_noise_is_not_looked_at(picture, channels, part):
    """A bar above, a bar at the right, a box: each of one colour."""
    noisy = benchmark.degrade("white", picture, 15)[:channels]
    expected = noise_level.estimate(noisy).sigma
    noisy[part] = np.array([30, 31, 35]).reshape(3, 1, 1)[:channels]
    assert expected > 12 and noise_level.estimate(noisy).sigma == pytest.approx(expected, rel=0.1)


def test_a_drawing_has_no_noise():
    """Two colours, a little of it shaded: what has no noise is then no reason to look elsewhere."""
    drawing = np.full((3, 256, 256), 60, np.uint8)
    drawing[:, 80:170, 50:200] = np.linspace(80, 200, 150)
    assert noise_level.estimate(drawing).sigma < 1


@pytest.mark.parametrize("y, x", [(0, 0), (3, 0), (5, 2), (7, 6)])
def test_the_grid_of_jpeg_is_found_after_a_cut(picture, y, x):
    noisy = benchmark.degrade("JPEG 85", picture, 5)[:, y:, x:]
    for pixels in (noisy, noisy[:1]):
        parts = noise_level.windows(pixels)
        assert [jpeg_traces.grid(parts, axis)[0] for axis in (1, 2)] == [-y % 8, -x % 8]
    white = noise_level.windows(benchmark.degrade("white", picture, 5)[:, y:, x:])
    assert [jpeg_traces.grid(white, axis)[0] for axis in (1, 2)] == [0, 0]
    # And so the level is that before the cut.
    assert found(noisy)[0] == pytest.approx(benchmark.true_sigma(picture[:, y:, x:], noisy), rel=0.15)


@pytest.mark.parametrize("kind", ["white", "blurred 0.8", "JPEG 95"])
def test_grey(picture, kind):
    grey = picture[:1]
    noisy = benchmark.degrade(kind, grey, 20)
    assert found(noisy)[0] == pytest.approx(benchmark.true_sigma(grey, noisy), rel=0.15)


def test_depth_and_type_make_no_difference(picture):
    noisy = benchmark.degrade("white", picture, 20)
    expected = found(noisy)
    np.testing.assert_allclose(found(noisy.astype(np.uint16) * 257), expected, rtol=1e-3)
    np.testing.assert_allclose(found(noisy / GREY_LEVELS - 1), expected, rtol=1e-3)


def test_clean(picture):
    assert found(picture)[0] < 2


def test_clipped_areas_are_no_flat_places(picture):
    bright = picture.astype(float)
    bright[:, 64:] = 280  # half of it is overexposed, and has lost its noise
    noisy = benchmark.degrade("white", bright, 20)
    assert (noisy == 255).mean() > 0.4
    assert found(noisy)[0] == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8000), (33, 47)])
@pytest.mark.parametrize("channels, value", [(1, 0), (3, 77), (3, 255)])
def test_constant_pictures_have_no_noise(shape, channels, value):
    pixels = np.full((channels, *shape), value, np.uint8)
    assert np.abs(found(pixels, lambda x: pytest.fail("the likelihood is not asked"))).max() < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (1, 8000), (300, 700)])
def test_pictures_of_any_shape(shape):
    pixels = np.random.default_rng(0).integers(100, 140, (3, *shape)).astype(np.uint8)
    assert np.isfinite(found(pixels)).all()
    assert (found(pixels) <= 60).all()


def test_a_small_picture_is_left_to_the_likelihood():
    """For pixels x0 ~ N(0, s^2) the best eps_hat is sigma x / (s^2 + sigma^2), and the level is var(x) - s^2."""
    s, sigma = 0.3, 0.2
    random = np.random.default_rng(0)
    x = random.normal(0, s, (3, 32, 32)) + random.normal(0, sigma, (3, 32, 32))

    def optimal_eps(x, t):
        level = (t / T)[:, None, None, None]
        return level * x / (s**2 + level**2)

    level = noise_level.estimate(x, lambda x: diffusion.estimate_sigma(optimal_eps, x, T))
    assert level.sigma == pytest.approx(GREY_LEVELS * np.sqrt(x.var() - s**2), rel=0.05)
    assert level.low < level.sigma < level.high


def test_a_large_picture_is_sampled():
    """24 megapixels, most of them never touched."""
    tile = np.random.default_rng(0).normal(128, 10, (3, 400, 600)).round().astype(np.uint8)
    pixels = np.broadcast_to(tile[:, None, :, None], (3, 10, 400, 10, 600)).reshape(3, 4000, 6000)
    assert found(pixels)[0] == pytest.approx(10, rel=0.15)
    assert sum(part[0].size for part in noise_level.windows(pixels)) == (8 * 64) ** 2


def test_windows_of_a_large_picture_lie_on_the_grid_of_jpeg():
    place = np.add.outer(10 * (np.arange(900) % 8), np.arange(1100) % 8).astype(np.uint8)[None]
    parts = noise_level.windows(place)
    assert len(parts) == 64
    for part in parts:
        np.testing.assert_array_equal(part[0], place[0, :64, :64])


# ---- noise of a camera -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 10), (3, 9, 11)])
def test_a_camera_sees_one_colour_a_pixel_and_interpolates_the_others(shape):
    noise = np.random.default_rng(0).standard_normal(shape)
    red, green, blue = benchmark.demosaiced(noise)
    unit = green[0, 1] / noise[1, 0, 1]
    np.testing.assert_allclose(red[::2, ::2], unit * 1.9**0.5 * noise[0, ::2, ::2])
    np.testing.assert_allclose(blue[1::2, 1::2], unit * 1.6**0.5 * noise[2, 1::2, 1::2])
    for y, x in ((2, 2), (3, 5)):
        assert green[y, x] == pytest.approx(
            np.mean([green[y - 1, x], green[y + 1, x], green[y, x - 1], green[y, x + 1]])
        )
    assert red[3, 4] == pytest.approx((red[2, 4] + red[4, 4]) / 2)
    assert red[3, 5] == pytest.approx(red[2:5:2, 4:7:2].mean())
    assert blue[2, 2] == pytest.approx(blue[1:4:2, 1:4:2].mean())
    assert np.mean([red.var(), green.var(), blue.var()]) == pytest.approx(noise.var(), rel=0.2)
    np.testing.assert_allclose(blue[0, 1::2], blue[1, 1::2])  # there is nothing above to interpolate with


# ---- the fit -----------------------------------------------------------------------------------------------------


def test_the_fit_finds_quantiles():
    """Levels that depend on two statistics, times a factor whose distribution is known."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(9000, noise_level.STATISTICS, generator=random)
    middle = (2 + features[:, 3] - 0.5 * features[:, 40]).exp()
    levels = middle * (0.1 * torch.randn(9000, generator=random)).exp()
    model = benchmarks.fit_noise_level.fit(features[:8000], levels[:8000], epochs=5)
    found = noise_level.from_logarithm(model(features[8000:]))
    assert (found[:, 0] / middle[8000:]).log().abs().median() < 0.2  # of 0.75 for a constant
    inside = (found[:, 1] <= levels[8000:]) & (levels[8000:] <= found[:, 2])
    assert inside.float().mean() == pytest.approx(0.9, abs=0.12)


def test_the_logarithm_of_a_level():
    levels = torch.tensor([0.0, 0.1, 1, 20, 100])
    torch.testing.assert_close(
        noise_level.from_logarithm(noise_level.logarithm_of(levels)), levels, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("seed", range(12))
def test_examples_are_pictures_with_noise(picture, seed):
    found = benchmarks.fit_noise_level.example(picture, [0, seed])
    assert found is not None
    features, level = found
    assert features.shape == (noise_level.STATISTICS,) and np.isfinite(features).all()
    assert 0 <= level < 100


def test_the_level_of_an_example_is_what_the_fit_finds(picture):
    """The shipped fit, whose levels are checked above against noise that is known."""
    pairs = [benchmarks.fit_noise_level.example(picture, [0, seed]) for seed in range(12)]
    found, true = np.array([(noise_level.regression().levels(features)[0], level) for features, level in pairs]).T
    assert np.median(np.abs(np.log((found + 1) / (true + 1)))) < 0.15


def test_missing_weights_are_named(monkeypatch, tmp_path, picture):
    state = checkpoint.read(noise_level.WEIGHTS)
    monkeypatch.setattr(noise_level, "WEIGHTS", tmp_path / "noise_level.pth")
    monkeypatch.setattr(noise_level, "regression", noise_level.regression.__wrapped__)
    message = r"noise_level\.pth is missing, damaged or of another version; restore it"
    with pytest.raises(CheckpointError, match=message):
        noise_level.estimate(picture)
    noise_level.WEIGHTS.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=message):
        noise_level.estimate(picture)
    checkpoint.save(noise_level.WEIGHTS, {"model": {}})
    with pytest.raises(CheckpointError, match=message):
        noise_level.estimate(picture)
    state["model"]["layers.0.bias"][7] += 1  # the checksum is that of the bits before
    torch.save(state, noise_level.WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        noise_level.estimate(picture)
    del state["checksum"]  # as before version 3.3
    torch.save(state, noise_level.WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        noise_level.estimate(picture)


@pytest.mark.parametrize("size, most, least", [(87, 2, 0.4), (88, 1, 1)])
def test_below_88_pixels_the_likelihood_decides_within_bounds(size, most, least):
    pixels = np.random.default_rng(0).integers(100, 140, (3, size, size)).astype(np.uint8)
    statistics = noise_level.estimate(pixels).sigma
    for likely, factor in ((1.0, most), (0.001, least)):
        found = noise_level.estimate(pixels, lambda x, likely=likely: torch.tensor([likely])).sigma
        assert found == pytest.approx(factor * statistics)
