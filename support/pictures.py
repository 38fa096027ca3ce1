"""Picture files, read with Pillow: whatever a file holds comes out in one of a few modes, or is refused in a line.

pixels = read("photo.tif")          # uint8 (H, W, 3)
names = image_files("photos")       # of all pictures below the folder
"""

import io
import os
import stat
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.ExifTags import Base as Tag
from tqdm import tqdm

from config import Setting, UserError, whole

MAX_PIXELS = 100_000_000
SETTINGS = {
    "max_pixels": Setting(MAX_PIXELS, whole(), "most pixels of a picture that is read; a small file can expand"),
}
SIZE = 32  # pixels, height and width of every image of the built-in data sets
JPEG = {".jfif", ".jpe", ".jpeg", ".jpg"}
IMAGE_FILES = JPEG | {".bmp", ".gif", ".jp2", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
# Endings of pictures that must be converted first, and what converts them: of phones, and raw ones of cameras.
CONVERTERS = dict.fromkeys([".avif", ".heic", ".heif", ".hif"], "heif-convert (of libheif) or ImageMagick")
CONVERTERS |= dict.fromkeys([".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw"], "darktable-cli or RawTherapee")
CONVERTERS |= dict.fromkeys([".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"], "darktable-cli or RawTherapee")
# Values of a TIFF file's tags SampleFormat, PhotometricInterpretation and PlanarConfiguration.
SIGNED, WHITE_IS_ZERO, SEPARATE = 2, 0, 2
NOTES_KEY, WHITE_KEY = object(), object()  # keys that no file can put into an image's info, see `read`
EXIF_PREFIX = b"Exif\0\0"  # of EXIF data in a JPEG file; a WebP file has them without
said = set()  # texts that were printed, so that a folder of a thousand such files prints one line


class DataError(UserError):
    """The images cannot be loaded: the text says why, names the file, and says what to do."""


# ---- finding pictures --------------------------------------------------------------------------------------------


def image_files(root):
    """The files below root with the ending of a picture, as sorted relative paths with / on every system.

    Links are followed, loops are not. Pictures that must be converted first are left out with a warning. Raises
    DataError if a folder cannot be read, or if there are only such pictures.
    """
    seen, found, foreign = set(), [], []

    def refuse(error):
        raise DataError(
            f"cannot read the folder {error.filename}: {error.strerror}; change its permissions or remove it"
        )

    for path, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        folders.sort()  # in whatever order the disk lists them, of two ways to a folder the same counts
        if os.path.realpath(path) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(path))
        for name in names:
            relative, ending = Path(os.path.relpath(os.path.join(path, name), root)), Path(name).suffix.lower()
            if ending in IMAGE_FILES:
                found.append(relative.as_posix())
            elif ending in CONVERTERS:
                foreign.append(relative)
    if foreign and not found:
        raise DataError(f"{root} has no pictures that can be read: {must_convert(root / min(foreign))}")
    if foreign:
        say_once(root, f"pictures left out: {len(foreign)}; {must_convert(min(foreign))}", "WARNING")
    return sorted(found)


def must_convert(path):
    return (
        f"{path.suffix[1:].upper()} files such as {path} are not read; "
        f"convert them to PNG or TIFF first, for example with {CONVERTERS[path.suffix.lower()]}"
    )


def say_once(path, text, kind="note"):
    """Print what the user should know about a file, only for the first file of which it is true."""
    if text not in said:
        said.add(text)
        tqdm.write(f"{kind}: {path}: {text}", sys.stderr)


def note(image, path, text):
    """Print a note, once for each text, and append it to the list image.info[NOTES_KEY]."""
    image.info.setdefault(NOTES_KEY, []).append(text)
    say_once(path, text)


# ---- reading one -------------------------------------------------------------------------------------------------


