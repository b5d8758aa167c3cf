"""AVDiffPipeline: text, pictures and sounds in; one clip with sound out.

Which task is run follows from what is given: nothing but a prompt (text to audio-video), `image`
and `last_image` (its first and last frame), `audio` (it drives the picture), `video` (it gets its
sound); `generate_video=False` or `generate_audio=False` leaves a modality out. A clip that is
longer than the given sound or film continues it; `retake` makes a span of it anew, `mask` a region.
A given part keeps noise level 0 while the rest is denoised around it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.video_processor import VideoProcessor
from PIL.Image import Image

from avdiff.clip import Clock
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.models.conditions import Positions
from avdiff.models.prompt_domain import PromptDomain
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack
from avdiff.pipelines.codecs import CodecMixin
from avdiff.pipelines.conditioning import ConditioningMixin, Retake, per_clip
from avdiff.pipelines.denoise import StepMixin, Told
from avdiff.pipelines.loading import SafeLoadingMixin
from avdiff.pipelines.lora import AVLoraLoaderMixin
from avdiff.pipelines.output import AVPipelineOutput
from avdiff.pipelines.prompt import Request, understand
from avdiff.pipelines.streaming import LongMixin
from avdiff.pipelines.validation import check_finite, check_memory, checked
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler

__all__ = ["RECOMMENDED", "AVDiffPipeline"]

# What a call uses that does not say otherwise, unless the pipeline's config does (a distilled
# one's).
RECOMMENDED = {
    "num_inference_steps": 16,
    "guidance_scale": 2.0,
    "audio_guidance_scale": 2.0,
    "deflicker_strength": 0.0,
}


class AVDiffPipeline(
    SafeLoadingMixin,
    DiffusionPipeline,
    AVLoraLoaderMixin,
    CodecMixin,
    ConditioningMixin,
    StepMixin,
    LongMixin,
):
    """Joint audio-video generation.

    Args:
        transformer: denoiser. scheduler: steps both modalities. vae, audio_vae, vocoder: codecs.
        text_encoder, tokenizer: captions to features. world: what the model can make; without one,
            any prompt is taken.
        num_inference_steps, guidance_scale, audio_guidance_scale, deflicker_strength: what a call
            uses that does not say otherwise; a distilled model says fewer steps and no guidance.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae->vocoder"
    _optional_components = ["text_encoder", "tokenizer", "prompt_domain"]
    _callback_tensor_inputs = [
        "latents",
        "audio_latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]

    def __init__(
        self,
        transformer: AVTransformer,
        scheduler: JointFlowMatchScheduler,
        vae: AVVideoVAE,
        audio_vae: AVAudioVAE,
        vocoder: AVVocoder,
        text_encoder: CaptionEncoder | None = None,
        tokenizer: Any = None,
        prompt_domain: PromptDomain | None = None,
        num_inference_steps: int = 16,
        guidance_scale: float = 2.0,
        audio_guidance_scale: float = 2.0,
        deflicker_strength: float = 0.0,
    ) -> None:
        super().__init__()
        scales = dict(guidance_scale=guidance_scale, audio_guidance_scale=audio_guidance_scale)
        self.register_to_config(
            num_inference_steps=num_inference_steps, deflicker_strength=deflicker_strength, **scales
        )
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            audio_vae=audio_vae,
            vocoder=vocoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prompt_domain=prompt_domain,
        )
        if transformer is None or vae is None or audio_vae is None:
            return  # captions alone can be encoded
        self.clock = Clock(
            video_stride=vae.config.temporal_compression_ratio,
            spatial_stride=vae.config.spatial_compression_ratio,
            patch=round((transformer.config.video_channels / vae.config.latent_channels) ** 0.5),
            audio_stride=audio_vae.config.mel_hop_length
            * audio_vae.config.temporal_compression_ratio,
            mel_hop=audio_vae.config.mel_hop_length,
            shared_rate=Fraction(transformer.config.shared_rate or 12.5).limit_denominator(1000),
        )
        self.video_processor = VideoProcessor(vae_scale_factor=self.clock.spatial_stride)

    @property
    def guidance_scale(self) -> float:
        """Text guidance of the picture in the running call; a callback may set
        `pipe._guidance_scale`.
        """
        return self._guidance_scale

    @property
    def audio_guidance_scale(self) -> float:
        """Text guidance of the sound in the running call; a callback may set
        `pipe._audio_guidance_scale`.
        """
        return self._audio_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call guides by text."""
        return self._guidance_scale != 1 or self._audio_guidance_scale != 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Those of the running call."""
        return self._attention_kwargs

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
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ):
        """Captions -> features (B, L, D) and masks (B, L); without a negative prompt the negative
        pair is None.
        """
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._features(prompt)
        if negative_prompt_embeds is None and negative_prompt is not None:
            negative_prompt_embeds, negative_prompt_attention_mask = self._features(negative_prompt)
        return (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )

    def _features(self, text: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder: pass prompt_embeds and prompt_attention_mask"
            )
        tokens = self.tokenizer(
            [text] if isinstance(text, str) else text,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self.text_encoder.config.max_length,
        )
        mask = tokens.attention_mask.to(self._execution_device)
        return self.text_encoder(tokens.input_ids.to(self._execution_device), mask), mask

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
            isinstance(prompt, str)
            or (isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt))
        ):
            raise ValueError(
                f"prompt of type {type(prompt).__name__}: needs a text or a non-empty list of texts"
            )
        if not (generate.video or generate.audio):
            raise ValueError(
                "generate_video and generate_audio are both False: nothing is left to generate"
            )
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
    @checked
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        seconds: float | None = None,
        num_frames: int | None = None,
        frame_rate: Fraction | float = 25,
        height: int = 128,
        width: int = 128,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        audio_guidance_scale: float | None = None,
        guidance: Guidance | None = None,
        deflicker_strength: float | None = None,
        num_videos_per_prompt: int = 1,
        generate_video: bool = True,
        generate_audio: bool = True,
        image: torch.Tensor | Image | None = None,
        audio: torch.Tensor | None = None,
        video: torch.Tensor | None = None,
        last_image: torch.Tensor | Image | None = None,
        retake: Retake | None = None,
        mask: torch.Tensor | None = None,
        language: str | None = None,
        track: PhonemeTrack | None = None,
        speech_start: float | None = None,
        check_prompt: bool = True,
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
            prompt: description; words to speak stand in double quotes. negative_prompt: what
                guidance leads from.
            seconds or num_frames: length (num_frames = 1 + k * video stride); with neither, as long
            as what is given,
                or as the words take. A clip that is longer than what is given continues it.
            height, width: pixels. frame_rate: frames per second.
            num_inference_steps: denoising steps. guidance_scale, audio_guidance_scale: text
                guidance of video and audio, 1 is none; or a whole `guidance`. Where they are not
                given, the pipeline's config decides.
            deflicker_strength: changes of a pixel from frame to frame, of 255, that count as
                flicker and are averaged over time; 0 leaves the frames as they are decoded.
            image, last_image: (3, H, W) or (B, 3, H, W) in [-1, 1], or a PIL picture of the clip's
                size; first and last frame, as the codec renders them.
            video: (B, 3, F, H, W) in [-1, 1]. audio: (B, C, S) at the audio VAE's rate. Both come
                back as they were given, but for 10 ms of sound ahead of what is new.
            retake: a span of the given clip that is made anew. mask: (H, W) or (F, H, W), above 0.5
                where the given video is made anew; the rest of such a frame is as the codec renders
                it.
            script: spoken words on the clock instead of the prompt's. speech_start: seconds at
                which the words begin; by default after the sound that is continued.
            check_prompt: refuse prompts beyond the pipeline's `world`, if it has one.
            latents, audio_latents: packed starting noise (B, N, C).

        Raises:
            ValueError: one sentence that names the argument, its value and what fits.
        """
        generate = Joint(generate_video, generate_audio)
        num_inference_steps = _or(num_inference_steps, self.config.num_inference_steps)
        self.check_inputs(
            prompt,
            prompt_embeds,
            generate,
            num_inference_steps,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        scales = (
            _or(guidance_scale, self.config.guidance_scale),
            _or(audio_guidance_scale, self.config.audio_guidance_scale),
        )
        self._guidance = guidance or Guidance(text=Joint(*scales))
        self._guidance_scale = self._guidance.text.video
        self._audio_guidance_scale = self._guidance.text.audio
        self._interrupt = False
        self._current_timestep = None
        self._attention_kwargs = attention_kwargs
        device = self._execution_device
        steady = _or(deflicker_strength, self.config.deflicker_strength)

        prompts = _repeat([prompt] if isinstance(prompt, str) else prompt, num_videos_per_prompt)
        embedded = 0 if prompt_embeds is None else prompt_embeds.shape[0]
        batch = len(prompts) if prompts else embedded * num_videos_per_prompt
        frame = dict(
            fps=frame_rate,
            height=height,
            width=width,
            sample_rate=self.audio_vae.config.sample_rate,
            clock=self.clock,
        )
        widened = bool(
            getattr(self.transformer, "peft_config", None)
        )  # an adapter may have learned more
        prompt_domain = self.prompt_domain if check_prompt and not widened else None
        conditioning_from_files = any(
            part is not None for part in (image, last_image, audio, video)
        )
        length, num_frames, begin = self._length(
            seconds, num_frames, frame, audio, video, speech_start
        )
        request: Request = understand(
            prompts,
            frame,
            length,
            num_frames,
            language,
            track,
            prompt_domain,
            conditioning_from_files,
            begin,
            self._event_seeds(generator, batch) if prompts else None,
        )
        clip = request.clip
        check_memory(clip, batch)
        positions = Positions.of(clip, device)

        (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        ) = self.encode_prompt(
            request.descriptions,
            _repeat_negative(negative_prompt, batch),
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        prompt_embeds, prompt_attention_mask = (
            per_clip(x, batch) for x in (prompt_embeds, prompt_attention_mask)
        )
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = per_clip(negative_prompt_embeds, batch)
            negative_prompt_attention_mask = per_clip(negative_prompt_attention_mask, batch)
        assert not isinstance(image, Image) and not isinstance(
            last_image, Image
        )  # `checked` made tensors of them
        given = self._given(clip, batch, image, last_image, audio, video, retake, mask)
        state, known = self.prepare_latents(
            clip, batch, generator, positions, generate, given, latents, audio_latents
        )
        told = Told(
            partial(self.transformer.prepare, attention_kwargs=attention_kwargs),
            {
                "cond": (prompt_embeds, prompt_attention_mask),
                "no_text": (negative_prompt_embeds, negative_prompt_attention_mask),
            },
            positions,
            None if request.track is None else request.track.to(device),
            batch,
        )

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = num_inference_steps
        with self.progress_bar(total=num_inference_steps) as progress:
            for i in range(num_inference_steps):
                if self.interrupt:
                    continue
                sigmas = Joint(
                    *(
                        s[i].expand(batch)
                        for s in (self.scheduler.sigmas.video, self.scheduler.sigmas.audio)
                    )
                )
                self._current_timestep = self.scheduler.timesteps[i]
                estimate = self._estimate(
                    state, known, sigmas, told, i / num_inference_steps, attention_kwargs
                )
                state = self.scheduler.step(estimate, i, state, known)
                if callback_on_step_end is not None:
                    state = self._callback(
                        callback_on_step_end, callback_on_step_end_tensor_inputs, i, state, told
                    )
                progress.update()

        check_finite(state.latents)
        frames, waveform = self._decode(state, clip, given, output_type, steady)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames, waveform)
        return AVPipelineOutput(frames, waveform, self.vocoder.config.sampling_rate, clip.fps)


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _repeat(items: list[str] | None, times: int) -> list[str] | None:
    return None if items is None else [item for item in items for _ in range(times)]


def _repeat_negative(negative: str | list[str] | None, batch: int) -> list[str] | None:
    if negative is None:
        return None
    items = [negative] if isinstance(negative, str) else negative
    if batch % len(items):
        raise ValueError(
            f"negative_prompt has {len(items)} texts for {batch} clips: give one, or one for each"
        )
    return _repeat(items, batch // len(items))
