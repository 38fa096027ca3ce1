"""Draw what a trained network does: comparison grids, strips of several denoising steps and loss curves.

    python visualize.py                                    the newest weights on test images
    python visualize.py --weights model/unet32_e9.pth      others
    python visualize.py --strip --t 7                      from noise level 7 in 1, 2, ... 7 steps
    python visualize.py --curves                           the loss curves of model/log.csv

Writes comparison_result_{checkpoint}.png, steps_{checkpoint}.png or curves.png in model/res/.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import checkpoint
import config
import data
import diffusion

BLUE, ORANGE = "#0072B2", "#D55E00"  # of the Okabe-Ito palette, which colour-blind readers tell apart
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # more of it, and a grey
STYLES = [  # of the curves in one plot, in turn, each with a marker of its own
    dict(color=colour, marker=marker, markersize=5, linewidth=1.4) for colour, marker in zip(PALETTE, "osD^vPX*")
]


@torch.no_grad()
def comparison_grid(model, images, T, path, count=6):
    """Save a grid: for `count` of the uint8 images, original, noisy, one-step and multi-step estimate at three levels.

    The images and the noise are the same at every call. Each cell bears its PSNR in dB against the original.
    """
    was_training = model.training
    model.eval()
    x0, eps = sample(model, images, count)
    rows = [("original", x0, None)]
    net = model.forward  # not the compiled one: another batch size is not worth compiling for
    for level in shown_levels(T):
        t = torch.full((len(x0),), level, device=x0.device)
        x_t = diffusion.add_noise(x0, eps, t, T)
        rows += [
            (f"t = {level}\nnoisy", x_t, x0),
            ("1 step", diffusion.denoise(net, x_t, t, T), x0),
            (f"{level} steps", diffusion.denoise_steps(net, x_t, t, T), x0),
        ]
    draw(path, rows)
    model.train(was_training)


def shown_levels(T):
    """The noise levels t of which figures show what denoising does: low, middle and high."""
    return sorted({max(1, T // 5), T // 2, T - 1})


@torch.no_grad()
def steps_strip(model, images, T, level, path, count=6):
    """Save what 1, 2, 3, ... `level` denoising steps make of `count` of the uint8 images, noisy at t = level."""
    x0, eps = sample(model, images, count)
    t = torch.full((len(x0),), level, device=x0.device)
    x_t = diffusion.add_noise(x0, eps, t, T)
    rows = [("original", x0, None), (f"t = {level}\nnoisy", x_t, x0)]
    for steps in sorted({1, 2, 3, level}):
        x0_hat = diffusion.denoise_steps(model, x_t, t, T, steps)
        rows.append((f"{steps} step{'s' if steps > 1 else ''}", x0_hat, x0))
    draw(path, rows)


def sample(model, images, count):
    """x0 and eps of `count` of the uint8 images, the same at every call, where the model is."""
    random = data.generator("cpu", 0, data.CHOICE, 1)
    device = next(model.parameters()).device
    chosen = torch.randperm(len(images), generator=random)[:count]
    x0 = data.scale(images[chosen.to(images.device)].to(device))
    return x0, torch.randn(x0.shape, generator=random).to(device)


def draw(path, rows, cell=1.15):
    """Save a figure of rows (label, images (n, 3, H, W) in [-1, 1], originals or None), with PSNR where there are originals.

    cell: width of an image, inches.
    """
    columns = len(rows[0][1])
    figure = Figure((0.7 + cell * columns, (cell + 0.17) * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images, originals) in zip(axes, rows):
        row[0].set_ylabel(label, fontsize=11)
        for i, ax in enumerate(row):
            show(ax, images[i], None if originals is None else originals[i])
    save_figure(figure, path)


def panels(path, cells):
    """Save one row of cells (title, image (3, H, W) in [-1, 1], original), each with its PSNR."""
    figure = Figure((2.4 * len(cells), 2.9), layout="constrained")
    for ax, (title, image, original) in zip(figure.subplots(1, len(cells)), cells):
        show(ax, image, original)
        ax.set_title(title, fontsize=11)
    save_figure(figure, path)


def show(ax, image, original):
    ax.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if original is not None:
        psnr = diffusion.psnr(image[None], original[None]).item()
        ax.set_xlabel("∞ dB" if psnr == math.inf else f"{psnr:.1f} dB", fontsize=10, labelpad=2)


def read_figure(path):
    """A saved figure as uint8 (3, H, W)."""
    return np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def curves(log, path):
    """Save the training and held-out loss by epoch from the rows of log.csv."""
    if not log:
        raise ValueError("no rows")
    epochs = [int(row["epoch"]) + 1 for row in log]
    figure = Figure((7, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(epochs, [float(row["train_loss"]) for row in log], "o-", color=BLUE, label="training")
    ax.plot(epochs, [float(row["test_loss"]) for row in log], "s--", color=ORANGE, label="held out")
    ax.set(xlabel="epochs", ylabel="loss: mean squared error of the noise", yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter("{x:.3g}")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    save_figure(figure, path)


def evaluation(path, levels, trade_off, count):
    """Save PSNR against the noise level, and the perception-distortion curves, as two panels.

    levels: {method: [(sigma on the 0-255 scale, PSNR in dB of `count` images), ...]}, the noisy images first.
    trade_off: {name: [(sharpness: power in the high band / the clean images', change of PSNR in dB, steps), ...]}.
    """
    figure = Figure((9.2, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, curves in ((left, levels), (right, trade_off)):
        for (name, points), style in zip(curves.items(), itertools.cycle(STYLES)):
            ax.plot([point[0] for point in points], [point[1] for point in points], label=name, **style)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=9)
    for x, y, steps in itertools.chain(*trade_off.values()):
        right.annotate(steps, (x, y), (4, 4), textcoords="offset points", fontsize=9)
    # The noisy images may leave the frame, which they would else fill.
    left.set_ylim(bottom=min(psnr for found in list(levels.values())[1:] for _, psnr in found) - 2)
    left.set(xlabel="sigma of the noise, 0-255 scale", ylabel="PSNR, dB", title=f"{count:,} test images")
    right.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    right.set(xlabel="sharpness: power at high frequencies / clean images'", ylabel="PSNR - that of one step, dB")
    right.set(title="in 1 to K steps: sharper, at the cost of PSNR")
    save_figure(figure, path)


def save_figure(figure, path):
    checkpoint.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def load_run(cfg):
    """What --weights and the data settings name: (path, network, the config it was trained with, images, their source).

    The images are the test split's. Data settings that were not typed are those the network was trained with.
    """
    weights = checkpoint.choose(cfg.weights, cfg.out_dir)
    model, trained = checkpoint.load_model(weights, config.pick_device(cfg.device))
    for name in {"dataset", "data_dir", "skip_bad_images", "max_pixels"} & trained.keys() - cfg.given:
        setattr(cfg, name, trained[name])
    images, source = data.load(
        "test", cfg.dataset, cfg.data_dir, skip_bad_images=cfg.skip_bad_images, max_pixels=cfg.max_pixels
    )
    return weights, model, trained, images, source


def main():
    cfg = config.parse(
        __doc__, "weights out_dir dataset data_dir skip_bad_images max_pixels images strip t curves device"
    )
    res = Path(cfg.out_dir) / "res"
    if cfg.curves:
        log = Path(cfg.out_dir) / "log.csv"
        if not log.is_file():
            raise config.ConfigError(
                f"{log} does not exist; run train.py first, or name the run's folder with --out-dir"
            )
        with open(log, newline="") as file:
            rows = list(csv.DictReader(file))
        path = res / "curves.png"
        try:
            curves(rows, path)
        except (KeyError, ValueError, TypeError, csv.Error):
            raise config.ConfigError(f"{log} is empty or damaged; train.py --resume auto writes it anew") from None
    else:
        weights, model, trained, images, source = load_run(cfg)
        if "out_dir" not in cfg.given:
            res = weights.parent / "res"
        print(f"data: {source}; weights: {weights}")
        T = trained["noise_steps"]
        if cfg.strip:
            config.check_t(cfg.t, T)
            path = res / f"steps_{weights.stem}.png"
            steps_strip(model, images, T, cfg.t, path, cfg.images)
        else:
            path = res / f"comparison_result_{weights.stem}.png"
            comparison_grid(model, images, T, path, cfg.images)
    print(f"figure saved: {path}")


if __name__ == "__main__":
    config.run(main, data.DataError, checkpoint.CheckpointError)
