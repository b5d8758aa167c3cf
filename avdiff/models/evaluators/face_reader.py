"""FaceReader: what a picture of a drawn presenter shows, read from pixels alone.

Two small networks in one class. The first looks at the whole picture at 128 x 128: is there a face,
where is it, where is its mouth, and who is it (hair, skin, beard, glasses, background...). The
second looks at a crop around the mouth, of one size relative to the face: the 20 lip points, how
open, wide and round the lips are, and the viseme.

Coordinates are shares of the picture, x to the right and y down. Shape legend: B pictures, C
channels, K lip points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from avdiff.pixels import to_model

SIDE = 128  # pixels that the first network sees
CROP = 48  # pixels of the mouth's crop: about one for one at SIDE
POINTS = 20
SHAPES = ("jaw", "width", "round")


class Place(NamedTuple):
    """Where things are: `face` logit (B,), `box` (B, 4) left top right bottom of the face, `mouth`
    (B, 3) centre x, centre y and side of the square that holds the mouth, `attributes` name ->
    logits (B, values).
    """

    face: Tensor
    box: Tensor
    mouth: Tensor
    attributes: dict[str, Tensor]


class Mouth(NamedTuple):
    """The mouth in a picture: `points` (B, 20, 2), `shape` (B, 3) jaw, width and round in [0, 1],
    `viseme` logits (B, classes).
    """

    points: Tensor
    shape: Tensor
    viseme: Tensor


class PictureBlock(nn.Module):
    """Residual pair of 3 x 3 convolutions, (B, C, H, W) -> same; it starts close to the
    identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, width)
        nn.init.normal_(self.second.weight, std=0.2 * (9 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


class FaceReader(ModelMixin, ConfigMixin):
    """Reads drawn faces.

    Args:
        attributes: name -> its possible values, in the order of the logits. visemes: classes of the
            mouth.
        widths: channels of the first network at 32, 16 and 8 pixels. mouth_widths: of the second at
            24, 12 and 6.
    """

    @register_to_config
    def __init__(
        self,
        attributes: Mapping[str, Sequence[str]] = MappingProxyType({"glasses": ("none", "round")}),
        visemes: Sequence[str] = ("sil", "aa"),
        widths: Sequence[int] = (24, 48, 96),
        mouth_widths: Sequence[int] = (24, 40, 64),
    ) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, a, 4, stride=4), nn.GELU(), nn.Conv2d(a, a, 3, padding=1)
        )  # 32 x 32
        self.middle = nn.Sequential(
            nn.GELU(), nn.Conv2d(a, b, 2, stride=2), PictureBlock(b)
        )  # 16 x 16
        self.deep = nn.Sequential(
            nn.Conv2d(b, c, 2, stride=2), PictureBlock(c), nn.GroupNorm(4, c)
        )  # 8 x 8
        self.fine_maps, self.coarse_maps = (
            nn.Conv2d(b, 2, 1),
            nn.Conv2d(c, 2, 1),
        )  # where the face is, and the mouth
        self.sizes = nn.Linear(c, 3)  # log of the face's width and height and of the mouth's side
        self.is_face = nn.Linear(c, 1)
        self.looks = nn.Conv2d(c, len(attributes), 1)  # where each attribute is looked at
        self.answers = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(2 * c, 32), nn.GELU(), nn.Linear(32, len(values)))
                for name, values in sorted(attributes.items())
            }
        )  # config.json sorts its keys
        u, v, w = mouth_widths
        self.mouth_net = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, u, 3, padding=1),
            PictureBlock(u),  # 24 x 24
            nn.Conv2d(u, v, 2, stride=2),
            PictureBlock(v),  # 12 x 12
            nn.Conv2d(v, w, 2, stride=2),
            PictureBlock(w),
            nn.GroupNorm(4, w),
            nn.GELU(),
            nn.Flatten(),  # 6 x 6
            nn.Linear(w * (CROP // 8) ** 2, w),
            nn.GELU(),
        )
        self.to_points = nn.Linear(w, 2 * POINTS)
        self.to_shape = nn.Linear(w, len(SHAPES))
        self.to_viseme = nn.Linear(w, len(visemes))
        nn.init.zeros_(self.to_points.weight)

    def find(self, pictures: Tensor) -> Place:
        """Pictures (B, 3, 128, 128) in [-1, 1] -> where and who.

        Raises:
            ValueError: another shape.
        """
        if pictures.ndim != 4 or pictures.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(
                f"pictures has shape {tuple(pictures.shape)}: needs (batch, 3, {SIDE}, {SIDE})"
            )
        fine = self.middle(self.stem(pictures))  # (B, b, 16, 16)
        deep = self.deep(fine)  # (B, c, 8, 8)
        maps = self.fine_maps(fine) + F.interpolate(self.coarse_maps(deep), scale_factor=2)
        centres = expectation(maps.float())  # (B, 2, 2)
        pooled = deep.mean(dim=(2, 3))  # (B, c)
        sizes = (
            self.sizes(pooled).float() * 0.3 - 1.0
        ).exp()  # shares of the picture, about 0.37 at first
        half = sizes[:, :2] / 2
        box = torch.cat([centres[:, 0] - half, centres[:, 0] + half], dim=1)
        where = self.looks(deep).flatten(2).softmax(dim=-1)  # (B, A, 64)
        seen = torch.einsum("bap,bcp->bac", where, deep.flatten(2))  # (B, A, c)
        joined = torch.cat([seen, pooled[:, None].expand_as(seen)], dim=-1)
        attributes = {
            name: answer(joined[:, i]).float()
            for i, (name, answer) in enumerate(self.answers.items())
        }
        face = self.is_face(pooled)[:, 0].float()
        return Place(face, box, torch.cat([centres[:, 1], sizes[:, 2:]], dim=1), attributes)

    def read_mouth(self, pictures: Tensor, squares: Tensor) -> Mouth:
        """Pictures (B, 3, H, W) in [-1, 1] and mouth squares (B, 3) as in `Place.mouth` -> the
        mouths.
        """
        x = self.mouth_net(crop_squares(pictures, squares))
        offset = self.to_points(x).float().view(-1, POINTS, 2) * 0.25  # in sides of the square
        points = squares[:, None, :2] + offset * squares[:, None, 2:]
        return Mouth(points, self.to_shape(x).float() * 0.25 + 0.5, self.to_viseme(x).float())

    def forward(self, pictures: Tensor) -> tuple[Place, Mouth]:
        """Pictures (B, 3, H, W) in [-1, 1], any size -> what they show; a picture that is not
        square is read as one with black added at its right or its bottom, and coordinates are
        shares of that square.
        """
        square = to_square(pictures)
        place = self.find(square)
        return place, self.read_mouth(square, place.mouth)


def expectation(maps: Tensor) -> Tensor:
    """Logits (B, N, H, W) -> mean place (x, y) under their softmax, (B, N, 2), in shares of the
    picture.
    """
    height, width = maps.shape[-2:]
    weight = maps.flatten(2).softmax(dim=-1).view_as(maps)
    x = (torch.arange(width, device=maps.device) + 0.5) / width
    y = (torch.arange(height, device=maps.device) + 0.5) / height
    return torch.stack(
        [(weight.sum(dim=2) * x).sum(dim=-1), (weight.sum(dim=3) * y).sum(dim=-1)], dim=-1
    )


def crop_squares(pictures: Tensor, squares: Tensor, size: int = CROP) -> Tensor:
    """Cut squares (B, 3), centre x, y and side in shares, out of (B, 3, H, W) -> (B, 3, size,
    size), bilinear.
    """
    grid = (torch.arange(size, device=pictures.device, dtype=torch.float32) + 0.5) / size - 0.5
    x = squares[:, 0:1] + squares[:, 2:3] * grid  # (B, size)
    y = squares[:, 1:2] + squares[:, 2:3] * grid
    places = (
        torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
        * 2
        - 1
    )
    with torch.autocast(pictures.device.type, enabled=False):
        return F.grid_sample(pictures.float(), places, padding_mode="border", align_corners=False)


def to_square(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, 128, 128): black added at the right or the bottom, then shrunk by
    area.
    """
    height, width = pictures.shape[-2:]
    side = max(height, width)
    if (height, width) != (side, side):
        pictures = F.pad(pictures, (0, side - width, 0, side - height), value=-1.0)
    return pictures if side == SIDE else F.interpolate(pictures, size=(SIDE, SIDE), mode="area")


def to_pictures(frames: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return rearrange(to_model(frames), "b h w c -> b c h w")
