"""AVDiffPipeline: text, pictures and sounds in; one clip with sound out.

Which task is run follows from what is given: nothing but a prompt (text to audio-video), `image`
and `last_image` (its first and last frame), `audio` (it drives the picture), `video` (it gets its
sound); `generate_video=False` or `generate_audio=False` leaves a modality out. A clip that is
longer than the given sound or film continues it; `retake` makes a span of it anew, `mask` a region.
A given part keeps noise level 0 while the rest is denoised around it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.video_processor import VideoProcessor
from PIL.Image import Image

from avdiff.clip import ClipSpec
from avdiff.guidance import Guidance
from avdiff.latents import Joint, JointLatents
from avdiff.models.codec import LatentCodec, codec_clock
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.models.conditions import Conditions
from avdiff.models.prompt_domain import PromptDomain
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack
from avdiff.pipelines.conditioning import Conditioning, Retake, encode_conditioning, initial_state
from avdiff.pipelines.denoise import ConditionCache, denoise
from avdiff.pipelines.loading import checked_folder, refuse_pickle, write_loader
from avdiff.pipelines.lora import AVLoraLoaderMixin
from avdiff.pipelines.output import AVPipelineOutput, decode_output
from avdiff.pipelines.prompt import ClipPlan, clip_length, plan_clip, seeds_of
from avdiff.pipelines.request import ARGUMENTS, GenerationRequest
from avdiff.pipelines.sampling_defaults import SamplingDefaults
from avdiff.pipelines.schedule import correlate_frames
from avdiff.pipelines.streaming import Segment, stream_clip
from avdiff.pipelines.texts import caption_features, pass_conditions, repeat_rows
from avdiff.pipelines.validation import check_finite, check_memory, validate
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler

__all__ = ["RECOMMENDED", "AVDiffPipeline"]

RECOMMENDED = asdict(SamplingDefaults())  # as a pipeline's config holds them


class AVDiffPipeline(DiffusionPipeline, AVLoraLoaderMixin):
    """Joint audio-video generation.

    Args:
        transformer: denoiser. scheduler: steps both modalities; a flow-matching scheduler of
            diffusers is stepped by a copy for each.
        vae, audio_vae, vocoder: codecs.
        text_encoder, tokenizer: captions to features. prompt_domain: what the model can make;
            without one, any prompt is taken.
        num_inference_steps, guidance_scale, audio_guidance_scale, deflicker_strength: what a call
            uses that does not say otherwise; where they are None, what the transformer brings from
            the pipeline that it was in, else `SamplingDefaults()`.
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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        audio_guidance_scale: float | None = None,
        deflicker_strength: float | None = None,
    ) -> None:
        super().__init__()
        named = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "audio_guidance_scale": audio_guidance_scale,
            "deflicker_strength": deflicker_strength,
        }
        brought = getattr(transformer, "sampling_defaults", None)
        self.register_to_config(**asdict(SamplingDefaults.of(named, brought)))
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
        self._reset_run()
        if transformer is None or vae is None or audio_vae is None:
            return  # captions alone can be encoded
        ratio = transformer.config.video_channels / vae.config.latent_channels
        self.clock = codec_clock(vae, audio_vae, round(ratio**0.5), transformer.config.shared_rate)
        self.video_processor = VideoProcessor(vae_scale_factor=self.clock.spatial_stride)

    # ------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """As in diffusers, but pickled weights are refused, and so is a config with options that
        are not known.

        Raises:
            ValueError: an unknown option in a component's config, a tensor that is missing or that
                no one asked for.
            OSError: no safetensors file.
        """
        refuse_pickle(kwargs)
        with checked_folder(pretrained_model_name_or_path, kwargs) as check:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            check(pipe.components)
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """As in diffusers, always as safetensors, with a `pipeline.py` by which
        `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder)` finds this class.

        Raises:
            ValueError: pickled weights are asked for.
        """
        if safe_serialization is not True:
            raise ValueError("safe_serialization: needs True, as pickled weights can run code")
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
        write_loader(save_directory)

    # ------------------------------------------------------------- what a call uses by default

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """What a call uses that does not say otherwise."""
        return SamplingDefaults.of(self.config)

    @sampling_defaults.setter
    def sampling_defaults(self, defaults: SamplingDefaults) -> None:
        self.register_to_config(**asdict(defaults))

    @property
    def components(self) -> dict[str, Any]:
        """Arguments of another pipeline; the transformer carries the sampling defaults along, as
        they belong to its weights.
        """
        parts = super().components
        if parts.get("transformer") is not None:
            parts["transformer"].sampling_defaults = self.sampling_defaults
        return parts

    # -------------------------------------------------------------------- state of the running call

    def _reset_run(self, request: GenerationRequest | None = None) -> None:
        guidance = Guidance() if request is None else request.guidance
        self._guidance = guidance
        self._guidance_scale = guidance.text.video
        self._audio_guidance_scale = guidance.text.audio
        self._interrupt = False
        self._current_timestep: torch.Tensor | None = None
        self._num_timesteps = 0 if request is None else request.steps
        self._attention_kwargs = None if request is None else request.attention_kwargs

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
        return any(s not in (0, 1) for s in (self._guidance_scale, self._audio_guidance_scale))

    @property
    def attention_kwargs(self) -> Any:
        """Those of the running call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Noise level of the running step, from 1000 down to 0, as diffusers' caches expect it."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the step."""
        return self._interrupt

    # --------------------------------------------------------------------------------- the parts

    @property
    def codec(self) -> LatentCodec:
        """Between pixels and waveforms outside and tokens inside."""
        return LatentCodec(
            self.vae, self.audio_vae, self.vocoder, self.clock, self._execution_device
        )

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] -> packed normalized tokens."""
        return self.codec.encode_video(frames)

    def encode_audio(self, waveform: torch.Tensor) -> torch.Tensor:
        """Waveform (B, C, S) at the audio VAE's rate -> packed normalized tokens."""
        return self.codec.encode_audio(waveform)

    def decode_video(self, tokens: torch.Tensor, clip: ClipSpec) -> torch.Tensor:
        """Packed tokens -> video (B, 3, F, H, W) in [-1, 1]."""
        return self.codec.decode_video(tokens, self.codec.layout(clip))

    def decode_audio(self, tokens: torch.Tensor, clip: ClipSpec) -> torch.Tensor:
        """Packed tokens -> waveform (B, C, S) of exactly the clip's length, in [-1, 1]."""
        return self.codec.decode_audio(tokens, self.codec.layout(clip))

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Captions -> features (B, L, D) and masks (B, L); without a negative prompt the negative
        pair is None.
        """

        if prompt_embeds is None and prompt is not None:
            prompt_embeds, prompt_attention_mask = caption_features(self, prompt, device)
        if negative_prompt_embeds is None and negative_prompt is not None:
            negative_prompt_embeds, negative_prompt_attention_mask = caption_features(
                self, negative_prompt, device
            )
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        prompt_embeds = repeat_rows(prompt_embeds, num_videos_per_prompt, dtype)
        prompt_attention_mask = repeat_rows(prompt_attention_mask, num_videos_per_prompt)
        negative_prompt_embeds = repeat_rows(negative_prompt_embeds, num_videos_per_prompt, dtype)
        negative_prompt_attention_mask = repeat_rows(
            negative_prompt_attention_mask, num_videos_per_prompt
        )
        # diffusers' tests read the names of these four from the source
        return (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )

    def _event_seeds(
        self, generator: torch.Generator | list[torch.Generator] | None, batch: int
    ) -> list[int] | None:
        """A seed for the onsets of each clip's event; None where the model knows no onset track."""
        return seeds_of(generator, batch) if self.transformer.config.onset_track else None

    def plan(self, request: GenerationRequest) -> ClipPlan:
        """Size and length of the clip, and what is said in it when.

        Raises:
            ValueError: a prompt beyond the model's domain, or words that do not fit.
        """
        # an adapter may have learned more than the domain says
        adapted = bool(getattr(self.transformer, "peft_config", None))
        checks = request.check_prompt and not adapted
        plan = plan_clip(
            request.prompts,
            request.frame,
            clip_length(request),
            request.language,
            request.phoneme_track,
            self.prompt_domain if checks else None,
            request.has_media,
            self._event_seeds(request.generator, request.batch) if request.prompts else None,
        )
        check_memory(plan.clip, request.batch)
        return plan

    def prepare_latents(
        self,
        clip: ClipSpec,
        request: GenerationRequest,
        conditioning: Joint[Conditioning],
    ) -> tuple[JointLatents, Joint[torch.Tensor]]:
        """Noise for what is generated, clean tokens for what is given, and the mask of the given
        tokens: bool (B, N), or (B,) where a modality is given or generated as a whole.

        Raises:
            ValueError: latents do not fit the clip, or everything is given.
        """
        correlate = partial(correlate_frames, self.scheduler)
        layout = self.codec.layout(clip)
        return initial_state(layout, request, conditioning, self._execution_device, correlate)

    def conditions(self, request: GenerationRequest, plan: ClipPlan) -> ConditionCache[Conditions]:
        """What each pass of the run reads: captions, words on the clock, positions."""
        return pass_conditions(self, request, plan)

    def decode(
        self,
        state: JointLatents,
        clip: ClipSpec,
        conditioning: Joint[Conditioning],
        request: GenerationRequest,
    ) -> AVPipelineOutput:
        """Tokens to what `output_type` asks for; given frames and samples come back as they were.

        Raises:
            ValueError: the run ended in NaN or infinite values.
        """
        check_finite(state.latents)
        decoded = decode_output(self.codec, state, clip, conditioning, request)
        frames: Any = decoded.video
        if frames is not None and request.output_type not in ("latent", "tokens"):
            process = self.video_processor.postprocess_video
            frames = process(frames, output_type=request.output_type)
        rate = self.vocoder.config.sampling_rate
        return AVPipelineOutput(frames, decoded.audio, rate, clip.fps)

    # ---------------------------------------------------------------------------------- the call

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
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | Joint | None = None,
        timesteps: Sequence[float] | None = None,
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
        phoneme_track: PhonemeTrack | None = None,
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
        """Generate clips."""
        arguments = dict(locals())
        request = validate(self, {name: arguments[name] for name in CALL.parameters})
        self._reset_run(request)
        plan = self.plan(request)
        codec = self.codec
        conditions = self.conditions(request, plan)
        conditioning = encode_conditioning(codec, plan.clip, request, self._execution_device)
        state, mask = self.prepare_latents(plan.clip, request, conditioning)
        state = denoise(self, state, mask, conditions, request)
        output = self.decode(state, plan.clip, conditioning, request)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.frames, output.audio)

    def request(self, **arguments: Any) -> GenerationRequest:
        """Check the arguments of a call without running it.

        Raises:
            ValueError: as the call does. TypeError: an argument that it does not have.
        """
        bound = CALL.bind(**arguments)
        bound.apply_defaults()
        return validate(self, bound.arguments)

    def stream(
        self,
        prompt: str,
        seconds: float,
        segment: float = 4.0,
        overlap: float = 1.0,
        video: torch.Tensor | None = None,
        audio: torch.Tensor | None = None,
        frame_rate: Fraction | float = 25,
        generate_video: bool = True,
        generate_audio: bool = True,
        language: str | None = None,
        **options: Any,
    ) -> Iterator[Segment]:
        """Make one clip of any length piece by piece, in constant memory; write it with
        `write_clip(path, *streams(pipe.stream(...)), ...)`.

        Args:
            prompt: its words are laid on the clock of the whole clip, after the given part.
            seconds: length of the whole clip. segment, overlap: seconds of one call and of what it
                is given.
            video, audio: as in `__call__`, the beginning of the clip, which comes first in the
                result. Sound that is longer than the film drives it.
            options: of `__call__`.

        Raises:
            ValueError: before any work: a value that no call takes, the clip is no longer than what
                is given, or what is given lacks a modality that is asked for.
        """
        options |= {
            "frame_rate": frame_rate,
            "generate_video": generate_video,
            "generate_audio": generate_audio,
            "language": language,
        }
        return stream_clip(self, prompt, seconds, segment, overlap, video, audio, options)


# The arguments of a call, without `self`.
CALL = inspect.signature(AVDiffPipeline.__call__)
CALL = CALL.replace(parameters=list(CALL.parameters.values())[1:])
AVDiffPipeline.__call__.__doc__ = f"{AVDiffPipeline.__call__.__doc__}\n{ARGUMENTS}"
