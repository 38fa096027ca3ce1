"""One training run per folder."""

import os
import socket
import stat
import sys
from pathlib import Path

from config import UserError
from support import files

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None


def take(folder):
    """Hold the folder for this process until the file returned is closed. Deletes what a killed save left there.

    Raises UserError if another process holds it. The lock dies with its process, however that ends. Between
    hosts it holds where the file system passes flock on (NFS since Linux 2.6.12 does, some cluster file systems do
    not). A folder that is removed and made again under a run is not locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = open_file(folder / ".lock")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(200).strip() or "another process"
        file.close()
        raise UserError(f"{folder} is in use by {holder}; wait for it to end or choose another --out-dir") from None
    except OSError as error:
        print(f"WARNING: {folder} cannot be locked ({error}); start no second run in it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    files.clean(folder)
    files.clean(folder / "res")
    return file


def open_file(path):
    """Open or make a lock file, and no other kind: what a link leads to would be overwritten."""
    if os.path.lexists(path):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise UserError(f"{path} is not a lock file of train.py; delete it or choose another --out-dir")
    number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    return open(number, "r+", errors="replace")
