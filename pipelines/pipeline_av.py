"""AVDiffPipeline: text, pictures and sounds in; one clip with sound out.

Which task is run follows from what is given: nothing but a prompt (text to audio-video), `image` (its first frame),
`audio` (it drives the picture), `video` (it gets its sound); `generate_video=False` or `generate_audio=False` leaves a
modality out. A given part keeps noise level 0 while the rest is denoised around it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from avdiff.clip import ClipSpec, Clock
from avdiff.guidance import Guidance
from avdiff.latents import Joint, JointLatents
from avdiff.models.audio_vae import AVAudioVAE
from avdiff.models.conditions import Positions, Script
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.models.video_vae import AVVideoVAE
from avdiff.models.vocoder import AVVocoder
from avdiff.pipelines.codecs import CodecMixin
from avdiff.pipelines.output import AVPipelineOutput
from avdiff.pipelines.prompt import Request, understand
from avdiff.pipelines.steps import StepMixin
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler

__all__ = ["AVDiffPipeline"]


class AVDiffPipeline(DiffusionPipeline, CodecMixin, StepMixin):
    """Joint audio-video generation.

    Args:
        transformer: denoiser. scheduler: steps both modalities. vae, audio_vae, vocoder: codecs.
        text_encoder, tokenizer: captions to features.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae->vocoder"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: AVTransformer,
        scheduler: JointFlowMatchScheduler,
        vae: AVVideoVAE,
        audio_vae: AVAudioVAE,
        vocoder: AVVocoder,
        text_encoder: CaptionEncoder | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            audio_vae=audio_vae,
            vocoder=vocoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.clock = Clock(
            video_stride=vae.config.temporal_compression_ratio,
            spatial_stride=vae.config.spatial_compression_ratio,
            patch=round((transformer.config.video_channels / vae.config.latent_channels) ** 0.5),
            audio_stride=audio_vae.config.mel_hop_length * audio_vae.config.temporal_compression_ratio,
            mel_hop=audio_vae.config.mel_hop_length,
            tick_rate=Fraction(transformer.config.shared_rate or 12.5).limit_denominator(1000),
        )
        self.video_processor = VideoProcessor(vae_scale_factor=self.clock.spatial_stride)

    @property
    def guidance_scale(self) -> Joint[float]:
        """Text guidance of each modality in the running call."""
        return Joint(self._guidance.text.video, self._guidance.text.audio)

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Noise level of the running step."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the step."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: list[str],
        negative_prompt: list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ):
        """Captions -> features (B, L, D) and masks (B, L); without a negative prompt the negative pair is None."""
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._features(prompt)
        if negative_prompt_embeds is None and negative_prompt is not None:
            negative_prompt_embeds, negative_prompt_attention_mask = self._features(negative_prompt)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _features(self, text: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder: pass prompt_embeds and prompt_attention_mask")
        tokens = self.tokenizer(
            text,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self.text_encoder.config.max_length,
        )
        mask = tokens.attention_mask.to(self._execution_device)
        return self.text_encoder(tokens.input_ids.to(self._execution_device), mask), mask

    def prepare_latents(
        self,
        clip: ClipSpec,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        positions: Positions,
        generate: Joint[bool],
        given: Joint[torch.Tensor],
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
    ) -> tuple[JointLatents, Joint[torch.Tensor]]:
        """Noise for what is generated, clean tokens for the given, and the mask of given tokens: bool (B, N), or (B,)
        where a modality is given or generated as a whole.

        Args:
            given: clean packed tokens (B, n, C); they are the first n tokens of their modality.
        """
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"generator is a list of {len(generator)}: needs one generator for each of the {batch} clips"
            )
        device, c = self._execution_device, self.transformer.config

        def state(wanted: bool, tokens: int, channels: int, start: torch.Tensor | None, clean: torch.Tensor | None):
            if not wanted and clean is None:
                return None, None
            noise = (
                randn_tensor((batch, tokens, channels), generator, device, torch.float32) if start is None else start
            )
            if noise.shape != (batch, tokens, channels):
                raise ValueError(f"latents of shape {tuple(noise.shape)}: this call needs {(batch, tokens, channels)}")
            known = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
            if clean is not None:
                n = min(clean.shape[1], tokens)
                noise = torch.cat([clean[:, :n].to(noise), noise[:, n:]], dim=1)
                known[:, :n] = True
            # One level for a whole clip is the common case, and much cheaper to modulate than one for each token.
            return noise.to(device), known if bool((known != known[:, :1]).any()) else known[:, 0]

        video, video_known = state(bool(generate.video), clip.video_tokens, c.video_channels, latents, given.video)
        audio, audio_known = state(
            bool(generate.audio), clip.audio_tokens, c.audio_channels, audio_latents, given.audio
        )
        masks = Joint(video_known, audio_known)
        seconds = Joint(positions.video[:, 0], positions.audio[:, 0])
        return JointLatents(video, audio, masks.map(lambda m: (~m).float()), seconds), masks

    def check_inputs(
        self,
        prompt: Any,
        prompt_embeds: Any,
        generate: Joint[bool],
        steps: int,
        output_type: str,
        callback_inputs: list[str],
    ) -> None:
        """One sentence for each way a call can be wrong."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("needs exactly one of prompt and prompt_embeds")
        if prompt is not None and not (
            isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt))
        ):
            raise ValueError(f"prompt of type {type(prompt).__name__}: needs a text or a non-empty list of texts")
        if not (generate.video or generate.audio):
            raise ValueError("generate_video and generate_audio are both False: nothing is left to generate")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps={steps}: needs a whole number of at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: needs 'pil', 'np', 'pt' or 'latent'")
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: "
                f"needs some of {self._callback_tensor_inputs}"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        seconds: float | None = None,
        num_frames: int | None = None,
        frame_rate: Fraction | float = 25,
        height: int = 128,
        width: int = 128,
        num_inference_steps: int = 16,
        guidance_scale: float = 2.0,
        audio_guidance_scale: float = 2.0,
        guidance: Guidance | None = None,
        num_videos_per_prompt: int = 1,
        generate_video: bool = True,
        generate_audio: bool = True,
        image: torch.Tensor | None = None,
        audio: torch.Tensor | None = None,
        video: torch.Tensor | None = None,
        language: str | None = None,
        script: Script | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents", "audio_latents"],  # noqa: B006 (diffusers' signature)
    ) -> AVPipelineOutput | tuple:
        """Generate clips.

        Args:
            prompt: description; words to speak stand in double quotes. negative_prompt: what guidance leads from.
            seconds or num_frames: length (num_frames = 1 + k * video stride); with neither, as long as the words take.
            height, width: pixels. frame_rate: frames per second.
            guidance_scale, audio_guidance_scale: text guidance of video and audio, 1 is none; or a whole `guidance`.
            image: (3, H, W) or (B, 3, H, W) in [-1, 1], the first frame. audio: (B, C, S) at the audio VAE's rate.
            video: (B, 3, F, H, W) in [-1, 1]. script: spoken words on the clock instead of the prompt's.
            latents, audio_latents: packed starting noise (B, N, C).

        Raises:
            ValueError: one sentence that names the argument, its value and what fits.
        """
        generate = Joint(generate_video, generate_audio)
        self.check_inputs(
            prompt, prompt_embeds, generate, num_inference_steps, output_type, callback_on_step_end_tensor_inputs
        )
        self._guidance = guidance or Guidance(text=Joint(guidance_scale, audio_guidance_scale))
        self._interrupt, self._current_timestep = False, None
        device = self._execution_device

        prompts = _repeat([prompt] if isinstance(prompt, str) else prompt, num_videos_per_prompt)
        embedded = 0 if prompt_embeds is None else prompt_embeds.shape[0]
        batch = len(prompts) if prompts else embedded * num_videos_per_prompt
        frame = dict(
            fps=frame_rate, height=height, width=width, sample_rate=self.audio_vae.config.sample_rate, clock=self.clock
        )
        request: Request = understand(prompts, frame, seconds, num_frames, language, script)
        clip = request.clip
        positions = Positions.of(clip, device)

        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            self.encode_prompt(
                request.descriptions,
                _repeat_negative(negative_prompt, batch),
                prompt_embeds,
                prompt_attention_mask,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
            )
        )
        prompt_embeds, prompt_attention_mask = (_per_clip(x, batch) for x in (prompt_embeds, prompt_attention_mask))
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = _per_clip(negative_prompt_embeds, batch)
            negative_prompt_attention_mask = _per_clip(negative_prompt_attention_mask, batch)
        given = self._given(image, audio, video, batch)
        state, known = self.prepare_latents(clip, batch, generator, positions, generate, given, latents, audio_latents)
        conditions = self._conditions(
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            positions,
            request.script,
            batch,
        )

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = num_inference_steps
        with self.progress_bar(total=num_inference_steps) as progress:
            for i in range(num_inference_steps):
                if self.interrupt:
                    continue
                sigmas = Joint(
                    *(s[i].expand(batch) for s in (self.scheduler.sigmas.video, self.scheduler.sigmas.audio))
                )
                self._current_timestep = self.scheduler.timesteps[i]
                estimate = self._estimate(state, known, sigmas, conditions, i / num_inference_steps, attention_kwargs)
                state = self.scheduler.step(estimate, i, state, known)
                if callback_on_step_end is not None:
                    state, conditions = self._callback(
                        callback_on_step_end,
                        callback_on_step_end_tensor_inputs,
                        i,
                        state,
                        conditions,
                        prompt_embeds,
                        negative_prompt_embeds,
                    )
                progress.update()

        frames, waveform = self._decode(state, clip, generate, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames, waveform)
        return AVPipelineOutput(frames, waveform, self.vocoder.config.sampling_rate, clip.fps)

    def _given(
        self, image: torch.Tensor | None, audio: torch.Tensor | None, video: torch.Tensor | None, batch: int
    ) -> Joint[torch.Tensor]:
        """Clean packed tokens of what the caller gave."""
        if image is not None and video is not None:
            raise ValueError("image and video are both given: an image is the first frame of a video to be generated")
        if image is not None:
            image = image if image.ndim == 4 else image[None]
            video = image[:, :, None]
        tokens = Joint(video, audio)
        encoded = Joint(
            None if tokens.video is None else self.encode_video(tokens.video),
            None if tokens.audio is None else self.encode_audio(tokens.audio),
        )
        return encoded.map(lambda x: x.expand(batch, -1, -1) if x.shape[0] == 1 else x)

    def _decode(self, state: JointLatents, clip: ClipSpec, generate: Joint[bool], output_type: str):
        """Tokens to frames and waveform; a modality that was given is returned as its codec renders it."""
        if output_type == "latent":
            return state.video, state.audio
        frames = None if state.video is None else self.decode_video(state.video, clip)
        waveform = None if state.audio is None else self.decode_audio(state.audio, clip)
        if frames is not None:
            frames = self.video_processor.postprocess_video(frames, output_type=output_type)
        return frames, waveform


def _repeat(items: list[str] | None, times: int) -> list[str] | None:
    return None if items is None else [item for item in items for _ in range(times)]


def _repeat_negative(negative: str | list[str] | None, batch: int) -> list[str] | None:
    if negative is None:
        return None
    items = [negative] if isinstance(negative, str) else negative
    if batch % len(items):
        raise ValueError(f"negative_prompt has {len(items)} texts for {batch} clips: give one, or one for each")
    return _repeat(items, batch // len(items))


def _per_clip(rows: Any, batch: int) -> Any:
    """Repeat given rows so that there is one for each of the `batch` clips."""
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)
