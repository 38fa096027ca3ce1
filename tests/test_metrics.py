"""The measures against independent formulas, on ordinary images and on those where a formula divides by nothing."""

import math

import numpy as np
import pytest
import torch

from support import metrics


def grey_levels(x):
    return (x.double().clamp(-1, 1).numpy() + 1) * 127.5


def test_ssim_is_wang_and_others_formula(pair):
    x0, x = (images[:, :, :14, :13] for images in pair)  # not square
    a, b = grey_levels(x), grey_levels(x0)
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    for i in range(3):
        found = []
        for c, y, z in np.ndindex(3, 4, 3):
            p, q = a[i, c, y : y + 11, z : z + 11], b[i, c, y : y + 11, z : z + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            cov = (window * (p - mean_p) * (q - mean_q)).sum()
            luminance = (2 * mean_p * mean_q + 6.5025) / (mean_p**2 + mean_q**2 + 6.5025)
            found.append(luminance * (2 * cov + 58.5225) / (var_p + var_q + 58.5225))
        assert metrics.ssim(x, x0)[i].item() == pytest.approx(np.mean(found), abs=1e-5)
    torch.testing.assert_close(metrics.ssim(x0, x0), torch.ones(3))


def test_ssim_is_scikit_images(pair):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    x0, x = pair
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=0)
    expected = [structural_similarity(a, b, **options) for a, b in zip(grey_levels(x), grey_levels(x0))]
    np.testing.assert_allclose(metrics.ssim(x, x0).numpy(), expected, atol=1e-4)


def test_a_wave_has_its_power_in_its_band():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for band, cycles in enumerate(((3, 0), (6, 6), (0, 13))):
        wave = 0.4 + 0.5 * torch.cos(2 * math.pi * (cycles[0] * y + cycles[1] * x) / 32)  # its mean is left out
        power = metrics.band_power(wave.expand(1, 3, 32, 32))[0]
        assert power[band] > 0.98 * power.sum()
        # Parseval: half the squared amplitude in each pixel, under the window.
        window = np.outer(np.hanning(32), np.hanning(32))
        expected = 1024 * (0.5 * (0.5 * window) ** 2).sum()
        assert power.sum().item() == pytest.approx(expected, rel=0.05)
    torch.testing.assert_close(metrics.band_power(0.5 * wave[None, None]) * 4, power[None], rtol=1e-4, atol=1e-2)


def test_autocorrelation_of_white_noise_and_of_a_filter_of_it():
    random = torch.Generator().manual_seed(0)
    white = torch.randn(300, 3, 32, 32, generator=random)
    assert metrics.autocorrelation(white).mean().item() == pytest.approx(math.sqrt(2 / math.pi / 1024), rel=0.05)
    # x[i] + x[i + 1] along both axes: 1/2 at the lags along an axis, 1/4 along the diagonals, less the pairs that the
    # edges of 32 pixels cut off.
    smooth = white + white.roll(1, 2)
    smooth = smooth + smooth.roll(1, 3)
    assert metrics.autocorrelation(smooth + 5).mean().item() == pytest.approx(
        (31 / 32 / 2 + (31 / 32) ** 2 / 4) / 2, abs=0.005
    )
    # One picture by numpy's own correlation coefficient, which centres each of the two parts anew.
    r = smooth[0, 0].numpy()
    parts = ((r[:, 1:], r[:, :-1]), (r[1:], r[:-1]), (r[1:, 1:], r[:-1, :-1]), (r[1:, :-1], r[:-1, 1:]))
    expected = np.mean([abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in parts])
    assert metrics.autocorrelation(smooth[:1, :1]).item() == pytest.approx(expected, abs=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = torch.Generator().manual_seed(0)
    values = 3 + torch.randn(700, 50, generator=random)
    reference = 2 + 0.1 * torch.randn(700, 50, generator=random)
    mean, half = metrics.interval(values[0])
    assert mean == pytest.approx(values[0].mean().item())
    assert half == pytest.approx(1.96 * np.std(values[0].numpy(), ddof=1) / math.sqrt(50), rel=1e-5)
    for truth, found in (
        (3, [metrics.interval(v) for v in values]),
        (1.5, [metrics.interval(v, r) for v, r in zip(values, reference)]),
    ):
        assert np.mean([abs(mean - truth) < half for mean, half in found]) == pytest.approx(0.94, abs=0.03)
    assert metrics.interval(torch.tensor([2.0])) == (2.0, None)
    assert metrics.interval(torch.tensor([1.0, math.inf])) == (None, None)
    assert metrics.interval(torch.ones(2), torch.zeros(2)) == (None, None)


def test_psnr_is_that_of_clipped_images_on_the_grey_scale(pair):
    x0, x = pair
    error = grey_levels(x) - grey_levels(x0)
    expected = 10 * np.log10(255**2 / (error**2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics.psnr(x, x0).numpy(), expected, rtol=1e-5)
    assert metrics.psnr(torch.full_like(x0, 1.0), torch.full_like(x0, -1.0)).tolist() == pytest.approx([0, 0, 0])


SHAPES = [(1, 1), (1, 40), (40, 1), (2, 2), (3, 7), (10, 12), (11, 11), (16, 20)]


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_any_size_have_finite_measures(shape):
    random = torch.Generator().manual_seed(0)
    x0, x = (torch.rand(2, 3, *shape, generator=random) * 2 - 1 for _ in range(2))
    for values in (metrics.psnr(x, x0), metrics.ssim(x, x0), metrics.autocorrelation(x), metrics.band_power(x)):
        assert len(values) == 2 and values.isfinite().all()
    assert (metrics.ssim(x, x0) < 0.999).all()
    torch.testing.assert_close(metrics.ssim(x0, x0), torch.ones(2))
    if shape == (1, 1):  # the luminance alone
        a, b = grey_levels(x), grey_levels(x0)
        expected = ((2 * a * b + 6.5025) / (a**2 + b**2 + 6.5025)).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(metrics.ssim(x, x0).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 1.0])
def test_constant_images_have_the_documented_measures(value):
    x0 = torch.full((2, 3, 32, 32), value)
    assert metrics.psnr(x0, x0).tolist() == [math.inf] * 2  # documented
    torch.testing.assert_close(metrics.ssim(x0, x0), torch.ones(2))
    assert metrics.autocorrelation(x0).tolist() == [0, 0]
    assert metrics.band_power(x0).abs().max() < 1e-6
    x = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    assert metrics.psnr(x, x0).isfinite().all() and metrics.ssim(x, x0).isfinite().all()
    # An infinite or undefined mean is left out of tables, and no error.
    assert metrics.interval(metrics.psnr(x0, x0)) == (None, None)
    assert metrics.interval(metrics.band_power(x)[:, 2], metrics.band_power(x0)[:, 2] * 0) == (None, None)


def test_every_metric_measures_each_image_by_itself(pair):
    x0, x = pair
    for metric in metrics.METRICS.values():
        together, alone = metric.measure(x, x0), [metric.measure(x[i : i + 1], x0[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
        better = metric.measure(x0 + 0.1 * (x - x0), x0) > together
        assert better.all() if metric.higher_is_better else not better.any()
