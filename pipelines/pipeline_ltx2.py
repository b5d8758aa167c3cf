"""LTX-2 driven by avdiff's scheduler, guidance and masks of what is given.

The class loads an LTX-2 folder as diffusers' `LTX2Pipeline` does and is one in all that is not
sampling: components, LoRA, offloading, `device_map`, quantization. `save_pretrained` writes a plain
LTX2Pipeline folder, so that it stays readable for everyone else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import LTX2Pipeline
from torch import Tensor

from avdiff.clip import ClipSpec, as_fps
from avdiff.families.ltx2.codec import LTX2Codec
from avdiff.families.ltx2.denoiser import LTX2Behavior, LTX2Denoiser
from avdiff.families.ltx2.layout import Generators, LTX2Layout
from avdiff.families.ltx2.levels import audio_levels, is_distilled, sampling_levels
from avdiff.families.ltx2.lora import parse_lora, read_lora
from avdiff.families.ltx2.names import version_of
from avdiff.families.ltx2.texts import MAX_LENGTH, LTX2Text, LTX2Texts
from avdiff.guidance import Guidance
from avdiff.latents import Joint, JointLatents
from avdiff.pipelines.conditioning import Conditioning, Retake
from avdiff.pipelines.ltx2_conditioning import (
    Given,
    keep_given_frames,
    keep_given_samples,
    known_parts,
)
from avdiff.pipelines.output import AVPipelineOutput
from avdiff.pipelines.validation import picture_tensor
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler

TINY = 1e-6  # noise levels of this family are never smaller where they divide


@dataclass(frozen=True)
class Recommended:
    """Sampling as Lightricks recommends it for a folder.

    Args:
        steps: None takes the folder's own list (distilled). guidance: of all terms. blocks: whose
            self-attention the perturbed pass cuts.
    """

    steps: int | None
    guidance: Guidance
    blocks: tuple[int, ...]
    height: int = 512
    width: int = 768
    num_frames: int = 121
    fps: int = 24


def recommended(pipe: LTX2Pipeline) -> Recommended:
    """Steps, guidance and blocks by the generation of the transformer."""
    config = pipe.transformer.config
    version = version_of(config)
    block = min(29 if version == "2.0" else 28, config.num_layers - 1)
    if is_distilled(pipe.scheduler):
        return Recommended(None, Guidance(), (block,))
    guidance = Guidance(
        text=Joint(3.0, 7.0), cross=Joint(3.0, 3.0), rescale=0.7, perturbed=Joint(1.0, 1.0)
    )
    return Recommended(40 if version == "2.0" else 30, guidance, (block,))


@dataclass(frozen=True)
class _Run:
    """What stays the same over the steps of a call.

    Args:
        text: rows [negative, positive] or [positive] only, B each. guided: whether negative rows
            are there. known: masks (B,) or (B, N) of given tokens.
    """

    layout: LTX2Layout
    text: LTX2Text
    guided: bool
    known: Joint[Tensor]
    guidance: Guidance
    blocks: tuple[int, ...]

    def positive(self) -> LTX2Text:
        """The prompt's rows alone."""
        rows = self.text.video.shape[0] // (2 if self.guided else 1)
        return self.text.rows(slice(-rows, None))


