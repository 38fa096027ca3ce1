"""A file of torch.save that may come from anywhere, read as data and never as code.

state = read(path)      # None, numbers, texts and tensors in dicts, lists and tuples; or a CheckpointError

Reading takes no more memory than the size of the file suggests.
"""

import os
import pickletools
import stat
import zipfile

import torch

from config import UserError
from support import files, memory

# All that torch.save refers to in a dict of plain values and tensors of these three types.
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
GLOBALS |= {"torch FloatStorage", "torch HalfStorage", "torch LongStorage"}
DEEPEST = 10  # levels of dicts and lists inside one another


class CheckpointError(UserError):
    """A checkpoint that cannot be used: the text names the file and says why."""


class DamagedError(CheckpointError):
    """The file is not what was saved."""


def read(path):
    """What torch.save wrote to a file. Raises DamagedError for other content, CheckpointError if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise CheckpointError(f"{path} is not a file; name a checkpoint, unet32_e*.pth")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise DamagedError(f"{path} is empty; use another one")
            values = check_archive(file, size)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            check_size(state, values, size)
            return state
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; restore it, or name a checkpoint that train.py saved") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({files.reason(error)})") from None
    except CheckpointError:
        raise
    except Exception as error:  # a dozen kinds, by where the damage lies
        if memory.out_of_memory(error):
            raise
        raise DamagedError(f"{path} is damaged, or is not a checkpoint, or holds code; use another one") from None


def check_archive(file, size):
    """Refuse, before it is unpacked, what torch.save does not write: compressed members, references to other code.

    Returns an upper bound of the number of values. Raises ValueError, and what zipfile and pickletools raise.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > size:
            raise ValueError("compressed")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two of one name")
        structure = archive.read(members[0].filename.partition("/")[0] + "/data.pkl")
    if {argument for opcode, argument, _ in pickletools.genops(structure) if opcode.name == "GLOBAL"} - GLOBALS:
        raise ValueError("code")
    return len(structure)  # each value takes a byte at least, unless it is shared


def check_size(state, values, size):
    """Refuse what is larger than its file: lists in lists in lists, shared, tensors of one number expanded.

    values, size: the most values and the most bytes of tensors. Raises ValueError.
    """
    queue = [(state, 0)]
    for value, depth in queue:
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            parts = value.values()
        elif type(value) in (list, tuple):
            parts = value
        elif type(value) is torch.Tensor and not value.requires_grad and not value.is_neg():
            parts, size = (), size - value.nbytes
        elif value is None or type(value) in (bool, int, float, str):
            parts = ()
        else:
            raise ValueError("other types")
        queue += ((part, depth + 1) for part in parts)
        if len(queue) > values or size < 0 or depth > DEEPEST:
            raise ValueError("larger than its file")
