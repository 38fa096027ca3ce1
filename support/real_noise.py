"""Noise like that of real pictures, made from white noise: correlated, or compressed as JPEG."""

import io
import math

import numpy as np
import torch
from PIL import Image

import diffusion
from diffusion import GREY_LEVELS
from support.pixels import from_x, to_x

ROUNDING = math.sqrt(1 / 12) / GREY_LEVELS  # the noise level of 8 bits; that of a compressed image is at least this


def correlate(eps, random, share):
    """White noise eps (B, 3, H, W) of unit variance, made correlated in a `share` of the images.

    Like the noise of a camera or scanner it is then correlated across pixels and channels: it is blurred by a Gaussian
    with a standard deviation of 0 to 0.8 pixels, and chroma, the differences of the channels from their mean, is scaled
    by 0 to 2 (0: three equal channels). The expected variance of every channel stays 1.
    """
    chosen, width, chroma = torch.rand(3, len(eps), 1, 1, 1, generator=random, device=eps.device)
    width, chroma = 0.8 * width, 2 * chroma
    y, x = (torch.fft.fftfreq(n, device=eps.device) for n in eps.shape[2:])
    response = torch.exp(-2 * (math.pi * width * torch.hypot(y[:, None], x)) ** 2)
    gain = response.square().mean(dim=(2, 3), keepdim=True).sqrt()
    blurred = torch.fft.ifft2(torch.fft.fft2(eps) * response).real / gain
    luma = blurred.mean(dim=1, keepdim=True)
    correlated = (luma + chroma * (blurred - luma)) / ((1 + 2 * chroma**2) / 3).sqrt()
    return torch.where(chosen < share, correlated, eps)


def compress(x0, t, eps, qualities, T):
    """(t, eps) after the noisy images, in 8 bits, went through JPEG at these qualities (B,); 0: they stay as they are.

    The noise of a compressed image is all that sets it apart from x0, (B, 3, H, W) in [-1, 1]. Its level is this
    noise's root mean square, but at least ROUNDING and at most that of T; its eps is the noise over its level. t: (B,),
    floating.
    """
    t, eps = t.clone(), eps.clone()
    chosen = qualities.nonzero().flatten()
    noisy = from_x(diffusion.add_noise(x0[chosen], eps[chosen], t[chosen], T), torch.uint8).cpu().numpy()
    after = [through_jpeg(*pair) for pair in zip(noisy, qualities[chosen].tolist())]
    if after:
        noise = to_x(torch.from_numpy(np.stack(after))).to(x0.device) - x0[chosen]
        sigma = noise.square().mean(dim=(1, 2, 3)).sqrt().clamp(ROUNDING, diffusion.sigma_of(T, T))
        t[chosen], eps[chosen] = diffusion.t_of(sigma, T), noise / sigma[:, None, None, None]
    return t, eps


def through_jpeg(pixels, quality, **options):
    """A uint8 array (C, H, W), C = 1 or 3, compressed with Pillow's `options` and read again."""
    file, image = io.BytesIO(), pixels.transpose(1, 2, 0)
    Image.fromarray(image if len(pixels) == 3 else image[..., 0]).save(file, "JPEG", quality=quality, **options)
    return np.atleast_3d(np.array(Image.open(file))).transpose(2, 0, 1)
