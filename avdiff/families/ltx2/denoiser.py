"""LTX-2's transformer as a function of latents, noise levels and text, right at unequal noise
levels.

ltx-core takes scale and shift of the attention between the modalities from a stream's own noise
level and its gate from the partner's (`model/transformer/transformer_args.py`). diffusers' class
has one flag that takes both from the partner or both from the own: the same thing at equal levels,
off by up to a tenth of the output in picture-to-sound, sound-to-picture, image-to-video and in
training. Here the gates are given their level by two hooks; `cross_timestep` chooses diffusers'
way for parity.

Shape legend: B clips, N tokens, C values of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor
from torch import Tensor, nn

from avdiff.families.ltx2.layout import LTX2Layout
from avdiff.families.ltx2.texts import LTX2Text
from avdiff.latents import Joint

CrossTimestep = Literal["reference", "partner", "own"]
CROSS_TIMESTEPS = ("reference", "partner", "own")


@dataclass(frozen=True)
class LTX2Behavior:
    """Where diffusers departs from Lightricks' reference; the defaults are the reference.

    Args:
        cross_timestep: "reference", or diffusers' `use_cross_timestep` True ("partner") or False
            ("own").
        mark_first_frame: 2.5 marks the first latent frame; diffusers' pipelines never do.
        perturb: let spatio-temporal guidance work on a converted 2.0, whose config switches it off.
        shift_tokens: "clip", noise levels shifted by the clip's own token count as diffusers does,
            or the number to use instead; ltx-pipelines always use 4096.
    """

    cross_timestep: CrossTimestep = "reference"
    mark_first_frame: bool = True
    perturb: bool = True
    shift_tokens: int | Literal["clip"] = "clip"

    def __post_init__(self) -> None:
        if self.cross_timestep not in CROSS_TIMESTEPS:
            raise ValueError(
                f"cross_timestep={self.cross_timestep!r}: needs {', '.join(CROSS_TIMESTEPS)}"
            )
        if self.shift_tokens != "clip" and not (
            isinstance(self.shift_tokens, int) and self.shift_tokens > 0
        ):
            raise ValueError(f"shift_tokens={self.shift_tokens!r}: needs 'clip' or a token count")


DIFFUSERS = LTX2Behavior("partner", mark_first_frame=False, perturb=False)


@dataclass(frozen=True)
class _Stream:
    """One modality on its way into the transformer.

    Args:
        tokens: (B, N, C). level: 0 to 1000, (B,) or (B, N). row: (B,), the highest of a clip: 0
            only where all is given. coords: bounds of each token, (B, axes, N, 2).
    """

    tokens: Tensor
    level: Tensor
    row: Tensor
    coords: Tensor


class LTX2Denoiser:
    """`(latents, sigmas, text, layout) -> velocity`, with two cuts for guidance."""

    prediction_type = "velocity"

    def __init__(
        self, transformer: LTX2VideoTransformer3DModel, behavior: LTX2Behavior = LTX2Behavior()
    ) -> None:
        self.transformer = transformer
        self.behavior = behavior

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What training may touch."""
        return {"transformer": self.transformer}

    def __call__(
        self,
        latents: Joint[Tensor],
        sigmas: Joint[Tensor],
        text: LTX2Text,
        layout: LTX2Layout,
        /,
        isolated: bool = False,
        perturbed: Sequence[int] = (),
    ) -> Joint[Tensor]:
        """Velocity (B, N, C) of each modality in fp32; None for one that is absent.

        Args:
            latents: (B, N, C); a modality that is None takes no part. sigmas: (B,) or (B, N) in [0,
                1]. isolated: the modalities do not hear each other. perturbed: blocks whose
                self-attention is cut.
        """
        model = self.transformer
        batch, device = _batch_of(latents)
        video = self._stream(latents.video, sigmas.video, layout, batch, device, "video")
        audio = self._stream(latents.audio, sigmas.audio, layout, batch, device, "audio")
        dtype = text.video.dtype
        gates = nullcontext()
        if self.behavior.cross_timestep == "reference":
            gates = partner_gates(model, video.row, audio.row)
        mask = None
        if perturbed:
            prepare_perturbation(model, self.behavior.perturb)
            mask = torch.zeros(batch, device=device)
        apart = isolated or latents.video is None or latents.audio is None
        with gates:
            picture, sound = model(
                hidden_states=video.tokens.to(dtype),
                audio_hidden_states=audio.tokens.to(dtype),
                encoder_hidden_states=text.video,
                audio_encoder_hidden_states=text.audio,
                timestep=video.level,
                audio_timestep=audio.level,
                sigma=video.row,
                audio_sigma=audio.row,
                encoder_attention_mask=text.mask,
                audio_encoder_attention_mask=text.mask,
                video_coords=video.coords,
                audio_coords=audio.coords,
                isolate_modalities=apart,
                spatio_temporal_guidance_blocks=list(perturbed) or None,
                perturbation_mask=mask,
                video_keyframes_mask=self._marked(latents.video, layout),
                use_cross_timestep=self.behavior.cross_timestep == "partner",
                return_dict=False,
            )
        return Joint(
            None if latents.video is None else picture.float(),
            None if latents.audio is None else sound.float(),
        )

    def _stream(
        self,
        tokens: Tensor | None,
        sigma: Tensor | None,
        layout: LTX2Layout,
        batch: int,
        device: torch.device,
        modality: str,
    ) -> _Stream:
        """Tokens, levels and coordinates of a modality. An absent one is a single idle token that
        nobody hears: the class asks for both, and its rotary embedding for one token at least.
        """
        model = self.transformer
        config = model.config
        if modality == "video":
            rate = float(layout.clip.fps)
            coords = model.rope.prepare_video_coords(batch, *layout.grid, device, fps=rate)
            width = config.in_channels
        else:
            coords = model.audio_rope.prepare_audio_coords(batch, layout.audio_steps, device)
            width = config.audio_in_channels
        if tokens is None or sigma is None:
            nothing = torch.zeros(batch, device=device)
            idle = torch.zeros(batch, 1, width, device=device)
            return _Stream(idle, nothing, nothing, coords[:, :, :1])
        level = config.timestep_scale_multiplier * sigma
        row = level if level.ndim == 1 else level.amax(1)
        return _Stream(tokens, level, row, coords)

    def _marked(self, video: Tensor | None, layout: LTX2Layout) -> Tensor | None:
        """(B, N_v, 1) with ones on the first latent frame, which holds a single frame."""
        wanted = self.behavior.mark_first_frame
        if video is None or not (
            wanted and self.transformer.config.use_keyframes_abs_pos_embedding
        ):
            return None
        marked = video.new_zeros(video.shape[0], video.shape[1], 1)
        marked[:, : layout.grid[1] * layout.grid[2]] = 1
        return marked


