"""What the commands share: a user's mistake ends in one line, and output that cannot be written harms nothing.

if __name__ == "__main__":
    script.run(main)
"""

import contextlib
import io
import os
import re
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image

from config import UserError
from support import memory


class Unfailing:
    """A text stream that drops what cannot be written and replaces what cannot be encoded.

    A full disk, a closed pipe, a missing stream or an ASCII terminal must not end a run or lose a table.
    """

    def __init__(self, stream):
        self.stream = stream if stream is not None else io.StringIO()

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(main):
    """Run main(). A UserError becomes one line, `error: ...`, on stderr and exit code 1; Ctrl-C exit code 130."""
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    set_up_libraries()
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("the GPU's memory is full; use --device cpu, or in training a smaller --batch-size")
    except (MemoryError, RuntimeError) as error:
        fail(explain(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def set_up_libraries():
    """What holds for the whole process: a script may set it, an import must leave it to the program that imports."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on CUDA too
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # advice to allow it
    Image.MAX_IMAGE_PIXELS = None  # pictures.read has a limit of its own
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files, whose fault is reported if it matters


def fail(reason):
    print(f"error: {' '.join(str(reason).split())[:1000]}", file=sys.stderr)
    sys.exit(1)


def explain(error):
    """What an error of PyTorch, or running out of memory, means that is not the code's fault; raises others again."""
    if problem := memory.out_of_memory(error):
        return f"{problem}; use fewer or smaller images, a smaller network, or in training a smaller --batch-size"
    # What gloo and NCCL say when a peer is gone: Connection closed, Connection reset, Broken pipe, ...
    if os.environ.get("WORLD_SIZE", "1") != "1" and re.search("gloo|NCCL|onnection", str(error)):
        return f"{error} (if another process of the run ended, see its message; go on with --resume auto)"
    raise error


def result_path(out_dir, name):
    """out_dir/res/name, whose folder is made, see make_folder."""
    folder = Path(out_dir) / "res"
    make_folder(folder)
    return folder / name


def make_folder(folder):
    """Make a folder for what a script will write. Raises UserError or OSError before the work, not after it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"no permission to write into {folder}; change its permissions or choose another output")
