"""Every figure: image grids with PSNR, loss curves, evaluation curves. PNG files, without a display.

Matplotlib is imported when the first figure is made: training without figures runs where it cannot be imported.
Images are (B, 3, H, W) in [-1, 1], clipped when drawn, unless said otherwise.
"""

import itertools
import math

import torch

import data
import diffusion
from config import UserError
from support import files, metrics, streams

BLUE, ORANGE = "#0072B2", "#D55E00"  # of the Okabe-Ito palette, which colour-blind readers tell apart
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # more of it, and a grey
STYLES = [  # of the curves in one plot, in turn, each with a marker of its own
    dict(color=colour, marker=marker, markersize=5, linewidth=1.4) for colour, marker in zip(PALETTE, "osD^vPX*")
]
MOST_STEPS = 50  # of a walk in a figure or table: more take long and change little


def new(width, height):
    """An empty figure of that many inches. Raises UserError without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"figures need Matplotlib ({error}); pip install matplotlib") from None

    return Figure((width, height), layout="constrained")


def save(figure, path):
    """Write the figure to a PNG file. Raises OSError."""
    files.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


# ---- images -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def comparison_grid(model, images, T, path, count=6):
    """Save a grid: `count` of the uint8 images, original, noisy, one-step and multi-step estimate at three levels.

    The images and the noise are the same at every call. Each cell shows its PSNR in dB against the original.
    """
    was_training = model.training
    model.eval()
    x0, eps = sample(model, images, count)
    rows = [("original", x0, None)]
    net = model.forward  # not the compiled one: another batch size is not worth compiling for
    for level in shown_levels(T):
        t, steps = torch.full((len(x0),), level, device=x0.device), min(level, MOST_STEPS)
        x_t = diffusion.add_noise(x0, eps, t, T)
        rows += [
            (f"t = {level}\nnoisy", x_t, x0),
            ("1 step", diffusion.denoise(net, x_t, t, T), x0),
        ]
        if steps > 1:
            rows.append((f"{steps} steps", diffusion.denoise_steps(net, x_t, t, T, steps), x0))
    model.train(was_training)
    grid(path, rows)


def shown_levels(T):
    """The noise levels t at which figures show what denoising does: low, middle and high."""
    return sorted({max(1, T // 5), T // 2, T - 1})


@torch.no_grad()
def steps_strip(model, images, T, level, path, count):
    """Save what 1, 2, 3 and min(level, MOST_STEPS) denoising steps make of `count` uint8 images, noisy at t = level."""
    x0, eps = sample(model, images, count)
    t = torch.full((len(x0),), level, device=x0.device)
    x_t = diffusion.add_noise(x0, eps, t, T)
    rows = [("original", x0, None), (f"t = {level}\nnoisy", x_t, x0)]
    for steps in sorted({1, 2, 3, min(level, MOST_STEPS)}):
        x0_hat = diffusion.denoise_steps(model, x_t, t, T, steps)
        rows.append((f"{steps} step{'s' if steps > 1 else ''}", x0_hat, x0))
    grid(path, rows)


def sample(model, images, count):
    """x0 and eps of `count` of the uint8 images, the same at every call, where the model is."""
    random = streams.generator("cpu", 0, streams.CHOICE, 1)
    device = next(model.parameters()).device
    chosen = torch.randperm(len(images), generator=random)[:count]
    x0 = data.scale(images[chosen.to(images.device)].to(device))
    return x0, torch.randn(x0.shape, generator=random).to(device)


def grid(path, rows):
    """Save rows of (label, images, originals or None), with PSNR where there are originals."""
    columns, cell = len(rows[0][1]), 1.15  # inches, width of an image
    figure = new(0.7 + cell * columns, (cell + 0.17) * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images, originals) in zip(axes, rows):
        row[0].set_ylabel(label, fontsize=11)
        for i, ax in enumerate(row):
            show(ax, images[i], None if originals is None else originals[i])
    save(figure, path)


def panels(path, cells):
    """Save one row of cells (title, image (3, H, W), original or None), each with its PSNR."""
    figure = new(2.4 * len(cells), 2.9)
    for ax, (title, image, original) in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells):
        show(ax, image, original)
        ax.set_title(title, fontsize=11)
    save(figure, path)


def show(ax, image, original):
    ax.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if original is not None:
        psnr = metrics.psnr(image[None], original[None]).item()
        ax.set_xlabel("∞ dB" if psnr == math.inf else f"{psnr:.1f} dB", fontsize=10, labelpad=2)


# ---- curves -----------------------------------------------------------------------------------------------------


def curves(log, path):
    """Save the training and held-out loss by epoch. log: the rows of log.csv as dicts of text.

    Raises KeyError, ValueError or TypeError if there are no rows, or not those.
    """
    if not log:
        raise ValueError("no rows")
    epochs = [int(row["epoch"]) + 1 for row in log]
    figure = new(7, 4)
    ax = figure.subplots()
    ax.plot(epochs, [float(row["train_loss"]) for row in log], "o-", color=BLUE, label="training")
    ax.plot(epochs, [float(row["test_loss"]) for row in log], "s--", color=ORANGE, label="held out")
    ax.set(xlabel="epochs", ylabel="loss: mean squared error of the noise", yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.set_major_formatter("{x:.5g}")  # after a few epochs the losses may be very close
    ax.yaxis.set_minor_formatter("{x:.5g}")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    save(figure, path)


def evaluation(path, levels, trade_off, count):
    """Save PSNR against the noise level, and the perception-distortion curves, as two panels.

    levels: {method: [(sigma on the 0-255 scale, PSNR in dB of `count` images), ...]}, the noisy images first.
    trade_off: {name: [(sharpness: power in the high band / the clean images', change of PSNR in dB, steps), ...]}.
    """
    figure = new(9.2, 4.2)
    left, right = figure.subplots(1, 2)
    for ax, lines in ((left, levels), (right, trade_off)):
        for (name, points), style in zip(lines.items(), itertools.cycle(STYLES)):
            ax.plot([point[0] for point in points], [point[1] for point in points], label=name, **style)
        ax.grid(alpha=0.3)
        if lines:
            ax.legend(frameon=False, fontsize=9)
    for x, y, steps in itertools.chain(*trade_off.values()):
        right.annotate(steps, (x, y), (4, 4), textcoords="offset points", fontsize=9)
    # The curve of the noisy images may leave the frame, which it would otherwise fill.
    lowest = min((psnr for found in list(levels.values())[1:] for _, psnr in found), default=math.nan)
    if math.isfinite(lowest):
        left.set_ylim(bottom=lowest - 2)
    left.set(xlabel="sigma of the noise, 0-255 scale", ylabel="PSNR, dB", title=f"{count:,} test images")
    right.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    right.set(xlabel="sharpness: power at high frequencies / clean images'", ylabel="PSNR - that of one step, dB")
    right.set(title="in 1 to K steps: sharper, at the cost of PSNR")
    save(figure, path)
