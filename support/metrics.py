"""Measures of images beside diffusion.psnr, and their intervals: pure functions.

Images are (B, C, H, W) in [-1, 1]; a measure is a number for each of them, (B,).
"""

import math

import torch
import torch.nn.functional as F

BANDS = {"low": (0, 1 / 6), "middle": (1 / 6, 1 / 3), "high": (1 / 3, 1 / 2)}  # radial frequencies, cycles a pixel


def ssim(x, x0):
    """Structural similarity (Wang et al. 2004), both clipped to [-1, 1] and compared on the 0-255 scale.

    Gaussian window of 11 pixels with sigma 1.5, where it fits into the image; mean over channels.
    """
    a, b = (127.5 * (images.float().clamp(-1, 1) + 1) for images in (x, x0))
    window = torch.exp(-((torch.arange(11, device=x.device) - 5.0) ** 2) / (2 * 1.5**2))

    def filters(size):  # a matrix that filters by multiplication, much faster than a convolution of one channel
        return torch.stack([F.pad(window / window.sum(), (i, size - 11 - i)) for i in range(size - 10)])

    down, across = filters(x.shape[2]), filters(x.shape[3])
    mean_a, mean_b, aa, bb, ab = down @ torch.stack((a, b, a * a, b * b, a * b)) @ across.T
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean(dim=(1, 2, 3))


def band_power(x):
    """Power in each of BANDS, mean over channels, (B, 3): the radial power spectrum in three steps.

    Of images clipped to [-1, 1], without their mean, under a Hann window: edges of the frame are not detail.
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
    at each lag, and so sqrt(2 / pi / pixels) here, 0.025 in 32x32 pixels.
    """
    r = residual.float() - residual.float().mean(dim=(2, 3), keepdim=True)
    lags = (
        (r[..., :, 1:] * r[..., :, :-1]).sum(dim=(2, 3)),
        (r[..., 1:, :] * r[..., :-1, :]).sum(dim=(2, 3)),
        (r[..., 1:, 1:] * r[..., :-1, :-1]).sum(dim=(2, 3)),
        (r[..., 1:, :-1] * r[..., :-1, 1:]).sum(dim=(2, 3)),
    )
    return (torch.stack(lags) / r.square().sum(dim=(2, 3))).abs().mean(dim=(0, 2))


def interval(values, reference=None):
    """(mean, half of its 95% interval over images), or of the ratio of the means of values and reference (Cochran 1977).

    None stands for what is not a number, and for the interval of fewer than two images.
    """
    values = values.double()
    scale = 1.0 if reference is None else reference.double().mean().item()
    mean = values.mean().item() / scale if scale else math.nan
    spread = (
        (values - mean * reference if reference is not None else values).std().item() if len(values) > 1 else math.nan
    )
    half = 1.96 * spread / math.sqrt(len(values)) / scale if scale else math.nan
    return tuple(number if math.isfinite(number) else None for number in (mean, half))
