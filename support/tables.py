"""The tables of evaluate.py, made from flat records (measure.Record).

There is a record for each method, noise level, number of steps and sampler.
A table is a dict: title, columns {heading: digits after the decimal point} and rows. A cell of a row is a text, a
number, (mean, half of its 95% interval) or None. `as_text` makes Markdown of it, `as_data` what JSON takes.
"""

import math
import statistics

import torch

from support.measure import LITERATURE
from support.metrics import BANDS, METRICS, interval

# PSNR in dB on CBSD68 (whole pictures, float noise, mean over pictures), as published.
PUBLISHED = {
    "CBM3D (published, arXiv 1710.04026)": (33.52, 30.71, 27.38),
    "CDnCNN-B, not told sigma (published, arXiv 1710.04026)": (33.89, 31.23, 27.92),
    "FFDNet (published, arXiv 1710.04026)": (33.87, 31.21, 27.96),
    "DRUNet, 32 million parameters (published, arXiv 2008.13751)": (34.30, 31.69, 28.51),
}


def select(records, **fields):
    """The records with these fields, in their order."""
    return [record for record in records if all(getattr(record, name) == value for name, value in fields.items())]


def others(records, *known):
    """{method: its records} of all methods but the `known` ones, in their order."""
    names = dict.fromkeys(record.method for record in records)
    return {name: select(records, method=name) for name in names if name not in known}


# ---- on images: every list of records that is zipped has the same levels in the same order --------------------------


def summary(records):
    """The autocorrelation of the true noise, and the held-out loss: the mean over the integer t that were measured."""
    clean = select(records, method="clean")[0]
    rows = [["autocorrelation of the true noise", interval(clean.values["autocorrelation"])]]
    for method in ("network", "control"):
        one = [record for record in select(records, method=method, steps=1) if record.t == int(record.t)]
        if one:
            name = "held-out loss" if clean.count > 1 else "loss on one image (no held-out loss)"
            name += f" of the {method}, mean over {len(one)} levels, t = {one[0].t} ... {one[-1].t}"
            rows.append([name, interval(torch.stack([record.values["loss"] for record in one]).mean(dim=0))])
    return dict(title=f"Summary, {clean.count:,} images", columns={"": 0, "mean": 4}, rows=rows)


def one_step(records):
    """A row for each level: the loss, each metric of the noisy images and of the estimate, autocorrelation."""
    columns, rows, found = {"sigma": 2, "t": 2, "loss": 4}, [], select(records, method="network", steps=1)
    for metric in METRICS.values():
        columns |= {f"{metric.name} noisy": metric.digits, metric.name: metric.digits}
    for noisy, own in zip(select(records, method="noisy"), found):
        pairs = [record.values[key] for key in METRICS for record in (noisy, own)]
        rows.append([own.sigma, own.t, *map(interval, (own.values["loss"], *pairs, own.values["autocorrelation"]))])
    return dict(title=f"One step, {found[0].count:,} images", columns=columns | {"autocorrelation": 4}, rows=rows)


def control(records):
    """The control's loss and metrics, and the network's minus these, paired by image."""
    quantities = {"loss": ("loss", 4)} | {key: (metric.name, metric.digits) for key, metric in METRICS.items()}
    columns, rows = {"sigma": 2, "t": 2}, []
    for name, digits in quantities.values():
        columns |= {f"{name} of control": digits, f"{name} change": digits}
    found = select(records, method="network", steps=1)
    for own, other in zip(found, select(records, method="control", steps=1)):
        pairs = [(other.values[key], own.values[key] - other.values[key]) for key in quantities]
        rows.append([own.sigma, own.t, *(interval(values) for pair in pairs for values in pair)])
    title = f"The control in one step, and how the network differs from it, {found[0].count:,} images"
    return dict(title=title, columns=columns, rows=rows)


def walks(records, count):
    """Of every level, the network's records of the first `count` images: in one step, and in more."""
    levels = [record.t for record in select(records, method="network", steps=1)]
    return [
        [record.first(count) for record in sorted(select(records, method="network", t=t), key=lambda r: r.steps)]
        for t in levels
    ]


def several_steps(records, count):
    """Of the first `count` images. Sharpness is the power in a band relative to the clean images'."""
    names = {metric.name: metric.digits for metric in METRICS.values()}
    columns = {"sigma": 2, "t": 2, "sampler": 0, "steps": 0} | names | {"PSNR gain": 2} | dict.fromkeys(BANDS, 3)
    clean, rows = select(records, method="clean")[0].first(count), []
    for walk in walks(records, count):
        for record in walk:
            values = [record.values[key] for key in METRICS] + [record.values["psnr"] - walk[0].values["psnr"]]
            sharpness = [interval(record.values[band], clean.values[band]) for band in BANDS]
            rows.append([record.sigma, record.t, record.sampler, record.steps, *map(interval, values), *sharpness])
    title = "Several steps (Heun's method calls the network twice in each), the gain over one step, and sharpness: "
    title += "power in bands of frequencies / the clean images'"
    return dict(title=f"{title}, {clean.count:,} images", columns=columns, rows=rows)


