"""The networks: UNet predicts the noise in an image from the image and the time step; PlainUNet, its control, has the
same levels and widths and does not know the time step.

    model = UNet()
    eps_hat = model(x_t, t)        # x_t (B, 3, H, W), t (B,) -> (B, 3, H, W)

The U-shape is that of Ronneberger et al. 2015 (arXiv 1505.04597), the time conditioning inside residual blocks
that of DDPM (Ho et al. 2020, arXiv 2006.11239), both reduced to what 32x32 images need: 2,176,515 parameters.
The time embedding is an MLP of t itself, where DDPM has sinusoids, and UNet has no normalization.
"""

import inspect

import torch
import torch.nn as nn

import config
from config import Setting, whole


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them: (B, in, H, W), (B, t_dim) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels, t_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.t_proj = nn.Linear(t_dim, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x, t_emb):
        h = self.relu(self.conv1(x))
        h = h + self.t_proj(t_emb)[:, :, None, None]
        h = self.relu(self.conv2(h))
        return h + self.shortcut(x)


class Stage(ResidualBlock):
    """`blocks` residual blocks at one resolution, of which the first changes the width.

    The first is the stage itself, so that with one block the weights have the names of a plain residual block.
    """

    def __init__(self, in_channels, out_channels, t_dim, blocks):
        super().__init__(in_channels, out_channels, t_dim)
        self.more = nn.ModuleList(ResidualBlock(out_channels, out_channels, t_dim) for _ in range(blocks - 1))

    def forward(self, x, t_emb):
        h = super().forward(x, t_emb)
        for block in self.more:
            h = block(h, t_emb)
        return h


class UNet(nn.Module):
    """Time-conditioned U-Net, the noise predictor eps_hat = model(x_t, t).

    widths: channels at full, half and quarter resolution. blocks: residual blocks per level. t_dim: width of the time
    embedding. noise_steps: T; the embedding sees 10 t / T, so that its range is the same for every T.
    """

    takes_inner = True  # a network without this attribute is taken to compute the whole, always

    def __init__(self, image_channels=3, widths=(64, 128, 256), t_dim=256, blocks=1, noise_steps=10):
        super().__init__()
        w1, w2, w3 = widths
        self.t_scale = 10 / noise_steps
        self.reach = 8 * blocks  # pixels: an output of the decoder depends on nothing farther away; a multiple of 4
        self.time_mlp = nn.Sequential(nn.Linear(1, t_dim), nn.ReLU(), nn.Linear(t_dim, t_dim))
        self.enc1 = Stage(image_channels, w1, t_dim, blocks)
        self.pool1 = nn.MaxPool2d(2)
        self.enc2 = Stage(w1, w2, t_dim, blocks)
        self.pool2 = nn.MaxPool2d(2)
        self.bottleneck = Stage(w2, w3, t_dim, blocks)
        self.up1 = nn.ConvTranspose2d(w3, w2, 2, stride=2)
        self.dec1 = Stage(w2 + w2, w2, t_dim, blocks)
        self.up2 = nn.ConvTranspose2d(w2, w1, 2, stride=2)
        self.dec2 = Stage(w1 + w1, w1, t_dim, blocks)
        self.final = nn.Conv2d(w1, image_channels, 1)

    def forward(self, x, t, inner=None):
        """x: noisy images (B, C, H, W), H and W multiples of 4; t: time steps (B,), integer or float.

        Returns the predicted noise, (B, C, H, W). inner: two slices, of its rows and its columns, if no others are
        needed; far from them it is 0, which saves time. Their bounds are multiples of 4, or among the last 4 of x.
        Raises ValueError for any other H or W.
        """
        check_size(x)
        dtype = self.time_mlp[0].weight.dtype
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round t to 8 significant bits
            t_emb = self.time_mlp(self.t_scale * t.to(dtype)[:, None])  # (B, t_dim)
        features = self.encode(x, t_emb)
        if inner is None:
            return self.decode(features, t_emb)
        near = [slice(max(side.start - self.reach, 0), side.stop + self.reach) for side in inner]
        features = [crop(f, near, scale) for f, scale in zip(features, (1, 2, 4), strict=True)]
        eps_hat = torch.zeros_like(x)
        eps_hat[(..., *near)] = self.decode(features, t_emb)
        return eps_hat

    def encode(self, x, t_emb):
        """The features [e1, e2, h] of noisy images, at full, half and quarter resolution."""
        e1 = self.enc1(x, t_emb)  # (B, w1, H, W)
        e2 = self.enc2(self.pool1(e1), t_emb)  # (B, w2, H/2, W/2)
        h = self.bottleneck(self.pool2(e2), t_emb)  # (B, w3, H/4, W/4)
        return [e1, e2, h]

    def decode(self, features, t_emb):
        """The predicted noise from a list of features, which is used up: none is kept longer than it is needed."""
        h = features.pop()
        h = self.dec1(torch.cat([self.up1(h), features.pop()], dim=1), t_emb)  # (B, w2, H/2, W/2)
        h = self.dec2(torch.cat([self.up2(h), features.pop()], dim=1), t_emb)  # (B, w1, H, W)
        return self.final(h)  # (B, C, H, W)


