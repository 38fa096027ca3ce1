"""Picture files of every kind: each comes out right, or is refused in a line that says why."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from support import pictures
from support.pictures import DataError, image_files, read

# ---- files written without Pillow, of kinds that it cannot write ------------------------------------------------


def tiff(values, photometric=1, sample_format=1, extra=(), order="<", **tags):
    """An uncompressed TIFF file of an array (W,) or (W, channels), one row."""
    values = np.array(values)
    channels = values.shape[1] if values.ndim == 2 else 1
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    width, bits = len(values), 8 * values.dtype.itemsize
    entries = {256: [width], 257: [1], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [8]}
    entries |= {277: [channels], 278: [1], 279: [len(pixels)], 339: [sample_format] * channels}
    entries |= {338: extra} if extra else {}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    start = 8 + len(pixels)
    heap_at, heap, directory = start + 2 + 12 * len(entries) + 4, b"", b""
    for tag, value in sorted(entries.items()):
        data = struct.pack(f"{order}{len(value)}H", *value)
        if len(data) > 4:
            data, heap = struct.pack(f"{order}I", heap_at + len(heap)), heap + data
        directory += struct.pack(f"{order}HHI", tag, 3, len(value)) + data.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return head + pixels + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + heap


def png(values, kind, *chunks, bits=16, width=None):
    """A PNG file of an array (W,) or (W, channels), one row; kind: PNG's colour type.

    With fewer than 8 bits: of the bytes into which its `width` pixels are packed.
    """

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = b"\0" + np.array(values).astype(f">u{max(bits, 8) // 8}").tobytes()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width or len(values), 1, bits, kind, 0, 0, 0))
    body = b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def saved(image, ending, **options):
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[ending], **options)
    return file.getvalue()


def cmyk_profile():
    """An ICC profile of a press whose cyan is a grey of L* = 50, and whose magenta and yellow are white."""
    identity = bytes(range(256))
    grid = b"".join(bytes([0 if cell & 1 else 128 if cell & 8 else 255, 128, 128]) for cell in range(16))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + grid + 3 * identity
    lut += bytes(-len(lut) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s24x", 144 + len(lut), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    head += struct.pack(">I3i", 0, 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


def u8(*values):
    return np.array(values, np.uint8)


def u16(*values):
    return np.array(values, np.uint16)


GREY = np.array([0, 1000, 40000, 65535])
GREY_8 = [0, 4, 156, 255]  # GREY / 257, rounded
SIGNED = np.array([0, 1000, 20000, 32767], np.int16)
SIGNED_8 = [0, 8, 156, 255]  # SIGNED * 255 / 32767
WIDE = np.array([0, 100_000, 200_000, 400_000])
WIDE_8 = [0, 64, 128, 255]  # WIDE * 255 / 400000
TWELVE = np.array([0, 500, 2000, 4000], np.uint16)
TWELVE_8 = [0, 31, 125, 249]  # TWELVE * 255 / 4095
COLOURS = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 200], [255, 255, 255]])
LAB = u8([138, 81, 70], [224, 256 - 79, 81], [128, 0, 0], [255, 0, 0])  # of sRGB's red and green, grey, white
CMYK = Image.fromarray(u8([255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255], [0, 0, 0, 0])[None], "CMYK")
INKS = [[0, 255, 255], [255, 0, 255], [0, 0, 0], [255, 255, 255]]

# ending, file, what comes out (grey or colour, each pixel) or why not, and what is said
KINDS = {
    "8-bit grey": (".png", png(u8(0, 4, 156, 255), 0, bits=8), GREY_8, ""),
    "16-bit grey": (".png", png(GREY, 0), GREY_8, ""),
    "16-bit grey TIFF": (".tif", tiff(GREY.astype(np.uint16)), GREY_8, ""),
    "16-bit grey TIFF, big-endian": (".tif", tiff(GREY.astype(np.uint16), order=">"), GREY_8, ""),
    "16-bit grey TIFF, white is zero": (".tif", tiff(65535 - GREY.astype(np.uint16), 0), GREY_8, ""),
    "8-bit grey TIFF, white is zero": (".tif", tiff(255 - u8(0, 4, 156, 255), 0), GREY_8, ""),
    "16-bit grey JPEG 2000": (".jp2", saved(Image.fromarray(GREY.astype(np.uint16)[None].repeat(4, 0)), ".jp2"),
                              GREY_8, ""),
    "12 of 16 bits": (".png", png(TWELVE, 0), TWELVE_8, "no grey value of 16 bits is above 4095"),
    "12 of 16 bits, TIFF": (".tif", tiff(TWELVE), TWELVE_8, "no grey value of 16 bits is above 4095"),
    "8 of 16 bits": (".png", png([0, 4, 156, 255], 0), GREY_8, "no grey value of 16 bits is above 255"),
    "12 bits that say so": (".tif", tiff(TWELVE, t281=[4095]), TWELVE_8, ""),
    "16 bits that say so": (".tif", tiff(TWELVE, t281=[65535]), [0, 2, 8, 16], ""),
    "a brightest value that is no range": (".tif", tiff(GREY.astype(np.uint16), t281=[65000]), GREY_8, ""),
    "packed 12 bits": (".tif", tiff(u8(0x00, 0x01, 0xF4, 0x7D, 0x0F, 0xA0), t256=[4], t258=[12]), TWELVE_8, ""),
    "packed 12 bits, dark": (".tif", tiff(u8(0x00, 0x00, 0x80), t256=[2], t258=[12]), [0, 8], ""),
    "12-bit PGM": (".pgm", b"P5 4 1 4095\n" + TWELVE.astype(">u2").tobytes(), TWELVE_8, ""),
    "16-bit PGM, dark": (".pgm", b"P5 4 1 65535\n" + TWELVE.astype(">u2").tobytes(), [0, 2, 8, 16], ""),
    "16-bit grey, black": (".png", png([0, 0, 0, 0], 0), [0, 0, 0, 0], ""),
    "signed 16-bit": (".tif", tiff(SIGNED, sample_format=2), SIGNED_8, ""),
    "signed 16-bit, big-endian": (".tif", tiff(SIGNED, sample_format=2, order=">"), SIGNED_8, ""),
    "signed 16-bit, negative": (".tif", tiff(SIGNED - 1, sample_format=2), "negative pixels, whose range", ""),
    "signed 8-bit": (".tif", tiff(np.array([0, -5, 5, 9], np.int8), sample_format=2), "signed pixels of 8 bits", ""),
    "32-bit": (".tif", tiff(WIDE.astype(np.uint32)), WIDE_8, "grey values above 65535"),
    "32-bit, the upper half": (".tif", tiff((WIDE * 10_000).astype(np.uint32)), WIDE_8, "grey values above 65535"),
    "32-bit, signed": (".tif", tiff(WIDE.astype(np.int32), sample_format=2), WIDE_8, "grey values above 65535"),
    "32-bit, negative": (".tif", tiff(-WIDE.astype(np.int32), sample_format=2), "negative pixels", ""),
    "32-bit with 16 used": (".tif", tiff(GREY.astype(np.uint32)), GREY_8, ""),
    "floating-point": (".tif", tiff(np.array([0, 1], np.float32), sample_format=3), "floating-point pixels", ""),
    "16-bit colour": (".png", png(257 * COLOURS, 2), COLOURS, "more than 8 bits are read as 8 bits"),
    "16-bit colour with alpha": (".png", png(np.c_[257 * COLOURS, GREY * 0 + 65535], 6), COLOURS,
                                 "more than 8 bits are read as 8 bits"),
    "16-bit colour TIFF": (".tif", tiff((257 * COLOURS).astype(np.uint16), 2), COLOURS, "are read as 8 bits"),
    "16-bit colour PPM": (".ppm", b"P6 4 1 65535\n" + (257 * COLOURS).astype(">u2").tobytes(), COLOURS,
                          "are read as 8 bits"),
    "16-bit colour PPM as text": (".ppm", b"P3 1 1 65535\n65535 0 514", [[255, 0, 2]], "are read as 8 bits"),
    "transparent": (".png", png(u8([255, 0, 0, 255], [9, 9, 9, 0]), 6, bits=8), [[255, 0, 0], [255, 255, 255]], ""),
    "a transparent colour": (".png", png(COLOURS, 2, (b"tRNS", struct.pack(">3H", 10, 20, 200)), bits=8),
                             [[255, 0, 0], [0, 128, 0], [255, 255, 255], [255, 255, 255]], ""),
    "a transparent colour of 16 bits": (".png", png(257 * COLOURS, 2, (b"tRNS", struct.pack(">3H", 2570, 5140, 51400))),
                                        [[255, 0, 0], [0, 128, 0], [255, 255, 255], [255, 255, 255]], "read as 8 bits"),
    "black beside a transparent colour of 16 bits": (".png", png([[0, 0, 0], [32768] * 3], 2,
                                                     (b"tRNS", struct.pack(">3H", *[32768] * 3))),
                                                     [[0, 0, 0], [255, 255, 255]], "read as 8 bits"),
    **{f"a transparent grey of {bits} bits": (".png", png(u8(packed), 0, (b"tRNS", struct.pack(">H", 1)), bits=bits,
                                              width=2), [0, 255], "")  # pixels 0 and 1
       for bits, packed in ((1, [0b01000000]), (2, [0b00010000]), (4, [0b00000001]))},
    "a transparent grey of 16 bits": (".png", png(GREY, 0, (b"tRNS", struct.pack(">H", 0))), GREY_8,
                                      "transparent grey of a picture of 16 bits is read as opaque"),
    "bitmap as text": (".pgm", b"P1\n4 1\n1 0 0 1\n", [0, 255, 255, 0], ""),
    "bitmap": (".pgm", b"P4\n4 1\n" + bytes([0b10010000]), [0, 255, 255, 0], ""),
    "straight alpha": (".tif", tiff(u8([200, 100, 0, 128]), 2, extra=[2]), [[227, 177, 127]], ""),
    "premultiplied alpha": (".tif", tiff(u8([100, 50, 0, 128]), 2, extra=[1]), [[227, 177, 127]], ""),
    **({"grey, premultiplied alpha": (".tif", tiff(u8([100, 128]), 1, extra=[1]), [227], "")}
       if int(PIL.__version__.split(".")[0]) >= 13 else {}),  # Pillow 12, which Gradio asks for, cannot read it
    "palette": (".png", saved(Image.fromarray(COLOURS.astype(np.uint8)[None]).quantize(8), ".png"), COLOURS, ""),
    "CMYK": (".tif", saved(CMYK, ".tif"), INKS, "CMYK without a usable colour profile"),
    "CMYK with a profile": (".tif", saved(CMYK, ".tif", icc_profile=cmyk_profile()), [119, 255, 0, 255], ""),
    "CMYK with a damaged profile": (".tif", saved(CMYK, ".tif", icc_profile=b"x" * 200), INKS, "profile is damaged"),
    "Lab": (".tif", tiff(LAB, 8), [[255, 0, 0], [0, 255, 0], [119] * 3, [255] * 3], ""),
    "a damaged colour profile": (".png", saved(Image.fromarray(COLOURS.astype(np.uint8)[None]), ".png",
                                               icc_profile=b"\0" * 200), COLOURS, "profile is damaged and is ignored"),
    "texts with the names of binary data": (
        ".png", png(COLOURS, 2, *[(b"tEXt", name + b"\0text") for name in (b"icc_profile", b"transparency", b"exif")],
                    bits=8), COLOURS, "profile is damaged"),
    "upside down": (".png", saved(Image.fromarray(COLOURS.astype(np.uint8)[None, ::-1]), ".png",
                                  exif=(lambda e: (e.__setitem__(274, 3), e)[1])(Image.Exif())), COLOURS, ""),
    "PostScript": (".png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 1\n", "cannot identify image file", ""),
    "no picture": (".png", b"no picture", "cannot identify image file", ""),
    "cut off": (".png", saved(Image.effect_noise((64, 64), 50), ".png")[:500], "cannot be read as an image", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(kind, tmp_path, capsys):
    ending, content, expected, said = KINDS[kind]
    path = tmp_path / f"picture{ending}"
    path.write_bytes(content)
    pictures.said.clear()
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    else:
        pixels = read(path)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        expected = np.array(expected) if np.ndim(expected) == 2 else np.array(expected)[:, None].repeat(3, 1)
        np.testing.assert_allclose(pixels[0].astype(int), expected, atol=14 if kind == "Lab" else 1)
    printed = capsys.readouterr().err
    assert said in printed if said else not printed


def test_grey_with_premultiplied_alpha():
    """Of a mode that Pillow reads from TIFF files since version 13."""
    image = pictures.standard(Image.frombytes("La", (1, 1), bytes([100, 128])), "a.tif")
    assert image.mode == "LA" and image.getpixel((0, 0)) == (199, 128)


def test_colours_of_16_bits_in_separate_planes_are_refused(tmp_path):
    """Pillow 12.3 decodes them as if they had 8, if they are not compressed."""
    pixels = np.linspace(0, 65535, 3 * 8 * 8).astype("<u2").reshape(3, 8, 8)
    plane, start = 2 * 8 * 8, 8 + 2 + 12 * 9 + 4
    extra = start + pixels.nbytes
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, extra), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 3, extra + 6), (277, 3, 1, 3), (279, 4, 3, extra + 18), (284, 3, 1, 2)]
    body = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    body += struct.pack("<I", 0) + pixels.tobytes() + struct.pack("<3H", 16, 16, 16)
    body += struct.pack("<3I", *(start + i * plane for i in range(3))) + struct.pack("<3I", *[plane] * 3)
    (tmp_path / "a.tif").write_bytes(body)
    with pytest.raises(DataError, match=r"a\.tif has colours of 16 bits in separate planes"):
        pictures.read(tmp_path / "a.tif")


def test_a_note_is_printed_once_for_all_files_of_a_kind(tmp_path, capsys):
    pictures.said.clear()
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(257 * COLOURS, 2))
        read(tmp_path / f"{i}.png")
    assert capsys.readouterr().err.count("read as 8 bits") == 1


def test_that_only_the_first_of_several_pictures_is_read_is_said(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        for count, said in (
            (1, ""),
            (2, f"{name}: of an animation, or of several pages, only the first picture is read"),
        ):
            pictures.said.clear()
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:count], lossless=True)
            assert read(tmp_path / name)[0, 0].tolist() == [255, 0, 0]
            printed = capsys.readouterr().err
            assert said in printed if said else not printed


def test_a_converted_image_has_no_profile_that_cannot_be_written_again(tmp_path):
    (tmp_path / "a.png").write_bytes(png(COLOURS, 2, (b"tEXt", b"icc_profile\0text"), bits=8))
    assert "icc_profile" not in read(tmp_path / "a.png", convert=lambda image: image.info)
    (tmp_path / "a.tif").write_bytes(saved(CMYK, ".tif", icc_profile=cmyk_profile()))
    image = read(tmp_path / "a.tif", convert=lambda image: image)
    assert image.mode == "RGB" and "icc_profile" not in image.info


def test_pictures_of_more_than_max_pixels_are_not_decoded(tmp_path):
    Image.new("1", (3000, 1000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"3000x1000 pixels, more than --max-pixels 2000000; raise that"):
        read(tmp_path / "large.png", max_pixels=2_000_000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_a_file_that_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.png")  # a longer path may be too long
        for name in ("pipe.png", "s.png"):
            with pytest.raises(DataError, match="not a regular file"):
                read(tmp_path / name)
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path / "device.png")


def test_pictures_of_phones_and_raw_ones_are_refused_with_what_converts_them(tmp_path, capsys):
    for name, program in (("a.HEIC", "heif-convert"), ("b.cr2", "darktable-cli"), ("c.dng", "RawTherapee")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(
            DataError, match=f"files such as .*{name} are not read; convert them to PNG or TIFF first, .*{program}"
        ):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"no pictures that can be read: .*convert them"):
        image_files(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "d.png")
    pictures.said.clear()
    assert image_files(tmp_path) == ["d.png"]
    assert "pictures left out: 3; HEIC files such as a.HEIC are not read" in capsys.readouterr().err


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert image_files(tmp_path) == ["a/x.png"]


def test_of_two_ways_to_a_folder_the_same_counts_in_whatever_order_the_disk_lists_them(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "real" / "a.png")
    (tmp_path / "best").symlink_to(tmp_path / "real")
    for order in (1, -1):
        walk = os.walk

        def ordered(*args, order=order, walk=walk, **options):
            for path, folders, names in walk(*args, **options):
                folders.sort(reverse=order < 0)
                yield path, folders, names

        with monkeypatch.context() as patch:
            patch.setattr(pictures.os, "walk", ordered)
            assert pictures.image_files(tmp_path) == ["best/a.png"]
