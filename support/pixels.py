"""Images of every type as pixels (C, H, W), and pixels as x in [-1, 1]; both ways, exactly for integers.

pixels, pack = unpack(image)        # a Pillow image, a NumPy array or a tensor
same = pack(pixels)                 # of the type, the shape and the scale of the image
"""

import numpy as np
import torch
from PIL import Image

from diffusion import GREY_LEVELS

WHITE = {torch.uint8: 255, torch.uint16: 65535}  # the value of 1 in integer pixels; 0 is that of -1
BEYOND = 10  # the strongest noise that a network knows stays far below it, the values of another scale do not


def unpack(image):
    """The pixels of an image, a tensor (C, H, W) of C = 1 or 3, and the function that makes such an image of pixels.

    Pixels are uint8, uint16 or floating in [-1, 1]. image: a Pillow image of a mode that `to_supported_mode` takes; a
    NumPy array (H, W), (H, W, 1) or (H, W, 3), uint8, uint16 or floating in [0, 1]; or a tensor (C, H, W), uint8,
    uint16 or floating in [-1, 1]. Raises ValueError for any other.
    """
    if isinstance(image, Image.Image):
        return unpack_pillow(image)
    if isinstance(image, np.ndarray):
        pixels, pack = unpack_array(image)
    elif isinstance(image, torch.Tensor) and is_usable(image):
        pixels, pack = image.detach().resolve_neg(), torch.Tensor.contiguous  # not a view of one grey plane
    else:
        kind = type(image).__name__
        if isinstance(image, torch.Tensor):
            kind = f"a {image.layout} tensor of {image.dtype} on {image.device}"
        raise ValueError(f"a Pillow image, an array or a tensor (dense; uint8, uint16 or float) is needed, not {kind}")
    if pixels.dim() != 3 or len(pixels) not in (1, 3) or not pixels.numel():
        raise ValueError(f"an image of 1 or 3 channels is needed, not an array of the shape {tuple(image.shape)}")
    if pixels.dtype not in WHITE and not pixels.abs().max() < BEYOND:
        raise ValueError("an array of floats must be in [0, 1] and a tensor in [-1, 1], without NaN")
    return pixels, pack


def is_usable(tensor):
    """Whether it has values of a type in which an image can be."""
    has_values = tensor.layout is torch.strided and not tensor.is_meta
    return has_values and tensor.dtype in (*WHITE, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unpack_pillow(image):
    """Alpha and info go back where they came from."""
    if not image.width * image.height:
        raise ValueError(f"an image of {image.width}x{image.height} pixels is empty")
    image = to_supported_mode(image)
    mode, info = image.mode, dict(image.info)
    alpha = image.getchannel("A") if mode.endswith("A") else None
    planes = np.atleast_3d(np.array(image))[..., : 3 if mode.startswith("RGB") else 1]

    def pack(pixels):
        planes = pixels.permute(1, 2, 0).contiguous().numpy()
        result = Image.fromarray(planes if len(pixels) == 3 else planes[..., 0])
        if alpha:
            result.putalpha(alpha)
        result.info = info
        return result

    return torch.from_numpy(planes).permute(2, 0, 1), pack


def unpack_array(array):
    shape, dtype = array.shape, array.dtype.newbyteorder("=")
    floating = dtype in (np.float16, np.float32, np.float64)
    if dtype not in (np.uint8, np.uint16) and not floating:
        raise ValueError(f"an array must be uint8, uint16 or floating, of at most 64 bits, not {dtype}")
    if array.ndim not in (2, 3):
        raise ValueError(f"an image of 1 or 3 channels is needed, not an array of the shape {shape}")
    pixels = torch.from_numpy(np.atleast_3d(np.array(array, dtype))).permute(2, 0, 1)

    def pack(pixels):
        pixels = (pixels + 1) / 2 if floating else pixels
        return pixels.permute(1, 2, 0).reshape(shape).contiguous().numpy()

    return 2 * pixels - 1 if floating else pixels, pack


def to_supported_mode(image):
    """A Pillow image in a mode whose values come back unchanged: L, LA, RGB, RGBA or, for 16 bits, I;16.

    Raises ValueError for a mode whose range or colours none of them has.
    """
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "YCbCr", "I;16"):
        raise ValueError(f"a picture of mode {image.mode} must be converted to RGB, L or I;16 first")
    if image.mode == "I;16":
        return image
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    mode += "A" if image.has_transparency_data else ""
    return image if image.mode == mode else image.convert(mode)


def to_x(pixels):
    """Pixels of any type as float32 in [-1, 1]."""
    return 2 * pixels.float() / WHITE[pixels.dtype] - 1 if pixels.dtype in WHITE else pixels.float()


def from_x(x, dtype):
    """x in [-1, 1] as pixels of a type; integer ones are rounded and clipped."""
    white = WHITE.get(dtype)
    return ((x + 1) * (white / 2)).round().clamp(0, white).to(dtype) if white else x.to(dtype)


def rms_change(before, after):
    """The root mean square of the difference of two images (C, H, W), on the 0-255 scale."""
    rows = zip(before.split(64, dim=1), after.split(64, dim=1))  # a large picture must not become floats at once
    total = sum((to_x(a) - to_x(b)).square().mean().item() * a.numel() for a, b in rows)
    return GREY_LEVELS * (total / before.numel()) ** 0.5