def crop(features, sides, scale):
    """The part of features (B, ..., H / scale, W / scale) that belongs to two slices of an image's rows and columns."""
    rows, columns = (slice(side.start // scale, side.stop // scale) for side in sides)
    return features[..., rows, columns]


class PlainUNet(nn.Module):
    """The control: the same levels and widths, without time conditioning. forward takes t and ignores it."""

    knows_t = False  # a network without this attribute is taken to know t

    def __init__(self, image_channels=3, widths=(64, 128, 256)):
        super().__init__()
        w1, w2, w3 = widths
        self.enc1 = conv_block(image_channels, w1)
        self.pool1 = nn.MaxPool2d(2)
        self.enc2 = conv_block(w1, w2)
        self.pool2 = nn.MaxPool2d(2)
        self.bottleneck = conv_block(w2, w3)
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.dec1 = conv_block(w3 + w2, w2)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.dec2 = conv_block(w2 + w1, w1)
        self.final = nn.Conv2d(w1, image_channels, 1)

    def forward(self, x, t=None):
        """x: noisy images (B, C, H, W), H and W multiples of 4; t: ignored. Returns the predicted noise, (B, C, H, W).

        Raises ValueError for any other H or W.
        """
        check_size(x)
        e1 = self.enc1(x)  # (B, w1, H, W)
        e2 = self.enc2(self.pool1(e1))  # (B, w2, H/2, W/2)
        h = self.bottleneck(self.pool2(e2))  # (B, w3, H/4, W/4)
        h = self.dec1(torch.cat([self.up1(h), e2], dim=1))  # (B, w2, H/2, W/2)
        h = self.dec2(torch.cat([self.up2(h), e1], dim=1))  # (B, w1, H, W)
        return self.final(h)  # (B, C, H, W)


def conv_block(in_channels, out_channels):
    """(3x3 convolution - BatchNorm - ReLU) twice: (B, in, H, W) -> (B, out, H, W)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def check_size(x):
    height, width = x.shape[-2:]
    if height % 4 or width % 4 or not height or not width:
        raise ValueError(f"image height and width must be multiples of 4, not {height}x{width}")


# To add a network: a class with forward(x, t), its line here, and what is new among its arguments in SETTINGS.
NETWORKS = {"unet": UNet, "plain": PlainUNet}
SETTINGS = {
    "model": Setting("unet", tuple(NETWORKS), "network; plain: the control without time conditioning"),
    "widths": Setting((64, 128, 256), whole(1, 4096), "channels at full, half and quarter resolution", count=3),
    "blocks": Setting(1, whole(1, 16), "residual blocks per level"),
    "t_dim": Setting(256, whole(1, 65536), "width of the time embedding, channels"),
    "noise_steps": Setting(10, whole(2, 1000), "T: sigma = t / T with t from 1 to T-1"),
}


def describe(cfg):
    """What a checkpoint stores under "network": the name of the network of `cfg` and the settings that it takes.

    Raises UserError if one that it does not take was typed.
    """
    arguments = inspect.signature(NETWORKS[cfg.model]).parameters
    unused = SETTINGS.keys() - arguments.keys() - {"model", "noise_steps"}
    config.refuse(cfg, unused, f"is not a setting of --model {cfg.model}; leave it out")
    return {"name": cfg.model} | {name: getattr(cfg, name) for name in SETTINGS if name in arguments}


def build(name, **arguments):
    """The network that `describe` described. Raises ValueError for an unknown name, TypeError for unknown arguments."""
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}, only {', '.join(NETWORKS)}")
    return NETWORKS[name](**arguments)
