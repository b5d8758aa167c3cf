"""AVVideoVAE: a small causal video autoencoder, 32x32 pixels and two frames to 16 values.

The network is a 2-D convolutional one over *frame pairs*: a pair is folded into channels
(space-time pixel-unshuffle), so that even the finest convolutions run at a quarter of the picture's
size. Time enters at the coarsest level only, through causal taps on earlier pairs. Nothing is
normalized over space or time, so a slice of a clip with the right memory, or a tile with enough
margin, gives what the whole gives.

The first frame stands alone: it is treated as the pair (f0, f0), and every further latent covers
two frames (2j-1, 2j), the layout of causal video VAEs (MAGVIT-v2, LTX-2). Blocks are plain
convolutions with a skip, as in TAESD, with a per-position RMS norm at the coarse levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    DecoderOutput,
    DiagonalGaussianDistribution,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

Pyramid = list[tuple[int, int]]  # (channels, blocks) of each level, in the order of the data
Memory = dict[
    int, Tensor
]  # slot of a temporal layer -> the last inputs it saw, (B, taps - 1, C, h, w)


class PositionNorm(nn.Module):
    """RMS norm over the channels of each position, without statistics over space: (N, C, h, w) ->
    same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = (
            x.float().square().mean(dim=1, keepdim=True).add(1e-6).rsqrt()
        )  # fp32: a sum of squares
        return x * (scale * self.weight.view(1, -1, 1, 1)).to(x.dtype)


def _zeros(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all parameters 0, so that a residual branch starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ConvBlock(nn.Module):
    """x + W2 silu(W1 * norm(x)), W1 3x3 and W2 1x1: (N, C, h, w) -> same. Starts as the
    identity.
    """

    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        self.norm = PositionNorm(channels) if norm else nn.Identity()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = _zeros(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.silu(self.conv(self.norm(x))))


class TimeBlock(nn.Module):
    """Adds what the last `taps` pairs say, causally: x_t + W2 silu(sum_k W1_k norm(x)_{t-k}).

    Before the first pair the first pair is repeated. `memory[slot]` carries the last `taps - 1`
    inputs on to the next slice.
    """

    def __init__(self, channels: int, taps: int, slot: int) -> None:
        super().__init__()
        self.taps = taps
        self.slot = slot
        self.norm = PositionNorm(channels)
        self.mix = nn.Conv2d(channels * taps, channels, 1)
        self.out = _zeros(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, batch: int, memory: Memory) -> Tensor:
        y = rearrange(self.norm(x), "(b t) c h w -> b t c h w", b=batch)
        past = memory.get(self.slot)
        if past is None:
            past = y[:, :1].expand(-1, self.taps - 1, -1, -1, -1)
        y = torch.cat([past.to(y.dtype), y], dim=1)  # (B, taps - 1 + T, C, h, w)
        memory[self.slot] = y[:, y.shape[1] - (self.taps - 1) :]
        steps = y.shape[1] - (self.taps - 1)
        window = torch.cat(
            [y[:, k : k + steps] for k in range(self.taps)], dim=2
        )  # (B, T, taps * C, h, w)
        return x + self.out(F.silu(self.mix(window.flatten(0, 1))))


class Level(nn.Module):
    """Blocks at one resolution; the coarsest also has one temporal block ahead of each
    convolutional one.
    """

    def __init__(self, channels: int, layers: int, norm: bool, taps: int, slot: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(channels, norm) for _ in range(layers))
        slots = [] if slot is None else range(slot, slot + layers)
        self.time = nn.ModuleList(TimeBlock(channels, taps, s) for s in slots)

    def forward(self, x: Tensor, batch: int, memory: Memory) -> Tensor:
        for i, block in enumerate(self.blocks):
            if self.time:
                x = self.time[i](x, batch, memory)
            x = block(x)
        return x


class Encoder(nn.Module):
    """Pairs (B*T, 6, H, W) -> moments (B*T, 2*latent, H/32, W/32). Levels run fine to coarse."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        shape: Pyramid,
        patch: int,
        norm_levels: int,
        taps: int,
        slot: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        channels = [c for c, _ in shape]
        last = len(shape) - 1
        widths = [2 * in_channels * patch**2, *(4 * c for c in channels[:-1])]
        self.down = nn.ModuleList(nn.Conv2d(w, c, 1) for w, c in zip(widths, channels, strict=True))
        self.levels = nn.ModuleList(
            Level(c, n, last - i < norm_levels, taps, slot if i == last else None)
            for i, (c, n) in enumerate(shape)
        )
        self.norm_out = PositionNorm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 1)

    def forward(self, x: Tensor, batch: int, memory: Memory) -> Tensor:
        for i, (down, level) in enumerate(zip(self.down, self.levels, strict=True)):
            x = down(F.pixel_unshuffle(x, 2 if i else self.patch))
            x = level(x, batch, memory)
        return self.conv_out(self.norm_out(x))


class Decoder(nn.Module):
    """Latents (B*T, latent, H/32, W/32) -> pairs (B*T, 6, H, W). Levels run coarse to fine."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        shape: Pyramid,
        patch: int,
        norm_levels: int,
        taps: int,
        slot: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        channels = [c for c, _ in shape]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 1)
        self.levels = nn.ModuleList(
            Level(c, n, i < norm_levels, taps, None if i else slot)
            for i, (c, n) in enumerate(shape)
        )
        self.up = nn.ModuleList(nn.Conv2d(c, 4 * d, 1) for c, d in pairwise(channels))
        self.conv_out = nn.Conv2d(channels[-1], 2 * out_channels * patch**2, 3, padding=1)

    def forward(self, z: Tensor, batch: int, memory: Memory) -> Tensor:
        x = self.conv_in(z)
        for i, level in enumerate(self.levels):
            x = level(x, batch, memory)
            if i < len(self.up):
                x = F.pixel_shuffle(self.up[i](x), 2)
        return F.pixel_shuffle(self.conv_out(F.silu(x)), self.patch)


class AVVideoVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Causal video autoencoder: video (B, 3, 1+2k, H, W) in [-1, 1] <-> latents (B, 16, 1+k, H/32,
    W/32).

    Normalised latents, `(z - latents_mean) / latents_std`, are the callers' business, as in LTX-2.

    Args:
        encoder_channels, encoder_layers: width and blocks of the levels at 1/stem_patch, ..., 1/32
            of the size.
        decoder_channels, decoder_layers: the same from 1/32 to 1/head_patch.
        stem_patch, head_patch: pixels folded into channels ahead of the encoder and after the
            decoder.
        decoder_scale: how many times larger than the encoder's the decoder's pictures are.
        norm_levels: how many of the coarsest levels carry a norm. time_taps: pairs a temporal block
            sees.

    Attributes:
        slice_latent_frames: latent frames worked on at once; memory for activations does not grow
            with the clip.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["Level"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        encoder_channels: tuple[int, ...] = (96, 160, 192),
        encoder_layers: tuple[int, ...] = (2, 1, 1),
        decoder_channels: tuple[int, ...] = (192, 160, 96, 48),
        decoder_layers: tuple[int, ...] = (2, 3, 3, 2),
        stem_patch: int = 8,
        head_patch: int = 4,
        norm_levels: int = 2,
        time_taps: int = 3,
        spatial_compression_ratio: int = 32,
        temporal_compression_ratio: int = 2,
        decoder_scale: int = 1,
    ) -> None:
        super().__init__()
        for name, patch, levels, ratio in (
            ("stem_patch", stem_patch, len(encoder_channels), spatial_compression_ratio),
            (
                "head_patch",
                head_patch,
                len(decoder_channels),
                spatial_compression_ratio * decoder_scale,
            ),
        ):
            if patch * 2 ** (levels - 1) != ratio:
                fits = ratio // 2 ** (levels - 1)
                raise ValueError(
                    f"{name}={patch}: {levels} levels and a ratio of {ratio} need {fits}"
                )
        if temporal_compression_ratio != 2:
            raise ValueError(
                f"temporal_compression_ratio={temporal_compression_ratio}: needs 2, frames go in "
                "pairs"
            )
        down = list(zip(encoder_channels, encoder_layers, strict=True))
        up = list(zip(decoder_channels, decoder_layers, strict=True))
        self.encoder = Encoder(
            in_channels, latent_channels, down, stem_patch, norm_levels, time_taps, 0
        )
        self.decoder = Decoder(
            in_channels, latent_channels, up, head_patch, norm_levels, time_taps, encoder_layers[-1]
        )
        self.register_buffer("latents_mean", torch.zeros(latent_channels))
        self.register_buffer("latents_std", torch.ones(latent_channels))
        self.spatial_compression_ratio = spatial_compression_ratio
        self.temporal_compression_ratio = temporal_compression_ratio
        self.use_slicing = False  # over the batch
        self.use_tiling = False  # over space
        # pixels
        self.tile_size = 512
        self.tile_stride = 384
        self.slice_latent_frames = 16

    # -- time ---------------------------------------------------------------------------------

    def encode_slice(self, x: Tensor, memory: Memory) -> Tensor:
        """Moments (B, 2*latent, T, h, w) of the next frames (B, 3, 1+2k or 2k, H, W); `memory` is
        updated in place.

        An empty memory means the start of a clip: the first frame counts as a pair with itself.
        """
        if not memory:
            x = torch.cat([x[:, :, :1], x], dim=2)
        batch = x.shape[0]
        pairs = rearrange(x, "b c (t p) h w -> (b t) (p c) h w", p=2).contiguous(
            memory_format=torch.channels_last
        )
        moments = self.encoder(pairs, batch, memory)
        return rearrange(moments, "(b t) c h w -> b c t h w", b=batch)

    def decode_slice(self, z: Tensor, memory: Memory) -> Tensor:
        """Frames (B, 3, 2T-1 at the start of a clip, else 2T, H, W) of latents (B, latent, T, h,
        w).
        """
        first = not memory
        batch = z.shape[0]
        flat = rearrange(z, "b c t h w -> (b t) c h w").contiguous(
            memory_format=torch.channels_last
        )
        pairs = self.decoder(flat, batch, memory)
        frames = rearrange(pairs, "(b t) (p c) h w -> b c (t p) h w", b=batch, p=2)
        return frames[:, :, 1:] if first else frames

    def iter_encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Moments slice by slice from chunks of frames; the first chunk has 1+2k frames, the others
        2k.
        """
        memory: Memory = {}
        for chunk in frames:
            yield self.encode_slice(chunk, memory)

    def iter_decode(self, z: Tensor) -> Iterator[Tensor]:
        """Frames slice by slice, `slice_latent_frames` latents at a time: a long clip in constant
        memory.
        """
        memory: Memory = {}
        for part in z.split(self.slice_latent_frames, dim=2):
            yield self.decode_slice(part, memory)

    def _encode_clip(self, x: Tensor) -> Tensor:
        first = 2 * self.slice_latent_frames - 1
        chunks = [x[:, :, :first], *x[:, :, first:].split(2 * self.slice_latent_frames, dim=2)]
        return torch.cat(list(self.iter_encode(c for c in chunks if c.shape[2])), dim=2)

    def _decode_clip(self, z: Tensor) -> Tensor:
        return torch.cat(list(self.iter_decode(z)), dim=2)

    # -- space --------------------------------------------------------------------------------

    def enable_tiling(self, tile_size: int | None = None, tile_stride: int | None = None) -> None:
        """Work on overlapping square tiles of frames larger than `tile_size` pixels; overlaps are
        cross-faded.

        Raises:
            ValueError: sizes that are not multiples of the compression ratio, or a stride above the
                size.
        """
        size = tile_size or self.tile_size
        stride = tile_stride or self.tile_stride
        ratio = self.spatial_compression_ratio
        for name, value in (("tile_size", size), ("tile_stride", stride)):
            if value < ratio or value % ratio:
                raise ValueError(f"{name}={value}: needs a multiple of {ratio}")
        if stride > size:
            raise ValueError(
                f"tile_stride={stride}: needs at most tile_size={size}, or pixels are left out"
            )
        self.use_tiling = True
        self.tile_size = size
        self.tile_stride = stride

    def _tiled(
        self, work: Callable[[Tensor], Tensor], x: Tensor, unit: int, out_unit: int
    ) -> Tensor:
        """Apply `work` to tiles of `x`; a cell of the latent grid is `unit` samples there,
        `out_unit` in the result.
        """
        ratio = self.spatial_compression_ratio
        size = self.tile_size // ratio
        stride = self.tile_stride // ratio
        rows = x.shape[-2] // unit
        columns = x.shape[-1] // unit
        total = None
        weight = None
        for top in _tile_starts(rows, size, stride):
            for left in _tile_starts(columns, size, stride):
                tile = work(
                    x[..., top * unit : (top + size) * unit, left * unit : (left + size) * unit]
                )
                if total is None or weight is None:
                    shape = (*tile.shape[:-2], rows * out_unit, columns * out_unit)
                    total = tile.new_zeros(shape)
                    weight = tile.new_zeros(shape[-2:])
                fade = _tile_fade(tile, (size - stride) * out_unit)
                area = (
                    slice(top * out_unit, top * out_unit + tile.shape[-2]),
                    slice(left * out_unit, left * out_unit + tile.shape[-1]),
                )
                total[..., area[0], area[1]] += tile * fade
                weight[area] += fade
        assert total is not None and weight is not None
        return total / weight

    def _needs_tiles(self, height: int, width: int) -> bool:
        return self.use_tiling and max(height, width) > self.tile_size

    # -- diffusers' interface -----------------------------------------------------------------

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Video (B, 3, 1+2k, H, W) in [-1, 1] -> distribution over latents (B, 16, 1+k, H/32,
        W/32).

        Raises:
            ValueError: not five axes, an even number of frames, or a size that is no multiple of
                32.
        """
        self._check_video(x)
        moments = self._over_batch(self._encode_any, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, 16, 1+k, h, w), not normalized -> video (B, 3, 1+2k, 32h, 32w) times
        `decoder_scale`, about [-1, 1], not clamped.

        Raises:
            ValueError: not five axes, or another number of channels.
        """
        if z.ndim != 5 or z.shape[1] != self.config.latent_channels:
            fits = f"(batch, {self.config.latent_channels}, time, rows, columns)"
            raise ValueError(f"z has shape {tuple(z.shape)}: needs {fits}")
        sample = self._over_batch(self._decode_any, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Round trip: video (B, 3, 1+2k, H, W) -> same."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _encode_any(self, x: Tensor) -> Tensor:
        if self._needs_tiles(x.shape[-2], x.shape[-1]):
            return self._tiled(self._encode_clip, x, self.spatial_compression_ratio, 1)
        return self._encode_clip(x)

    def _decode_any(self, z: Tensor) -> Tensor:
        ratio = self.spatial_compression_ratio
        if self._needs_tiles(z.shape[-2] * ratio, z.shape[-1] * ratio):
            return self._tiled(self._decode_clip, z, 1, ratio * self.config.decoder_scale)
        return self._decode_clip(z)

    def _over_batch(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([work(part) for part in x.split(1)])
        return work(x)

    def _check_video(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            fits = f"(batch, {self.config.in_channels}, frames, height, width)"
            raise ValueError(f"x has shape {tuple(x.shape)}: needs {fits}")
        frames = x.shape[2]
        ratio = self.spatial_compression_ratio
        if frames % 2 == 0:
            raise ValueError(
                f"num_frames={frames}: needs 2*k+1; nearest are {max(1, frames - 1)} and "
                f"{frames + 1}"
            )
        for name, size in (("height", x.shape[3]), ("width", x.shape[4])):
            if size < ratio or size % ratio:
                raise ValueError(f"{name}={size}: needs a multiple of {ratio}")


def enlarge_decoder(vae: AVVideoVAE, scale: int = 2, channels: int = 32) -> AVVideoVAE:
    """The same encoder and latents with a decoder for pictures `scale` times as large, 2 or 4.

    The decoder gets one finer level of `channels` for each doubling; what both decoders have is
    copied, what is new starts random and needs training.
    """
    if scale not in (2, 4):
        raise ValueError(f"scale={scale}: needs 2 or 4")
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    finer = (scale // 2).bit_length()
    config["decoder_channels"] = (*vae.config.decoder_channels, *(channels,) * finer)
    config["decoder_layers"] = (*vae.config.decoder_layers, *(1,) * finer)
    config["decoder_scale"] = vae.config.decoder_scale * scale
    enlarged = AVVideoVAE(**config)
    own = enlarged.state_dict()
    for name, value in vae.state_dict().items():
        if name in own and own[name].shape == value.shape:
            own[name] = value
    enlarged.load_state_dict(own)
    return enlarged


def _tile_starts(length: int, size: int, stride: int) -> list[int]:
    """First cells of the tiles that cover `length` cells; the last tile ends with the frame."""
    if length <= size:
        return [0]
    return [*range(0, length - size, stride), length - size]


def _tile_fade(tile: Tensor, overlap: int) -> Tensor:
    """Weights (h, w) that rise over `overlap` samples from each edge; never 0, so the division by
    their sum is safe.
    """

    def ramp(length: int) -> Tensor:
        position = torch.arange(length, dtype=torch.float32, device=tile.device) + 0.5
        edge = torch.minimum(position, length - position)
        return (edge / max(overlap, 1)).clamp(max=1.0)

    return (ramp(tile.shape[-2])[:, None] * ramp(tile.shape[-1])).to(tile.dtype)
