"""The measures against independent formulas, the tables against one another, and the script as a user runs it."""

import importlib.util
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import classical
import config
import data
import diffusion
import evaluate
import metrics
import train
import unet

needs_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("skimage", "pywt", "bm3d")),
    reason="the packages of requirements-bench.txt are not installed",
)


@pytest.fixture
def pair():
    """Smooth random colours x0 (3, 3, 32, 32) in [-1, 1], and noisy ones that leave that range."""
    random = torch.Generator().manual_seed(0)
    small = torch.rand(3, 3, 6, 6, generator=random) * 2 - 1
    x0 = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic").clamp(-1, 1)
    return x0, x0 + 0.3 * torch.randn(x0.shape, generator=random)


def grey_levels(x):
    return (x.double().clamp(-1, 1).numpy() + 1) * 127.5


def test_ssim_is_wang_and_others_formula(pair):
    x0, x = (images[:, :, :20, :16] for images in pair)  # not square
    a, b = grey_levels(x), grey_levels(x0)
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    for i in range(3):
        found = []
        for c, y, z in np.ndindex(3, 10, 6):
            p, q = a[i, c, y : y + 11, z : z + 11], b[i, c, y : y + 11, z : z + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            cov = (window * (p - mean_p) * (q - mean_q)).sum()
            luminance = (2 * mean_p * mean_q + 6.5025) / (mean_p**2 + mean_q**2 + 6.5025)
            found.append(luminance * (2 * cov + 58.5225) / (var_p + var_q + 58.5225))
        assert metrics.ssim(x, x0)[i].item() == pytest.approx(np.mean(found), abs=1e-5)
    torch.testing.assert_close(metrics.ssim(x0, x0), torch.ones(3))


def test_ssim_is_scikit_images(pair):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    x0, x = pair
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=0)
    expected = [structural_similarity(a, b, **options) for a, b in zip(grey_levels(x), grey_levels(x0))]
    np.testing.assert_allclose(metrics.ssim(x, x0).numpy(), expected, atol=1e-4)


def test_a_wave_has_its_power_in_its_band():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for band, cycles in enumerate(((3, 0), (6, 6), (0, 13))):
        wave = 0.4 + 0.5 * torch.cos(2 * math.pi * (cycles[0] * y + cycles[1] * x) / 32)  # its mean is left out
        power = metrics.band_power(wave.expand(1, 3, 32, 32))[0]
        assert power[band] > 0.98 * power.sum()
        # Parseval: half the squared amplitude in each pixel, under the window.
        window = np.outer(np.hanning(32), np.hanning(32))
        expected = 1024 * (0.5 * (0.5 * window) ** 2).sum()
        assert power.sum().item() == pytest.approx(expected, rel=0.05)
    torch.testing.assert_close(metrics.band_power(0.5 * wave[None, None]) * 4, power[None], rtol=1e-4, atol=1e-2)


