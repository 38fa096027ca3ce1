"""PyTorch Hub: the trained networks in one line, from a copy of the repository or by its name on GitHub.

    net = torch.hub.load("path/to/this/repository", "unet32", source="local")
    eps_hat = net(x_t, t)       # x_t (B, 3, H, W) in [-1, 1], H and W multiples of 4; t (B,): sigma = t / 10

The networks are in eval mode, on the CPU, in float32.
"""

import denoise
import unet
from support import checkpoint

dependencies = ["torch", "numpy", "PIL", "tqdm"]


def unet32(pretrained=True):
    """The UNet trained on CIFAR-10. pretrained=False: with random weights. Raises CheckpointError."""
    return checkpoint.load_model(checkpoint.SHIPPED, "cpu")[0] if pretrained else unet.UNet().eval()


def photo(pretrained=True):
    """The UNet trained on photographs. pretrained=False: with random weights. Raises CheckpointError."""
    return checkpoint.load_model(checkpoint.PHOTO, "cpu")[0] if pretrained else unet.UNet().eval()


def denoiser():
    """The function denoise.denoise, for Pillow images, NumPy arrays and tensors."""
    return denoise.denoise
