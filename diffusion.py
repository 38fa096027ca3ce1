"""The noise process and its inverse: pure functions of tensors and of any callable model(x, t) -> eps_hat.

    x_t    = add_noise(x0, eps, t, T)      # linear noise, sigma = t / T
    loss   = noise_loss(model, x0, eps, t, T)
    x0_hat = denoise(model, x_t, t, T)     # one step: the MMSE estimate, best PSNR
    x0_hat = denoise_steps(model, x_t, t, T)   # several steps: sharper

Shapes: images (B, C, H, W) in [-1, 1]; t (B,), integer or float, 0 <= t <= T. Nothing is clipped.
"""

import torch
import torch.nn.functional as F


def noise_level(t, T):
    """sigma = t / T for every image, as (B, 1, 1, 1). Times 127.5 it is the level on the 0-255 pixel scale."""
    return (t / T)[:, None, None, None]


def add_noise(x0, eps, t, T):
    """x_t = x0 + sigma * eps: variance-exploding noise, linear in t."""
    return x0 + noise_level(t, T) * eps


def noise_loss(model, x0, eps, t, T):
    """mean((eps_hat - eps)^2) over every element, a float32 scalar (Ho et al. 2020, equation 14)."""
    eps_hat = model(add_noise(x0, eps, t, T), t)
    return F.mse_loss(eps_hat.float(), eps)


def denoise(model, x_t, t, T):
    """One step: x0_hat = x_t - sigma * eps_hat, an estimate of E[x0 | x_t] (Tweedie's formula, Robbins 1956)."""
    return x_t - noise_level(t, T) * model(x_t, t).float()


def denoise_steps(model, x_t, t, T, steps=None):
    """Several steps: Euler's method on the probability-flow equation dx/dsigma = eps_hat, from sigma down to 0.

    It is DDIM with eta = 0 for this process (Song et al. 2021, arXiv 2010.02502; Karras et al. 2022, arXiv
    2206.00364). steps=None walks the integer grid t, t-1, ..., 0, which the model was trained on; a number K takes
    K equal steps through fractional t, and K = 1 is `denoise`. Returns x0_hat, shaped like x_t.
    """
    t = t.float()
    stride = torch.ones_like(t) if steps is None else t / steps
    x = x_t
    for k in range(int(t.max().ceil()) if steps is None else steps):
        t_now = (t - k * stride).clamp(min=0)
        t_next = (t - (k + 1) * stride).clamp(min=0)
        x = x + noise_level(t_next - t_now, T) * model(x, t_now).float()
    return x


def estimate_sigma(model, x_t, T):
    """The noise level of each image, (B,), as sigma on the [-1, 1] scale: where the predicted noise has unit variance."""
    low = torch.zeros(len(x_t), device=x_t.device)
    high = torch.full_like(low, T)
    for _ in range(10):
        t = (low + high) / 2
        too_low = model(x_t, t).float().var(dim=(1, 2, 3)) > 1
        low, high = torch.where(too_low, t, low), torch.where(too_low, high, t)
    return (low + high) / 2 / T


def psnr(x, x0):
    """Peak signal-to-noise ratio of each image in dB, (B,): both clipped to [-1, 1] and compared on the 0-255 scale."""
    error = 127.5 * (x.float().clamp(-1, 1) - x0.float().clamp(-1, 1))
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))
