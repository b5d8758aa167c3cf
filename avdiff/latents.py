"""The records that travel together: one value per modality, and the state of a joint denoising run.

Shape legend: B batch, N tokens, C values per token, F latent frames, H/W latent rows/columns, L
audio latent steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from einops import rearrange

T = TypeVar("T")
MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class Joint(Generic[T]):
    """One value for each modality; a modality that takes no part is `None`."""

    video: T | None = None
    audio: T | None = None

    def map(self, fn: Callable[..., Any], *others: Joint[Any]) -> Joint[Any]:
        """Apply `fn(own, *theirs)` to each modality that is present here; an absent one stays
        absent.
        """
        return Joint(
            *(
                None
                if getattr(self, m) is None
                else fn(getattr(self, m), *(getattr(o, m) for o in others))
                for m in MODALITIES
            )
        )

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield (modality, value) for the modalities that are present, video first."""
        for m in MODALITIES:
            value = getattr(self, m)
            if value is not None:
                yield m, value


@dataclass(frozen=True)
class JointLatents:
    """State of a joint run: packed, normalized latents with their noise levels and times.

    Args:
        video: (B, N_v, C_v) tokens or None. audio: (B, N_a, C_a) tokens or None.
        sigmas: noise level of each modality in [0, 1], (B,) or per token (B, N); 1 is pure noise, 0
            is data.
        seconds: fp32 bin midpoints on the clip's clock, (N_v,) and (N_a,).
    """

    video: torch.Tensor | None
    audio: torch.Tensor | None
    sigmas: Joint[torch.Tensor]
    seconds: Joint[torch.Tensor]

    @property
    def latents(self) -> Joint[torch.Tensor]:
        """Both token tensors as one pair."""
        return Joint(self.video, self.audio)

    def with_latents(
        self, latents: Joint[torch.Tensor], sigmas: Joint[torch.Tensor] | None = None
    ) -> JointLatents:
        """Copy of this state with new tokens and, if given, new noise levels."""
        return replace(self, video=latents.video, audio=latents.audio, sigmas=sigmas or self.sigmas)


def per_token(sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Broadcast noise levels (B,) or (B, N) against tokens (B, N, C): returns (B, 1, 1) or (B, N,
    1).
    """
    return sigma[:, None, None] if sigma.ndim == 1 else sigma.unsqueeze(-1)


def clean_estimate(noisy: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x0 = c_skip z + c_out F, fp32, for noisy tokens z (B, N, C), network output F and noise level
    t, `sigma` (B,) or (B, N).

    Preconditioning of Karras et al. 2022 (arXiv:2206.00364, eq. 7) for z = (1-t) x + t eps with
    unit-variance data: c_skip = (1-t) / ((1-t)^2 + t^2) is the best linear estimate and c_out = t /
    sqrt((1-t)^2 + t^2) the size of its error, so F has unit variance at every noise level, and a
    token with t = 0 comes back as it is.
    """
    t = per_token(sigma.float(), noisy)
    power = (1 - t) ** 2 + t**2
    return noisy.float() * ((1 - t) / power) + output.float() * (t / power.sqrt())


def normalize_latents(z: torch.Tensor, codec: Any) -> torch.Tensor:
    """Latents (B, C, ...) to unit variance by the codec's `latents_mean` and `latents_std` (C,)."""
    mean, std = (
        x.to(z).view(1, -1, *(1,) * (z.ndim - 2)) for x in (codec.latents_mean, codec.latents_std)
    )
    return (z - mean) / std


def denormalize_latents(z: torch.Tensor, codec: Any) -> torch.Tensor:
    """Inverse of `normalize_latents`."""
    mean, std = (
        x.to(z).view(1, -1, *(1,) * (z.ndim - 2)) for x in (codec.latents_mean, codec.latents_std)
    )
    return z * std + mean


def pack_video(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, F, H, W) -> tokens (B, F*H/patch*W/patch, C*patch*patch), frame by frame, row by
    row.
    """
    return rearrange(latents, "b c f (h p) (w q) -> b (f h w) (c p q)", p=patch, q=patch)


def unpack_video(tokens: torch.Tensor, patch: int, grid: tuple[int, int, int]) -> torch.Tensor:
    """Inverse of `pack_video`; `grid` is (F, H/patch, W/patch)."""
    f, h, w = grid
    return rearrange(
        tokens, "b (f h w) (c p q) -> b c f (h p) (w q)", f=f, h=h, w=w, p=patch, q=patch
    )


def pack_audio(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, L, M) -> tokens (B, L, C*M); M is the number of mel groups left by the audio VAE (1
    for ours).
    """
    return rearrange(latents, "b c l m -> b l (c m)")


def unpack_audio(tokens: torch.Tensor, channels: int) -> torch.Tensor:
    """Inverse of `pack_audio` for `channels` = C."""
    return rearrange(tokens, "b l (c m) -> b c l m", c=channels)