def read(path, max_pixels=MAX_PIXELS, convert=None):
    """convert(the picture in a file as an upright Pillow image); by default a uint8 array (H, W, 3), see rgb.

    The image's mode is one that Pillow converts to RGB correctly, or I;16 with the full range 0 ... 65535 for grey of
    more than 8 bits; info[WHITE_KEY] is the value that 65535 had in the file, where that is a guess. What is lost or
    assumed is printed, once for each kind, and is in info[NOTES_KEY]; info["exif"] begins with EXIF_PREFIX. Raises
    DataError if the file cannot be read or has more than max_pixels, which are looked up before any is decoded.
    """
    path = Path(path)
    if path.suffix.lower() in CONVERTERS:
        raise DataError(must_convert(path))
    try:
        with open_picture(path) as image:
            check_header(image, path, max_pixels)
            image.load()
            drop_unusable_info(image, path)  # what stood after the pixels
            turn_upright(image)
            return (convert or rgb)(standard(image, path))
    except (MemoryError, DataError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise DataError(f"{path} cannot be read as an image ({error}); repair or remove it") from None


def check_header(image, path, max_pixels):
    """Refuse an image that is too large or would be misread, mend its info, and say what decoding will lose."""
    if image.width * image.height > max_pixels:
        raise DataError(
            f"{path} is {image.width}x{image.height} pixels, more than --max-pixels {max_pixels}; raise that"
        )
    if misreads(image):
        raise DataError(f"{path} has colours of 16 bits in separate planes; save it interleaved or compressed")
    drop_unusable_info(image, path)
    scale_transparent_colour(image)
    if has_frames(image):
        note(image, path, "of an animation, or of several pages, only the first picture is read")
    if loses_bits(image):
        note(image, path, "colours of more than 8 bits are read as 8 bits")


def turn_upright(image):
    """Turn the image as its EXIF data say, in place, and leave them as a JPEG file has them."""
    exif = image.info.get("exif")
    if exif and not exif.startswith(EXIF_PREFIX):
        image.info["exif"] = EXIF_PREFIX + exif
    try:
        ImageOps.exif_transpose(image, in_place=True)
        if "Raw profile type exif" in image.info:  # as some programs write it into a PNG file
            image.info.setdefault("exif", image.getexif().tobytes())
    except MemoryError:
        raise
    except Exception:
        pass  # broken EXIF data are no reason to lose the picture


def size_of(path):
    """(width, height) from the header of a file, (0, 0) if it cannot be read."""
    try:
        with open_picture(path) as image:
            return image.size
    except Exception:
        return 0, 0


def open_picture(path):
    """The Pillow image of a regular file (a pipe would block) of one of IMAGE_FILES' kinds (Pillow runs programs for
    others, such as Ghostscript for PostScript, whatever the ending)."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    endings = Image.registered_extensions()
    return Image.open(path, formats=sorted({endings[ending] for ending in IMAGE_FILES if ending in endings}))


def drop_unusable_info(image, path):
    """Remove what a PNG text chunk or a broken profile put where binary data are expected."""
    for name in ("exif", "transparency"):
        if isinstance(image.info.get(name), str):
            del image.info[name]
    if "icc_profile" in image.info and not is_profile(image.info["icc_profile"]):
        del image.info["icc_profile"]
        note(image, path, "its colour profile is damaged and is ignored")


def scale_transparent_colour(image):
    """Bring the transparent colour of a PNG file, which Pillow leaves in the file's depth, to the pixels' 8 bits."""
    colour = image.info.get("transparency")
    rawmode = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if rawmode in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if rawmode == "L;2" else 17)
    if rawmode == "RGB;16B" and colour:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def is_profile(profile):
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except ImportError:  # a Pillow without LittleCMS
        return isinstance(profile, bytes)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return False
    return True


def has_frames(image):
    """Whether a file holds more pictures than the first. A JPEG file's second one (MPO) is a preview or a depth map."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # what is damaged behind the first picture does not matter
        return False


def loses_bits(image):
    """Whether colours of more than 8 bits are about to be decoded to 8, as Pillow has no mode for them."""
    if image.mode.startswith("I"):
        return False
    return any(
        ";16" in str(args) or (codec.startswith("ppm") and isinstance(args, tuple) and args[1] > 255)
        for codec, _, _, args in image.tile
    )


def misreads(image):
    """Whether Pillow would take colours of 16 bits for colours of 8: of an uncompressed TIFF in separate planes."""
    tags = getattr(image, "tag_v2", {})
    planes = tags.get(Tag.PlanarConfiguration) == SEPARATE and any(codec == "raw" for codec, *_ in image.tile)
    return planes and max(tags.get(Tag.BitsPerSample, (8,))) > 8


def standard(image, path):
    """The decoded image with its values as `read` promises them, its info unchanged."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        raise DataError(f"{path} has floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        if image.info.pop("transparency", None) is not None:
            note(image, path, "the transparent grey of a picture of 16 bits is read as opaque")
        result = Image.fromarray(full_range(image, tags, path))
    elif SIGNED in tags.get(Tag.SampleFormat, ()):
        raise DataError(f"{path} has signed pixels of 8 bits, whose range is unknown; save it with unsigned ones")
    elif image.mode in ("CMYK", "LAB"):
        result = by_profile(image, path)
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha
        result = image.convert(image.mode.upper())
    else:
        return image
    result.info = image.info
    return result


def full_range(image, tags, path):
    """A grey image of integers as uint16 (H, W) with white at 65535. Raises DataError for negative ones."""
    values = np.asarray(image)
    signed = SIGNED in tags.get(Tag.SampleFormat, ())
    if values.dtype == np.int32 and not signed:
        values = values.view(np.uint32)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0:
        raise DataError(f"{path} has negative pixels, whose range is unknown; save it with unsigned ones")
    bits, declared = max(tags.get(Tag.BitsPerSample, (16,))), max(tags.get(Tag.MaxSampleValue, ()), default=0)
    is_range = declared > 0 and declared & (declared + 1) == 0  # 2^bits - 1, and no statistic of the picture
    if is_range and declared >= highest:
        white = declared
    elif bits < 16 or (signed and bits == 16):
        white = 2 ** (bits - signed) - 1
    elif highest >= 2**16:
        white = highest
        note(image, path, "grey values above 65535: the largest of the file is taken as white")
    elif highest < 2**12 and highest and image.format != "PPM":  # which says its range
        white = 2**8 - 1 if highest < 2**8 else 2**12 - 1  # as many cameras and microscopes write into 16 bits
        note(image, path, f"no grey value of 16 bits is above {white}, which is taken as white")
        image.info[WHITE_KEY] = white  # so that it is written with values like those that were read
    else:
        white = 2**16 - 1
    if tags.get(Tag.PhotometricInterpretation) == WHITE_IS_ZERO:
        values = white - values
    return values.astype(np.uint16) if white == 65535 else (values * (65535 / white)).round().astype(np.uint16)


def by_profile(image, path):
    """A CMYK or LAB image as sRGB: by its colour profile; CMYK without one by the naive formula, with a note."""
    profile = image.info.pop("icc_profile", None)
    try:
        if image.mode == "CMYK" and profile is None:
            raise ValueError("no profile")
        source = ImageCms.createProfile("LAB") if image.mode == "LAB" else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImportError, ValueError, ImageCms.PyCMSError):
        if image.mode == "LAB":
            raise
        note(image, path, "CMYK without a usable colour profile: its colours are approximate")
        return image.convert("RGB")


def to_8_bits(image):
    """An image of mode I;16 as one of mode L."""
    return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))


def rgb(image):
    """An image from `read` as a uint8 array (H, W, 3): 16 bits scaled to 8, transparent parts on white."""
    if image.mode == "I;16":
        image = to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))
