"""Every task of a joint model on LTX-2: what is given comes back bit for bit, counts and edges are
the family's, noise levels those of the folder.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torchaudio
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift

from avdiff.families.ltx2.levels import (
    DISTILLED,
    audio_levels,
    sampling_levels,
    training_levels,
    training_shift,
)
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.pipelines.conditioning import Retake
from tests import tiny_ltx2

ALL = Guidance(Joint(3.0, 7.0), Joint(3.0, 3.0), 0.7, perturbed=Joint(1.0, 1.0))


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def film() -> torch.Tensor:
    return torch.rand(1, 3, 17, 64, 96, generator=noise()) * 2 - 1


@pytest.fixture(scope="module")
def sound() -> torch.Tensor:
    return 0.1 * torch.randn(1, 2, 11334, generator=noise())


def run(version: str = "2.3", guidance: Guidance = ALL, **given):
    size = dict(height=64, width=96, num_frames=17, max_sequence_length=32)
    return tiny_ltx2.loaded(version)(
        "A woman says hello",
        "bad",
        **size | dict(num_inference_steps=2, output_type="latent", guidance_blocks=[1]) | given,
        guidance=guidance,
        generator=noise(),
    )


def layout_of(version: str = "2.3", frames: int = 17):
    codec = tiny_ltx2.loaded(version).codec
    return codec.layout(codec.clip(frames, Fraction(24), 64, 96))


@pytest.mark.parametrize("version", tiny_ltx2.VERSIONS)
def test_given_modalities_come_back_bit_for_bit(version, film, sound) -> None:
    codec = tiny_ltx2.loaded(version).codec
    driven = run(version, audio=sound)
    assert torch.equal(driven.audio, codec.encode_audio(sound[..., :11333], 18))
    dubbed = run(version, video=film)
    assert torch.equal(dubbed.frames, codec.encode_video(film))
    for out in (driven, dubbed):
        assert bool(out.frames.isfinite().all() and out.audio.isfinite().all())


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_retake_redoes_only_the_tokens_that_touch_its_span(film, sound, which) -> None:
    codec = tiny_ltx2.loaded().codec
    picture, heard = codec.encode_video(film), codec.encode_audio(sound[..., :11333], 18)
    out = run(video=film, audio=sound, retake=Retake(0.2, 0.4, *which))
    for modality, tokens, made in (("video", picture, out.frames), ("audio", heard, out.audio)):
        edges = getattr(layout_of().edges(), modality)
        anew = (edges[:, 0] < 0.4) & (edges[:, 1] > 0.2)
        if not which[modality == "audio"]:
            anew = torch.zeros_like(anew)
        same = (made == tokens).all(-1)[0]
        assert torch.equal(same, ~anew), modality


def test_images_extension_and_inpainting_keep_what_is_given(film, sound) -> None:
    codec = tiny_ltx2.loaded().codec
    still, last = film[:, :, 0], film[:, :, -1]
    out = run(image=still, last_image=last)
    assert torch.equal(out.frames[:, :6], codec.encode_video(still[:, :, None]))
    repeated = last[:, :, None].expand(-1, -1, 9, -1, -1)
    assert torch.equal(out.frames[:, -6:], codec.encode_video(repeated)[:, -6:])
    longer = run(video=film[:, :, :9], audio=sound[..., :4000])
    assert torch.equal(longer.frames[:, :12], codec.encode_video(film[:, :, :9]))
    ends = layout_of().edges().audio[:, 1]
    count = int((ends <= 4000 / 16000).sum())
    assert torch.equal(longer.audio[:, :count], codec.encode_audio(sound[..., :4000], count))
    assert longer.frames.shape[1] == 18
    mask = torch.zeros(64, 96)
    mask[:20, 70:] = 1
    masked = run(video=film, mask=mask)
    changed = (masked.frames != codec.encode_video(film)).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [2, 8, 14]  # one cell of 6 in each latent frame


def test_one_modality_alone_and_a_schedule_of_its_own() -> None:
    alone = run(generate_audio=False)
    assert alone.audio is None
    assert alone.frames.shape == (1, 18, 16)
    heard = run(generate_video=False)
    assert heard.frames is None
    assert heard.audio.shape == (1, 18, 32)
    shared, own = run(audio_shift=1.0), run(audio_shift=0.5)
    assert torch.equal(shared.audio, run().audio)
    assert not torch.equal(own.audio, shared.audio)
    levels = torch.tensor([1.0, 0.5])
    assert torch.allclose(audio_levels(levels, 0.5), torch.tensor([1.0, 1 / 3]))


def test_finished_clip_holds_the_given_frames_and_samples(film, sound) -> None:
    out = run(guidance=Guidance(), video=film, output_type="pt")
    assert torch.equal(out.frames[0], (film[0] / 2 + 0.5).clamp(0, 1).transpose(0, 1))
    heard = run(guidance=Guidance(), audio=sound, output_type="pt").audio
    resampled = torchaudio.functional.resample(sound, 16000, 48000)
    assert heard.shape == (1, 2, 34000)
    assert torch.equal(heard, resampled[..., :34000])


def test_counts_edges_and_mel_of_the_reference() -> None:
    codec = tiny_ltx2.loaded().codec
    layout = layout_of(frames=121)
    assert layout.tokens().audio == 126  # 5.04 s at 25 a second, to the nearest
    assert layout.clip.audio_tokens == 127
    edges = layout.edges()
    assert torch.allclose(edges.audio[:2], torch.tensor([[0.0, 0.01], [0.01, 0.05]]))
    assert torch.allclose(edges.video[0], torch.tensor([0.0, 1 / 24]))
    model = tiny_ltx2.loaded().transformer
    theirs = model.rope.prepare_video_coords(1, *layout.grid, torch.device("cpu"), fps=24.0)
    assert torch.allclose(edges.video, theirs[0, 0])
    sounds = model.audio_rope.prepare_audio_coords(1, 126, torch.device("cpu"))
    assert torch.equal(edges.audio, sounds[0, 0])
    waveform = 0.3 * torch.randn(1, 2, 8000, generator=noise())
    window = torch.hann_window(1024)
    spectrum = torch.stft(waveform[0], 1024, 160, window=window, return_complex=True).abs()
    bank = torchaudio.functional.melscale_fbanks(513, 0.0, 8000.0, 64, 16000, "slaney", "slaney")
    expected = (spectrum.transpose(1, 2) @ bank).clamp(min=1e-5).log()
    assert float((codec.mel(waveform)[0] - expected).abs().max()) <= 1e-5


@torch.no_grad()
def test_normalization_is_undone_exactly(film, sound) -> None:
    codec = tiny_ltx2.loaded().codec
    layout = layout_of()
    raw = codec.vae.encode(film).latent_dist.mode()
    assert torch.allclose(codec.video_latents(codec.encode_video(film), layout), raw, atol=1e-6)
    heard = codec.audio_vae.encode(codec.mel(sound)).latent_dist.mode()[:, :, :18]
    tokens = codec.encode_audio(sound, 18)
    assert torch.allclose(codec.audio_latents(tokens, layout), heard, atol=1e-6)


# ----------------------------------------------------------------------------------- noise levels
@pytest.mark.parametrize("tokens", [126, 1024, 4096, 6144])
def test_training_levels_are_the_trainers_bit_for_bit(tokens: int) -> None:
    """The formula of ltx-trainer's ShiftedLogitNormalTimestepSampler, written out."""
    made = training_levels(64, tokens, noise())
    generator = noise()
    mean = (2.05 - 0.95) / (4096 - 1024) * tokens + (0.95 - (2.05 - 0.95) / (4096 - 1024) * 1024)
    drawn = torch.sigmoid(torch.randn((64,), generator=generator) * 1.0 + mean)
    high = torch.sigmoid(torch.tensor(mean + 3.0902))
    low = torch.sigmoid(torch.tensor(mean - 2.5758))
    level = (drawn - low) / (high - low)
    level = torch.where(level >= 1e-3, level, 2 * 1e-3 - level).clamp(0, 1)
    uniform = (1 - 1e-3) * torch.rand((64,), generator=generator) + 1e-3
    chosen = torch.rand((64,), generator=generator) > 0.1
    assert torch.equal(made, torch.where(chosen, level, uniform))
    assert training_shift(tokens) == mean
    assert bool(training_levels(8, 10**6, noise()).isfinite().all())


