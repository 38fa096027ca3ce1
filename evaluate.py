"""Measure a trained network on the test images, at every noise level, beside classical denoisers.

    python evaluate.py                                     the newest checkpoint of model/
    python evaluate.py --control plain/unet32_e9.pth       ... beside a second network on the same noise
    python evaluate.py --json e.json --markdown e.md       the same numbers as files
    pip install -r requirements-bench.txt                  once: wavelets, non-local means and BM3D too

Noise levels are t = 1 ... T-1 and the literature's sigma = 15, 25 and 50, on the 0-255 scale. The noise is the same for
every level, method and run. PSNR and SSIM are those of images clipped to the valid range, on the 0-255 scale. Every
"±" is a 95% interval over images, 1.96 standard errors. Writes the figure model/res/evaluation_{checkpoint}.png.
"""

import contextlib
import itertools
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import classical
import config
import data
import diffusion
import metrics
import visualize

SETTINGS = (
    "weights control out_dir dataset data_dir skip_bad_images max_pixels limit subset baselines steps device precision "
    "json markdown"
)
LITERATURE = (15, 25, 50)  # sigma on the 0-255 scale
STEPS = (1, 2, 3, 5, 10, 20, 50)  # of the perception-distortion curve, as far as they are fewer than the last


# ---- denoisers: estimate(x_t, sigma) -> x0_hat ------------------------------------------------------------------------


def noisy(x_t, sigma):
    return x_t


def in_precision(model, precision):
    """model(x, t) under autocast."""

    def eps_hat(x, t):
        with config.autocast(x.device, precision):
            return model(x, t)

    return eps_hat


def network(model, T, steps=1):
    """The network's estimate, see diffusion.denoise_steps."""

    def estimate(x_t, sigma):
        t = torch.full((len(x_t),), sigma * T, device=x_t.device)
        return diffusion.denoise_steps(model, x_t, t, T, steps)

    return estimate


# ---- measuring --------------------------------------------------------------------------------------------------------


def fixed_noise(images):
    """The noise of every image, that of train.held_out_loss."""
    parts = enumerate(images.split(data.TEST_BATCH))
    return torch.cat([data.held_out_noise(part, i * data.TEST_BATCH) for i, part in parts])


def quality(x0_hat, x0, x_t, sigma):
    """What the tables tell of estimates x0_hat of x0 from x_t = x0 + sigma * eps: a dict of (B,).

    loss is the mean squared error of eps_hat = (x_t - x0_hat) / sigma.
    """
    return dict(
        loss=(x0_hat - x0).square().mean(dim=(1, 2, 3)) / sigma**2,
        psnr=diffusion.psnr(x0_hat, x0),
        ssim=metrics.ssim(x0_hat, x0),
        whiteness=metrics.autocorrelation(x_t - x0_hat),
        **dict(zip(metrics.BANDS, metrics.band_power(x0_hat).unbind(1))),
    )


def measure(images, eps, sigma, estimate, bar):
    """The `quality` of estimate(x_t, sigma) for the images that eps has noise for."""
    parts = []
    for start in range(0, len(eps), data.TEST_BATCH):
        x0 = data.scale(images[start : start + data.TEST_BATCH][: len(eps) - start])
        x_t = x0 + sigma * eps[start : start + data.TEST_BATCH]
        parts.append(quality(estimate(x_t, sigma).float(), x0, x_t, sigma))
        bar.update(len(x0))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


@contextlib.contextmanager
def part(name, total, seconds):
    """A progress bar of `total` images times denoisers; notes in `seconds` how long the part took."""
    started = time.time()
    with tqdm(total=total, desc=name, unit="image", delay=2, leave=False, mininterval=1) as bar:
        yield bar
    seconds[name] = round(time.time() - started, 1)


def step_plan(t, T, last):
    """{number of steps: steps of diffusion.denoise_steps} to try from level t: 1 and last; at shown_levels others too.

    last None: one step for each unit of t, down the integers that the network was trained on.
    """
    plan = {1: 1} | {k: k for k in STEPS if k < (last or t) and t in visualize.shown_levels(T)}
    return plan | {last or math.ceil(t): last}


