"""Noise and denoising against Gaussian data, for which the optimal denoiser has a closed form.

For x0 ~ N(mu, s^2): E[eps | x_t] = sigma (x_t - mu) / (s^2 + sigma^2), and the probability-flow equation takes x_t to
mu + (x_t - mu) s / sqrt(s^2 + sigma^2) at sigma = 0.
"""

import numpy as np
import pytest
import torch

import diffusion

T, MU, S = 10, 0.3, 0.5


def optimal_eps(x, t):
    sigma = (t.double() / T).view(-1, 1, 1, 1)
    return sigma * (x - MU) / (S**2 + sigma**2)


@pytest.fixture
def noisy():
    random = torch.Generator().manual_seed(0)
    x0 = MU + S * torch.randn(900, 3, 4, 4, generator=random, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=random, dtype=torch.float64)
    t = 1 + torch.arange(900) % 9
    return x0, eps, t, diffusion.add_noise(x0, eps, t, T)


def test_noise_is_linear_in_t(noisy):
    x0, eps, t, x_t = noisy
    for i in (0, 4, 8):
        np.testing.assert_allclose(x_t[i].numpy(), x0[i].numpy() + eps[i].numpy() * (i + 1) / 10, rtol=1e-6)
    assert x_t.max() > 1  # never clipped
    # On the 0-255 scale the noise of step t has a standard deviation of 127.5 t / T.
    level = 127.5 * (x_t - x0)[t == 4].std()
    assert level.item() == pytest.approx(51, rel=0.05)