def _batch_of(latents: Joint[Tensor]) -> tuple[int, torch.device]:
    for _, tokens in latents.items():
        return tokens.shape[0], tokens.device
    raise ValueError("latents=Joint(None, None): needs the latents of at least one modality")


@contextmanager
def partner_gates(
    model: LTX2VideoTransformer3DModel, video: Tensor, audio: Tensor
) -> Iterator[None]:
    """Within, the gates between the modalities read the partner's level, as in ltx-core.

    Args:
        video, audio: levels (B,) in the model's own scale, 0 to 1000.
    """
    config = model.config
    factor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier

    def gate(level: Tensor) -> Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return (level * factor, *args[1:]), kwargs

        return hook

    a2v = model.av_cross_attn_video_a2v_gate
    v2a = model.av_cross_attn_audio_v2a_gate
    hooks = [
        a2v.register_forward_pre_hook(gate(audio), with_kwargs=True),
        v2a.register_forward_pre_hook(gate(video), with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prepare_perturbation(model: LTX2VideoTransformer3DModel, repair: bool) -> None:
    """Give the blocks attention processors that can be perturbed.

    A converted 2.0 has `perturbed_attn=False`, and its blocks then ignore the mask without a word:
    the pass is paid for and equals the conditional one. Only processors change, no weights.
    """
    for block in model.transformer_blocks:
        if block.perturbed_attn or not repair:
            continue
        block.perturbed_attn = True
        for attention in (block.attn1, block.audio_attn1):
            attention.set_processor(LTX2PerturbedAttnProcessor())