def measure_classical(images, eps, levels, T, seconds):
    """{method: {t: quality}}, by mean PSNR the best of its settings at each level."""
    methods = classical.methods()
    found = {name: {} for name in methods}
    with part("classical denoisers", len(levels) * len(eps) * sum(map(len, methods.values())), seconds) as bar:
        for name, settings in methods.items():
            for t in levels:
                tried = [measure(images, eps, t / T, estimate, bar) for estimate in settings]
                found[name][t] = max(tried, key=lambda q: q["psnr"].mean())
    return found


def measure_blind(estimators, images, eps, seconds):
    """{(sigma on the 0-255 scale, name of the estimator): errors on that scale}; an estimator returns sigma (B,)."""
    errors = {}
    with part("blind estimate", len(LITERATURE) * len(eps) * len(estimators), seconds) as bar:
        for sigma, (name, estimate) in itertools.product(LITERATURE, estimators.items()):
            batches = (data.scale(images[: len(eps)]) + sigma / 127.5 * eps).split(data.TEST_BATCH)
            found = []
            for x_t in batches:
                found.append(127.5 * estimate(x_t).cpu().double() - sigma)
                bar.update(len(x_t))
            errors[sigma, name] = torch.cat(found)
    return errors


# ---- tables: a title, columns {heading: decimals} and rows of texts, numbers, (mean, half interval) or None ------------


def level_table(title, T, found, columns, values):
    """A row for every level of found {t: quality}, with the intervals of values(t), a tensor for each column."""
    rows = [[127.5 * t / T, t, *map(metrics.interval, values(t))] for t in found]
    return dict(title=f"{title}, {images_of(found):,} images", columns={"sigma": 2, "t": 2} | columns, rows=rows)


def images_of(found):
    return len(next(iter(found.values()))["psnr"])


def one_step_table(T, noise, one):
    columns = {"loss": 4, "PSNR noisy": 2, "PSNR": 2, "SSIM noisy": 4, "SSIM": 4, "whiteness": 4}

    def values(t):
        return *(one[t]["loss"], noise[t]["psnr"], one[t]["psnr"]), *(
            noise[t]["ssim"],
            one[t]["ssim"],
            one[t]["whiteness"],
        )

    return level_table("One step", T, one, columns, values)


def control_table(T, one, control):
    columns = {
        "loss of control": 4,
        "gain": 4,
        "PSNR of control": 2,
        "PSNR gain": 2,
        "SSIM of control": 4,
        "SSIM gain": 4,
    }

    def values(t):
        return [v for name in ("loss", "psnr", "ssim") for v in (control[t][name], one[t][name] - control[t][name])]

    return level_table("The control in one step, and what the network gains on it", T, one, columns, values)


def classical_table(metric, digits, T, methods):
    """methods: {name: {t: quality}}, the network's last. The gain is over the best other at the level, in the mean."""
    *others, own = methods.values()

    def values(t):
        best = max((other[t][metric] for other in others), key=torch.mean)
        return *(found[t][metric] for found in methods.values()), own[t][metric] - best

    title = f"{metric.upper()} beside classical denoisers, and the gain over the best of them"
    return level_table(title, T, own, dict.fromkeys((*methods, "gain"), digits), values)


def steps_table(T, several, power):
    """several: {t: {steps: quality}}; power: that of the clean images in the bands, (n, 3)."""
    columns = {"sigma": 2, "t": 2, "steps": 0, "PSNR": 2, "gain": 2, "SSIM": 4} | dict.fromkeys(metrics.BANDS, 3)
    rows = []
    for t, by_steps in several.items():
        for k, q in by_steps.items():
            values = (q["psnr"], q["psnr"] - by_steps[1]["psnr"], q["ssim"])
            sharpness = [metrics.interval(q[band], power[:, i]) for i, band in enumerate(metrics.BANDS)]
            rows.append([127.5 * t / T, t, k, *map(metrics.interval, values), *sharpness])
    title = "Several steps, the gain on one step, and sharpness: power in bands of frequencies / the clean images'"
    return dict(title=f"{title}, {images_of(by_steps):,} images", columns=columns, rows=rows)


