"""Measure a trained network on the test images, at every noise level, beside classical denoisers.

    python evaluate.py                                     the newest checkpoint of model/
    python evaluate.py --control plain/unet32_e9.pth       ... beside a second network on the same noise
    python evaluate.py --json e.json --markdown e.md       the same numbers as files
    python evaluate.py --dataset folder --data-dir photos  whole pictures, as the literature measures
    pip install -r requirements-bench.txt                  once: wavelets, non-local means and BM3D too

A folder's held-out pictures are measured whole if any of them is larger than the training crops (--no-whole: crops).
For images of one size it also draws model/res/evaluation_{checkpoint}.png.
"""

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path

import torch

import config
import data
import denoise
import diffusion
from config import Setting, UserError, name_ending, whole
from diffusion import GREY_LEVELS
from support import checkpoint, classical, devices, figures, files, held_out, measure, metrics, script, streams, tables
from support.datasets import folder
from support.measure import LITERATURE, Job, estimator, noisy

SETTINGS = data.TEST_SETTINGS | checkpoint.SETTINGS | devices.SETTINGS | {
    "control":   Setting(None, config.file_name, "checkpoint of a second network to compare with"),
    "out_dir":   Setting("model", config.file_name, "folder of the run; the figure goes to its res/"),
    "whole":     Setting(None, bool, "measure whole pictures of a folder; None: if one is larger than the crops"),
    "subset":    Setting(100, whole(), "images for what takes many passes: several steps and the blind estimate"),
    "steps":     Setting(None, whole(1, 1000), "most steps to try; None: one for each unit of t, and at most 50"),
    "ensemble":  denoise.SETTINGS["ensemble"],
    "baselines": Setting(None, whole(0), "images for classical denoisers (whole: BM3D alone); None: 100, whole: 0"),
    "json":      Setting(None, name_ending(".json"), "file to write the tables to as JSON"),
    "markdown":  Setting(None, name_ending(".md"), "file to write the tables to as Markdown"),
    "overwrite": Setting(False, bool, "replace these two files if they exist"),
}  # fmt: skip
MEASURES = (
    "The noise is the same for every level, method and run. PSNR and SSIM are those of images clipped to the valid "
    'range; they and sigma are on the 0-255 scale. Every "±" is a 95% interval over images, 1.96 standard errors.'
)
WHOLE_LEVELS = (5, 10, 15, 25, 50)  # sigma of whole pictures, on the 0-255 scale
TOLD = {"1": 1, "2": 2, "estimated": None}  # sigma that the network is told for pictures without noise


def plan(cfg, networks):
    """The Jobs of measure.run. networks: {name: (model(x, t) -> eps_hat, its T)}, "network" and maybe "control"."""
    model, T = networks["network"]
    levels = measure.levels_of(T)
    jobs = [Job("clean", levels[-1], [None])]
    jobs += [Job("noisy", t, [noisy]) for t in levels]
    jobs += [Job(name, t, [estimator(*net)], 1, "euler") for name, net in networks.items() for t in levels]
    several = [(t, k, s) for t in levels for k in measure.step_counts(t, T, cfg.steps) for s in diffusion.SAMPLERS]
    jobs += [Job("network", t, [estimator(model, T, k, s)], k, s, cfg.subset) for t, k, s in several]
    for name, settings in (classical.methods() if cfg.baselines else {}).items():
        jobs += [Job(name, t, settings, count=cfg.baselines) for t in levels]
    return jobs


@torch.inference_mode()
def evaluate_images(cfg, networks, knows_level, images):
    """The tables and the records, for uint8 images of one size. knows_level: whether the network knows t."""
    model, T = networks["network"]
    records = measure.run(plan(cfg, networks), T, images)
    made = [tables.summary(records), tables.one_step(records)]
    made += [tables.control(records)] if "control" in networks else []
    made.append(tables.several_steps(records, cfg.subset))
    if knows_level:
        estimators = {"the network": lambda x_t: diffusion.estimate_sigma(model, x_t, T)}
        estimators |= classical.sigma_estimators() if cfg.baselines else {}
        made.append(tables.blind(measure.blind(images[: cfg.subset], LITERATURE, estimators)))
    made += [tables.classical(records, key) for key in metrics.METRICS if cfg.baselines]
    return made, records


def evaluate_pictures(cfg, networks, pictures):
    """The tables for whole pictures, see data.whole_pictures. networks: {name: denoise.Network}, names as in `plan`."""
    every, network = len(pictures), networks["network"]
    sizes = [tuple(read().shape[1:]) for read in pictures]
    for net, size in itertools.product(networks.values(), sizes):
        denoise.check_size(net, *size)

    def denoiser(net, told):
        """told(sigma): the level that the network is told, 0-255 scale; None: estimated."""

        def estimate(x_t, sigma):
            return denoise.denoise_pixels(net, x_t[0], told(sigma), ensemble=cfg.ensemble).clean[None]

        return every, estimate

    denoisers = {"noisy": (every, noisy)}
    denoisers |= {name: denoiser(net, lambda sigma: GREY_LEVELS * sigma) for name, net in networks.items()}
    if cfg.baselines:
        denoisers["BM3D"] = cfg.baselines, bm3d(sizes[: cfg.baselines])
    records = measure.run_whole(pictures, WHOLE_LEVELS, denoisers)
    on_clean = {name: denoiser(network, lambda _, level=level: level) for name, level in TOLD.items()}
    clean = measure.run_whole(pictures, (0,), on_clean)
    # The literature reports on CBSD68: 68 pictures of 481x321 or 321x481 pixels.
    cbsd68 = every == 68 and all(sorted(size) == [321, 481] for size in sizes)
    return [*(tables.pictures(records, key, cbsd68) for key in metrics.METRICS), tables.clean(clean)]


