"""Where the numbers of a run go: log.csv, TensorBoard, Weights & Biases.

A logger is a class with the three methods of CSV. To add one: the class, and its line in LOGGERS.
"""

import csv
import io
from pathlib import Path

from config import UserError
from support import files, pictures

SCALARS = ("train_loss", "test_loss", "lr", "images_per_second", "channels_in_use")


class CSV:
    """log.csv in the run's folder, one row per epoch."""

    def __init__(self, out_dir, settings):
        self.path = Path(out_dir) / "log.csv"

    def log(self, rows):
        """Take all rows so far, the last of which is new: so that the file is that of one run, resumed or not."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[-1], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.path, text.getvalue())

    def figure(self, path, step):
        """Take a picture file that the run has drawn."""


class TensorBoard:
    """Event files below the run's folder."""

    def __init__(self, out_dir, settings):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(Path(out_dir) / "tensorboard")

    def log(self, rows):
        for name in SCALARS:
            if name in rows[-1]:
                self.writer.add_scalar(name, rows[-1][name], rows[-1]["step"])
        self.writer.flush()

    def figure(self, path, step):
        self.writer.add_image("comparison", pictures.read(path), step, dataformats="HWC")
        self.writer.flush()


class WandB:
    """Weights & Biases, project "denoising-unet"; the starts of one resumed run are a group there."""

    def __init__(self, out_dir, settings):
        import wandb

        self.image = wandb.Image
        group = Path(out_dir).resolve().name
        self.run = wandb.init(project="denoising-unet", group=group, dir=out_dir, config=settings)

    def log(self, rows):
        self.run.log({name: rows[-1][name] for name in SCALARS if name in rows[-1]}, step=rows[-1]["step"])

    def figure(self, path, step):
        self.run.log({"comparison": self.image(str(path))}, step=step)


LOGGERS = {"csv": CSV, "tensorboard": TensorBoard, "wandb": WandB}


def start(name, out_dir, settings):
    """The logger of this name. settings: a dict of the run's. Raises UserError if it cannot start."""
    try:
        return LOGGERS[name](out_dir, settings)
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        raise UserError(f"--loggers {name} needs the package {package}; pip install {package}") from None
    except Exception as error:  # not logged in, no network: each package raises its own kinds
        raise UserError(f"--loggers {name} cannot start ({error}); leave it out to train without it") from None
