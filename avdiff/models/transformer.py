"""AVTransformer: a dual-branch diffusion transformer for sound and picture together.  START HERE.

What is special in it:
- two instances of one branch, video and audio; either may be absent and then costs nothing;
- a shared latent stream, one token per tick of the clock, that both branches read and write;
- every position is in seconds, so both streams stay in phase at any frame rate;
- noise levels are separate for each modality, per sample or per token: a given modality has level
    0;
- spoken words enter on the clock, with an Engram memory over phoneme n-grams; descriptions by text
    cross-attention;
- mixture-of-experts feed-forwards where the config asks; their routing statistics are an output,
    never state;
- it predicts clean data (x0), as the best linear guess plus what the network adds to it.

Shape legend: B batch, N_v / N_a / N_s tokens, C_v / C_a values per token, D_v / D_a widths, L
caption tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from avdiff.core.engram import Engram, MemoryRead, NgramHash
from avdiff.core.modulation import TimestepEmbedding, rms_norm
from avdiff.core.rope import rotary_phases
from avdiff.latents import Joint, per_token
from avdiff.models.blocks import Branch, DualBlock, SharedStream, StepRows, split_shared
from avdiff.models.conditions import Conditions, Positions, window_mask
from avdiff.models.phoneme_encoder import PhonemeEncoder
from avdiff.phonetics.phone import ONSET_ID
from avdiff.phonetics.track import PhonemeTrack


@dataclass
class AVTransformerOutput(BaseOutput):
    """Clean-data estimates (B, N, C) of the modalities that took part, and MoE routing statistics
    by layer (which the tuple of `return_dict=False` leaves out).
    """

    video: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    routing: list[torch.Tensor] | None = None


class AVTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin, CacheMixin):
    """Dual-branch DiT. Presets: `avdiff.models.presets`.

    Args:
        video_channels, audio_channels: values per token. text_dim: width of the caption features.
        video_dim, audio_dim, video_heads, audio_heads, dim_head: widths; heads * dim_head may
            differ from the width.
        num_layers: blocks. text_every: a block in so many has text cross-attention.
        video_hidden, audio_hidden: SwiGLU widths. video_experts, audio_experts: 0 is dense.
        shared_rate: ticks per second of the shared stream, 0 for none. shared_layers: blocks that
            update it.
        shared_hidden, shared_experts, top_k: its feed-forward.
        num_phonemes, num_stress_tones, phoneme_dim: the script; 0 phonemes for a model without one.
        onset_track: whether events have a script too, of their strokes (`ONSET_ID`).
        mels_per_token: mel frames of an audio token, the resolution of the script.
        memory_layers: blocks with an Engram over phoneme n-grams; memory_rows: rows per head,
            memory_orders: longest n-gram, memory_heads, memory_head_dim: its size.
        window: seconds of the local cross-attention window, None for global.
        cross_modal: whether the branches read each other directly; without it they meet through the
            shared stream alone, and with shared_rate 0 as well not at all.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DualBlock"]
    _repeated_blocks = ["DualBlock"]
    _keep_in_fp32_modules = ["time", "router"]
    _skip_layerwise_casting_patterns = [
        "norm",
        "memory",
        "router",
        "proj_in_video",
        "proj_in_audio",
        "time",
        "table",
    ]

    @register_to_config
    def __init__(
        self,
        video_channels: int = 64,
        audio_channels: int = 48,
        text_dim: int = 192,
        video_dim: int = 256,
        audio_dim: int = 256,
        video_heads: int = 4,
        audio_heads: int = 4,
        dim_head: int = 64,
        num_layers: int = 8,
        text_every: int = 2,
        video_hidden: int = 512,
        audio_hidden: int = 512,
        video_experts: int = 0,
        audio_experts: int = 0,
        shared_rate: float = 12.5,
        shared_layers: tuple[int, ...] = (0, 3, 6),
        shared_hidden: int = 256,
        shared_experts: int = 8,
        top_k: int = 2,
        num_phonemes: int = 128,
        num_stress_tones: int = 8,
        phoneme_dim: int = 128,
        mels_per_token: int = 4,
        memory_layers: tuple[int, ...] = (1,),
        memory_rows: int = 2048,
        memory_orders: int = 3,
        memory_heads: int = 4,
        memory_head_dim: int = 16,
        window: float | None = 0.2,
        cross_modal: bool = True,
        onset_track: bool = False,
    ) -> None:
        super().__init__()
        if onset_track and num_phonemes <= ONSET_ID:
            raise ValueError(f"num_phonemes={num_phonemes}: onset_track needs {ONSET_ID + 1}")
        bad = [i for i in (*shared_layers, *memory_layers) if not 0 <= i < num_layers]
        if bad:
            raise ValueError(
                f"shared_layers/memory_layers contain {bad}: needs block numbers from 0 to "
                f"{num_layers - 1}"
            )
        if num_layers - 1 in shared_layers:
            raise ValueError(
                f"shared_layers={tuple(shared_layers)}: block {num_layers - 1} is the last, and "
                "nobody would "
                "read its update of the shared stream"
            )
        shared = shared_rate > 0
        self.proj_in_video = nn.Linear(video_channels, video_dim)
        self.proj_in_audio = nn.Linear(audio_channels, audio_dim)
        self.text_register = nn.Parameter(torch.randn(1, 1, text_dim))
        self.phoneme_encoder = (
            PhonemeEncoder(
                num_phonemes,
                num_stress_tones,
                phoneme_dim,
                mels_per_token,
                audio_dim,
                video_dim,
                onset_track=onset_track,
            )
            if num_phonemes
            else None
        )
        self.time = nn.ModuleDict(
            {
                "video": TimestepEmbedding(video_dim, rows=6),
                "audio": TimestepEmbedding(audio_dim, rows=6),
            }
        )
        # The gate of what a branch hears follows the noise level of the partner, in the width of
        # the listener.
        self.cross_gate_proj = nn.ModuleDict(
            {"video": nn.Linear(audio_dim, video_dim), "audio": nn.Linear(video_dim, audio_dim)}
        )
        self.shared_time_proj = (
            nn.ModuleDict(
                {"video": nn.Linear(video_dim, audio_dim), "audio": nn.Linear(audio_dim, audio_dim)}
            )
            if shared
            else None
        )
        self.shared_init = nn.Parameter(torch.zeros(1, 1, audio_dim)) if shared else None

        def branch(
            dim: int, heads: int, partner: int, hidden: int, experts: int, layer: int
        ) -> Branch:
            text = text_dim if layer % text_every == 0 else 0
            reads = (partner if cross_modal else None, audio_dim if shared else None)
            return Branch(dim, heads, dim_head, text, *reads, audio_heads, hidden, experts, top_k)

        self.transformer_blocks = nn.ModuleList(
            DualBlock(
                layer=i,
                video=branch(video_dim, video_heads, audio_dim, video_hidden, video_experts, i),
                audio=branch(audio_dim, audio_heads, video_dim, audio_hidden, audio_experts, i),
                shared=SharedStream(
                    audio_dim,
                    audio_heads,
                    dim_head,
                    video_dim,
                    shared_hidden,
                    shared_experts,
                    top_k,
                )
                if shared and i in shared_layers
                else None,
                memory=Engram(
                    audio_dim,
                    NgramHash(
                        num_phonemes * num_stress_tones,
                        memory_rows,
                        memory_orders,
                        memory_heads,
                        i,
                        tuple(memory_layers),
                    ),
                    memory_head_dim,
                )
                if num_phonemes and i in memory_layers
                else None,
            )
            for i in range(num_layers)
        )
        self.out_modulation = nn.ModuleDict(
            {
                "video": nn.Linear(video_dim, 2 * video_dim),
                "audio": nn.Linear(audio_dim, 2 * audio_dim),
            }
        )
        self.proj_out_video = nn.Linear(video_dim, video_channels)
        self.proj_out_audio = nn.Linear(audio_dim, audio_channels)
        self.gradient_checkpointing = False
        self._init_weights(num_layers)

    def _init_weights(self, num_layers: int) -> None:
        """One place for all starts.

        | part                                  | start |
        | matrices                              | normal, sd 1 / sqrt(fan_in) |
        | projections back into a residual line | the same, over sqrt(2 * num_layers) (GPT-2) |
        | time rows, partner gates, output head | zero: modulation off, first estimate is linear |
        | Engram value projection               | zero: a fresh memory changes nothing |
        """
        for name, module in self.named_modules():
            if (
                isinstance(module, nn.Linear)
                and ".memory" not in name
                and not name.endswith("to_rows")
            ):
                scale = (
                    (2 * num_layers) ** -0.5
                    if name.endswith(("to_out.0", "proj_out", "contract"))
                    else 1.0
                )
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
        for head in (
            self.cross_gate_proj,
            self.out_modulation,
            self.proj_out_video,
            self.proj_out_audio,
        ):
            for p in head.parameters():
                nn.init.zeros_(p)

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def prepare(
        self,
        text: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        positions: Positions,
        track: PhonemeTrack | None = None,
        batch_size: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Conditions:
        """Everything that does not change from step to step, computed once for a prompt.

        Args:
            text: (B, L, text_dim) caption features; text_mask: (B, L) bool. None is the
                unconditional caption.
            positions: the clip's tokens on the clock. script: spoken words, None for a clip
                without.
            attention_kwargs: "scale" of a LoRA, as in `forward`.
        """
        batch = batch_size or next(
            x.shape[0] for x in (text, None if track is None else track.phonemes) if x is not None
        )
        device = (
            positions.video.device
        )  # where an offloaded model's weights will be when they are used
        register = self.text_register.to(device).expand(batch, -1, -1)
        mask = torch.ones(batch, 1, dtype=torch.bool, device=register.device)
        if text is not None:
            assert text_mask is not None
            register = torch.cat([register, text.to(register.dtype)], dim=1)
            mask = torch.cat([mask, text_mask.bool()], dim=1)
        if self.shared_time_proj is None:
            positions = replace(positions, shared=positions.shared[:0])
        video_s = positions.video[:, 0]
        audio_s = positions.audio[:, 0]
        shared_s = positions.shared[:, 0]
        w = self.config.window
        e = self.config.dim_head
        windows = {
            "video": (window_mask(video_s, audio_s, w), window_mask(video_s, shared_s, w)),
            "audio": (window_mask(audio_s, video_s, w), window_mask(audio_s, shared_s, w)),
            "shared": (
                window_mask(shared_s, shared_s, None),
                window_mask(shared_s, video_s, w),
                window_mask(shared_s, audio_s, w),
            ),
        }
        sound = video = memory = None
        if track is not None:
            if self.phoneme_encoder is None:
                raise ValueError(
                    "script was given, but this model has num_phonemes=0 and cannot read one"
                )
            sound, video = self.phoneme_encoder(track, positions)
            sound = sound.to(device)
            video = None if video is None else video.to(device)
            memory = self._recall(track, positions)
        return Conditions(
            register,
            mask[:, None, None],
            rotary_phases(positions.video, e),
            rotary_phases(positions.video[:, :1], e),
            rotary_phases(positions.audio, e),
            rotary_phases(positions.shared, e),
            windows,
            video,
            sound,
            memory,
            len(shared_s),
        )

    def _recall(self, track: PhonemeTrack, positions: Positions) -> dict[int, MemoryRead] | None:
        """Engram read by layer: that of the marked phoneme at the midpoint of each audio token and
        tick.
        """
        layers: dict[int, Any] = {
            i: b.memory for i, b in enumerate(self.transformer_blocks) if b.memory is not None
        }
        if not layers:
            return None
        marked = track.phonemes + self.config.num_phonemes * track.stress_tones
        marked = marked * track.present[:, None].to(marked.dtype)
        mels = self.config.mels_per_token
        middle = track.frames[:, mels // 2 :: mels]  # (B, N_a)
        nearest = (
            (positions.shared[:, None, 0] - positions.audio[None, :, 0]).abs().argmin(dim=1)
        )  # (N_s,)
        index = torch.cat([middle, middle[:, nearest]], dim=1)
        return {i: engram.lookup(marked).at(index) for i, engram in layers.items()}

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        audio_timestep: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        positions: Positions | None = None,
        track: PhonemeTrack | None = None,
        conditions: Conditions | None = None,
        isolated: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> AVTransformerOutput | tuple:
        """Estimate clean latents.

        Args:
            hidden_states: noisy video tokens (B, N_v, C_v), or None for a clip without picture.
                Keep them in fp32: half precision would be felt in the last steps.
            audio_hidden_states: noisy audio tokens (B, N_a, C_a), or None for a clip without sound.
            timestep, audio_timestep: noise levels in [0, 1], (B,) or per token (B, N).
            text, text_mask, positions, script: see `prepare`; or `conditions` made by it.
            isolated: cut both cross-attention directions and the shared stream.
        """
        if hidden_states is None and audio_hidden_states is None:
            raise ValueError(
                "hidden_states and audio_hidden_states are both None: needs video, audio or both"
            )
        if (hidden_states is None or audio_hidden_states is None) and isinstance(
            self._cache_config, FirstBlockCacheConfig
        ):
            raise ValueError(
                "FirstBlockCache compares picture and sound of a block: needs both, or "
                "disable_cache()"
            )
        batch = next(x.shape[0] for x in (hidden_states, audio_hidden_states) if x is not None)
        if conditions is None:
            if positions is None:
                raise ValueError("needs positions, or conditions made by prepare()")
            conditions = self.prepare(text, text_mask, positions, track, batch)
        c = conditions.narrowed(
            audio=audio_hidden_states is not None,
            shared=self.shared_time_proj is not None and not isolated,
        )
        working = self.proj_in_video.weight.dtype
        video = None if hidden_states is None else self.proj_in_video(hidden_states.to(working))
        audio = (
            None
            if audio_hidden_states is None
            else self.proj_in_audio(audio_hidden_states.to(working))
        )
        embedded: Joint[Any] = Joint(
            None if video is None else self.time["video"](timestep),
            None if audio is None else self.time["audio"](audio_timestep),
        )
        embedded = embedded.map(
            lambda e: (e[0].to(working), e[1])
        )  # `time` stays in fp32, what reads it may not
        steps = self._step_rows(embedded)

        sound, shared = split_shared(c.audio_phonemes, c.num_shared)
        if video is not None and c.video_phonemes is not None:
            video = video + c.video_phonemes.to(video.dtype)
        if audio is not None and sound is not None:
            audio = audio + sound.to(audio.dtype)
        audio = self._append_shared(audio, shared, embedded, c.num_shared, batch)

        routing: list[torch.Tensor] = []
        for block in self.transformer_blocks:
            args = (video, audio, steps.video, steps.audio, c, isolated)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                outputs = self._gradient_checkpointing_func(block, *args)
            else:
                outputs = block(*args)
            video, audio, *stats = outputs
            routing += [s for s in stats if s is not None]  # a block that a cache skipped has none

        audio, _ = split_shared(audio, c.num_shared)
        if video is not None and embedded.video is not None:
            video = self.proj_out_video(self._modulate_out("video", video, embedded.video[0]))
            video = clean_estimate(hidden_states, video, timestep)
        if audio is not None and embedded.audio is not None:
            audio = self.proj_out_audio(self._modulate_out("audio", audio, embedded.audio[0]))
            audio = clean_estimate(audio_hidden_states, audio, audio_timestep)
        if not return_dict:
            return (video, audio)
        return AVTransformerOutput(video=video, audio=audio, routing=routing)

    def _step_rows(self, embedded: Joint) -> Joint[StepRows]:
        """Modulation rows of each branch, and its partner gate from the partner's noise level (mean
        over tokens).
        """

        def gate(listener: str, partner: tuple | None) -> torch.Tensor | None:
            return (
                None
                if partner is None
                else self.cross_gate_proj[listener](partner[0].mean(dim=1, keepdim=True))
            )

        v = embedded.video
        a = embedded.audio
        return Joint(
            None if v is None else StepRows(v[1], gate("video", a)),
            None if a is None else StepRows(a[1], gate("audio", v)),
        )

    def _append_shared(
        self,
        audio: torch.Tensor | None,
        track: torch.Tensor | None,
        embedded: Joint,
        num_shared: int,
        batch: int,
    ) -> torch.Tensor | None:
        """Start the shared stream from the script and both noise levels, and hang it behind the
        audio tokens.
        """
        if num_shared == 0 or self.shared_init is None or self.shared_time_proj is None:
            return audio
        shared = self.shared_init.expand(batch, num_shared, -1)
        if track is not None:
            shared = shared + track.to(shared.dtype)
        for name, (embedding, _) in embedded.items():
            shared = shared + self.shared_time_proj[name](embedding.mean(dim=1, keepdim=True))
        return shared if audio is None else torch.cat([audio, shared.to(audio.dtype)], dim=1)

    def _modulate_out(self, name: str, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale = self.out_modulation[name](embedding).chunk(2, dim=-1)
        return (rms_norm(x) * (1 + scale) + shift).to(x.dtype)


# What diffusers' caches need to know of a block. `TransformerBlockRegistry.register` would import
# all its own models.
_BLOCK = TransformerBlockMetadata(
    return_hidden_states_index=0, return_encoder_hidden_states_index=1, _cls=DualBlock
)
TransformerBlockRegistry._registry[DualBlock] = _BLOCK


def clean_estimate(
    noisy: torch.Tensor | None, output: torch.Tensor, sigma: torch.Tensor | None
) -> torch.Tensor:
    """x0 = c_skip z + c_out F, fp32, for noisy tokens z (B, N, C), network output F and noise level
    t (B,) or (B, N).

    Preconditioning of Karras et al. 2022 (arXiv:2206.00364, eq. 7) for z = (1-t) x + t eps with
    unit-variance data: c_skip = (1-t) / ((1-t)^2 + t^2) is the best linear estimate and c_out = t /
    sqrt((1-t)^2 + t^2) the size of its error, so F has unit variance at every noise level, and a
    token with t = 0 comes back as it is.
    """
    assert noisy is not None and sigma is not None
    t = per_token(sigma.float(), noisy)
    power = (1 - t) ** 2 + t**2
    return noisy.float() * ((1 - t) / power) + output.float() * (t / power.sqrt())
