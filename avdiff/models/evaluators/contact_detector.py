"""ContactDetector: when does something hit something in a drawn scene, read from pixels alone.

Pictures and their steps from one to the next go through a small convolutional network, each for
itself; a few convolutions over time then say how near a contact is to the middle of each picture.
It knows the drawn events of the corpus; real footage is not what it was taught.

Shape legend: B clips, F pictures at 25 a second, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

# pixels and pictures a second that it sees
SIDE = 64
FPS = 25
SPREAD = 0.8  # pictures: standard deviation of the bump around a contact


class ContactDetector(ModelMixin, ConfigMixin):
    """Bumps around contacts.

    Args:
        widths: channels at 32, 16 and 8 pixels. dim: values of a picture. layers, kernel:
            convolutions over time.
    """

    @register_to_config
    def __init__(
        self,
        widths: tuple[int, int, int] = (16, 24, 32),
        dim: int = 64,
        layers: int = 3,
        kernel: int = 5,
    ) -> None:
        super().__init__()
        a, b, c = widths
        self.look = nn.Sequential(
            nn.Conv2d(6, a, 4, stride=2, padding=1),
            nn.GELU(),  # 32 x 32
            nn.Conv2d(a, b, 4, stride=2, padding=1),
            nn.GroupNorm(4, b),
            nn.GELU(),  # 16 x 16
            nn.Conv2d(b, c, 4, stride=2, padding=1),
            nn.GroupNorm(4, c),
            nn.GELU(),  # 8 x 8
            nn.Flatten(),
            nn.Linear(c * 64, dim),
        )
        self.times = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2) for _ in range(layers)
        )
        self.head = nn.Linear(dim, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, F, 3, 64, 64) in [-1, 1] -> logits (B, F) of exp(-d^2 / 2) for the distance
        d, in units of 0.8 pictures, of the middle of each picture's time from the nearest contact.

        Raises:
            ValueError: another shape.
        """
        if pictures.ndim != 5 or pictures.shape[2:] != (3, SIDE, SIDE):
            raise ValueError(
                f"pictures has shape {tuple(pictures.shape)}: needs (batch, frames, 3, {SIDE}, "
                f"{SIDE})"
            )
        batch = pictures.shape[0]
        steps = F.pad(
            pictures[:, 1:] - pictures[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)
        )  # step i leads to picture i
        both = torch.cat([pictures, 4 * steps], dim=2)
        x = rearrange(
            self.look(rearrange(both, "b f c h w -> (b f) c h w")), "(b f) d -> b d f", b=batch
        )
        for convolution in self.times:
            x = x + convolution(F.gelu(x))
        return self.head(F.gelu(rearrange(x, "b d f -> b f d")))[..., 0].float()


def bumps(contacts: list[float], frames: int) -> Tensor:
    """What the reader should say for contacts in seconds: (F,)."""
    middle = torch.arange(frames) + 0.5
    if not contacts:
        return torch.zeros(frames)
    away = (middle[:, None] - torch.tensor(contacts) * FPS) / SPREAD
    return (-0.5 * away.square()).exp().max(dim=1).values


def peaks(heat: Tensor, least: float = 0.4) -> list[float]:
    """Bumps (F,) in [0, 1] -> contacts in seconds: local maxima, placed by the parabola through
    three logarithms.
    """
    found: list[float] = []
    padded = F.pad(heat, (1, 1))
    for i in range(len(heat)):
        before, here, after = padded[i : i + 3].tolist()
        if here < least or here < before or here <= after:
            continue
        low, top, high = (torch.tensor([before, here, after]).clamp_min(1e-3).log()).tolist()
        bend = low - 2 * top + high
        shift = 0.5 * (low - high) / bend if bend < -1e-6 else 0.0
        found.append((i + 0.5 + max(-0.5, min(0.5, shift))) / FPS)
    return found