def blind(records):
    """Of records whose values are {"error": estimated sigma - sigma, on the 0-255 scale}."""
    columns = {"sigma": 0, "estimate by": 0, "mean error": 2, "mean absolute error": 2, "standard deviation": 2}
    rows = []
    for record in records:
        error = record.values["error"]
        spread = error.std().item() if len(error) > 1 else None
        rows.append([record.sigma, record.method, interval(error), interval(error.abs()), spread])
    return dict(title=f"sigma estimated from the image, {record.count:,} images", columns=columns, rows=rows)


def classical(records, key):
    """One metric of the network beside the classical denoisers', on the images that all were given."""
    metric, own = METRICS[key], select(records, method="network", steps=1)
    methods = others(records, "clean", "network", "control") | {"network": own}
    count, rows = min(found[0].count for found in methods.values()), []
    for at_level in zip(*methods.values()):
        *theirs, ours = (record.first(count).values[key] for record in at_level)
        best = (max if metric.higher_is_better else min)(theirs, key=torch.mean)
        rows.append([at_level[0].sigma, at_level[0].t, *map(interval, (*theirs, ours, ours - best))])
    title = f"{metric.name} beside classical denoisers, and the difference from the best of them, {count:,} images"
    return dict(
        title=title, columns={"sigma": 2, "t": 2} | dict.fromkeys((*methods, "difference"), metric.digits), rows=rows
    )


def channels(shares):
    """shares: see channels.in_use."""
    rows = [[block, 100 * share] for block, share in shares.items()]
    return dict(title="Share of channels in use, by block", columns={"block": 0, "in use, %": 1}, rows=rows)


# ---- on whole pictures ----------------------------------------------------------------------------------------------


def pictures(records, key, published):
    """A row for each method, a column for each sigma; of a method that was given fewer pictures, the network's too.

    published: whether the pictures are CBSD68's, so that the PUBLISHED rows are comparable.
    """
    metric = METRICS[key]
    levels = {record.sigma: f"sigma {record.sigma:g}" for record in records}
    total = max(record.count for record in records)

    def row(name, method, count):
        found = [record.first(count).values[key] for record in select(records, method=method)]
        return [name, count, *map(interval, found)]

    rows = [row(method, method, total) for method in ("noisy", "network")]
    if published and key == "psnr":
        for name, values in PUBLISHED.items():
            at = dict(zip(LITERATURE, values))
            rows.append([name, 68, *map(at.get, levels)])
    for method, found in others(records, "noisy", "network").items():
        count = found[0].count
        rows.append(row(method, method, count))
        if count < total:
            rows.append(row("network, on the same", "network", count))
    columns = {"": 0, "pictures": 0} | dict.fromkeys(levels.values(), metric.digits)
    return dict(title=f"{metric.name} on {total:,} whole test pictures", columns=columns, rows=rows)


def clean(records):
    """Of clean pictures that were denoised nevertheless. A record's method is the sigma that it was told.

    The PSNR of a picture that comes out as it went in is infinite; hence the median.
    """
    columns = {"sigma told": 0, "median PSNR": 2, "lowest PSNR": 2, "pictures below 45 dB": 0}
    rows = []
    for record in records:
        found = record.values["psnr"]
        rows.append([record.method, statistics.median(found.tolist()), found.min().item(), (found < 45).sum().item()])
    return dict(
        title=f"PSNR of clean pictures after denoising, {records[0].count:,} pictures", columns=columns, rows=rows
    )


# ---- the figure -----------------------------------------------------------------------------------------------------


def curves(records, count, shown):
    """What figures.evaluation draws: PSNR by method and level, and PSNR against sharpness at the levels t of `shown`.

    The former for the images that every method was given, the latter for the first `count`; the sampler is Euler's.
    """
    by_level = [[record for record in walk if record.sampler == "euler"] for walk in walks(records, count)]
    methods = {"noisy": select(records, method="noisy"), "one step": select(records, method="network", steps=1)}
    methods["several steps"] = [walk[-1] for walk in by_level]
    methods |= others(records, "clean", "noisy", "network", "control")
    shared = min(record.count for found in methods.values() for record in found)

    def mean(record, key):
        return record.values[key].mean().item()

    levels = {name: [(r.sigma, mean(r.first(shared), "psnr")) for r in found] for name, found in methods.items()}
    power = mean(select(records, method="clean")[0].first(count), "high")
    trade_off = {}
    for one, *more in by_level:
        if one.t in shown and power:  # constant images have no sharpness
            points = [(mean(r, "high") / power, mean(r, "psnr") - mean(one, "psnr"), r.steps) for r in (one, *more)]
            trade_off[f"sigma = {one.sigma:.3g}"] = points
    return levels, trade_off, shared


# ---- output ---------------------------------------------------------------------------------------------------------


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
        if isinstance(cell, float) and not math.isfinite(cell):  # JSON has no infinity
            return None
        return dict(zip(("mean", "interval"), cell)) if isinstance(cell, tuple) else cell

    rows = [{name: cell_data(cell) for name, cell in zip(table["columns"], row)} for row in table["rows"]]
    return dict(title=table["title"], rows=rows)
