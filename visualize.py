"""Draw what a trained network does: comparison grids, strips of several denoising steps and loss curves.

    python visualize.py                                    the newest weights on test images
    python visualize.py --weights model/unet32_e9.pth      others
    python visualize.py --strip --t 7                      from noise level 7 in 1, 2, 3 and 7 steps
    python visualize.py --curves                           the loss curves of model/log.csv

Writes comparison_result_{checkpoint}.png, steps_{checkpoint}.png or curves.png in model/res/.
"""

import csv
from pathlib import Path

import config
import data
from config import Setting, UserError, whole
from support import checkpoint, devices, figures, script

SETTINGS = data.TEST_SETTINGS | checkpoint.SETTINGS | {
    "out_dir": Setting("model", config.file_name, "folder of the run; figures go to its res/"),
    "images":  Setting(6, whole(1, 40), "test images in the figure"),
    "strip":   Setting(False, bool, "draw 1, 2, 3 and t denoising steps (at most 50) from noise level t, not the grid"),
    "t":       Setting(None, whole(), "time step of the noise in the strip, from 1 to T-1; None: T / 2"),
    "curves":  Setting(False, bool, "draw the loss curves of log.csv in --out-dir, not the grid"),
    "device":  devices.SETTINGS["device"],
}  # fmt: skip


def check_choice(cfg):
    """Raises UserError for combinations in which one setting would be ignored."""
    if cfg.curves and cfg.strip:
        raise UserError("--curves and --strip are two figures; draw one at a time")
    if cfg.curves and cfg.weights:
        raise UserError("--curves draws the log of a run; name its folder with --out-dir, not --weights")
    if cfg.curves:
        unused = data.TEST_SETTINGS.keys() | {"images", "device"}
        config.refuse(cfg, unused, "does nothing to the curves of a run; leave it out")
    if "t" in cfg.given and not cfg.strip:
        raise UserError("--t is the noise level of the strip; give --strip too")


def draw_curves(out_dir):
    """Draw out_dir/log.csv; returns the figure's path. Raises UserError."""
    log = Path(out_dir) / "log.csv"
    if not log.is_file():
        raise UserError(f"{log} does not exist; run train.py first, or name the run's folder with --out-dir")
    path = script.result_path(out_dir, "curves.png")
    try:
        with open(log, newline="") as file:
            figures.curves(list(csv.DictReader(file)), path)
    except (KeyError, ValueError, TypeError, OverflowError, csv.Error):
        raise UserError(f"{log} is empty or damaged; train.py --resume auto writes it anew") from None
    return path


def draw_images(cfg):
    """Draw the grid or the strip; returns the figure's path. Raises UserError."""
    weights, model, train_cfg, cfg = checkpoint.load_run(cfg, devices.pick(cfg.device))
    T = train_cfg.noise_steps
    level = cfg.t or T // 2
    if level >= T:
        raise UserError(f"--t {level} is outside 1 ... {T - 1}; lower it")
    path = script.result_path(cfg.out_dir, f"{'steps' if cfg.strip else 'comparison_result'}_{weights.stem}.png")
    images, source = data.load("test", cfg)
    print(f"data: {source}; weights: {weights}")
    if cfg.strip:
        figures.steps_strip(model, images, T, level, path, cfg.images)
    else:
        figures.comparison_grid(model, images, T, path, cfg.images)
    return path


def main():
    cfg = config.parse(__doc__, SETTINGS)
    check_choice(cfg)
    path = draw_curves(cfg.out_dir) if cfg.curves else draw_images(cfg)
    print(f"figure saved: {path}")


if __name__ == "__main__":
    script.run(main)
