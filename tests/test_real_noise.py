"""Noise like that of real pictures: what it keeps, and what it is."""

import warnings

import pytest
import torch
from torchvision.io import decode_jpeg, encode_jpeg

import config
import data
import diffusion
import train
from support import real_noise

T = 10


def test_correlated_noise_keeps_its_variance():
    random = torch.Generator().manual_seed(0)
    eps = torch.randn(60, 3, 64, 64, generator=random)
    noise = real_noise.correlate(eps, random, share=1.0)
    assert noise.square().mean().item() == pytest.approx(1, rel=0.02)
    assert noise.square().mean(dim=(1, 2, 3)).sub(1).abs().max() < 0.2
    luma = noise.mean(dim=1, keepdim=True)
    of_luma, of_chroma = map(correlation_of_neighbours, (luma, noise - luma))
    for neighbours in (of_luma, of_chroma):  # after a Gaussian filter of width w exp(-1 / (4 w^2)): 0.68 for 0.8 pixels
        assert neighbours.min() < 0.02 and 0.6 < neighbours.max() < 0.73
    shared = luma.square().mean(dim=(1, 2, 3))  # 1/3 for independent channels, 1 for equal ones
    assert shared.min() < 0.2 and shared.max() > 0.8
    some = (real_noise.correlate(eps, random, share=1 / 3) != eps).flatten(1).any(dim=1)
    assert 10 <= some.sum() <= 30


def correlation_of_neighbours(noise):
    """Of the values of each image (B, C, H, W) with those on their right: (B,)."""
    return (noise[..., 1:] * noise[..., :-1]).mean(dim=(1, 2, 3)) / noise.square().mean(dim=(1, 2, 3))


@pytest.fixture
def noisy():
    """x0 (8, 3, 32, 32), smooth; t from sigma 1 to 75 of 255; eps."""
    random = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-0.6, 0.6, 32)
    x0 = (ramp[:, None] * torch.rand(8, 3, 1, 1, generator=random) + ramp / 4).expand(8, 3, 32, 32)
    return x0, torch.linspace(1, 75, 8) / 127.5 * T, torch.randn(x0.shape, generator=random)


def test_compressed_noise_is_what_jpeg_leaves(noisy):
    """torchvision compresses the same noisy image; what then differs from x0 is sigma * eps, of unit variance."""
    x0, t, eps = noisy
    qualities = torch.tensor([75, 0, 85, 95, 100, 0, 70, 90])
    t_after, eps_after = real_noise.compress(x0, t, eps, qualities, T)
    before, after = diffusion.add_noise(x0, eps, t, T), diffusion.add_noise(x0, eps_after, t_after, T)
    pixels = ((before + 1) * 127.5).round().clamp(0, 255).byte()
    for i, quality in enumerate(qualities.tolist()):
        if not quality:
            assert torch.equal(after[i], before[i]) and t_after[i] == t[i]
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            expected = decode_jpeg(encode_jpeg(pixels[i], quality)) / 127.5 - 1
        assert (after[i] - expected).abs().mean() < 0.5 / 127.5  # two libraries, which may round differently
        assert eps_after[i].square().mean().item() == pytest.approx(1, abs=1e-4)


def test_an_image_without_noise_stays_finite():
    x0 = torch.zeros(1, 3, 16, 16)
    t, eps = real_noise.compress(x0, torch.zeros(1), torch.zeros_like(x0), torch.tensor([90]), T)
    assert 0 < t.item() < 0.1 and eps.isfinite().all() and eps.square().mean() <= 4


def test_qualities_follow_from_the_step():
    cfg = config.defaults(train.SETTINGS, noise="mixed", batch_size=3000)
    qualities = data.draw_qualities(cfg, step=7)
    compressed = qualities[qualities > 0]
    assert len(compressed) / 3000 == pytest.approx(1 / 10, abs=0.03)
    assert compressed.min() == 70 and compressed.max() == 100
    assert torch.equal(qualities, data.draw_qualities(cfg, step=7))
    assert not torch.equal(qualities, data.draw_qualities(cfg, step=8))
