"""Noise like that of real pictures, made from white noise: correlated, or compressed as JPEG."""

import io
import math

import numpy as np
import torch
from PIL import Image

import diffusion
from diffusion import GREY_LEVELS
from support.pixels import from_x, to_x

ROUNDING = math.sqrt(1 / 12) / GREY_LEVELS  # the noise level of 8 bits: no JPEG file has less


def correlate(eps, random, share):
    """White noise eps (B, 3, H, W) of unit variance, in a `share` of the images made like that of a camera or scanner.

    There it is correlated across pixels and channels, in the others it stays white: it is blurred by a Gaussian of 0 to
    0.8 pixels, and the differences between the channels become 0 to 2 times as strong (0: all three are equal). The
    mean variance of the channels stays 1.
    """
    chosen, width, chroma = torch.rand(3, len(eps), 1, 1, 1, generator=random, device=eps.device)
    width, chroma = 0.8 * width, 2 * chroma
    y, x = (torch.fft.fftfreq(n, device=eps.device) for n in eps.shape[2:])
    response = torch.exp(-2 * (math.pi * width * torch.hypot(y[:, None], x)) ** 2)
    gain = response.square().mean(dim=(2, 3), keepdim=True).sqrt()
    blurred = torch.fft.ifft2(torch.fft.fft2(eps) * response).real / gain
    common = blurred.mean(dim=1, keepdim=True)
    correlated = (common + chroma * (blurred - common)) / ((1 + 2 * chroma**2) / 3).sqrt()
    return torch.where(chosen < share, correlated, eps)


def compress(x0, t, eps, qualities, T):
    """(t, eps) after the noisy images, in 8 bits, went through JPEG at these qualities (B,); 0: they stay as they are.

    The noise of a compressed image is all that sets it apart from x0, (B, 3, H, W) in [-1, 1]; its t is that of this
    noise's root mean square, at most T, and its eps has unit variance as before.
    """
    t, eps = t.to(torch.float32, copy=True), eps.clone()
    for i in qualities.nonzero().flatten().tolist():
        noisy = diffusion.add_noise(x0[i : i + 1], eps[i : i + 1], t[i : i + 1], T)[0]
        pixels = through_jpeg(from_x(noisy, torch.uint8).cpu().numpy(), int(qualities[i]))
        noise = to_x(torch.from_numpy(pixels)).to(x0.device) - x0[i]
        sigma = noise.square().mean().sqrt().clamp(ROUNDING, diffusion.sigma_of(T, T))
        t[i], eps[i] = diffusion.t_of(sigma, T), noise / sigma
    return t, eps


def through_jpeg(pixels, quality, **options):
    """A uint8 array (C, H, W), C = 1 or 3, compressed with Pillow's `options` and read again."""
    file, image = io.BytesIO(), pixels.transpose(1, 2, 0)
    Image.fromarray(image if len(pixels) == 3 else image[..., 0]).save(file, "JPEG", quality=quality, **options)
    return np.atleast_3d(np.array(Image.open(file))).transpose(2, 0, 1)
