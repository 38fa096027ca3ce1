"""Measuring: what denoisers make of noisy images, as flat records with a number for each image.

A denoiser is estimate(x_t, sigma) -> x0_hat, images (B, 3, H, W) in [-1, 1] and sigma on that scale. The noise of an
image follows from its place alone: it is the same for every denoiser, level and run.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import data
import diffusion
from diffusion import GREY_LEVELS
from support import devices, figures, metrics, sheets, streams
from support.held_out import in_parts
from support.metrics import METRICS

LITERATURE = (15, 25, 50)  # sigma on the 0-255 scale
MOST_LEVELS = 17  # integer noise levels, besides those of the literature
STEPS = (1, 2, 3, 5, 10, 20, 50)  # of the perception-distortion curve, as far as they are fewer than the last


class Job(NamedTuple):
    """A method to measure at one noise level."""

    method: str  # this, steps and sampler: as in Record
    t: float  # the network's time step of the level
    denoisers: list  # settings of the method, of which the best by PSNR counts; [None]: the clean images themselves
    steps: int = 0
    sampler: str = ""
    count: Any = None  # images, the first ones; None: all


@dataclasses.dataclass(frozen=True)
class Record:
    """What one method makes of images at one noise level."""

    method: str  # "noisy", "clean", "network", "control", "blur", "BM3D", ...
    sigma: float  # the noise level, 0-255 scale
    values: dict  # {quantity: (n,) tensor, a number for each image}
    t: float = 0  # the network's time step of that level; 0 where the tables do not show it
    steps: int = 0  # of the sampler; 0: there is none
    sampler: str = ""  # one of diffusion.SAMPLERS, or ""

    @property
    def count(self):
        """How many images."""
        return len(next(iter(self.values.values())))

    def first(self, count):
        """The record of the first `count` images alone."""
        return dataclasses.replace(self, values={name: values[:count] for name, values in self.values.items()})


# ---- levels and steps ------------------------------------------------------------------------------------------


def levels_of(T):
    """The time steps to measure at: 1 ... T-1, or the middles of MOST_LEVELS equal parts; and those of LITERATURE."""
    count = min(T - 1, MOST_LEVELS)
    integers = {round(0.5 + (k + 0.5) * (T - 1) / count) for k in range(count)}
    return sorted(integers | {diffusion.t_of(sigma / GREY_LEVELS, T) for sigma in LITERATURE})


def levels_with_many_steps(T):
    """The levels of levels_of(T) at which many numbers of steps are tried: the nearest to those that figures show."""
    return sorted({min(levels_of(T), key=lambda t: abs(t - shown)) for shown in figures.shown_levels(T)})


def step_counts(t, T, last):
    """The numbers of steps to try from level t, besides 1: the last, and at levels_with_many_steps others too."""
    last = last or min(math.ceil(t), figures.MOST_STEPS)
    return sorted(({k for k in STEPS if k < last and t in levels_with_many_steps(T)} | {last}) - {1})


# ---- denoisers --------------------------------------------------------------------------------------------------


def noisy(x_t, sigma):
    return x_t


def estimator(model, T, steps=1, sampler="euler"):
    """The estimate of a model(x, t), see diffusion.denoise_steps."""

    def estimate(x_t, sigma):
        t = torch.full((len(x_t),), diffusion.t_of(sigma, T), device=x_t.device)
        return diffusion.denoise_steps(model, x_t, t, T, steps, sampler)

    return estimate


def in_precision(model, precision, ensemble=1):
    """model(x, t) under autocast, see also held_out.in_parts; ensemble: see diffusion.self_ensemble."""
    average = diffusion.self_ensemble(in_parts(model), ensemble)

    def eps_hat(x, t):
        with devices.autocast(x.device, precision):
            return average(x, t)

    return eps_hat


# ---- images of one size -----------------------------------------------------------------------------------------


def batches(images):
    """x0 and eps of uint8 images, data.TEST_BATCH at a time; an image's eps follows from its place among them."""
    for start in range(0, len(images), data.TEST_BATCH):
        x0 = data.scale(images[start : start + data.TEST_BATCH])
        yield x0, data.held_out_noise(x0, start)


