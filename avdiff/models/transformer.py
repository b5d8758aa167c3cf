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

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from avdiff.core.engram import MemoryRead
from avdiff.core.modulation import TimestepEmbedding, rms_norm
from avdiff.core.rope import rotary_phases
from avdiff.latents import Joint, clean_estimate
from avdiff.models.blocks import StepRows, build_block, split_shared
from avdiff.models.conditions import Conditions, Positions, cross_windows
from avdiff.models.convert_names import check_folder
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

        self.transformer_blocks = nn.ModuleList(
            build_block(self.config, layer) for layer in range(num_layers)
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

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> AVTransformer:
        """As in diffusers; a folder with names of weights or options of before is refused.

        Raises:
            ValueError: names the old name and the command that converts the folder.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        if pretrained_model_name_or_path and folder.is_dir():
            check_folder(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

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
            positions: the clip's tokens on the clock. track: spoken words, None for a clip
                without.
            attention_kwargs: "scale" of a LoRA, as in `forward`.
        """
        batch = batch_size or next(
            x.shape[0] for x in (text, None if track is None else track.phonemes) if x is not None
        )
        if self.shared_time_proj is None:
            positions = replace(positions, shared=positions.shared[:0])
        # where an offloaded model's weights will be when they are used
        device = positions.video.device
        caption, mask = self._with_register(text, text_mask, batch, device)
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
        dim_head = self.config.dim_head
        return Conditions(
            text=caption,
            text_mask=mask[:, None, None],
            video_rope=rotary_phases(positions.video, dim_head),
            video_time_rope=rotary_phases(positions.video[:, :1], dim_head),
            audio_rope=rotary_phases(positions.audio, dim_head),
            shared_rope=rotary_phases(positions.shared, dim_head),
            windows=cross_windows(positions, self.config.window),
            num_shared=len(positions.shared),
            video_phonemes=video,
            audio_phonemes=sound,
            memory=memory,
        )

    def _with_register(
        self,
        text: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        batch: int,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Caption features after the learned register, (B, 1 + L, D_t), and their mask (B, 1 + L):
        also a clip without a caption has something to attend to.
        """
        caption = self.text_register.to(device).expand(batch, -1, -1)
        mask = torch.ones(batch, 1, dtype=torch.bool, device=device)
        if text is None:
            return caption, mask
        if text_mask is None:
            raise ValueError("text was given without text_mask: needs a (B, L) bool mask with it")
        caption = torch.cat([caption, text.to(caption.dtype)], dim=1)
        return caption, torch.cat([mask, text_mask.bool()], dim=1)

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
        middle = track.frame_to_phone[:, mels // 2 :: mels]  # (B, N_a)
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
        noisy = Joint(hidden_states, audio_hidden_states)
        sigma = Joint(timestep, audio_timestep)
        self._check_inputs(noisy, sigma)
        batch = next(x.shape[0] for _, x in noisy.items())
        if conditions is None:
            if positions is None:
                raise ValueError("needs positions, or conditions made by prepare()")
            conditions = self.prepare(text, text_mask, positions, track, batch)
        c = conditions.narrowed(
            audio=noisy.audio is not None,
            shared=self.shared_time_proj is not None and not isolated,
        )
        tokens = self._project_in(noisy)
        embedded = self._embed(noisy, sigma)
        steps = self._step_rows(embedded)
        video, audio = self._read_phonemes(tokens, embedded, c, batch)

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
        estimates = self._estimate(Joint(video, audio), noisy, sigma, embedded)
        if not return_dict:
            return (estimates.video, estimates.audio)
        return AVTransformerOutput(video=estimates.video, audio=estimates.audio, routing=routing)

    def _check_inputs(self, noisy: Joint[torch.Tensor], sigma: Joint[torch.Tensor]) -> None:
        """Refuse what no forward can do.

        Raises:
            ValueError: no modality at all, one alone under FirstBlockCache, or one without a level.
        """
        present = [name for name, _ in noisy.items()]
        if not present:
            raise ValueError(
                "hidden_states and audio_hidden_states are both None: needs video, audio or both"
            )
        if len(present) == 1 and isinstance(self._cache_config, FirstBlockCacheConfig):
            raise ValueError(
                "FirstBlockCache compares picture and sound of a block: needs both, or "
                "disable_cache()"
            )
        names = {"video": "timestep", "audio": "audio_timestep"}
        for modality in present:
            if getattr(sigma, modality) is None:
                raise ValueError(
                    f"{names[modality]}=None: needs the noise level of {modality}, (B,) or (B, N)"
                )

    def _project_in(self, noisy: Joint[torch.Tensor]) -> Joint[torch.Tensor]:
        """Noisy tokens (B, N, C) -> hidden states (B, N, D) in the dtype of the weights."""
        working = self.proj_in_video.weight.dtype
        layers = Joint(self.proj_in_video, self.proj_in_audio)
        return noisy.map(lambda x, layer: layer(x.to(working)), layers)

    def _embed(
        self, noisy: Joint[torch.Tensor], sigma: Joint[torch.Tensor]
    ) -> Joint[tuple[torch.Tensor, torch.Tensor]]:
        """Embedding (B, 1|N, D) and modulation rows of each modality's noise level. `time` stays in
        fp32; what reads the embedding may not.
        """
        working = self.proj_in_video.weight.dtype
        layers = Joint(self.time["video"], self.time["audio"])
        embedded = noisy.map(lambda _, level, layer: layer(level), sigma, layers)
        return embedded.map(lambda pair: (pair[0].to(working), pair[1]))

    def _step_rows(self, embedded: Joint) -> Joint[StepRows]:
        """Modulation rows of each branch, and its gate towards its partner from the partner's noise
        level (mean over tokens).
        """

        def rows(name: str, own: tuple, partner: tuple | None) -> StepRows:
            gate = None
            if partner is not None:
                gate = self.cross_gate_proj[name](partner[0].mean(dim=1, keepdim=True))
            return StepRows(own[1], gate)

        video = embedded.video
        audio = embedded.audio
        return Joint(
            None if video is None else rows("video", video, audio),
            None if audio is None else rows("audio", audio, video),
        )

    def _read_phonemes(
        self, tokens: Joint[torch.Tensor], embedded: Joint, conditions: Conditions, batch: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Add the words on the clock to video (B, N_v, D_v) and to audio with the shared stream
        behind it (B, N_a + N_s, D_a).
        """
        video = tokens.video
        audio = tokens.audio
        words, shared_words = split_shared(conditions.audio_phonemes, conditions.num_shared)
        if video is not None and conditions.video_phonemes is not None:
            video = video + conditions.video_phonemes.to(video.dtype)
        if audio is not None and words is not None:
            audio = audio + words.to(audio.dtype)
        shared = self._start_shared(shared_words, embedded, conditions.num_shared, batch)
        if shared is not None and audio is not None:
            return video, torch.cat([audio, shared.to(audio.dtype)], dim=1)
        return video, audio if shared is None else shared

    def _start_shared(
        self, words: torch.Tensor | None, embedded: Joint, num_shared: int, batch: int
    ) -> torch.Tensor | None:
        """Start the shared stream (B, N_s, D_a) from the words and both noise levels."""
        if num_shared == 0 or self.shared_init is None or self.shared_time_proj is None:
            return None
        shared = self.shared_init.expand(batch, num_shared, -1)
        if words is not None:
            shared = shared + words.to(shared.dtype)
        for name, (embedding, _) in embedded.items():
            shared = shared + self.shared_time_proj[name](embedding.mean(dim=1, keepdim=True))
        return shared

    def _estimate(
        self,
        hidden: Joint[torch.Tensor],
        noisy: Joint[torch.Tensor],
        sigma: Joint[torch.Tensor],
        embedded: Joint,
    ) -> Joint[torch.Tensor]:
        """Hidden states (B, N, D) -> clean-data estimates (B, N, C)."""
        layers = {"video": self.proj_out_video, "audio": self.proj_out_audio}
        estimates = {}
        for name, x in hidden.items():
            embedding, _ = getattr(embedded, name)
            shift, scale = self.out_modulation[name](embedding).chunk(2, dim=-1)
            modulated = (rms_norm(x) * (1 + scale) + shift).to(x.dtype)
            output = layers[name](modulated)
            estimates[name] = clean_estimate(getattr(noisy, name), output, getattr(sigma, name))
        return Joint(**estimates)