def test_autocorrelation_of_white_noise_and_of_a_filter_of_it():
    random = torch.Generator().manual_seed(0)
    white = torch.randn(300, 3, 32, 32, generator=random)
    assert metrics.autocorrelation(white).mean().item() == pytest.approx(math.sqrt(2 / math.pi / 1024), rel=0.05)
    # x[i] + x[i + 1] along both axes: 1/2 at the lags along an axis, 1/4 along the diagonals, less the pairs that the
    # edges of 32 pixels cut off.
    smooth = white + white.roll(1, 2)
    smooth = smooth + smooth.roll(1, 3)
    assert metrics.autocorrelation(smooth + 5).mean().item() == pytest.approx(
        (31 / 32 / 2 + (31 / 32) ** 2 / 4) / 2, abs=0.005
    )
    # One picture by numpy's own correlation coefficient, which centres each of the two parts anew.
    r = smooth[0, 0].numpy()
    parts = ((r[:, 1:], r[:, :-1]), (r[1:], r[:-1]), (r[1:, 1:], r[:-1, :-1]), (r[1:, :-1], r[:-1, 1:]))
    expected = np.mean([abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in parts])
    assert metrics.autocorrelation(smooth[:1, :1]).item() == pytest.approx(expected, abs=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = torch.Generator().manual_seed(0)
    values = 3 + torch.randn(2000, 50, generator=random)
    reference = 2 + 0.1 * torch.randn(2000, 50, generator=random)
    mean, half = metrics.interval(values[0])
    assert mean == pytest.approx(values[0].mean().item())
    assert half == pytest.approx(1.96 * np.std(values[0].numpy(), ddof=1) / math.sqrt(50), rel=1e-5)
    for truth, found in (
        (3, [metrics.interval(v) for v in values]),
        (1.5, [metrics.interval(v, r) for v, r in zip(values, reference)]),
    ):
        assert np.mean([abs(mean - truth) < half for mean, half in found]) == pytest.approx(0.94, abs=0.02)
    assert metrics.interval(torch.tensor([2.0])) == (2.0, None)
    assert metrics.interval(torch.tensor([1.0, math.inf])) == (None, None)
    assert metrics.interval(torch.ones(2), torch.zeros(2)) == (None, None)


def test_quality_tells_the_loss_of_eps_and_the_measures(pair):
    x0, x_t = pair
    sigma, T = 0.3, 10
    eps = (x_t - x0) / sigma

    def model(x, t):
        return 0.9 * eps + 0.02 * x

    x0_hat = evaluate.network(model, T)(x_t, sigma)
    q = evaluate.quality(x0_hat, x0, x_t, sigma)
    t = torch.full((3,), 3)
    for i in range(3):
        expected = (model(x_t, t)[i] - eps[i]).square().mean()
        torch.testing.assert_close(q["loss"][i], expected, rtol=1e-4, atol=0)
        error = grey_levels(x0_hat)[i] - grey_levels(x0)[i]
        assert q["psnr"][i].item() == pytest.approx(10 * np.log10(255**2 / (error**2).mean()), rel=1e-5)
    torch.testing.assert_close(q["whiteness"], metrics.autocorrelation(model(x_t, t)), rtol=1e-4, atol=1e-6)


def test_noise_follows_from_the_place_alone(monkeypatch):
    monkeypatch.setattr(data, "TEST_BATCH", 4)
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    eps = evaluate.fixed_noise(images)
    assert torch.equal(evaluate.fixed_noise(images[:6]), eps[:6])
    assert len(eps.unique()) > 0.99 * eps.numel() and eps.std().item() == pytest.approx(1, abs=0.02)


def test_blur_is_gaussian_and_removes_noise(pair):
    x0, x_t = pair
    point = torch.zeros(1, 1, 33, 29)
    point[0, 0, 16, 14] = 1
    y, x = np.mgrid[-16:17, -14:15]
    expected = np.exp(-(y**2 + x**2) / (2 * 1.5**2)) / (2 * math.pi * 1.5**2)
    np.testing.assert_allclose(classical.blur(point, 0.3, 1.5)[0, 0].numpy(), expected, atol=1e-6)
    torch.testing.assert_close(classical.blur(torch.full_like(x0, 0.7), 0.3, 2.0), torch.full_like(x0, 0.7))
    best = max(diffusion.psnr(estimate(x_t, 0.3), x0).mean() for estimate in classical.methods()["blur"])
    assert best > diffusion.psnr(x_t, x0).mean() + 5


@needs_packages
def test_the_best_setting_of_every_classical_method_removes_noise(pair):
    x0, x_t = pair
    methods = classical.methods()
    assert list(methods) == ["blur", "wavelet", "NLM", "BM3D", "BM3D 4x4"]
    for settings in methods.values():
        best = max(diffusion.psnr(estimate(x_t, 0.3), x0).mean() for estimate in settings)
        assert best > diffusion.psnr(x_t, x0).mean() + 5
    level = classical.sigma_estimators()["scikit-image"](x_t)
    np.testing.assert_allclose(level, 0.3, rtol=0.15)


def test_without_the_packages_one_line_says_what_is_left_out(monkeypatch, capsys):
    for name in ("skimage", "skimage.restoration", "pywt", "bm3d"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert list(classical.methods()) == ["blur"] and classical.sigma_estimators() == {}
    assert re.fullmatch(r"left out: wavelet.*BM3D.*requirements-bench.txt.*\n", capsys.readouterr().out)


@pytest.fixture
def untrained(tmp_path, pictures):
    """untrained("unet"): a checkpoint of a small network that has seen nothing."""

    def save(model, name="unet32_e0.pth"):
        torch.manual_seed(0)
        settings = dict(model=model, t_dim=8, noise_steps=10, dataset="folder", data_dir=str(pictures))
        state = dict(model=unet.build(model, 8).state_dict(), config=settings)
        checkpoint.save(tmp_path / "model" / name, state)

    return save


def numbers_in(text):
    """The tables of Markdown, as [{heading: text}, ...] each."""
    tables, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            tables.append([dict(zip(rows[0], row)) for row in rows[2:]])
            rows = []
    return tables


def test_the_script_and_that_its_outputs_agree(script, untrained, tmp_path, pictures):
    untrained("unet")
    untrained("plain", "plain.pth")
    args = ("--control", "model/plain.pth", "--subset", 3, "--baselines", 2, "--precision", "float32")
    process = script("evaluate.py", *args, "--json", "out/e.json", "--markdown", "out/e.md")
    assert process.returncode == 0, process.stderr
    markdown = (tmp_path / "out/e.md").read_text()
    assert markdown in process.stdout
    result = json.loads((tmp_path / "out/e.json").read_text())
    provenance = result["provenance"]
    assert provenance["images"] == 4 and provenance["precision"] == "float32" and "clipped" in provenance["measures"]
    assert all(f"- {name}: " in markdown for name in provenance)
    tables = numbers_in(markdown)
    assert len(tables) == len(result["tables"]) == 7
    for shown, table in zip(tables, result["tables"]):
        assert table["title"] in markdown and len(shown) == len(table["rows"])
        for texts, row in zip(shown, table["rows"]):
            assert list(texts) == list(row)
            for name, value in row.items():
                exact = list(value.values()) if isinstance(value, dict) else [value]
                if isinstance(exact[0], str):
                    assert texts[name] == exact[0]
                else:
                    read = [float(number) for number in texts[name].split(" ± ")]
                    digits = len(texts[name].split(" ± ")[0].partition(".")[2])
                    assert read == pytest.approx(exact, abs=0.51 * 10**-digits)
    one, control, several, blind, psnr, _ = (table["rows"] for table in result["tables"][1:])
    sigmas = [12.75, 15, 25, 25.5, 38.25, 50, 51, 63.75, 76.5, 89.25, 102, 114.75]
    assert [row["sigma"] for row in one] == [row["sigma"] for row in psnr] == pytest.approx(sigmas)
    assert {(round(row["t"]), row["steps"]) for row in several if row["t"] in (1, 5)} == {
        (1, 1),
        (5, 1),
        (5, 2),
        (5, 3),
        (5, 5),
    }
    assert {row["estimate by"] for row in blind} >= {"the network"}
    # The same numbers from the parts they are made of.
    images = data.load("test", "folder", str(pictures))[0]
    images = images[torch.randperm(4, generator=data.generator("cpu", 0, data.CHOICE, 0))]
    x0, eps = data.scale(images), evaluate.fixed_noise(images)
    for name, rows in (("unet32_e0.pth", one), ("plain.pth", control)):
        model, _ = checkpoint.load_model(tmp_path / "model" / name, "cpu")
        with torch.no_grad():
            loss = diffusion.noise_loss(model, x0, eps, torch.full((4,), 3), 10).item()
        row = rows[sigmas.index(38.25)]
        assert (row.get("loss of control") or row["loss"])["mean"] == pytest.approx(loss, rel=1e-3)
    x_t = x0 + 0.3 * eps
    assert one[sigmas.index(38.25)]["PSNR noisy"]["mean"] == pytest.approx(
        diffusion.psnr(x_t, x0).mean().item(), rel=1e-4
    )
    assert psnr[0]["noisy"]["mean"] == pytest.approx(diffusion.psnr(x0 + 0.1 * eps, x0)[:2].mean().item(), rel=1e-4)
    for row, own in zip(control, one):
        assert row["gain"]["mean"] == pytest.approx(own["loss"]["mean"] - row["loss of control"]["mean"], abs=1e-6)
        assert row["PSNR gain"]["mean"] == pytest.approx(own["PSNR"]["mean"] - row["PSNR of control"]["mean"], abs=1e-4)
    row = psnr[sigmas.index(38.25)]
    others = [row[name]["mean"] for name in row.keys() - {"sigma", "t", "one step", "gain"}]
    assert row["gain"]["mean"] == pytest.approx(row["one step"]["mean"] - max(others), abs=1e-4)
    blurred = [diffusion.psnr(estimate(x_t[:2], 0.3), x0[:2]).mean() for estimate in classical.methods()["blur"]]
    assert row["blur"]["mean"] == pytest.approx(max(blurred).item(), abs=1e-3)
    model, _ = checkpoint.load_model(tmp_path / "model/unet32_e0.pth", "cpu")
    t = torch.full((3,), 5)
    with torch.no_grad():
        errors = 127.5 * diffusion.estimate_sigma(model, x0[:3] + 25 / 127.5 * eps[:3], 10) - 25
        x_t = x0[:3] + 0.5 * eps[:3]
        x0_hat, one_step = diffusion.denoise_steps(model, x_t, t, 10), diffusion.denoise(model, x_t, t, 10)
    row = next(row for row in blind if (row["sigma"], row["estimate by"]) == (25, "the network"))
    assert row["mean error"]["mean"] == pytest.approx(errors.mean().item(), abs=0.01)
    assert row["mean absolute error"]["mean"] == pytest.approx(errors.abs().mean().item(), abs=0.01)
    row = next(row for row in several if (row["t"], row["steps"]) == (5, 5))
    sharpness = metrics.band_power(x0_hat).mean(0) / metrics.band_power(x0[:3]).mean(0)
    assert [row[band]["mean"] for band in metrics.BANDS] == pytest.approx(sharpness.tolist(), rel=1e-3)
    gain = (diffusion.psnr(x0_hat, x0[:3]) - diffusion.psnr(one_step, x0[:3])).mean().item()
    assert row["gain"]["mean"] == pytest.approx(gain, abs=1e-3)
    figure = tmp_path / "model/res/evaluation_unet32_e0.png"
    assert f"figure saved: {figure.relative_to(tmp_path)}" in process.stdout
    assert figure.stat().st_size < 300_000 and np.asarray(Image.open(figure).convert("L")).std() > 10
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_control_alone_needs_no_blind_estimate(run, untrained, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "--limit", "2", "--baselines", "0", "--steps", "2", "--device", "cpu"]
    )
    untrained("plain")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluate, "draw", full)
    with pytest.raises(OSError):
        evaluate.main()
    text = capsys.readouterr().out  # all the same
    assert "estimated from the picture" not in text and "classical" not in text
    assert {row["steps"] for row in numbers_in(text)[-1]} == {"1", "2"}


