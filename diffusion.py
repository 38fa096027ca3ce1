"""The noise process and its inverse: pure functions of tensors and of any callable model(x, t) -> eps_hat.

    x_t    = add_noise(x0, eps, t, T)          # linear noise, sigma = t / T
    loss   = noise_loss(model, x0, eps, t, T)
    x0_hat = denoise(model, x_t, t, T)         # one step: the MMSE estimate, best PSNR
    x0_hat = denoise_steps(model, x_t, t, T, steps=3)   # several steps: sharper
    sigma  = estimate_sigma(model, x_t, T)     # the noise level, from the noisy image alone

Shapes: images (B, C, H, W) in [-1, 1]; t (B,), integer or float, 0 <= t <= T. Nothing is clipped.
"""

import itertools

import torch
import torch.nn.functional as F

GREY_LEVELS = 127.5  # of the 0-255 scale in a unit of [-1, 1]: the literature's sigma = 25 is 25 / GREY_LEVELS here

# ---- the noise schedule: these two functions and nothing else ----------------------------------------------------


def sigma_of(t, T):
    """The noise level of step t of T: sigma = t / T. t: a number or a tensor."""
    return t / T


def t_of(sigma, T):
    """The step, fractional in general, of a noise level, a number or a tensor: the inverse of sigma_of."""
    return sigma * T


# ---- noise and loss ----------------------------------------------------------------------------------------------


def sigma_of_images(t, T, x):
    """sigma_of(t, T) as (B, 1, 1, 1), of the type of the images x (B, C, H, W) that it is to be multiplied with."""
    return sigma_of(t, T)[:, None, None, None].to(x.dtype)


def add_noise(x0, eps, t, T):
    """x_t = x0 + sigma * eps: variance-exploding noise (Song et al. 2021, arXiv 2011.13456)."""
    return x0 + sigma_of_images(t, T, x0) * eps


def noise_loss(model, x0, eps, t, T):
    """mean((eps_hat - eps)^2) over every element, a scalar (Ho et al. 2020, equation 14)."""
    eps_hat = model(add_noise(x0, eps, t, T), t)
    return F.mse_loss(eps_hat.float(), eps)


# ---- denoising ---------------------------------------------------------------------------------------------------


def denoise(model, x_t, t, T):
    """One step: x0_hat = x_t - sigma * eps_hat, an estimate of E[x0 | x_t] (Tweedie's formula, Robbins 1956)."""
    return x_t - sigma_of_images(t, T, x_t) * model(x_t, t).to(x_t.dtype)


def denoise_steps(model, x_t, t, T, steps, sampler="euler"):
    """`steps` steps, equal in t, down the probability-flow equation dx/dsigma = eps_hat, from the level of t to 0.

    sampler: one of SAMPLERS; one step of "euler" is `denoise`. Returns x0_hat, shaped like x_t.
    """
    # The last is exactly 0: at a tiny positive t heun would call the model, which is not trained for such a level.
    ts = [t.float() * (1 - k / steps) for k in range(steps + 1)]
    return SAMPLERS[sampler](model, x_t, ts, T)


def euler(model, x, ts, T):
    """Euler's method, which is DDIM with eta = 0 for this process (Song et al. 2021, arXiv 2010.02502).

    ts: the times to visit, each (B,), the first that of x.
    """
    for t, t_next in itertools.pairwise(ts):
        x = x + (sigma_of_images(t_next, T, x) - sigma_of_images(t, T, x)) * model(x, t).to(x.dtype)
    return x


def heun(model, x, ts, T):
    """Heun's method, of second order (Karras et al. 2022, arXiv 2206.00364, algorithm 1): two calls a step.

    The step to t = 0 is Euler's: there is no noise left to predict there.
    """
    for t, t_next in itertools.pairwise(ts):
        slope = model(x, t).to(x.dtype)
        change = sigma_of_images(t_next, T, x) - sigma_of_images(t, T, x)
        if (t_next > 0).any():
            slope = (slope + model(x + change * slope, t_next).to(x.dtype)) / 2
        x = x + change * slope
    return x


SAMPLERS = {"euler": euler, "heun": heun}  # to add one: a function of (model, x, ts, T), and its line here


# ---- a model made from another -----------------------------------------------------------------------------------


def self_ensemble(model, count):
    """A model whose eps_hat is the mean of `model`'s over the first `count`, 1 to 8, of an image's eight orientations.

    2: the image and its mirror image; 4: these, and both upside down; 8: with height and width swapped too. It helps
    where the model was trained on such images, at `count` times the cost (Lim et al. 2017, arXiv 1707.02921).
    """

    def mean_eps_hat(x, t):
        total = 0
        for turn in range(count):
            flipped = [dim for dim, bit in ((3, 1), (2, 2)) if turn & bit]
            turned = x.flip(flipped)
            eps_hat = model(turned.mT, t).mT if turn & 4 else model(turned, t)
            total = total + eps_hat.to(x.dtype).flip(flipped)
        return total / count

    return mean_eps_hat


def grey(model, T, gain):
    """A model of colour images as a model of grey ones, (B, 1, H, W).

    A grey image is a colour image of three equal channels, which share their noise. A model that was trained on such
    noise too is told its level: gain 1. One that knows only independent noise needs gain sqrt(3): along (1, 1, 1) /
    sqrt(3), the one direction in which there is noise, its level is sqrt(3) sigma. Other arguments reach the model.
    """

    def eps_hat(x, t, **options):
        told = t_of(gain * sigma_of(t, T), T)
        return gain * model(x.expand(-1, 3, -1, -1), told, **options).mean(dim=1, keepdim=True)

    return eps_hat


# ---- the noise level of an image ---------------------------------------------------------------------------------


def estimate_sigma(model, x_t, T, iterations=9, highest=None):
    """The noise level of each image from the image alone, (B,), on the [-1, 1] scale, for white noise.

    It is the level of greatest likelihood. The density p of the noisy images obeys the heat equation, dp/dsigma =
    sigma * laplacian(p), and its score is -eps_hat / sigma; hence d log p / dsigma = |eps_hat|^2 / sigma - div eps_hat.
    The root is found by bisection of 0 < t < highest (a time step, by default T); each iteration halves the interval.
    An answer next to either end means "at most" or "at least" that level. The divergence is Hutchinson's estimate
    (1990) with one fixed random probe. The model, called twice per iteration, must know the time step and be
    differentiable almost everywhere.
    """
    probe = 2 * torch.randint(2, x_t.shape, generator=torch.Generator().manual_seed(0)).to(x_t) - 1
    low = x_t.new_zeros(len(x_t))
    high = torch.full_like(low, T if highest is None else highest)
    for _ in range(iterations):
        t = (low + high) / 2
        sigma = sigma_of_images(t, T, x_t)
        h = 0.1 * sigma
        eps_hat = model(x_t, t).float()
        divergence = probe * (model(x_t + h * probe, t).float() - eps_hat) / h
        noisier = (eps_hat.square() - sigma * divergence).mean(dim=(1, 2, 3)) > 0
        low, high = torch.where(noisier, t, low), torch.where(noisier, high, t)
    return sigma_of((low + high) / 2, T)
