"""Picture files that are written: where each goes, and what its format can hold."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from config import UserError
from support import files, pictures

DEEP = {".jp2", ".pgm", ".png", ".tif", ".tiff"}  # endings of files that keep 16 bits
LOSSY = pictures.JPEG | {".webp"}
PNG_STRATEGY = zlib.Z_RLE  # for photographs, files about as small as by default, in a third of the time
OPAQUE = {".bmp", ".pgm", ".ppm"}  # endings of files that drop the transparency of colours; others have it or refuse
WITH_METADATA = pictures.JPEG | {".png", ".tif", ".tiff", ".webp"}  # of files that keep profile and EXIF data
METADATA = {"icc_profile": "colour profile", "exif": "EXIF data"}  # {key in an image's info: its name}
# Tags of EXIF data that say how pixels are stored; Pillow would write them into a TIFF file as if they described it.
LAYOUT = {*range(254, 267), *range(273, 282), 284, *range(317, 348), *range(512, 533)}

# ---- where to ----------------------------------------------------------------------------------------------------


def plan(inputs, output, overwrite=False, extras=()):
    """[(source, target), ...], the paths of every picture. Raises UserError for what is bound to go wrong.

    inputs: names of files, and of folders with all below them. output: name of a file or of a folder. extras: names
    of what will be written beside every target, see `beside`.
    """
    pairs = pairs_of(inputs, output)
    originals = {identity(source) for source, _ in pairs if source.exists()}
    source_of = {}
    for source, target in pairs:
        if target.suffix.lower() not in pictures.IMAGE_FILES:
            raise UserError(
                f"{target} has no ending of a picture file that can be written "
                f"({' '.join(sorted(pictures.IMAGE_FILES))}); give it one, or name a folder with a / at its end"
            )
        for path in (target, *(beside(target, extra) for extra in extras)):
            if path in source_of:
                raise UserError(
                    f"{source_of[path]} and {source} would both be written to {path}; "
                    "rename one of them, or denoise them into two folders"
                )
            source_of[path] = source
            check_free(path, originals, overwrite)
    return pairs


def pairs_of(inputs, output):
    """See `plan`; whether the targets can be written is not checked."""
    named_folder = os.path.isdir(output) or output.endswith(("/", os.sep))
    to_folder = named_folder or len(inputs) > 1 or os.path.isdir(inputs[0])
    output, pairs = Path(output), []
    for path in map(Path, inputs):
        if path.is_dir():
            if output.resolve().is_relative_to(path.resolve()):
                raise UserError(f"the output {output} is inside the input {path}; choose a folder outside it")
            pairs += [(path / file, output / file) for file in pictures.image_files(path)]
        elif path.suffix.lower() in pictures.CONVERTERS:
            raise UserError(pictures.must_convert(path))
        elif path.exists():
            pairs.append((path, output / path.name if to_folder else output))
        else:
            raise UserError(f"{path} does not exist; name picture files or folders of them")
    if not pairs:
        raise UserError(f"no pictures (.png, .jpg, ...) in {', '.join(inputs)}")
    if to_folder and output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; several pictures need a folder to go to")
    if to_folder and not named_folder and output.suffix.lower() in pictures.IMAGE_FILES:
        raise UserError(f"{output} has the ending of a picture; name a folder for several (with a / at its end)")
    return list(dict.fromkeys(pairs))  # overlapping patterns of the shell name a file twice


def check_free(path, originals, overwrite):
    if len(os.fsencode(path.name)) > 255:
        raise UserError(f"{path} has a name of more than 255 bytes; choose a shorter one")
    if path.is_dir():
        raise UserError(f"{path} is a folder; choose another output")
    if path.exists() and identity(path) in originals:
        raise UserError(f"{path} is an input, which is never overwritten; choose another output")
    if os.path.lexists(path) and not overwrite:
        raise already_there(path)


def already_there(path):
    return UserError(f"{path} exists; choose another output, or add --overwrite to replace it")


def identity(path):
    """What is the same for all names of one file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def beside(target, extra):
    """The path of a figure that belongs to a target: clean.jpg -> clean_compare.png."""
    return target.with_name(f"{target.stem}_{extra}.png")


# ---- encoding ----------------------------------------------------------------------------------------------------