def bm3d(sizes):
    """The estimate of BM3D for pictures of these sizes, (height, width). Raises UserError."""
    if not classical.installed("bm3d"):
        raise UserError("--baselines needs BM3D for whole pictures; pip install -r requirements-bench.txt")
    if min(map(min, sizes)) < classical.BLOCK:
        size = f"{classical.BLOCK}x{classical.BLOCK}"
        raise UserError(f"BM3D needs {size} pixels; leave smaller pictures or --baselines out")
    return classical.by_picture(classical.bm3d_in_colour)


def held_out_pictures(cfg):
    """The pictures to measure whole, or [] where crops or the images of one size are to be measured."""
    if cfg.whole and cfg.dataset != "folder":
        raise UserError("--whole measures the pictures of a folder; add --dataset folder and --data-dir")
    if cfg.whole is False or cfg.dataset != "folder":
        return []
    pictures = data.whole_pictures("test", cfg)
    if not cfg.whole and all(max(read().shape[1:]) <= cfg.crop_size for read in pictures):
        return []
    why = "does nothing to whole pictures, which are denoised in one step; leave it out, or measure crops (--no-whole)"
    config.refuse(cfg, {"steps", "subset"}, why)
    return pictures


def held_out_images(cfg, pictures):
    """uint8 images of one size, and a phrase that says where they come from. Of whole `pictures`: cut from them."""
    if not pictures:
        images, source = data.load("test", cfg)
        # In an order in which the first few are a fair sample, of any folder.
        order = torch.randperm(len(images), generator=streams.generator("cpu", 0, streams.CHOICE, 0))
        return images[order], source
    source = f"{len(pictures):,} whole test pictures in {cfg.data_dir}"
    if not folder.is_sorted(cfg.data_dir):
        source += ", a fixed tenth of it (to choose others, sort it into train/ and test/)"
    return measure.middles(pictures, cfg.crop_size, held_out.SAMPLE), source


def check_reports(cfg):
    """Before the work: refuse to replace existing files without --overwrite, and make the folders of those to write.

    Raises UserError or OSError.
    """
    reports = [path for path in (cfg.json, cfg.markdown) if path]
    for path in filter(os.path.isdir, reports):
        raise UserError(f"{path} is a folder; choose another name")
    if not cfg.overwrite:
        files.refuse_existing(*reports, remedy="choose another name, or add --overwrite to replace it")
    for path in reports:
        script.make_folder(Path(path).parent)


def report(cfg, about, made):
    """Print the tables, and write the report files. Raises UserError if one cannot be written."""
    lines = "\n".join(f"- {name}: {value}" for name, value in about.items() if value is not None)
    text = "\n\n".join([lines, *map(tables.as_text, made)]) + "\n"
    document = json.dumps(dict(provenance=about, tables=[*map(tables.as_data, made)]), indent=1)
    print(text)
    unsaved = []
    for path, content in ((cfg.json, document), (cfg.markdown, text)):
        if path:
            try:
                files.write_text(path, content, replace=cfg.overwrite)
                print(f"tables saved: {path}")
            except FileExistsError:
                unsaved.append(f"{path} was created meanwhile and is not replaced")
            except OSError as error:
                unsaved.append(f"{path} cannot be written ({files.reason(error)})")
    if unsaved:
        raise UserError(f"{'; '.join(unsaved)}; the tables are printed above")


def main():
    cfg = config.parse(__doc__, SETTINGS)
    started = time.monotonic()
    device = devices.pick(cfg.device)
    check_reports(cfg)
    weights, model, train_cfg, cfg = checkpoint.load_run(cfg, device)
    loaded = {"network": (model, train_cfg, weights)}
    if cfg.control:
        loaded["control"] = *checkpoint.load_model(cfg.control, device), Path(cfg.control)
    pictures = held_out_pictures(cfg)
    if cfg.baselines is None:
        cfg = dataclasses.replace(cfg, baselines=0 if pictures else 100)
    images, source = held_out_images(cfg, pictures)
    images = images.to(device)
    figure = None if pictures else script.result_path(cfg.out_dir, f"evaluation_{weights.stem}.png")
    print(f"data: {source}; weights: {weights}")

    shares = held_out.channels_in_use(train_cfg, model, images) if len(images) else {}
    precision = devices.pick_precision(cfg.precision, device)
    if pictures:
        networks = {name: denoise.prepare(*of, device, precision) for name, of in loaded.items()}
        made = evaluate_pictures(cfg, networks, pictures)
    else:
        networks = {
            name: (measure.in_precision(net, precision, cfg.ensemble), its_cfg.noise_steps)
            for name, (net, its_cfg, _) in loaded.items()
        }
        made, records = evaluate_images(cfg, networks, getattr(model, "knows_t", True), images)
    about = dict(weights=str(weights), control=cfg.control, data=source, images=len(pictures or images))
    about |= dict(ensemble=cfg.ensemble, precision=precision, **devices.describe(device))
    about |= dict(seconds=round(time.monotonic() - started, 1), measures=MEASURES)
    try:
        report(cfg, about, [*made, tables.channels(shares)] if shares else made)
    finally:  # a report that cannot be written must not cost the figure
        if figure:
            shown = measure.levels_with_many_steps(train_cfg.noise_steps)
            figures.evaluation(figure, *tables.curves(records, cfg.subset, shown))
            print(f"figure saved: {figure}")


if __name__ == "__main__":
    script.run(main)
