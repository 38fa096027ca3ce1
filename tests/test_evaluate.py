"""What evaluate.py measures, against the parts that it is made of, and the script as a user runs it."""

import dataclasses
import errno
import functools
import importlib.util
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import denoise
import diffusion
import evaluate
import train
import unet
from support import checkpoint, classical, figures, files, held_out, measure, metrics, script, streams, tables, world
from support.measure import Record

needs_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("skimage", "pywt", "bm3d")),
    reason="the packages of requirements-bench.txt are not installed",
)


# ---- measuring --------------------------------------------------------------------------------------------------


def test_quality_tells_the_loss_of_eps_and_the_measures(pair):
    x0, x_t = pair
    sigma, T = 0.3, 10
    eps = (x_t - x0) / sigma

    def model(x, t):
        return 0.9 * eps + 0.02 * x

    x0_hat = measure.estimator(model, T)(x_t, sigma)
    q = measure.quality(x0_hat, x0, x_t, sigma)
    expected = (model(x_t, torch.full((3,), 3)) - eps).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(q["loss"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(q["autocorrelation"], metrics.autocorrelation(model(x_t, None)), rtol=1e-4, atol=1e-6)
    assert q.keys() >= {"loss", "autocorrelation", *metrics.METRICS, *metrics.BANDS}


def test_the_curves_of_the_figure_are_means_over_the_images_that_all_have():
    def record(method, psnr, high, count=4, steps=0, sampler=""):
        values = {"psnr": psnr + torch.arange(count), "high": torch.full((count,), high)}
        return Record(method, 25.5, values, 2, steps, sampler)

    records = [record("clean", 0.0, 2.0), record("noisy", 20.0, 9.0), record("network", 30.0, 1.0, 4, 1, "euler")]
    records += [record("network", 29.0, 1.5, 2, 2, "euler"), record("network", 28.0, 1.6, 2, 2, "heun")]
    records += [record("blur", 25.0, 0.5, 3)]
    levels, trade_off, count = tables.curves(records, 2, [2])
    expected = {"noisy": 20.5, "one step": 30.5, "several steps": 29.5, "blur": 25.5}
    assert levels == {name: [(25.5, psnr)] for name, psnr in expected.items()} and count == 2
    assert trade_off == {"sigma = 25.5": [(0.5, 0.0, 1), (0.75, -1.0, 2)]}
    assert tables.curves(records, 2, [5])[1] == {}  # another level is shown


@pytest.mark.parametrize("T", [2, 3, 10, 19, 100, 1000])
def test_levels_are_few_and_cover_all(T):
    levels = measure.levels_of(T)
    sigmas = [127.5 * diffusion.sigma_of(t, T) for t in levels]
    assert len(levels) <= 20 and sigmas == sorted(sigmas)
    for sigma in (15, 25, 50):
        assert min(abs(s - sigma) for s in sigmas) < 1e-9
    integers = [t for t in levels if t == int(t)]
    if T <= 18:
        assert integers == list(range(1, T))
    else:  # evenly spread: their mean is that of 1 ... T-1
        assert min(integers) >= 1 and max(integers) <= T - 1
        assert np.mean(integers) == pytest.approx(T / 2, rel=0.02)
    steps = {t: measure.step_counts(t, T, None) for t in levels}
    assert all(1 < k <= min(math.ceil(t), 50) for t, counts in steps.items() for k in counts)
    assert sum(len(counts) for counts in steps.values()) < 45
    if T == 10:
        assert steps[5] == [2, 3, 5] and steps[4] == [4] and steps[1] == []


def test_large_images_go_through_the_network_a_few_at_a_time():
    seen = []

    def model(x, t):
        seen.append(len(x))
        assert len(x) == len(t)
        return x * t[:, None, None, None]

    x = torch.randn(3, 3, 512, 500, generator=torch.Generator().manual_seed(0))
    in_parts = measure.in_precision(model, "float32")
    assert torch.equal(measure.estimator(in_parts, 10)(x, 0.2), x - 0.2 * x * 2)
    assert seen == [1, 1, 1]


def test_noise_follows_from_the_place_alone(monkeypatch):
    monkeypatch.setattr(data, "TEST_BATCH", 4)
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    eps, first = (torch.cat([eps for _, eps in measure.batches(part)]) for part in (images, images[:6]))
    assert torch.equal(first, eps[:6])
    assert len(eps.unique()) > 0.99 * eps.numel() and eps.std().item() == pytest.approx(1, abs=0.02)


def test_the_mean_loss_is_that_of_training():
    """On images that are all the same, the held-out loss of train.py has every t and noise of the same generator."""
    x = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = x.expand(180, -1, -1, -1).contiguous()
    torch.manual_seed(0)
    model = unet.UNet(widths=(4, 4, 4), t_dim=4).eval()
    cfg = config.defaults(train.SETTINGS, precision="float32", device="cpu")
    place = world.join("cpu", 1)
    expected = held_out.held_out_loss(cfg, place, model, images)
    model.eval()
    jobs = [measure.Job("clean", 9, [None])]
    jobs += [measure.Job("network", t, [measure.estimator(model, 10)], 1, "euler") for t in range(1, 10)]
    with torch.inference_mode():
        summary = tables.summary(measure.run(jobs, 10, images))
    name, (mean, _) = summary["rows"][1]
    assert "held-out loss" in name and mean == pytest.approx(expected, rel=0.01)


def test_the_best_of_several_settings_counts():
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    settings = [lambda x, sigma, shift=shift: x + shift for shift in (0.5, 0.0, -0.5)]
    jobs = [measure.Job("shifted", 1, settings, count=2), measure.Job("noisy", 1, [measure.noisy])]
    shifted, noisy = measure.run(jobs, 10, images)
    assert (shifted.count, noisy.count, noisy.sigma) == (2, 3, 12.75)
    assert torch.equal(shifted.values["psnr"], noisy.first(2).values["psnr"])


# ---- classical denoisers ----------------------------------------------------------------------------------------


def test_blur_is_gaussian_and_removes_noise(pair):
    x0, x_t = (x[:1] for x in pair)
    point = torch.zeros(1, 1, 33, 29)
    point[0, 0, 16, 14] = 1
    y, x = np.mgrid[-16:17, -14:15]
    expected = np.exp(-(y**2 + x**2) / (2 * 1.5**2)) / (2 * math.pi * 1.5**2)
    np.testing.assert_allclose(classical.blur(point, 0.3, 1.5)[0, 0].numpy(), expected, atol=1e-6)
    torch.testing.assert_close(classical.blur(torch.full_like(x0, 0.7), 0.3, 2.0), torch.full_like(x0, 0.7))
    best = max(metrics.psnr(estimate(x_t, 0.3), x0).mean() for estimate in classical.methods()["blur"])
    assert best > metrics.psnr(x_t, x0).mean() + 5


@needs_packages
def test_the_best_setting_of_every_classical_method_removes_noise(pair):
    x0, x_t = (x[:1] for x in pair)
    methods = classical.methods()
    assert list(methods) == ["blur", "wavelet", "NLM", "BM3D", "BM3D 4x4"]
    for settings in methods.values():
        best = max(metrics.psnr(estimate(x_t, 0.3), x0).mean() for estimate in settings)
        assert best > metrics.psnr(x_t, x0).mean() + 5
    level = classical.sigma_estimators()["scikit-image"](x_t)
    np.testing.assert_allclose(level, 0.3, rtol=0.15)


def test_without_the_packages_one_line_says_what_is_left_out(monkeypatch, capsys):
    for name in ("skimage", "skimage.restoration", "pywt", "bm3d"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert list(classical.methods()) == ["blur"] and classical.sigma_estimators() == {}
    assert re.fullmatch(r"left out: wavelet.*BM3D.*requirements-bench.txt.*\n", capsys.readouterr().out)


# ---- the script -------------------------------------------------------------------------------------------------


@pytest.fixture
def untrained(tmp_path, pictures, monkeypatch):
    """untrained("unet"): a checkpoint of a small network that has seen nothing, in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def save(model="unet", name="unet32_e0.pth", folder=pictures, **settings):
        torch.manual_seed(0)
        values = dict(model=model, widths=(4, 4, 8), t_dim=8, dataset="folder", data_dir=str(folder), **settings)
        cfg = config.defaults(train.SETTINGS, **values)
        network = unet.describe(cfg)
        state = dict(model=unet.build(**network).state_dict(), network=network, config=dataclasses.asdict(cfg))
        state["config"].pop("given")
        checkpoint.save(tmp_path / "model" / name, state)

    return save


@pytest.fixture
def blur_alone(monkeypatch):
    """Of the classical denoisers, only the one that takes no time."""
    settings = [lambda x, sigma, width=width: classical.blur(x, sigma, width) for width in (0.4, 0.7, 1.5)]
    monkeypatch.setattr(classical, "methods", lambda: {"blur": settings})
    monkeypatch.setattr(classical, "sigma_estimators", dict)


@pytest.fixture
def run_script(run_script):
    """run_script("--limit", 3): evaluate.py."""
    return functools.partial(run_script, evaluate, "--device", "cpu", "--precision", "float32")


def numbers_in(text):
    """The tables of Markdown, as [{heading: text}, ...] each."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([dict(zip(rows[0], row)) for row in rows[2:]])
            rows = []
    return found


def assert_shown(shown, table):
    """That the texts of a Markdown table are the numbers of JSON, rounded."""
    assert len(shown) == len(table["rows"])
    for texts, row in zip(shown, table["rows"]):
        assert list(texts) == list(row)
        for name, value in row.items():
            exact = [x for x in (value.values() if isinstance(value, dict) else [value]) if x is not None]
            if exact and isinstance(exact[0], str):
                assert texts[name] == exact[0]
            elif exact:
                read = [float(number) for number in texts[name].split(" ± ")]
                digits = len(texts[name].split(" ± ")[0].partition(".")[2])
                assert read == pytest.approx(exact, abs=0.51 * 10**-digits)


def test_the_script_and_that_its_outputs_agree(untrained, blur_alone, run_script, tmp_path, pictures):
    untrained("unet")
    untrained("plain", "plain.pth")
    args = ("--control", "model/plain.pth", "--subset", 3, "--baselines", 2, "--json", "out/e.json")
    code, out, err = run_script(*args, "--markdown", "out/e.md")
    assert code == 0, err
    markdown = (tmp_path / "out/e.md").read_text(encoding="utf-8")
    assert markdown in out
    result = json.loads((tmp_path / "out/e.json").read_text())
    provenance = result["provenance"]
    assert provenance["images"] == 4 and provenance["precision"] == "float32" and "clipped" in provenance["measures"]
    assert all(f"- {name}: " in markdown for name in provenance)
    shown = numbers_in(markdown)
    assert len(shown) == len(result["tables"]) == 8
    for texts, table in zip(shown, result["tables"]):
        assert table["title"] in markdown
        assert_shown(texts, table)
    one, control, several, blind, psnr, _, channels = (table["rows"] for table in result["tables"][1:])
    sigmas = [12.75, 15, 25, 25.5, 38.25, 50, 51, 63.75, 76.5, 89.25, 102, 114.75]
    assert [row["sigma"] for row in one] == [row["sigma"] for row in psnr] == pytest.approx(sigmas)
    assert {(row["sampler"], row["steps"]) for row in several if row["t"] == 5} == {
        ("euler", 1),
        *((sampler, k) for sampler in ("euler", "heun") for k in (2, 3, 5)),
    }
    assert {row["estimate by"] for row in blind} >= {"the network"}
    # The same numbers from the parts they are made of.
    cfg = config.defaults(train.SETTINGS, dataset="folder", data_dir=str(pictures))
    images = data.load("test", cfg)[0]
    images = images[torch.randperm(4, generator=streams.generator("cpu", 0, streams.CHOICE, 0))]
    x0 = data.scale(images)
    eps = data.held_out_noise(x0, 0)
    row_of = sigmas.index(38.25)
    for name, row, heading in (("unet32_e0", one[row_of], "loss"), ("plain", control[row_of], "loss of control")):
        model, _ = checkpoint.load_model(f"model/{name}.pth", "cpu")
        with torch.no_grad():
            loss = diffusion.noise_loss(model, x0, eps, torch.full((4,), 3), 10).item()
        assert row[heading]["mean"] == pytest.approx(loss, rel=1e-3)
    x_t = x0 + 0.3 * eps
    assert one[row_of]["PSNR noisy"]["mean"] == pytest.approx(metrics.psnr(x_t, x0).mean().item(), rel=1e-4)
    assert psnr[0]["noisy"]["mean"] == pytest.approx(metrics.psnr(x0 + 0.1 * eps, x0)[:2].mean().item(), rel=1e-4)
    for row, own in zip(control, one):
        for name in ("loss", "PSNR", "SSIM"):
            change = own[name]["mean"] - row[f"{name} of control"]["mean"]
            assert row[f"{name} change"]["mean"] == pytest.approx(change, abs=1e-4)
    row = psnr[row_of]
    others = [row[name]["mean"] for name in row.keys() - {"sigma", "t", "network", "difference"}]
    assert row["difference"]["mean"] == pytest.approx(row["network"]["mean"] - max(others), abs=1e-4)
    blurred = [metrics.psnr(estimate(x_t[:2], 0.3), x0[:2]).mean() for estimate in classical.methods()["blur"]]
    assert row["blur"]["mean"] == pytest.approx(max(blurred).item(), abs=1e-3)
    model, train_cfg = checkpoint.load_model("model/unet32_e0.pth", "cpu")
    t = torch.full((3,), 5)
    with torch.no_grad():
        errors = 127.5 * diffusion.estimate_sigma(model, x0[:3] + 25 / 127.5 * eps[:3], 10) - 25
        x_t = x0[:3] + 0.5 * eps[:3]
        one_step = diffusion.denoise(model, x_t, t, 10)
        walks = {name: diffusion.denoise_steps(model, x_t, t, 10, 5, name) for name in diffusion.SAMPLERS}
    row = next(row for row in blind if (row["sigma"], row["estimate by"]) == (25, "the network"))
    assert row["mean error"]["mean"] == pytest.approx(errors.mean().item(), abs=0.01)
    assert row["mean absolute error"]["mean"] == pytest.approx(errors.abs().mean().item(), abs=0.01)
    for sampler, x0_hat in walks.items():
        row = next(row for row in several if (row["t"], row["steps"], row["sampler"]) == (5, 5, sampler))
        sharpness = metrics.band_power(x0_hat).mean(0) / metrics.band_power(x0[:3]).mean(0)
        assert [row[band]["mean"] for band in metrics.BANDS] == pytest.approx(sharpness.tolist(), rel=1e-3)
        gain = (metrics.psnr(x0_hat, x0[:3]) - metrics.psnr(one_step, x0[:3])).mean().item()
        assert row["PSNR gain"]["mean"] == pytest.approx(gain, abs=1e-3)
    shares = held_out.channels_in_use(train_cfg, model, images)
    assert {row["block"]: row["in use, %"] for row in channels} == pytest.approx(
        {k: 100 * v for k, v in shares.items()}
    )
    figure = tmp_path / "model/res/evaluation_unet32_e0.png"
    assert f"figure saved: {figure.relative_to(tmp_path)}" in out
    assert figure.stat().st_size < 300_000 and np.asarray(Image.open(figure).convert("L")).std() > 10
    assert not list(tmp_path.rglob("*.part"))


def test_a_registered_metric_is_in_every_table(untrained, blur_alone, run_script, monkeypatch):
    def error(x, x0):
        return (x - x0).abs().mean(dim=(1, 2, 3))

    monkeypatch.setitem(metrics.METRICS, "mae", metrics.Metric("MAE", error, 5, higher_is_better=False))
    untrained()
    code, out, err = run_script(
        "--limit", 2, "--subset", 1, "--steps", 2, "--baselines", 1, "--control", "model/unet32_e0.pth"
    )
    assert code == 0, err
    _, one, control, several, _, psnr, ssim, mae, _ = numbers_in(out)
    assert {"MAE noisy", "MAE"} <= one[0].keys() and {"MAE of control", "MAE change"} <= control[0].keys()
    assert "MAE" in several[0] and "MAE beside classical denoisers" in out
    assert len(psnr) == len(ssim) == len(mae)
    value = {name: float(text) for name, text in mae[0].items()}
    best = min(value[name] for name in value.keys() - {"sigma", "t", "network", "difference"})  # lower is better
    assert value["difference"] == pytest.approx(value["network"] - best, abs=2e-5)


def test_a_thousand_steps_and_one_constant_image(untrained, blur_alone, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MOST_STEPS", 4)
    for split in ("train", "test"):
        (tmp_path / "black" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "black" / split / "0.png")
    untrained(folder="black", noise_steps=1000)
    code, _, err = run_script("--subset", 1, "--baselines", 1, "--json", "e.json")
    assert code == 0, err
    result = json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    summary, one, several = (table["rows"] for table in result["tables"][:3])
    assert len(one) == 20 and max(row["steps"] for row in several) == 4
    assert "loss on one image (no held-out loss)" in summary[1][""]


def test_the_control_alone_needs_no_blind_estimate(untrained, run_script, monkeypatch):
    untrained("plain")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(figures, "evaluation", full)
    code, out, err = run_script("--limit", 2, "--baselines", 0, "--steps", 2)
    assert code == 1 and "error: No space left" in err
    assert "sigma estimated" not in out and "classical" not in out  # and yet all tables are there
    assert {row["steps"] for row in numbers_in(out)[2]} == {"1", "2"}


SMALL = ("--baselines", "0", "--steps", "1", "--limit", "1")


class Failing:
    """A stream on a full disk, or an ASCII terminal."""

    encoding = "ascii"

    def __init__(self, full):
        self.full, self.text = full, ""

    def write(self, text):
        if self.full:
            raise OSError(28, "No space left on device")
        text.encode(self.encoding)  # raises UnicodeEncodeError
        self.text += text

    def flush(self):
        if self.full:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full", [True, False])
def test_files_are_written_whatever_becomes_of_the_screen(full, untrained, tmp_path, monkeypatch):
    untrained("plain")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *SMALL, "--json", "e.json", "--markdown", "e.md"])
    stream = Failing(full)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    script.run(evaluate.main)
    assert "±" in (tmp_path / "e.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "e.json").read_text())["tables"]
    assert full or ("One step" in stream.text and "?" in stream.text)


def test_files_that_exist_are_replaced_only_if_asked(untrained, run_script, tmp_path, monkeypatch):
    untrained("plain")
    for option, name in (("--json", "e.json"), ("--markdown", "e.md")):
        (tmp_path / name).write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "load_run", None)  # it is seen before any work
            code, _, err = run_script(option, name)
        assert code == 1 and re.fullmatch(rf"error: {name} exists; .*--overwrite.*\n", err)
        assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "folder.json").mkdir()
    code, _, err = run_script("--json", "folder.json", "--overwrite")
    assert code == 1 and err == "error: folder.json is a folder; choose another name\n"
    assert run_script(*SMALL, "--json", "e.json", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "e.json").read_text())
    # A file that comes into being during the work stays, and the numbers are on the screen.
    summary = tables.summary

    def meanwhile(records):
        (tmp_path / "late.md").write_text("mine")
        return summary(records)

    monkeypatch.setattr(tables, "summary", meanwhile)
    code, out, err = run_script(*SMALL, "--markdown", "late.md")
    assert code == 1 and "late.md was created meanwhile" in err and "Summary, 1 images" in out
    assert (tmp_path / "late.md").read_text() == "mine"
    code, _, err = run_script(*SMALL, "--json", "late.json", "--markdown", "late.md", "--overwrite")
    assert code == 0, err