def options_for(image, path):
    """The options of Image.save that write `image` in the format of path's ending, with its profile, EXIF data and dpi.

    Also the names of what must be left out. A format that cannot hold such a picture is found here, on strips
    that are as long as its sides. Raises DataError.
    """
    ending = path.suffix.lower()
    options = {"format": Image.registered_extensions()[ending]}
    options |= {"quality": 95, "subsampling": 0} if ending in LOSSY else {}
    options |= {"compress_type": PNG_STRATEGY} if options["format"] == "PNG" else {}
    sides = (image.width, min(image.height, 16)), (min(image.width, 16), image.height)
    strips = [bare(image.crop((0, 0, *size)), path) for size in sides]
    for strip in strips:
        error = trial(strip, options)
        if error:
            raise pictures.DataError(f"{path} cannot be written ({error}); choose another ending, such as .png")
    lost = lost_pixels(image, ending)
    for key, data in metadata_of(image, options["format"]).items():
        # A WebP file has no grey, and a profile of grey does not fit its colours.
        misfit = key == "icc_profile" and not image.mode.startswith("RGB") and ending == ".webp"
        if misfit or ending not in WITH_METADATA or trial(strips[0], options | {key: data}):
            lost.append(METADATA[key])
        else:
            options[key] = data
    dpi = image.info.get("dpi")
    # A PNG text chunk of that name is no tuple.
    if isinstance(dpi, tuple) and not trial(strips[0], options | {"dpi": dpi}):
        options["dpi"] = dpi
    return options, lost


def lost_pixels(image, ending):
    """What a file with this ending cannot hold of the image's pixels, in words."""
    lost = []
    if image.mode == "I;16" and ending not in DEEP:
        lost.append("depth of 16 bits")
    if image.mode.startswith("RGB") and ending == ".gif":
        lost.append("colours beyond 256")
    if image.has_transparency_data and (ending in OPAQUE or (image.mode == "LA" and ending == ".gif")):
        lost.append("transparency")
    elif image.has_transparency_data and ending == ".gif" and any(image.getchannel("A").histogram()[1:255]):
        lost.append("partial transparency")
    return lost


def metadata_of(image, kind):
    """What the image has of METADATA, as a file of this kind, Pillow's format, needs it: {key: bytes}."""
    found = {key: image.info[key] for key in METADATA if image.info.get(key)}
    if found.get("icc_profile", b"")[16:20] != (b"RGB " if image.mode.startswith("RGB") else b"GRAY"):
        found.pop("icc_profile", None)  # it was made for other colours than these
    if "exif" in found and kind == "TIFF":
        found["exif"] = without_layout(found["exif"])
    return found


def without_layout(exif):
    """EXIF data without the tags of LAYOUT; as it is, if it is damaged."""
    tags = Image.Exif()
    try:
        tags.load(exif)
        for tag in LAYOUT & set(tags):
            del tags[tag]
        return tags.tobytes()
    except Exception:  # Pillow raises several kinds
        return exif


def bare(image, path):
    """The image without its info, which some of Pillow's encoders write unasked, in a depth that the format has, and
    with 16 bits in the range that it was read in, see pictures.read."""
    white, image.info = image.info.get(pictures.WHITE_KEY), {}
    if image.mode == "I;16" and path.suffix.lower() not in DEEP:
        return pictures.to_8_bits(image)
    if image.mode == "I;16" and white:
        return Image.fromarray((np.asarray(image) * (white / 65535)).round().astype(np.uint16))
    return image


def trial(image, options):
    """What goes wrong when the image is encoded; None: nothing."""
    try:
        image.save(io.BytesIO(), **options)
    except Exception as error:  # Pillow's encoders raise a dozen kinds
        return error


def write(image, path, options, overwrite):
    """Write a picture whole or not at all; only `overwrite` replaces a file that exists. Raises UserError, OSError."""
    encoded = io.BytesIO()  # in memory first: on a full disk Pillow's JPEG 2000 encoder would try forever
    bare(image, path).save(encoded, **options)
    try:
        files.write_atomically(path, lambda file: file.write(encoded.getbuffer()), replace=overwrite)
    except FileExistsError:  # it came into being after the plan was made
        raise already_there(path) from None