def blind_table(errors):
    columns = {"sigma": 0, "estimate by": 0, "mean error": 2, "mean absolute error": 2, "standard deviation": 2}
    rows = []
    for (sigma, name), error in errors.items():
        spread = error.std().item() if len(error) > 1 else None
        rows.append([sigma, name, metrics.interval(error), metrics.interval(error.abs()), spread])
    return dict(title=f"sigma estimated from the picture, {len(error):,} images", columns=columns, rows=rows)


def as_text(table):
    """Aligned Markdown."""

    def cell_text(cell, digits):
        if isinstance(cell, tuple):
            return " ± ".join(f"{number:.{digits}f}" for number in cell if number is not None) or "-"
        return "-" if cell is None else cell if isinstance(cell, str) else f"{cell:.{digits}f}"

    columns = table["columns"]
    rows = [list(columns), *([cell_text(*pair) for pair in zip(row, columns.values())] for row in table["rows"])]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([f"{table['title']}:", "", rows[0], rule, *rows[1:]])


def as_data(table):
    """For JSON: the rows as {heading: text, number or {"mean": ..., "interval": half of it}}."""

    def cell_data(cell):
        return dict(zip(("mean", "interval"), cell)) if isinstance(cell, tuple) else cell

    rows = [{name: cell_data(cell) for name, cell in zip(table["columns"], row)} for row in table["rows"]]
    return dict(title=table["title"], rows=rows)


# ---- the script -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(cfg, T, model, blind, control, images):
    """Measure everything; returns the tables, what `draw` takes, and the seconds that each part took.

    model, control: callables (x, t) -> eps_hat, control with its T, or None. blind: whether model can tell the noise level.
    """
    seconds = {}
    levels = sorted({*range(1, T), *(sigma * T / 127.5 for sigma in LITERATURE)})
    eps = fixed_noise(images)
    few = eps[: cfg.subset]

    with part("noisy images", len(levels) * len(images), seconds) as bar:
        noise = {t: measure(images, eps, t / T, noisy, bar) for t in levels}
    with part("one step", len(levels) * len(images), seconds) as bar:
        one = {t: measure(images, eps, t / T, network(model, T), bar) for t in levels}
    summary = {
        "whiteness of the true noise": metrics.autocorrelation(eps).cpu(),
        f"held-out loss, mean over t = 1 ... {T - 1}": mean_loss(one, T),
    }
    tables = [one_step_table(T, noise, one)]

    if control:
        with part("control", len(levels) * len(images), seconds) as bar:
            other = {t: measure(images, eps, t / T, network(*control), bar) for t in levels}
        summary["the same for the control"] = mean_loss(other, T)
        tables.append(control_table(T, one, other))

    plan = [(t, k, steps) for t in levels for k, steps in step_plan(t, T, cfg.steps).items()]
    several = {t: {} for t in levels}
    with part("several steps", len(plan) * len(few), seconds) as bar:
        for t, k, steps in plan:
            several[t][k] = measure(images, few, t / T, network(model, T, steps), bar)
    power = metrics.band_power(data.scale(images[: cfg.subset])).cpu()
    tables.append(steps_table(T, several, power))
    curves = {"noisy": noise, "one step": one, "several steps": {t: list(several[t].values())[-1] for t in levels}}

    if blind:
        estimators = {"the network": lambda x_t: diffusion.estimate_sigma(model, x_t, T)}
        estimators |= classical.sigma_estimators() if cfg.baselines else {}
        tables.append(blind_table(measure_blind(estimators, images, few, seconds)))

    if cfg.baselines:
        found = measure_classical(images, eps[: cfg.baselines], levels, T, seconds)
        methods = first(cfg.baselines, {"noisy": noise, **found, "one step": one})
        tables += [classical_table("psnr", 2, T, methods), classical_table("ssim", 4, T, methods)]
        curves |= found

    rows = [[name, metrics.interval(values)] for name, values in summary.items()]
    tables.insert(0, dict(title="Summary", columns={"": 0, "mean": 4}, rows=rows))
    return tables, (curves, several, power, T), seconds