def test_one_report_that_cannot_be_written_does_not_cost_the_other(untrained, run_script, tmp_path, monkeypatch):
    untrained("plain")
    write_text = files.write_text

    def full(path, *args, **options):
        if path == "e.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, *args, **options)

    monkeypatch.setattr(files, "write_text", full)
    code, out, err = run_script(*SMALL, "--json", "e.json", "--markdown", "e.md")
    assert code == 1 and "e.json cannot be written (No space left on device); the tables are printed above" in err
    assert "Summary, 1 images" in out and "Summary, 1 images" in (tmp_path / "e.md").read_text(encoding="utf-8")
    assert (tmp_path / "model" / "res" / "evaluation_unet32_e0.png").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        ("--control nowhere.pth", "nowhere.pth does not exist"),
        ("--markdown model/unet32_e0.pth/e.md", "File exists: 'model/unet32_e0.pth'"),
        ("--weights model/unet32_e0.pth --out-dir model/unet32_e0.pth", "Not a directory: 'model/unet32_e0.pth/res'"),
        ("--json model", "must be a file name ending in .json"),
        ("--markdown model/unet32_e0.pth", "must be a file name ending in .md"),
        ("--dataset leaves --whole", "--dataset folder"),
    ],
)
def test_mistakes_show_before_the_work(args, message, untrained, run_script, tmp_path, monkeypatch):
    untrained("unet")
    before = (tmp_path / "model/unet32_e0.pth").read_bytes()
    monkeypatch.setattr(evaluate, "evaluate_images", None)
    monkeypatch.setattr(data, "load", lambda split, cfg: (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "nothing"))
    code, _, err = run_script(*args.split())
    assert code in (1, 2) and message in err and err.startswith("error: ")
    assert (tmp_path / "model/unet32_e0.pth").read_bytes() == before


