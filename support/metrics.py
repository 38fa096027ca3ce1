"""Measures of image quality, and their intervals: pure functions.

Images are (B, C, H, W) in [-1, 1], of any height and width from 1 up; a measure is a number for each of them, (B,).
PSNR and SSIM are those of the literature: of images clipped to the valid range, on the 0-255 scale.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion import GREY_LEVELS

BANDS = {"low": (0, 1 / 6), "middle": (1 / 6, 1 / 3), "high": (1 / 3, 1 / 2)}  # radial frequencies, cycles a pixel


def psnr(x, x0):
    """Peak signal-to-noise ratio in dB; infinite where x, clipped, equals x0."""
    error = GREY_LEVELS * (x.float().clamp(-1, 1) - x0.float().clamp(-1, 1))
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))


def ssim(x, x0):
    """Structural similarity (Wang et al. 2004, IEEE TIP 13(4)), from -1 to 1 (x equals x0), mean over channels.

    Gaussian window of 11 pixels with sigma 1.5, at every place where it fits into the image. Where the image is lower
    or narrower than 11 pixels the window is cut to its size; of one pixel only the luminance is compared.
    """
    a, b = (GREY_LEVELS * (images.float().clamp(-1, 1) + 1) for images in (x, x0))
    down, across = (gaussian_filter(size, x.device) for size in x.shape[2:])
    mean_a, mean_b, aa, bb, ab = down @ torch.stack((a, b, a * a, b * b, a * b)) @ across.T
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean(dim=(1, 2, 3))


def gaussian_filter(size, device):
    """SSIM's window along a side of `size` pixels as a matrix: multiplying is faster than convolving one channel."""
    width = min(11, size)
    window = torch.exp(-((torch.arange(width, device=device) - (width - 1) / 2) ** 2) / (2 * 1.5**2))
    places = size - width + 1
    return torch.stack([F.pad(window / window.sum(), (i, places - 1 - i)) for i in range(places)])


class Metric(NamedTuple):
    name: str  # the heading of its column
    measure: Callable  # measure(x, x0) -> (B,)
    digits: int  # after the decimal point
    higher_is_better: bool = True


# To add one: a function of (x, x0), and its line here; every table of evaluate.py then shows it.
METRICS = {
    "psnr": Metric("PSNR", psnr, 2),
    "ssim": Metric("SSIM", ssim, 4),
}


def band_power(x):
    """Power in each of BANDS, mean over channels, (B, 3): the radial power spectrum in three steps.

    Of images clipped to [-1, 1], without their mean, under a Hann window: edges of the frame are not detail. Zero for
    constant images, and for sides of two pixels, which the window leaves nothing of.
    """
    x = x.float().clamp(-1, 1)
    height, width = (torch.hann_window(size, periodic=False, device=x.device) for size in x.shape[2:])
    x = (x - x.mean(dim=(2, 3), keepdim=True)) * height[:, None] * width
    power = torch.fft.fft2(x).abs().square().mean(dim=1)
    y_frequency, x_frequency = (torch.fft.fftfreq(size, device=x.device) for size in x.shape[2:])
    radius = torch.hypot(y_frequency[:, None], x_frequency)
    return torch.stack([power[:, (radius > low) & (radius <= high)].sum(1) for low, high in BANDS.values()], 1)


def autocorrelation(residual):
    """Mean absolute autocorrelation at the four neighbouring lags, mean over channels: how far from white noise.

    It is a residual whiteness measure (Almeida & Figueiredo 2013, IEEE TIP 22(7)). White noise has 0 in expectation
    at each lag, and so sqrt(2 / pi / pixels) here, 0.025 in 32x32 pixels. 0 for a constant residual.
    """
    r = residual.float() - residual.float().mean(dim=(2, 3), keepdim=True)
    lags = (
        (r[..., :, 1:] * r[..., :, :-1]).sum(dim=(2, 3)),
        (r[..., 1:, :] * r[..., :-1, :]).sum(dim=(2, 3)),
        (r[..., 1:, 1:] * r[..., :-1, :-1]).sum(dim=(2, 3)),
        (r[..., 1:, :-1] * r[..., :-1, 1:]).sum(dim=(2, 3)),
    )
    power = r.square().sum(dim=(2, 3))
    rounding = (8 * torch.finfo(r.dtype).eps) ** 2 * residual.float().square().sum(dim=(2, 3))  # of the mean
    correlation = torch.where(power > rounding, torch.stack(lags) / power, 0)
    return correlation.abs().mean(dim=(0, 2))


def interval(values, reference=None):
    """(mean, half of its 95% interval) over images; of the ratio of two means (Cochran 1977) if there is a reference.

    None stands for what is not a finite number, and for the interval of fewer than two images.
    """
    values = values.double()
    scale = 1.0 if reference is None else reference.double().mean().item()
    mean = values.mean().item() / scale if scale else math.nan
    deviations = values if reference is None else values - mean * reference
    spread = deviations.std().item() if len(values) > 1 else math.nan
    half = 1.96 * spread / math.sqrt(len(values)) / scale if scale else math.nan
    return tuple(number if math.isfinite(number) else None for number in (mean, half))
