"""Files that are written whole or not at all."""

import contextlib
import os
import re
import socket
from pathlib import Path

from config import UserError

TEMPORARY = re.compile(r"\.tmp-(?P<pid>\d+)-(?P<host>[^/]*)\.part$")


def reason(error):
    """Why a file could not be read or written, without its name."""
    return getattr(error, "strerror", None) or error


def write_atomically(path, write, replace=True):
    """write(file) to a temporary file beside `path`, onto the disk, then renamed to `path`.

    At any moment `path` is absent, the old file or the whole new one. replace=False: never over a file that is there,
    not even one that appeared meanwhile (on a file system without hard links, `path` is an empty file for an instant).
    Raises FileExistsError, or another OSError, which names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{os.getpid()}-{socket.gethostname()}.part"  # short: `path` may be of full length
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            put(temporary, path)
    except OSError as error:
        if not error.errno:  # raised by Pillow, with a text alone
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # which names no temporary file
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new name too should reach the disk, where a folder can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path, text, replace=True):
    """write_atomically for a text, in UTF-8; what cannot be encoded becomes "?"."""
    write_atomically(path, lambda file: file.write(text.encode(errors="replace")), replace)


def refuse_existing(*paths, remedy="choose another name"):
    """Raises UserError if one of the paths exists, for what will be written at the end of long work."""
    for path in paths:
        if os.path.lexists(path):
            raise UserError(f"{path} exists; {remedy}")


def put(temporary, path):
    """Rename without replacing. Raises FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


def clean(folder):
    """Delete the temporary files that killed processes of this host left in a folder."""
    for path in Path(folder).glob(".tmp-*.part"):
        match = TEMPORARY.search(path.name)
        if match and match["host"] == socket.gethostname() and not alive(int(match["pid"])):
            with contextlib.suppress(OSError):
                path.unlink()


def alive(pid):
    """Whether a process of this host has this number (on Windows: always, as signal 0 would end it there)."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