def test_loss_of_the_optimal_denoiser(noisy):
    x0, eps, t, _ = noisy
    expected = np.mean([S**2 / (S**2 + (k / T) ** 2) for k in range(1, 10)])  # the posterior variance of eps
    assert diffusion.noise_loss(optimal_eps, x0, eps.double(), t, T).item() == pytest.approx(expected, rel=0.02)
    assert diffusion.noise_loss(lambda x, t: torch.zeros_like(x), x0, eps, t, T).item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("type_of_t", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_images_keep_their_type_whatever_that_of_t_is(type_of_t, dtype):
    x0, t = torch.ones(2, 3, 4, 4, dtype=dtype), torch.tensor([2, 5]).to(type_of_t)

    def model(x, t):
        assert x.dtype == dtype
        return torch.ones_like(x)

    x_t = diffusion.add_noise(x0, torch.ones_like(x0), t, T)
    torch.testing.assert_close(x_t[:, 0, 0, 0], torch.tensor([1.2, 1.5], dtype=dtype))
    assert diffusion.noise_loss(model, x0, torch.ones_like(x0), t, T) == 0
    estimates = [diffusion.denoise_steps(model, x_t, t, T, 2, sampler) for sampler in diffusion.SAMPLERS]
    for x0_hat in (diffusion.denoise(model, x_t, t, T), *estimates):
        torch.testing.assert_close(x0_hat, x0, rtol=2e-3, atol=0)


def test_one_step_is_the_posterior_mean(noisy):
    _, _, t, x_t = noisy
    sigma = (t / T).view(-1, 1, 1, 1)
    expected = (S**2 * x_t + sigma**2 * MU) / (S**2 + sigma**2)  # precision-weighted mean of prior and observation
    torch.testing.assert_close(diffusion.denoise(optimal_eps, x_t, t, T), expected, rtol=1e-5, atol=1e-5)


def test_many_steps_solve_the_probability_flow_equation(noisy):
    _, _, t, x_t = noisy
    sigma = (t / T).view(-1, 1, 1, 1)
    exact = MU + (x_t - MU) * S / (S**2 + sigma**2).sqrt()
    error = {k: (diffusion.denoise_steps(optimal_eps, x_t, t, T, k) - exact).abs().max().item() for k in (50, 100, 200)}
    assert error[200] < 0.01
    assert error[100] / error[200] == pytest.approx(2, rel=0.1)  # Euler's method is of first order
    # The exact solution has the spread of the data; the one-step estimate has less.
    assert diffusion.denoise_steps(optimal_eps, x_t, t, T, 200).std().item() == pytest.approx(S, rel=0.02)
    assert diffusion.denoise(optimal_eps, x_t, t, T).std() < 0.9 * S


def test_steps_of_every_image_go_from_its_own_level_to_zero():
    seen = []

    def model(x, t):
        seen.append(t.tolist())
        return torch.ones_like(x)

    x = torch.zeros(3, 1, 2, 2)
    out = diffusion.denoise_steps(model, x, torch.tensor([1, 3, 2]), T, 4)
    assert seen == [[1, 3, 2], [0.75, 2.25, 1.5], [0.5, 1.5, 1], [0.25, 0.75, 0.5]]
    # The steps of each image sum to its whole sigma.
    torch.testing.assert_close(out[:, 0, 0, 0], -torch.tensor([0.1, 0.3, 0.2]))


def test_one_of_one_step_is_denoise(noisy):
    _, _, t, x_t = noisy
    one = diffusion.denoise_steps(optimal_eps, x_t, t, T, 1)
    torch.testing.assert_close(one, diffusion.denoise(optimal_eps, x_t, t, T), rtol=1e-6, atol=1e-6)


def test_heuns_method_is_of_second_order(noisy):
    _, _, t, x_t = noisy
    sigma = (t / T).view(-1, 1, 1, 1)
    exact = MU + (x_t - MU) * S / (S**2 + sigma**2).sqrt()

    def error(steps, sampler):
        return (diffusion.denoise_steps(optimal_eps, x_t, t, T, steps, sampler) - exact).abs().max().item()

    assert error(10, "heun") / error(20, "heun") == pytest.approx(4, rel=0.15)
    assert error(20, "heun") < error(40, "euler") / 4  # as many calls of the network


def test_heuns_last_step_is_eulers():
    def model(x, t):
        assert (t > 0).any()
        return t.view(-1, 1, 1, 1).expand_as(x)

    x = torch.zeros(2, 1, 2, 2)
    for steps in (1, 2):
        out = diffusion.denoise_steps(model, x, torch.tensor([4.0, 8.0]), T, steps, "heun")
        # Steps of t / steps, slopes averaged over the ends of all but the last.
        expected = {1: [-1.6, -6.4], 2: [-0.2 * 3 - 0.2 * 2, -0.4 * 6 - 0.4 * 4]}[steps]
        torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_the_last_step_ends_at_no_noise_whatever_their_number(sampler):
    """Rounding must not leave a rest of t, at which Heun's method would call the model again."""
    seen = []

    def model(x, t):
        seen.append(t.item())
        return torch.zeros_like(x)

    for steps in range(1, 60):
        for t in (1.17, 3.92, 7.0):
            seen.clear()
            diffusion.denoise_steps(model, torch.zeros(1, 1, 2, 2), torch.tensor([t]), T, steps, sampler)
            assert len(seen) == (steps if sampler == "euler" else 2 * steps - 1)
            assert min(seen) == pytest.approx(t / steps, rel=1e-4)


def test_a_self_ensemble_is_the_mean_over_the_orientations():
    random = torch.Generator().manual_seed(0)
    places = torch.randn(3, 8, 8, generator=random)  # a model that treats every place in its own way
    x, t = torch.randn(2, 3, 8, 8, generator=random), torch.tensor([2, 7])

    def model(x, t):
        return (x * places * t.view(-1, 1, 1, 1)).half()

    # The same places as seen from an image that was turned; quarter turns and mirror images are all orientations.
    seen = [np.rot90(mirrored, k, (1, 2)) for mirrored in (places.numpy(), places.numpy()[..., ::-1]) for k in range(4)]
    mean = {1: seen[:1], 2: [seen[0], seen[4]], 4: [seen[0], seen[4], seen[2], seen[6]], 8: seen}
    for count, chosen in mean.items():
        found = diffusion.self_ensemble(model, count)(x, t)
        assert found.dtype == torch.float32
        expected = x * torch.from_numpy(np.mean(chosen, axis=0)) * t.view(-1, 1, 1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def test_a_noise_schedule_is_two_functions(noisy, monkeypatch):
    """With sigma = (t / T)^2 noise, loss, denoising and the estimate of sigma follow."""
    monkeypatch.setattr(diffusion, "sigma_of", lambda t, T: (t / T) ** 2)
    monkeypatch.setattr(diffusion, "t_of", lambda sigma, T: T * sigma**0.5)
    x0, eps, t, _ = noisy
    x_t = diffusion.add_noise(x0, eps, t, T)
    sigma = ((t / T) ** 2).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, x0 + sigma * eps)

    def optimal(x, t):
        level = ((t.double() / T) ** 2).view(-1, 1, 1, 1)
        return level * (x - MU) / (S**2 + level**2)

    exact = MU + (x_t - MU) * S / (S**2 + sigma**2).sqrt()
    assert (diffusion.denoise_steps(optimal, x_t, t, T, 100, "heun") - exact).abs().max() < 1e-3
    same = torch.full((900,), 7)
    x_t = diffusion.add_noise(x0, eps, same, T).reshape(1, 3, 120, 120)
    assert diffusion.estimate_sigma(optimal, x_t, T, 12).item() == pytest.approx(0.49, rel=0.05)


def test_the_level_where_neighbouring_pixels_are_alike():
    """For a stationary Gaussian of power spectrum P the best eps_hat is F^-1(sigma F(x) / (P + sigma^2))."""
    frequency = torch.fft.fftfreq(128, dtype=torch.float64)
    power = 0.002 / (0.002 + frequency[:, None] ** 2 + frequency**2)
    random = torch.Generator().manual_seed(0)
    white, eps = (torch.randn(1, 3, 128, 128, generator=random, dtype=torch.float64) for _ in range(2))

    def filtered(x, gain):
        return torch.fft.ifft2(torch.fft.fft2(x) * gain).real

    def optimal(x, t):
        sigma = (t.double() / T).view(-1, 1, 1, 1)
        return filtered(x, sigma / (power + sigma**2))

    x_t = filtered(white, power.sqrt()) + 0.5 * eps
    assert diffusion.estimate_sigma(optimal, x_t, T, 12).item() == pytest.approx(0.5, rel=0.03)


def test_each_image_of_a_batch_has_its_own_level():
    random = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 3, 64, 64, generator=random) for _ in range(2))
    x_t = MU + S * x0 + torch.tensor([0.2, 0.5, 0.8]).view(-1, 1, 1, 1) * eps
    exact = ((x_t - MU).square().mean(dim=(1, 2, 3)) - S**2).sqrt()
    torch.testing.assert_close(diffusion.estimate_sigma(optimal_eps, x_t, T), exact, rtol=0, atol=2e-3)