def test_the_mean_loss_is_that_of_training(run, untrained):
    """On images that are all the same, train.held_out_loss has every t and the noise of the same generator."""
    x = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = x.expand(900, -1, -1, -1).contiguous()
    torch.manual_seed(0)
    model = unet.UNet(widths=(4, 4, 4), t_dim=4).eval()
    world = train.World(0, 1, 0, torch.device("cpu"))
    expected = train.held_out_loss(model, images, 10, torch.float32, world)
    model.eval()
    with torch.inference_mode(), evaluate.part("", 0, {}) as bar:
        eps = evaluate.fixed_noise(images)
        one = {t: evaluate.measure(images, eps, t / 10, evaluate.network(model, 10), bar) for t in range(1, 10)}
    assert evaluate.mean_loss(one, 10).mean().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--control nowhere.pth", "nowhere.pth does not exist"),
        ("--markdown model/unet32_e0.pth/e.md", "model/unet32_e0.pth"),
        ("--weights model/unet32_e0.pth --out-dir model/unet32_e0.pth", "model/unet32_e0.pth"),
        ("--json model", "must be a file name ending in .json"),
        ("--markdown model/unet32_e0.pth", "must be a file name ending in .md"),
    ],
)
def test_mistakes_show_before_the_work(args, message, run, untrained, tmp_path, monkeypatch, capsys):
    untrained("unet")
    before = (tmp_path / "model/unet32_e0.pth").read_bytes()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *args.split()])
    monkeypatch.setattr(evaluate, "evaluate", None)
    with pytest.raises(SystemExit) as caught:
        config.run(evaluate.main, data.DataError, checkpoint.CheckpointError)
    assert message in f"{caught.value.code} {capsys.readouterr().err}"
    assert (tmp_path / "model/unet32_e0.pth").read_bytes() == before
