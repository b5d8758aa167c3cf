"""AVDiffPipeline: its life cycle, its tasks, what it refuses. Real components at tiny size."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import tiny_components, tiny_pipeline

from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.pipelines.pipeline_av import AVDiffPipeline

PROMPT = 'A woman with red hair says "good morning"'


@pytest.fixture(scope="module")
def pipe() -> AVDiffPipeline:
    return tiny_pipeline()


def call(pipe: AVDiffPipeline, prompt=PROMPT, seed: int = 0, **changes):
    options = dict(
        num_inference_steps=2,
        seconds=1.2,
        output_type="np",
        generator=torch.Generator().manual_seed(seed),
    )
    return pipe(prompt, **{**options, **changes})


def same(a, b, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(a.frames), np.asarray(b.frames), atol=atol)
    np.testing.assert_allclose(a.audio, b.audio, atol=atol)


def test_streams_have_equal_length(pipe) -> None:
    for fps in (25, 24, Fraction(30000, 1001)):
        out = call(pipe, frame_rate=fps)
        frames, samples = out.frames.shape[1], out.audio.shape[-1]
        assert out.frames.shape == (1, frames, 128, 128, 3) and out.audio.shape[:2] == (1, 1)
        assert abs(frames / out.frame_rate - Fraction(samples, out.sampling_rate)) <= Fraction(
            1, out.sampling_rate
        )


def test_length_follows_the_words(pipe) -> None:
    short, long = (
        call(pipe, f'A man says "{words}"', seconds=None, output_type="tokens")
        for words in ("yes", "one two three four five six seven")
    )
    assert long.audio.shape[1] > short.audio.shape[1] + 20
    with pytest.raises(ValueError, match="ask for a longer clip"):
        call(pipe, 'A man says "one two three four five six seven"', seconds=0.5)


def test_seed_decides_and_batch_equals_singles(pipe) -> None:
    same(call(pipe), call(pipe))
    assert np.abs(call(pipe, seed=1).frames - call(pipe).frames).max() > 1e-3
    prompts = [PROMPT, "a ball bounces three times"]
    both = call(pipe, prompts, generator=[torch.Generator().manual_seed(s) for s in (3, 4)])
    for i, seed in enumerate((3, 4)):
        one = call(pipe, prompts[i], seed=seed)
        np.testing.assert_allclose(both.frames[i : i + 1], one.frames, atol=1e-4)
        np.testing.assert_allclose(
            both.audio[i : i + 1], one.audio, atol=2e-3
        )  # phases of an untrained vocoder amplify


def test_save_and_load_is_bit_equal(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name in ("transformer", "scheduler", "vae", "audio_vae", "vocoder", "text_encoder"):
        assert index[name][0] == "avdiff", index[name]
    again = AVDiffPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for key, value in component.state_dict().items():
                assert torch.equal(again.components[name].state_dict()[key], value), f"{name}.{key}"
    same(
        call(again), call(pipe), atol=1e-4
    )  # memory-mapped weights are aligned otherwise, so sums round otherwise


def test_missing_modality_costs_nothing_and_is_none(pipe) -> None:
    video_only, audio_only = call(pipe, generate_audio=False), call(pipe, generate_video=False)
    assert video_only.audio is None and video_only.frames is not None
    assert audio_only.frames is None and audio_only.audio is not None
    with pytest.raises(ValueError, match="nothing is left"):
        call(pipe, generate_audio=False, generate_video=False)


def test_given_modality_is_kept(pipe) -> None:
    audio = (
        torch.randn(1, 1, 31 * 960, generator=torch.Generator().manual_seed(2)) * 0.1
    )  # as long as the clip
    tokens = pipe.encode_audio(audio)
    out = call(pipe, audio=audio, output_type="tokens")
    torch.testing.assert_close(out.audio[:, : tokens.shape[1]], tokens[:, : out.audio.shape[1]])
    assert (
        out.frames - call(pipe, output_type="tokens").frames
    ).abs().max() > 1e-4  # it drives the picture
    image = torch.rand(3, 128, 128) * 2 - 1
    first = pipe.encode_video(image[None, :, None])
    torch.testing.assert_close(
        call(pipe, image=image, output_type="tokens").frames[:, : first.shape[1]], first
    )


def test_guidance_passes_and_zero_is_off(pipe) -> None:
    plain, guided = call(pipe, guidance_scale=1.0, audio_guidance_scale=1.0), call(pipe)
    assert np.abs(plain.frames - guided.frames).max() > 1e-4
    same(call(pipe, guidance_scale=0, audio_guidance_scale=0.0), plain)  # off, as in diffusers
    textless = call(pipe, guidance=Guidance.without_text())
    assert np.abs(textless.frames - plain.frames).max() > 1e-4
    cross = call(pipe, guidance=Guidance(cross=Joint(3.0, 1.0)))
    assert np.abs(cross.frames - plain.frames).max() > 1e-4


def test_callback_sees_both_latents_and_may_change_them(pipe) -> None:
    seen = []

    def zero_at_end(pipeline, index, timestep, tensors):
        seen.append(sorted(tensors))
        if index == pipeline.num_timesteps - 1:
            return {name: torch.zeros_like(value) for name, value in tensors.items()}
        return tensors

    out = call(pipe, output_type="tokens", callback_on_step_end=zero_at_end)
    assert (
        seen == [["audio_latents", "latents"]] * 2 and not out.frames.any() and not out.audio.any()
    )

    def stop(pipeline, index, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    half = call(pipe, output_type="tokens", callback_on_step_end=stop)
    assert (half.frames - call(pipe, output_type="tokens").frames).abs().max() > 1e-3


def test_output_types_agree(pipe) -> None:
    arrays, tensors, pictures = (call(pipe, output_type=t) for t in ("np", "pt", "pil"))
    np.testing.assert_allclose(
        arrays.frames, tensors.frames.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6
    )
    np.testing.assert_allclose(
        np.asarray(pictures.frames[0][0]) / 255, arrays.frames[0, 0], atol=1 / 255
    )
    frames, audio = call(pipe, return_dict=False)
    np.testing.assert_array_equal(frames, arrays.frames)
    np.testing.assert_array_equal(audio, arrays.audio)


def test_several_clips_for_a_prompt(pipe) -> None:
    out = call(pipe, num_videos_per_prompt=2)
    assert (
        out.frames.shape[0] == out.audio.shape[0] == 2
        and np.abs(out.frames[0] - out.frames[1]).max() > 1e-3
    )


def test_embeddings_in_place_of_a_prompt(pipe) -> None:
    prompt = "A man speaks Spanish"
    embeds, mask, _, _ = pipe.encode_prompt([prompt])
    twice = call(
        pipe,
        None,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        num_videos_per_prompt=2,
        negative_prompt_embeds=embeds,
        negative_prompt_attention_mask=mask,
    )
    assert len(twice.frames) == 2
    same(
        call(pipe, prompt),
        call(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask),
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "exactly one of prompt"),
        ({"prompt": []}, "non-empty list"),
        ({"num_frames": 8, "seconds": None}, r"num_frames=8: needs 2\*k\+1; nearest are 7 and 9"),
        ({"seconds": 0}, "seconds=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"height": 100}, "height=100: needs a multiple of 64"),
        ({"frame_rate": 0}, "fps=0"),
        ({"output_type": "gif"}, "output_type='gif'"),
        ({"callback_on_step_end_tensor_inputs": ["loss"]}, "callback_on_step_end_tensor_inputs"),
        ({"latents": torch.zeros(1, 3, 64)}, r"latents of shape \(1, 3, 64\)"),
        ({"generator": [torch.Generator()] * 3}, "one generator for each"),
        ({"seconds": 1.0, "num_frames": 25}, "give one of them"),
        ({"language": "xx"}, "xx"),
    ],
)
def test_refusals_name_argument_and_value(pipe, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipe, **changes)


def test_components_are_real_and_seeded() -> None:
    a, b = tiny_components(), tiny_components()
    for name in ("transformer", "vae", "audio_vae", "vocoder", "text_encoder"):
        for p, q in zip(a[name].parameters(), b[name].parameters(), strict=True):
            assert torch.equal(p, q)
