"""Training on whole pictures: crops drawn anew every epoch, with the interface of a tensor of images."""

import dataclasses

import torch

from support.streams import CROPS, generator


@dataclasses.dataclass
class Crops:
    """`each` crops of every picture, new ones every epoch."""

    pixels: torch.Tensor  # uint8, those of all pictures (3, H, W), flat: one tensor is fast to index on a GPU
    shapes: torch.Tensor  # (pictures, 2): H, W
    size: int  # of a crop, pixels
    each: int

    @classmethod
    def of(cls, pictures, size, each):
        """pictures: uint8 (3, H, W), H and W at least `size`."""
        shapes = torch.tensor([picture.shape[1:] for picture in pictures])
        return cls(torch.cat([picture.flatten() for picture in pictures]), shapes, size, each)

    def __len__(self):
        return self.each * len(self.shapes)

    @property
    def device(self):
        return self.pixels.device

    def to(self, device):
        return dataclasses.replace(self, pixels=self.pixels.to(device))

    def draw(self, seed, epoch):
        """The crops of an epoch, as a function of their numbers: (B,) -> uint8 (B, 3, size, size).

        Their corners are uniform, and a pure function of (seed, epoch, picture).
        """
        place = torch.rand(len(self.shapes), self.each, 2, generator=generator("cpu", seed, CROPS, epoch))
        y, x = (place * (self.shapes[:, None] - self.size + 1)).long().unbind(2)  # (pictures, each)
        height, width = self.shapes.T
        area = height * width
        picture = (3 * area).cumsum(0) - 3 * area  # where its pixels begin
        corner = picture[:, None] + y * width[:, None] + x
        corner, area, width = (v.flatten().to(self.device) for v in (corner, area, width))
        channels, places = (torch.arange(n, device=self.device) for n in (3, self.size))

        def take(i):
            first, plane, row = (
                v[:, None, None, None] for v in (corner[i], area[i // self.each], width[i // self.each])
            )
            return self.pixels[first + plane * channels[:, None, None] + row * places[:, None] + places]

        return take