def quality(x0_hat, x0, x_t, sigma):
    """What the tables show of estimates x0_hat of x0 from x_t = x0 + sigma * eps: a dict of (B,).

    loss is the mean squared error of eps_hat = (x_t - x0_hat) / sigma.
    """
    return dict(
        loss=(x0_hat - x0).square().mean(dim=(1, 2, 3)) / sigma**2,
        autocorrelation=metrics.autocorrelation(x_t - x0_hat),
        **{key: metric.measure(x0_hat, x0) for key, metric in METRICS.items()},
        **dict(zip(metrics.BANDS, metrics.band_power(x0_hat).unbind(1))),
    )


def measure(images, sigma, estimate):
    """The `quality` of estimate(x_t, sigma) for uint8 images; estimate None: of the clean images themselves."""
    parts = []
    for x0, eps in batches(images):
        x_t = x0 + sigma * eps
        parts.append(quality(estimate(x_t, sigma).float() if estimate else x0, x0, x_t, sigma))
    return joined(parts)


def joined(parts):
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def run(jobs, T, images):
    """The Record of each Job on uint8 images."""
    records = []
    total = sum(len(images[: job.count]) * len(job.denoisers) for job in jobs)
    with tqdm(total=total, unit="image", delay=2, leave=False, mininterval=1) as bar:
        for job in jobs:
            bar.set_description(f"{job.method}, {job.steps} steps" if job.steps > 1 else job.method, refresh=False)
            sigma, found = diffusion.sigma_of(job.t, T), []
            for denoiser in job.denoisers:
                found.append(measure(images[: job.count], sigma, denoiser))
                bar.update(len(images[: job.count]))
            best = max(found, key=lambda values: values["psnr"].mean())
            records.append(Record(job.method, GREY_LEVELS * sigma, best, job.t, job.steps, job.sampler))
    return records


def blind(images, sigmas, estimators):
    """Records of {"error": estimated - true sigma}, 0-255 scale. estimators: {name: estimate(x_t) -> sigma (B,)}."""
    records = []
    for sigma, name in tqdm([*itertools.product(sigmas, estimators)], "sigma estimated", delay=2, leave=False):
        x_ts = (x0 + sigma / GREY_LEVELS * eps for x0, eps in batches(images))
        found = torch.cat([GREY_LEVELS * estimators[name](x_t).cpu().double() for x_t in x_ts])
        records.append(Record(name, sigma, {"error": found - sigma}))
    return records


# ---- whole pictures ---------------------------------------------------------------------------------------------


def middles(pictures, size, count):
    """The middles, uint8 (N, 3, size, size), of the first `count` pictures that are at least size x size."""
    crops = (sheets.middle(read(), size).clone() for read in pictures)
    large = list(itertools.islice((crop for crop in crops if crop.shape[1:] == (size, size)), count))
    return torch.stack(large) if large else torch.empty(0, 3, size, size, dtype=torch.uint8)


def run_whole(pictures, sigmas, denoisers):
    """Records of METRICS for whole pictures of any sizes, of which one at a time is in memory.

    pictures: functions read() -> uint8 (3, H, W). sigmas: 0-255 scale. denoisers: {method: (number of pictures to give
    it, estimate)}, whose x_t is on the CPU. As in the literature the noise is not rounded, nor x_t clipped.
    """
    parts = {key: [] for key in itertools.product(denoisers, sigmas)}
    for i, read in enumerate(tqdm(pictures, "whole pictures", delay=2, leave=False)):
        x0 = data.scale(read()[None])
        eps = torch.randn(x0.shape, generator=streams.generator("cpu", 0, streams.HELD_OUT_NOISE, i))
        for method, sigma in parts:
            count, estimate = denoisers[method]
            if i < count:
                x0_hat = estimate(x0 + sigma / GREY_LEVELS * eps, sigma / GREY_LEVELS).float()
                parts[method, sigma].append({key: metric.measure(x0_hat, x0) for key, metric in METRICS.items()})
    return [Record(method, sigma, joined(found)) for (method, sigma), found in parts.items()]