class LTX2JointPipeline(LTX2Pipeline):
    """`LTX2Pipeline` with every task of a joint model: text, image, last image, sound to picture,
    picture to sound, one modality alone, extension, retake, in-painting.
    """

    behavior = LTX2Behavior()

    @property
    def codec(self) -> LTX2Codec:
        """Codecs of this folder as the family's `Codec`."""
        return LTX2Codec(self.vae, self.audio_vae, self.vocoder)

    @property
    def texts(self) -> LTX2Texts:
        """Text encoder and connectors as the family's `Texts`."""
        return LTX2Texts(self.tokenizer, self.text_encoder, self.connectors)

    @property
    def denoiser(self) -> LTX2Denoiser:
        """The transformer as the family's `Denoiser`."""
        return LTX2Denoiser(self.transformer, self.behavior)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write an LTX2Pipeline folder."""
        LTX2Pipeline(**self.components).save_pretrained(save_directory, **kwargs)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a LoRA on the transformer: what diffusers reads, and kohya's and bare files as well.

        Raises:
            ValueError: the file is no LoRA of an LTX-2.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict) and Path(source).exists():
            name = kwargs.pop("weight_name", None)
            source = read_lora(Path(source) / name if name else source).state_dict()
        elif isinstance(source, dict):
            source = parse_lora(source).state_dict()
        super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        negative_prompt: str | list[str] = "",
        *,
        image: Any = None,
        last_image: Any = None,
        audio: Tensor | None = None,
        video: Tensor | None = None,
        retake: Retake | None = None,
        mask: Tensor | None = None,
        audio_sampling_rate: int = 16000,
        generate_video: bool = True,
        generate_audio: bool = True,
        seconds: float | Fraction | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        frame_rate: float | Fraction | str | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        audio_shift: float | None = None,
        guidance: Guidance | None = None,
        guidance_blocks: Sequence[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        audio_latents: Tensor | None = None,
        text: LTX2Text | None = None,
        max_sequence_length: int = MAX_LENGTH,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
    ) -> AVPipelineOutput:
        """Make clips with sound.

        Args:
            prompt: one text or B of them. negative_prompt: what to lead away from.
            image, last_image: PIL, or (3, H, W), (B, 3, H, W) in [-1, 1]. video: (B, 3, F, H, W) in
                [-1, 1]. audio: (B, channels, S) in [-1, 1] at `audio_sampling_rate` Hz. retake: a
                span of what is given that is made anew. mask: (H, W) or (F, H, W), above 0.5 is
                made anew.
            generate_video, generate_audio: False leaves out a modality that is not given.
            seconds, num_frames: length; that of what is given, else what 2.5's duration head says,
                else 121 frames.
            num_inference_steps: the folder's recommended number by default. sigmas: own base
                levels. audio_shift: a time shift of the sound's levels, below 1 is cleaner than
                the picture.
            guidance: all scales; the folder's recommended ones by default. guidance_blocks: whose
                self-attention the perturbed pass cuts.
            latents, audio_latents: packed noise (B, N, C) to start from. text: from `texts`, in
                place of `prompt`.
            output_type: pil, np, pt, or latent: packed normalized tokens.
            callback_on_step_end: (pipe, index, timestep, {"latents", "audio_latents"}) -> changes.

        Raises:
            ValueError: names the argument, its value and what fits.
        """
        advised = recommended(self)
        given = Given(
            _picture(image), _picture(last_image), video, audio, retake, mask, audio_sampling_rate
        )
        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        batch = len(prompts) if text is None else text.video.shape[0]
        scales = guidance or advised.guidance
        guided = "no_text" in scales.passes()
        told = self._read(prompts, negative_prompt, guided, text, max_sequence_length)
        clip = self._clip(
            given, advised, told, batch, seconds, num_frames, height, width, frame_rate
        )
        layout = self.codec.layout(clip)
        parts = known_parts(given, self.codec, layout, batch, device)
        start = Joint(latents, audio_latents)
        state, known = self._start(
            layout, batch, generator, Joint(generate_video, generate_audio), parts, start
        )
        scheduler = self._schedule(clip, num_inference_steps or advised.steps, sigmas, audio_shift)
        blocks = tuple(advised.blocks if guidance_blocks is None else guidance_blocks)
        _check_blocks(blocks, self.transformer.config.num_layers)
        generated = [m for m, mask in known.items() if not bool(mask.all())]
        both = state.video is not None and state.audio is not None
        scales = scales.only(generated, heard=both)
        run = _Run(layout, told, guided, known, scales, blocks)
        state = self._denoise(run, scheduler, state, callback_on_step_end)
        frames, waveform = self._finish(state, layout, parts, output_type)
        self.maybe_free_model_hooks()
        return AVPipelineOutput(frames, waveform, self.codec.out_rate, clip.fps)

    # ---------------------------------------------------------------------------------- what is
    # asked
    def _read(
        self,
        prompts: list[str],
        negative: str | list[str],
        guided: bool,
        text: LTX2Text | None,
        length: int,
    ) -> LTX2Text:
        """Rows [negative, positive] if guided; each half is encoded by itself and both are
        connected as one batch, as in diffusers.
        """
        device = self._execution_device
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise ValueError(
                f"negative_prompt: {len(negatives)} texts for {len(prompts)} prompts; needs one "
                "for all or one for each"
            )
        texts = self.texts
        if text is not None:
            text = text.to(device)
            if not guided:
                return text
            if isinstance(negative, str):
                negatives = [negative] * text.video.shape[0]
            return LTX2Text.cat([texts(negatives, text.video.shape[1], device), text])
        states, mask = texts.encode(prompts, length, device)
        if guided:
            no_states, no_mask = texts.encode(negatives, length, device)
            states, mask = torch.cat([no_states, states]), torch.cat([no_mask, mask])
        return texts.connect(states, mask)

    def _clip(
        self,
        given: Given,
        advised: Recommended,
        told: LTX2Text,
        batch: int,
        seconds: float | Fraction | None,
        num_frames: int | None,
        height: int | None,
        width: int | None,
        frame_rate: float | Fraction | str | None,
    ) -> ClipSpec:
        """Size and length, from what is given where they are not asked for."""
        fps = as_fps(advised.fps if frame_rate is None else frame_rate)
        codec = self.codec
        source = given.video if given.video is not None else given.image
        if source is None:
            source = given.last_image
        if source is not None:
            height = source.shape[-2] if height is None else height
            width = source.shape[-1] if width is None else width
            if source.shape[-2:] != (height, width):
                raise ValueError(
                    f"given picture of {tuple(source.shape[-2:])}: needs the clip's size "
                    f"{(height, width)}"
                )
        height = height or advised.height
        width = width or advised.width
        if seconds is not None and num_frames is not None:
            raise ValueError("seconds and num_frames are both given: needs one of them")
        stride = codec.clock.video_stride
        if seconds is not None:
            sizes = {"height": height, "width": width, "sample_rate": codec.sample_rate}
            return ClipSpec.from_seconds(seconds, fps, clock=codec.clock, **sizes)
        if num_frames is None and given.video is not None:
            num_frames = (given.video.shape[2] - 1) // stride * stride + 1
        elif num_frames is None and given.audio is not None:
            heard = Fraction(given.audio.shape[-1], given.sampling_rate)
            num_frames = max(0, int((heard * fps - 1) // stride)) * stride + 1
        elif num_frames is None and self.duration_head is not None:
            row = told.rows(slice(-batch, None)).rows(slice(0, 1))
            num_frames = self.duration_head.predict_num_frames(
                row.video, row.audio, frame_rate=float(fps), temporal_compression_ratio=stride
            )
        frames = advised.num_frames if num_frames is None else num_frames
        return codec.clip(frames, fps, height, width)

    def _start(
        self,
        layout: LTX2Layout,
        batch: int,
        generator: Generators,
        wanted: Joint[bool],
        parts: Joint[Conditioning],
        own: Joint[Tensor],
    ) -> tuple[JointLatents, Joint[Tensor]]:
        """Noise with the given tokens in their places, and the masks of what is known."""
        device = self._execution_device
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"generator is a list of {len(generator)}: needs one for each of the {batch} clips"
            )
        drawn = layout.noise(batch, generator, device)
        tokens: dict[str, Tensor | None] = {}
        known: dict[str, Tensor | None] = {}
        for modality, noise in drawn.items():
            part = getattr(parts, modality)
            tokens[modality] = known[modality] = None
            if part is None and not getattr(wanted, modality):
                continue
            start = getattr(own, modality)
            if start is not None and start.shape != noise.shape:
                raise ValueError(
                    f"latents of {modality} of shape {tuple(start.shape)}: this call needs "
                    f"{tuple(noise.shape)}"
                )
            tokens[modality] = noise if start is None else start.to(noise)
            known[modality] = torch.zeros(batch, dtype=torch.bool, device=device)
            if part is not None:
                mask = part.mask.to(device)
                tokens[modality] = torch.where(mask[None, :, None], part.tokens, tokens[modality])
                # One level for a whole clip is the common case, and cheaper than one a token.
                whole = bool((mask == mask[0]).all())
                known[modality] = mask[0].expand(batch) if whole else mask.expand(batch, -1)
        masks = Joint(**known)
        if not any(True for _ in masks.items()):
            raise ValueError(
                "generate_video=False and generate_audio=False: nothing is left to make"
            )
        if all(bool(mask.all()) for _, mask in masks.items()):
            raise ValueError("all of the clip is given: nothing is left to generate")
        seconds = layout.edges().map(lambda edges: edges.mean(1))
        levels = masks.map(lambda mask: (~mask).float())
        return JointLatents(tokens["video"], tokens["audio"], levels, seconds), masks

    def _schedule(
        self,
        clip: ClipSpec,
        steps: int | None,
        sigmas: Sequence[float] | None,
        audio_shift: float | None,
    ) -> JointFlowMatchScheduler:
        """avdiff's scheduler on the folder's own noise levels."""
        if audio_shift is not None and not audio_shift > 0:
            raise ValueError(f"audio_shift={audio_shift}: must be above 0")
        shift = self.behavior.shift_tokens
        count = clip.video_tokens if shift == "clip" else int(shift)
        if sigmas is not None:
            steps = None
        video = sampling_levels(self.scheduler, count, steps, sigmas)
        scheduler = JointFlowMatchScheduler(prediction_type="x0", sigma_min=TINY)
        levels = Joint(video, audio_levels(video, audio_shift))
        scheduler.set_timesteps(sigmas=levels, device=self._execution_device)
        return scheduler

    # -------------------------------------------------------------------------------------
    # denoising
    def _denoise(
        self,
        run: _Run,
        scheduler: JointFlowMatchScheduler,
        state: JointLatents,
        callback: Callable[..., dict[str, Tensor] | None] | None,
    ) -> JointLatents:
        steps = scheduler.num_inference_steps or 0
        for index in self.progress_bar(range(steps)):
            sigmas = scheduler.sigmas.map(lambda levels, i=index: levels[i])
            estimate = self._estimate(run, scheduler, state, sigmas, index / steps)
            state = scheduler.step(estimate, index, state, run.known)
            if callback is None:
                continue
            tensors = {"latents": state.video, "audio_latents": state.audio}
            changed = callback(self, index, 1000 * sigmas.video, tensors) or {}
            state = replace(
                state,
                video=changed.get("latents", state.video),
                audio=changed.get("audio_latents", state.audio),
            )
        return state

    def _estimate(
        self,
        run: _Run,
        scheduler: JointFlowMatchScheduler,
        state: JointLatents,
        sigmas: Joint[Tensor],
        progress: float,
    ) -> Joint[Tensor]:
        """Guided x0 estimate; the passes with and without text run as one batch."""
        levels = run.known.map(lambda mask, sigma: sigma * (~mask).to(sigma.dtype), sigmas)
        names = run.guidance.passes(progress)

        def estimate(text: LTX2Text, copies: int, **cuts: Any) -> list[Joint[Tensor]]:
            tokens = state.latents.map(lambda x: torch.cat([x] * copies))
            told = levels.map(lambda s: torch.cat([s] * copies))
            velocity = self.denoiser(tokens, told, text, run.layout, **cuts)
            chunks = scheduler.x0_from_velocity(velocity, tokens, told).map(
                lambda x: x.chunk(copies)
            )
            return [chunks.map(lambda c, i=i: c[i]) for i in range(copies)]

        estimates: dict[str, Joint[Tensor]] = {}
        if "no_text" in names:
            estimates["no_text"], estimates["cond"] = estimate(run.text, 2)
        else:
            estimates["cond"] = estimate(run.positive(), 1)[0]
        if "perturbed" in names:
            estimates["perturbed"] = estimate(run.positive(), 1, perturbed=run.blocks)[0]
        if "isolated" in names:
            estimates["isolated"] = estimate(run.positive(), 1, isolated=True)[0]
        return run.guidance.combine(estimates)

    def _finish(
        self, state: JointLatents, layout: LTX2Layout, parts: Joint[Conditioning], output_type: str
    ) -> tuple[Any, Tensor | None]:
        """Tokens to frames and samples, with what was given put back as it was."""
        if output_type == "latent":
            return state.video, state.audio
        frames = waveform = None
        if state.video is not None:
            frames = self.codec.decode_video(state.video.to(self.connectors.dtype), layout)
            frames = keep_given_frames(frames, parts.video, layout)
            frames = self.video_processor.postprocess_video(frames, output_type=output_type)
        if state.audio is not None:
            sound = self.codec.decode_audio(state.audio, layout)
            waveform = keep_given_samples(sound, parts.audio, layout, self.codec.out_rate)
        return frames, waveform


def _picture(image: Any) -> Tensor | None:
    """(B, 3, H, W) in [-1, 1] of a PIL image or a tensor."""
    if image is None:
        return None
    tensor = image if isinstance(image, Tensor) else picture_tensor(image)
    return tensor[None] if tensor.ndim == 3 else tensor


def _check_blocks(blocks: tuple[int, ...], count: int) -> None:
    wrong = [b for b in blocks if not 0 <= b < count]
    if wrong:
        raise ValueError(f"guidance_blocks={list(blocks)}: this model has blocks 0 to {count - 1}")