# ---- whole pictures ---------------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path):
    """A folder with two test pictures of 50x37 and 41x66 pixels."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "photographs" / split).mkdir(parents=True)
        for i, size in enumerate(((50, 37), (41, 66))):
            small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "photographs" / split / f"{i}.png")
    return tmp_path / "photographs"


def test_a_folder_of_photographs_is_measured_whole(untrained, run_script, photographs, tmp_path, monkeypatch):
    untrained()
    args = ("--dataset", "folder", "--data-dir", photographs, "--weights", "model/unet32_e0.pth")
    quick = functools.partial(classical.blur, width=1.0)  # in BM3D's place, which takes long
    monkeypatch.setattr(evaluate, "bm3d", lambda sizes: quick)
    code, out, err = run_script(*args, "--baselines", 1, "--json", "e.json", "--control", "model/unet32_e0.pth")
    assert code == 0, err
    assert f"data: 2 whole test pictures in {photographs}" in out
    assert "held-out loss" not in out and "published" not in out and "figure" not in out
    psnr, ssim, clean, channels = json.loads((tmp_path / "e.json").read_text())["tables"]
    assert psnr["title"] == "PSNR on 2 whole test pictures" and ssim["title"].startswith("SSIM")
    assert list(psnr["rows"][0]) == ["", "pictures", *(f"sigma {sigma}" for sigma in (5, 10, 15, 25, 50))]
    rows = {row[""]: row for row in psnr["rows"]}
    assert rows["control"] == rows["network"] | {"": "control"}  # the same noise for every method
    # By hand, one picture after the other and without tiles.
    model, _ = checkpoint.load_model("model/unet32_e0.pth", "cpu")
    found = {name: [] for name in ("noisy", "network", 1)}
    for i in range(2):
        picture = np.asarray(Image.open(photographs / "test" / f"{i}.png"))
        x0 = data.scale(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None])
        height, width = x0.shape[2:]
        eps = torch.randn(x0.shape, generator=streams.generator("cpu", 0, streams.HELD_OUT_NOISE, i))
        x_t = x0 + 25 / 127.5 * eps
        found["noisy"].append(metrics.psnr(x_t, x0).item())
        for key, x, sigma in (("network", x_t, 25), (1, x0, 1)):
            padded = torch.nn.functional.pad(x, (0, -width % 4, 0, -height % 4), mode="reflect")
            with torch.no_grad():
                x0_hat = diffusion.denoise(model, padded, torch.tensor([sigma / 127.5 * 10]), 10)[..., :height, :width]
            error = (x0_hat.clamp(-1, 1) - x0) * 127.5
            found[key].append(10 * math.log10(255**2 / error.square().mean().item()))
    assert rows["noisy"]["sigma 25"]["mean"] == pytest.approx(np.mean(found["noisy"]), abs=1e-3)
    assert rows["network"]["sigma 25"]["mean"] == pytest.approx(np.mean(found["network"]), abs=1e-3)
    clean = {row["sigma told"]: row for row in clean["rows"]}
    assert clean["1"]["median PSNR"] == pytest.approx(np.median(found[1]), abs=1e-2)
    assert clean["1"]["lowest PSNR"] == pytest.approx(min(found[1]), abs=1e-2)
    assert clean["1"]["pictures below 45 dB"] == sum(psnr < 45 for psnr in found[1])
    assert "estimated" in clean
    assert [row["pictures"] for row in psnr["rows"]] == [2, 2, 2, 1, 1]
    assert rows["network, on the same"]["sigma 25"]["mean"] == pytest.approx(found["network"][0], abs=1e-3)
    assert len(channels["rows"]) == 5


def test_an_ensemble_is_measured_where_one_is_asked_for(untrained, run_script, photographs, tmp_path):
    untrained()
    args = ("--dataset", "folder", "--data-dir", photographs, "--weights", "model/unet32_e0.pth", "--ensemble", 2)
    assert run_script(*args, "--json", "e.json")[0] == 0
    report = json.loads((tmp_path / "e.json").read_text())
    model, _ = checkpoint.load_model("model/unet32_e0.pth", "cpu")
    t, found = torch.tensor([50 / 127.5 * 10]), []
    for i in range(2):
        picture = np.array(Image.open(photographs / "test" / f"{i}.png"))
        x0 = data.scale(torch.from_numpy(picture).permute(2, 0, 1)[None])
        height, width = x0.shape[2:]
        x_t = x0 + 50 / 127.5 * torch.randn(x0.shape, generator=streams.generator("cpu", 0, streams.HELD_OUT_NOISE, i))
        padded = torch.nn.functional.pad(x_t, (0, -width % 4, 0, -height % 4), mode="reflect")
        with torch.no_grad():
            x0_hat = sum(diffusion.denoise(model, padded.flip(dims), t, 10).flip(dims) / 2 for dims in ([], [3]))
        x0_hat = x0_hat[..., :height, :width]
        found.append(metrics.psnr(x0_hat, x0).item())
        # The same as denoise.py gives.
        network = denoise.load("model/unet32_e0.pth", "cpu", "float32")
        same = denoise.denoise_pixels(network, x_t[0], 50, ensemble=2).clean
        torch.testing.assert_close(same, x0_hat[0], rtol=0, atol=1e-4)
    assert report["provenance"]["ensemble"] == 2
    assert report["tables"][0]["rows"][1]["sigma 50"]["mean"] == pytest.approx(np.mean(found), abs=1e-3)


def test_the_network_is_measured_with_the_ensemble_and_the_precision_of_the_flags(
    untrained, run_script, pictures, tmp_path, monkeypatch
):
    untrained()
    assert run_script(*SMALL, "--ensemble", 2, "--json", "e.json")[0] == 0
    tables = json.loads((tmp_path / "e.json").read_text())["tables"]
    (loss,) = (row["loss"]["mean"] for table in tables for row in table["rows"] if row.get("t") == 3 and "loss" in row)
    model, _ = checkpoint.load_model("model/unet32_e0.pth", "cpu")
    cfg = config.defaults(train.SETTINGS, dataset="folder", data_dir=str(pictures), limit=1)
    x0 = data.scale(data.load("test", cfg)[0])
    eps, t = data.held_out_noise(x0, 0), torch.tensor([3])
    x_t = x0 + 0.3 * eps
    with torch.no_grad():
        eps_hat = (model(x_t, t) + model(x_t.flip(3), t).flip(3)) / 2
    assert loss == pytest.approx((eps_hat - eps).square().mean().item(), rel=1e-4)
    assert loss != pytest.approx((model(x_t, t) - eps).square().mean().item(), rel=1e-4)

    forward, seen = unet.UNet.forward, []

    def seen_forward(self, x, t):
        seen.append(forward(self, x, t))
        return seen[-1]

    monkeypatch.setattr(unet.UNet, "forward", seen_forward)
    assert run_script(*SMALL, "--precision", "bfloat16")[0] == 0
    in_float32 = [eps_hat for eps_hat in seen if eps_hat.dtype == torch.float32]
    assert len(in_float32) == 1 < len(seen)  # the channels in use are counted in float32


def test_a_training_run_may_delete_the_weights_meanwhile(untrained, run_script, photographs, tmp_path, monkeypatch):
    untrained()
    measured = measure.run_whole

    def at_work(*args):
        (tmp_path / "model/unet32_e0.pth").unlink(missing_ok=True)
        return measured(*args)

    monkeypatch.setattr(measure, "run_whole", at_work)
    code, out, err = run_script("--dataset", "folder", "--data-dir", photographs)
    assert code == 0 and "PSNR on 2 whole test pictures" in out, err


def test_where_only_a_tenth_of_a_folder_is_measured_it_is_said(untrained, run_script, photographs, tmp_path):
    untrained("unet")
    (tmp_path / "mixed").mkdir()
    for i, path in enumerate(sorted(photographs.rglob("*.png"))):
        path.rename(tmp_path / "mixed" / f"{i}.png")
    code, out, err = run_script("--dataset", "folder", "--data-dir", tmp_path / "mixed", "--whole")
    assert code == 0 and f"in {tmp_path}/mixed, a fixed tenth of it (to choose others, sort it into" in out, err


def test_pictures_too_small_for_bm3d_are_refused_before_the_work(untrained, run_script, photographs, monkeypatch):
    untrained("unet")
    Image.new("RGB", (300, 5)).save(photographs / "test" / "0.png")
    args = ("--dataset", "folder", "--data-dir", photographs, "--whole", "--baselines", 2)
    for installed, message in (
        (True, "BM3D needs 8x8 pixels; leave smaller pictures or --baselines out"),
        (False, "--baselines needs BM3D for whole pictures; pip install -r requirements-bench.txt"),
    ):
        monkeypatch.setattr(classical, "installed", lambda *_, installed=installed: installed)
        code, _, err = run_script(*args)
        assert code == 1 and err.endswith(f"error: {message}\n")


def test_pictures_too_large_for_a_network_without_tiles_are_refused_before_the_work(
    untrained, run_script, photographs, monkeypatch
):
    untrained("plain")
    monkeypatch.setattr(denoise, "WHOLE", 50 * 37)  # the second has more
    monkeypatch.setattr(measure, "run_whole", None)
    code, _, err = run_script("--dataset", "folder", "--data-dir", photographs, "--whole")
    assert code == 1 and "must see a picture as a whole, of at most 1,850 pixels; use other weights" in err


@pytest.mark.parametrize("flag", ["--steps", "--subset"])
def test_settings_that_whole_pictures_have_no_use_for_are_refused(flag, untrained, run_script, photographs):
    untrained("unet")
    code, _, err = run_script("--dataset", "folder", "--data-dir", photographs, flag, 2)
    why = "does nothing to whole pictures, which are denoised in one step; leave it out, or measure crops (--no-whole)"
    assert code == 1 and err == f"error: {flag} {why}\n"


def test_pictures_smaller_than_the_crops_are_measured_whole(untrained, run_script, photographs, tmp_path):
    """The channels in use are counted in those alone that are large enough for a crop."""
    untrained()
    Image.new("RGB", (20, 20)).save(photographs / "test" / "small.png")
    args = ("--dataset", "folder", "--data-dir", photographs, "--weights", "model/unet32_e0.pth")
    code, out, err = run_script(*args, "--json", "e.json")
    assert code == 0 and "left out" not in err, err
    assert f"data: 3 whole test pictures in {photographs}" in out
    assert len(json.loads((tmp_path / "e.json").read_text())["tables"][-1]["rows"]) == 5
    code, out, err = run_script(*args, "--crop-size", 256, "--whole")
    assert code == 0 and "Share of channels" not in out, err


def test_crops_of_photographs_are_measured_if_asked(untrained, run_script, photographs):
    untrained("plain", folder=photographs)
    code, out, err = run_script("--no-whole", "--baselines", 0, "--steps", 1, "--limit", 2)
    assert code == 0, err
    assert "whole" not in out.split("Summary")[1] and "held-out loss of the network" in out


def test_pictures_that_come_out_as_they_went_in_have_an_infinite_median():
    record = Record("estimated", 0, {"psnr": torch.tensor([math.inf, 44.0, math.inf])})
    (row,) = tables.clean([record])["rows"]
    assert row == ["estimated", math.inf, 44, 1]


def test_published_rows_stand_beside_cbsd68_alone():
    records = [
        Record(method, sigma, {key: torch.full((68,), 30.0) for key in metrics.METRICS})
        for method in ("noisy", "network")
        for sigma in evaluate.WHOLE_LEVELS
    ]
    table = tables.pictures(records, "psnr", published=True)
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert rows["FFDNet (published, arXiv 1710.04026)"] == [68, None, None, 33.87, 31.21, 27.96]
    assert len(rows) == 6 and "published" in tables.as_text(table)
    for other in (tables.pictures(records, "ssim", True), tables.pictures(records, "psnr", False)):
        assert "published" not in tables.as_text(other)


@pytest.mark.parametrize(
    "count, size, published",
    [(68, (481, 321), True), (68, (321, 481), True), (67, (481, 321), False), (68, (480, 320), False)],
)
def test_cbsd68_is_told_by_number_and_size(count, size, published, monkeypatch):
    pictures = [lambda: torch.zeros(3, *size, dtype=torch.uint8)] * count
    seen = []
    record = Record("noisy", 0, {key: torch.zeros(count) for key in metrics.METRICS})
    monkeypatch.setattr(measure, "run_whole", lambda *args: [record])
    monkeypatch.setattr(tables, "pictures", lambda records, key, published: seen.append(published))
    cfg = config.defaults(evaluate.SETTINGS, baselines=0)
    network = denoise.Network(None, None, "any.pth", torch.device("cpu"), "float32", margin=24)
    evaluate.evaluate_pictures(cfg, {"network": network}, pictures)
    assert seen == [published] * len(metrics.METRICS)
