"""Settings: every script declares its own in a dict; this module turns them into a command line.

    SETTINGS = data.SETTINGS | {"epochs": Setting(10, whole(1), "passes over the training images")}
    cfg = config.parse(__doc__, SETTINGS)      # cfg.epochs: 10, or what --epochs says; --help lists them all

A `cfg` is frozen; `dataclasses.replace(cfg, epochs=20)` makes another one.
"""

import argparse
import dataclasses
import math
import os
from typing import Any, NamedTuple


class UserError(Exception):
    """A user's mistake. Its text, one line, says what is wrong and what to do."""


REQUIRED = object()  # the default of a setting that must be given; one without `flag` is positional


class Setting(NamedTuple):
    default: Any
    kind: Any  # bool, a tuple of choices, or a function from text to value that raises argparse.ArgumentTypeError
    help: str  # with its unit, and what None means
    count: Any = None  # how many values it takes, as argparse's nargs: 3, "*" or "+"
    flag: str = ""  # a second, short flag


def number(kind, low, high=math.inf, above=False):
    """Converter from text to an int or a float of at least `low` (above: greater than it) and at most `high`."""

    def convert(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        in_range = low < value <= high if above else low <= value <= high  # False for NaN
        if not in_range or math.isinf(value):
            what = "a whole number" if kind is int else "a number"
            limits = f"{'above' if above else 'of at least'} {low}"
            limits += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, not {text!r}")
        return value

    return convert


def whole(low=1, high=2**31 - 1):
    """Converter: an int from `low` to `high`."""
    return number(int, low, high)


def real(low, high=math.inf):
    """Converter: a float from `low` to `high`."""
    return number(float, low, high)


positive = number(float, 0, above=True)


def file_name(text):
    """Converter: a file's or folder's name, which must not be empty."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("must be the name of a file or folder, not empty")
    return text


def name_ending(suffix):
    """Converter: a file name with this suffix, so that a typing mistake cannot replace a file of another kind."""

    def convert(text):
        if not text.endswith(suffix):
            raise argparse.ArgumentTypeError(f"must be a file name ending in {suffix}, not {text!r}")
        return text

    return convert


def or_none(kind):
    """The same converter, but the word none is None: it undoes what a preset has set."""
    return lambda text: None if text.lower() == "none" else kind(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists every setting)\n")


def parse(doc, settings, presets=None, argv=None):
    """The settings as the command line gives them, frozen.

    A value is the flag's, else that of the preset named by --preset, else the default. `cfg.given` holds the names of
    the flags typed. What differs from the defaults is printed. A mistake ends the script with exit code 2.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for key, setting in settings.items():
        add_argument(parser, key, setting)
    given = {key: as_tuple(value) for key, value in vars(parser.parse_args(argv)).items()}
    preset = (presets or {}).get(given.get("preset"), {})
    cfg = defaults(settings, **(preset | given))
    changed = [
        f"{key}={getattr(cfg, key)}"
        for key, setting in settings.items()
        if setting.default not in (getattr(cfg, key), REQUIRED)
    ]
    if changed and is_main_process():
        print("settings:", *changed)
    return dataclasses.replace(cfg, given=frozenset(given))


def is_main_process():
    """Whether this process is the only one, or the one of those that torchrun starts which prints and saves."""
    return os.environ.get("RANK", "0") == "0"


def add_argument(parser, key, setting):
    if setting.default is REQUIRED and not setting.flag:
        parser.add_argument(key, type=setting.kind, nargs=setting.count, metavar="IN", help=setting.help)
        return
    options = dict(default=argparse.SUPPRESS, help=f"{setting.help} (default: {setting.default})")
    if setting.default is REQUIRED:
        options = dict(required=True, help=setting.help)
    if setting.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif isinstance(setting.kind, tuple):
        options |= dict(choices=setting.kind, nargs=setting.count)
    else:
        metavar = "N" if isinstance(setting.count, int) else key.upper()
        kind = or_none(setting.kind) if setting.default is None and not setting.count else setting.kind
        options |= dict(type=kind, nargs=setting.count, metavar=metavar)
    parser.add_argument(*filter(None, [setting.flag, flag_of(key)]), **options)


def as_tuple(value):
    """A list as a tuple, anything else as it is: settings are frozen."""
    return tuple(value) if isinstance(value, list) else value


def flag_of(name):
    """The flag of a setting: crop_size -> --crop-size."""
    return "--" + name.replace("_", "-")


def words_of(name, value):
    """A setting as it is typed: ["--widths", "64", "128", "256"], ["--no-compile"]."""
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value if isinstance(value, tuple) else (value,))]


def defaults(settings, /, **values):
    """The settings at their defaults but for `values`, frozen: for use from Python."""
    values = {key: setting.default for key, setting in settings.items()} | values
    return dataclasses.make_dataclass("Settings", [*values, "given"], frozen=True)(**values, given=frozenset())


def refuse(cfg, names, why):
    """Raises UserError, "--flag why", if one of the settings `names` was typed."""
    if typed := sorted(cfg.given & names):
        raise UserError(f"{flag_of(typed[0])} {why}")


def allows(setting, value):
    """Whether the command line could have given this value."""
    if value is None:
        return setting.default is None
    if setting.count:
        if not isinstance(value, list | tuple) or not right_count(setting.count, len(value)):
            return False
        return all(allows(setting._replace(count=None, default=REQUIRED), item) for item in value)
    if setting.kind is bool:
        return isinstance(value, bool)
    if isinstance(setting.kind, tuple):
        return isinstance(value, str) and value in setting.kind
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return setting.kind(str(value)) == value
    except argparse.ArgumentTypeError:
        return False


def right_count(count, given):
    """Whether `given` values are as many as `count`, argparse's nargs, asks for."""
    return given == count if isinstance(count, int) else given > 0 or count == "*"