def first(count, methods):
    """{method: {t: quality}} of the first images alone."""
    return {
        method: {t: {name: values[:count] for name, values in q.items()} for t, q in found.items()}
        for method, found in methods.items()
    }


def mean_loss(found, T):
    """Of every image, the mean of the loss over t; train.held_out_loss takes one t for each image."""
    return torch.stack([found[t]["loss"] for t in range(1, T)]).mean(dim=0)


def draw(path, curves, several, power, T):
    """curves: {method: {t: quality}}, drawn for the images that all of them have in common."""
    shared = min(images_of(found) for found in curves.values())
    levels = {
        name: [(127.5 * t / T, q["psnr"].mean().item()) for t, q in found.items()]
        for name, found in first(shared, curves).items()
    }
    trade_off = {}
    for t in visualize.shown_levels(T):
        sharpness = [(q["high"].mean() / power[:, 2].mean()).item() for q in several[t].values()]
        change = [(q["psnr"] - several[t][1]["psnr"]).mean().item() for q in several[t].values()]
        trade_off[f"sigma = {127.5 * t / T:.3g}"] = list(zip(sharpness, change, several[t]))
    visualize.evaluation(path, levels, trade_off, shared)


def main():
    cfg = config.parse(__doc__, SETTINGS)
    started, device = time.time(), config.pick_device(cfg.device)
    precision = config.pick_precision(cfg.precision, device)
    weights, model, trained, images, source = visualize.load_run(cfg)
    order = torch.randperm(len(images), generator=data.generator("cpu", 0, data.CHOICE, 0))
    images = images[order[: cfg.limit]].to(device)  # so that the first few are a fair sample, of any folder
    print(f"data: {source}; weights: {weights}")
    res = Path(cfg.out_dir) if "out_dir" in cfg.given else weights.parent
    figure = res / "res" / f"evaluation_{weights.stem}.png"
    for file in filter(None, (cfg.json, cfg.markdown, figure)):
        config.make_folder(Path(file).parent)
    control = None
    if cfg.control:
        other, trained_other = checkpoint.load_model(cfg.control, device)
        control = in_precision(other, precision), trained_other["noise_steps"]
    model, blind = in_precision(model, precision), trained["model"] != "plain"
    tables, drawing, seconds = evaluate(cfg, trained["noise_steps"], model, blind, control, images)

    provenance = dict(
        weights=str(weights),
        control=cfg.control,
        data=source,
        images=len(images),
        precision=str(precision).removeprefix("torch."),
        **config.machine(device),
        seconds=dict(seconds, total=round(time.time() - started, 1)),
        measures=" ".join(__doc__[__doc__.index("Noise levels are") : __doc__.index(" Writes the figure")].split()),
    )
    spent = ", ".join(f"{name} {value}" for name, value in provenance["seconds"].items())
    lines = (provenance | {"seconds": spent}).items()
    lines = "\n".join(f"- {name}: {value}" for name, value in lines if value is not None)
    text = "\n\n".join([lines, *map(as_text, tables)]) + "\n"
    print(text)
    if cfg.json:
        write(cfg.json, json.dumps(dict(provenance=provenance, tables=[as_data(table) for table in tables]), indent=1))
    if cfg.markdown:
        write(cfg.markdown, text)
    draw(figure, *drawing)  # last, so that the numbers are there whatever becomes of it
    print(f"figure saved: {figure}")


def write(path, text):
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
    print(f"tables saved: {path}")


if __name__ == "__main__":
    config.run(main, data.DataError, checkpoint.CheckpointError)