def test_sampling_levels_are_the_folders_own() -> None:
    scheduler = tiny_ltx2.loaded().scheduler
    import numpy as np

    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / 7, 7), mu=calculate_shift(18, 1024, 4096, 0.95, 2.05)
    )
    assert torch.equal(sampling_levels(scheduler, 18, 7), scheduler.sigmas[:-1])
    distilled = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
    assert torch.equal(sampling_levels(distilled, 18), torch.tensor(DISTILLED))
    with pytest.raises(ValueError, match="num_inference_steps=1: this folder's scheduler"):
        sampling_levels(scheduler, 18, 1)
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        sampling_levels(scheduler, 18, 0)


BAD = {
    "num_frames=50: needs": dict(num_frames=50),
    "max_sequence_length=33: needs a multiple of the connectors' 8": dict(max_sequence_length=33),
    "guidance_blocks=": dict(guidance_blocks=[2]),
    "nothing is left to make": dict(generate_audio=False, generate_video=False),
    "audio_shift=0": dict(audio_shift=0),
    "audio of 3 channels: needs 1 or 2": dict(audio=torch.zeros(1, 3, 16000)),
    "needs the clip's size": dict(image=torch.zeros(3, 32, 32)),
    "mask without video": dict(mask=torch.zeros(64, 96)),
}


@pytest.mark.parametrize("message", BAD)
def test_wishes_that_cannot_be_followed_are_one_sentence(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(guidance=Guidance(), **BAD[message])


def test_all_given_is_refused(film, sound) -> None:
    with pytest.raises(ValueError, match="all of the clip is given"):
        run(guidance=Guidance(), video=film, audio=sound)
