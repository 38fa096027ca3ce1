"""Classical denoisers to compare with, all told the noise level: Gaussian blur, wavelets, non-local means, BM3D.

for name, settings in methods().items():
    x0_hat = settings[0](x_t, sigma)       # x_t (B, C, H, W), x_t - x0 of standard deviation sigma, both in [-1, 1]

All but the blur need the packages of requirements-bench.txt; bm3d is free for non-commercial use only.
"""

import functools
import importlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def methods():
    """{name: estimates with different settings, of which the best is taken}, as far as the packages are installed.

    All know sigma. BM3D has its authors' settings but for gamma, see bm3d_in_colour. The others' settings, and those of
    BM3D with blocks of 4x4 in place of 8x8 pixels, did best of many on 24 to 40 of CIFAR-10's training images.
    """
    found = {"blur": [functools.partial(blur, width=width / 10) for width in range(2, 31)]}
    missing = []
    if installed("skimage.restoration", "pywt"):
        settings = ((3, 7, 1.0), (3, 7, 1.2), (5, 6, 0.8), (5, 6, 1.0))
        found["wavelet"] = [by_picture(wavelet)]
        found["NLM"] = [by_picture(non_local_means, patch=p, distance=d, h=h) for p, d, h in settings]
    else:
        missing.append("wavelets and non-local means (scikit-image, PyWavelets)")
    if installed("bm3d"):
        small = dict(bs_ht=4, bs_wiener=4, step_ht=2, step_wiener=2, transform_2d_ht_name="dct")
        found["BM3D"] = [by_picture(bm3d_in_colour)]
        found["BM3D 4x4"] = [by_picture(bm3d_in_colour, **small)]
    else:
        missing.append("BM3D (bm3d)")
    if missing:
        print(f"left out: {' and '.join(missing)}; pip install -r requirements-bench.txt adds them")
    return found


def sigma_estimators():
    """{name: estimate(x_t) -> sigma (B,)} of the noise level, as far as scikit-image is installed."""
    return {"scikit-image": wavelet_deviation} if installed("skimage.restoration", "pywt") else {}


def installed(*modules):
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError:
        return False
    return True


# ---- denoisers --------------------------------------------------------------------------------------------------


def blur(x_t, sigma, width):
    """Gaussian weights with a standard deviation of `width` pixels, summing to 1 over the pixels inside the image."""

    def weights(size):
        place = torch.arange(size, device=x_t.device, dtype=x_t.dtype)
        return torch.softmax(-((place[:, None] - place) ** 2) / (2 * width**2), dim=1)

    return weights(x_t.shape[2]) @ x_t @ weights(x_t.shape[3]).T


def wavelet(picture, sigma):
    """BayesShrink (Chang et al. 2000) of Haar wavelets in YCbCr, averaged over 16 shifts (Coifman & Donoho 1995)."""
    from skimage.restoration import denoise_wavelet

    options = dict(sigma=sigma, wavelet="db1", convert2ycbcr=True, method="BayesShrink", channel_axis=-1)
    shifts = itertools.product(range(4), repeat=2)
    return np.mean(
        [np.roll(denoise_wavelet(np.roll(picture, (y, x), (0, 1)), **options), (-y, -x), (0, 1)) for y, x in shifts],
        axis=0,
    )


def non_local_means(picture, sigma, patch, distance, h):
    """Buades et al. 2005; patch, distance: pixels; h in units of sigma."""
    from skimage.restoration import denoise_nl_means

    options = dict(patch_size=patch, patch_distance=distance, h=h * sigma, fast_mode=False, sigma=sigma)
    return denoise_nl_means(picture, channel_axis=-1, **options)


BLOCK = 8  # pixels: BM3D compares blocks of this height and width


def bm3d_in_colour(picture, sigma, **settings):
    """Dabov et al. 2007; gamma corrects for coloured noise and would take ten times as long."""
    import bm3d

    profile = bm3d.BM3DProfile()
    for name, value in dict(settings, gamma=0, num_threads=1).items():
        setattr(profile, name, value)
    return bm3d.bm3d_rgb(picture, sigma, profile)


def wavelet_deviation(x_t):
    """sigma from the median absolute deviation of the finest wavelets (Donoho & Johnstone 1994), mean over channels."""
    from skimage.restoration import estimate_sigma

    found = [estimate_sigma(picture, average_sigmas=True, channel_axis=-1) for picture in to_pictures(x_t)]
    return 2 * torch.tensor(found)


# ---- single pictures --------------------------------------------------------------------------------------------


def by_picture(denoise, **settings):
    """estimate(x_t, sigma) by a denoiser of single pictures, denoise(picture (H, W, C) in [0, 1], sigma on that scale).

    The pictures of a batch are shared out among the processor's cores.
    """

    def estimate(x_t, sigma):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(lambda picture: denoise(picture, sigma / 2, **settings), to_pictures(x_t)))
        return torch.stack([torch.from_numpy(picture) for picture in done]).permute(0, 3, 1, 2).to(x_t) * 2 - 1

    return estimate


def to_pictures(x):
    """(B, C, H, W) in [-1, 1] as a float64 array (B, H, W, C) in [0, 1]; nothing is clipped."""
    return ((x.cpu().double() + 1) / 2).permute(0, 2, 3, 1).contiguous().numpy()
