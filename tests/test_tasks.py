"""Every task of the pipeline: what is given stays, what is asked for is new, and no pass runs that
is not needed.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from avdiff.clip import ClipSpec
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.models.conditions import Conditions, Positions
from avdiff.pipelines.conditioning import Retake, masked_tokens
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.pipelines.prompt import ClipLength, clip_length

PROMPT = "A man with a beard looks up"
FRAMES = 15  # 8 latent frames of 4 tokens; 0.6 s are 15 audio tokens
CLIP = ClipSpec(FRAMES)


@pytest.fixture(scope="module")
def pipe() -> AVDiffPipeline:
    return tiny_pipeline()


def noise(*shape: int, seed: int = 7) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3).clamp(-1, 1)


VIDEO, AUDIO, PICTURE = (
    noise(1, 3, FRAMES, 128, 128),
    noise(1, 1, CLIP.num_samples),
    noise(3, 128, 128, seed=8),
)


def call(pipe: AVDiffPipeline, seed: int = 0, **changes):
    options = dict(
        num_inference_steps=2,
        num_frames=FRAMES,
        output_type="tokens",
        prompt=PROMPT,
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
    )
    return pipe(**{**options, **changes})


def cells(*latent_frames: int) -> torch.Tensor:
    """Bool (N_v,): the tokens of some latent frames."""
    known = torch.zeros(CLIP.latent_frames, dtype=torch.bool)
    known[list(latent_frames)] = True
    return known.repeat_interleave(4)


def sounds(first: int, stop: int) -> torch.Tensor:
    """Bool (N_a,): a run of audio tokens."""
    return (torch.arange(CLIP.audio_tokens) >= first) & (torch.arange(CLIP.audio_tokens) < stop)


LEFT = torch.zeros(128, 128)
LEFT[:, :60] = 1.0  # the tokens of the left half are made anew
RIGHT_KEPT = torch.tensor([False, True]).repeat(2 * CLIP.latent_frames)
SPAN = Retake(
    0.2, 0.4
)  # frames 5 to 9: latent frames 3, 4 and 5 (frames 5 to 10); audio tokens 5 to 9
NONE_V, NONE_A = cells(), sounds(0, 0)
TASKS = {
    "t2av": ({}, NONE_V, NONE_A),
    "image": ({"image": PICTURE}, cells(0), NONE_A),
    "first and last": ({"image": PICTURE, "last_image": PICTURE}, cells(0, 7), NONE_A),
    "last alone": ({"last_image": PICTURE}, cells(7), NONE_A),
    "a2v": ({"audio": AUDIO}, NONE_V, ~NONE_A),
    "v2a": ({"video": VIDEO}, ~NONE_V, NONE_A),
    "extend": (
        {"video": VIDEO[:, :, :5], "audio": AUDIO[..., :4800]},
        cells(0, 1, 2),
        sounds(0, 5),
    ),
    "extend sound": ({"audio": AUDIO[..., :4800]}, NONE_V, sounds(0, 5)),
    "bridge": ({"video": VIDEO[:, :, :5], "last_image": PICTURE}, cells(0, 1, 2, 7), NONE_A),
    "retake": ({"video": VIDEO, "audio": AUDIO, "retake": SPAN}, ~cells(3, 4, 5), ~sounds(5, 10)),
    "retake picture": (
        {"video": VIDEO, "audio": AUDIO, "retake": Retake(0.2, 0.4, audio=False)},
        ~cells(3, 4, 5),
        ~NONE_A,
    ),
    "retake sound": (
        {"video": VIDEO, "audio": AUDIO, "retake": Retake(0.2, 0.4, video=False)},
        ~NONE_V,
        ~sounds(5, 10),
    ),
    "in-paint": ({"video": VIDEO, "audio": AUDIO, "mask": LEFT}, RIGHT_KEPT, ~NONE_A),
    "in-paint a span": (
        {"video": VIDEO, "mask": LEFT, "retake": SPAN},
        RIGHT_KEPT & ~cells(3, 4, 5),
        NONE_A,
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_given_tokens_are_bit_equal_and_the_others_are_new(pipe, task: str) -> None:
    given, *known = TASKS[task]
    one, two = call(pipe, 1, **given), call(pipe, 2, **given)
    for a, b, kept in zip((one.frames, one.audio), (two.frames, two.audio), known, strict=True):
        assert torch.equal(a[:, kept], b[:, kept])
        assert (a[:, ~kept] != b[:, ~kept]).any(-1).all()
    if "video" in given:
        whole = pipe.encode_video(given["video"])
        seen = known[0][: whole.shape[1]]
        assert torch.equal(one.frames[:, : whole.shape[1]][:, seen], whole[:, seen])
    if "image" in given:
        assert torch.equal(one.frames[:, :4], pipe.encode_video(PICTURE[None, :, None]))
    if "audio" in given:
        whole = pipe.encode_audio(given["audio"])
        heard = known[1][: whole.shape[1]]
        assert torch.equal(one.audio[:, : whole.shape[1]][:, heard], whole[:, heard])


@pytest.mark.parametrize("task", ["extend", "retake", "in-paint", "bridge"])
def test_what_is_given_matters_for_what_is_new(pipe, task: str) -> None:
    given, *known = TASKS[task]
    out, plain = call(pipe, 1, **given), call(pipe, 1)
    assert (out.frames - plain.frames)[:, ~known[0]].abs().max() > 1e-4


def test_one_modality_alone(pipe) -> None:
    silent, dark = call(pipe, generate_audio=False, image=PICTURE), call(pipe, generate_video=False)
    assert silent.audio is None and dark.frames is None
    assert torch.equal(silent.frames[:, :4], pipe.encode_video(PICTURE[None, :, None]))


def test_given_frames_and_samples_come_back_as_they_were(pipe) -> None:
    pixels = (VIDEO[0].permute(1, 0, 2, 3) / 2 + 0.5).clamp(0, 1)
    seam = 240  # 10 ms
    v2a, a2v = call(pipe, video=VIDEO, output_type="pt"), call(pipe, audio=AUDIO, output_type="pt")
    assert torch.equal(v2a.frames[0], pixels) and torch.equal(a2v.audio, AUDIO)
    longer = call(pipe, output_type="pt", **TASKS["extend"][0])
    assert torch.equal(longer.frames[0, :5], pixels[:5]) and not torch.equal(
        longer.frames[0, 5:], pixels[5:]
    )
    assert torch.equal(longer.audio[..., : 4800 - seam], AUDIO[..., : 4800 - seam])
    assert longer.audio.shape == AUDIO.shape and (longer.audio[..., 4800:] != 0).any()
    anew = call(pipe, output_type="pt", **TASKS["retake"][0])
    for first, stop in ((0, 5), (11, 15)):
        assert torch.equal(anew.frames[0, first:stop], pixels[first:stop])
    assert not torch.isclose(anew.frames[0, 5:11], pixels[5:11]).all((1, 2, 3)).any()
    for part in (slice(0, 4800 - seam), slice(9600 + seam, None)):
        assert torch.equal(anew.audio[..., part], AUDIO[..., part])
    assert not torch.equal(anew.audio[..., 4800:9600], AUDIO[..., 4800:9600])


def test_length_follows_what_is_given(pipe) -> None:
    assert call(pipe, num_frames=None, video=VIDEO).audio.shape[1] == CLIP.audio_tokens
    driven = call(
        pipe, num_frames=None, audio=AUDIO[..., :14000]
    )  # 0.583 s: 15 frames, and 400 samples of silence
    assert driven.frames.shape[1] == CLIP.video_tokens
    given = pipe.encode_audio(torch.nn.functional.pad(AUDIO[..., :14000], (0, 400)))
    assert torch.equal(driven.audio, given)


def test_words_begin_after_the_sound_that_is_continued(pipe) -> None:
    long, short = noise(1, 1, 24000), noise(1, 1, 12000)

    def length(**given) -> ClipLength:
        return clip_length(pipe.request(prompt=PROMPT, **given))

    assert length(seconds=2.0, audio=long) == ClipLength(2.0, None, 1.0)
    assert length(audio=short) == ClipLength(Fraction(1, 2), None, 0.0)
    assert length(num_frames=13, audio=short).speech_start == 0.0  # 20 ms are no continuation
    assert length(seconds=2.0, audio=long, speech_start=0.25).speech_start == 0.25


def test_each_prompt_may_have_its_own_picture(pipe) -> None:
    two = torch.stack([PICTURE, -PICTURE])
    out = call(pipe, prompt=[PROMPT, PROMPT], image=two, num_videos_per_prompt=2)
    first = pipe.encode_video(two[:, :, None])
    assert torch.equal(out.frames[:, :4], first.repeat_interleave(2, dim=0))
    with pytest.raises(ValueError, match="2 given for 3 clips"):
        call(pipe, prompt=[PROMPT] * 3, image=two)


# -- guidance: which passes run ---------------------------------------------------------------


@pytest.fixture
def passes(pipe):
    """(rows, modalities, isolated) of each forward."""
    seen: list[tuple[int, str, bool]] = []

    def note(module, args, kwargs, output) -> None:
        here = "".join(m for m, x in zip("va", args[:2], strict=True) if x is not None)
        seen.append((next(x for x in args[:2] if x is not None).shape[0], here, kwargs["isolated"]))

    handle = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1, "va", False)]),
        ({"guidance_scale": 3.0}, [(2, "va", False)]),  # both passes as one batch
        ({"audio_guidance_scale": 0.0}, [(1, "va", False)]),  # off, as 1 is
        ({"guidance": Guidance.without_text()}, [(2, "va", False)]),
        ({"guidance": Guidance(cross=Joint(2.0, 1.0))}, [(1, "va", False), (1, "v", True)]),
        ({"guidance": Guidance(cross=Joint(1.0, 2.0))}, [(1, "va", False), (1, "a", True)]),
        (
            {"guidance": Guidance(text=Joint(2.0, 2.0), cross=Joint(2.0, 0.0))},
            [(2, "va", False), (1, "va", True)],
        ),
        ({"guidance": Guidance(text=Joint(2.0, 2.0), interval=(0.0, 0.0))}, [(1, "va", False)]),
        (
            {"audio": AUDIO, "audio_guidance_scale": 5.0},
            [(1, "va", False)],
        ),  # given sound is not guided
        (
            {"generate_audio": False, "guidance": Guidance(cross=Joint(2.0, 2.0))},
            [(1, "v", False)],
        ),  # nobody to hear
        ({"generate_video": False, "guidance_scale": 5.0}, [(1, "a", False)]),
    ],
)
def test_only_needed_passes_run(pipe, passes, options, expected) -> None:
    call(pipe, num_inference_steps=1, **options)
    assert passes == expected


def test_interval_guides_its_steps_alone(pipe, passes) -> None:
    call(
        pipe, num_inference_steps=4, guidance=Guidance(text=Joint(2.0, 2.0), interval=(0.25, 0.75))
    )
    assert [rows for rows, _, _ in passes] == [1, 2, 2, 1]


def test_passes_as_one_batch_equal_passes_alone(pipe) -> None:
    transformer, positions = pipe.transformer, Positions.of(CLIP)
    embeds, mask, _, _ = pipe.encode_prompt(["a man", "a woman speaks"])
    told = (
        transformer.prepare(embeds, mask, positions),
        transformer.prepare(None, None, positions, batch_size=2),
    )
    x, s = torch.randn(2, CLIP.video_tokens, 64), torch.randn(2, CLIP.audio_tokens, 48)
    t = torch.tensor([0.9, 0.2])
    with torch.no_grad():
        alone = [transformer(x, s, t, t, conditions=c) for c in told]
        joint = transformer(
            x.repeat(2, 1, 1),
            s.repeat(2, 1, 1),
            t.repeat(2),
            t.repeat(2),
            conditions=Conditions.cat(told),
        )
    for name in ("video", "audio"):
        torch.testing.assert_close(
            getattr(joint, name), torch.cat([getattr(a, name) for a in alone]), atol=2e-5, rtol=1e-4
        )


def test_one_branch_of_the_isolated_pass_is_enough(pipe) -> None:
    both, one = (
        call(pipe, guidance=Guidance(cross=Joint(3.0, m)), num_inference_steps=1)
        for m in (1.0001, 1.0)
    )
    torch.testing.assert_close(both.frames, one.frames, atol=2e-4, rtol=1e-4)


def test_callback_may_change_scales_and_captions(pipe, passes) -> None:
    def stronger(pipeline, index, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    out = call(pipe, num_inference_steps=3, callback_on_step_end=stronger)
    assert [rows for rows, _, _ in passes] == [1, 2, 2] and pipe.guidance_scale == 4.0
    assert (out.frames - call(pipe, num_inference_steps=3).frames).abs().max() > 1e-4

    def other_caption(pipeline, index, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    out = call(
        pipe,
        callback_on_step_end=other_caption,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert (out.frames - call(pipe).frames).abs().max() > 1e-4


# -- records and refusals ---------------------------------------------------------------------


def test_mask_takes_the_tokens_that_it_touches() -> None:
    mask = torch.zeros(FRAMES, 128, 128)
    mask[2, 70, 70] = (
        1.0  # one pixel of the lower right token in frame 2, which is in latent frame 1
    )
    assert masked_tokens(mask, CLIP).nonzero().flatten().tolist() == [7]
    assert masked_tokens(LEFT, CLIP).tolist() == [True, False] * 2 * CLIP.latent_frames


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": VIDEO, "audio": AUDIO}, "all of the clip is given"),
        ({"image": PICTURE, "video": VIDEO}, "image and video are both given"),
        ({"mask": LEFT}, "mask without video"),
        ({"retake": SPAN}, "retake without video and audio"),
        ({"video": VIDEO, "retake": Retake(3.0, 4.0)}, "retake from 3.0 s: the clip ends at 0.6 s"),
        ({"video": VIDEO, "mask": torch.zeros(64, 64)}, r"mask of shape \(64, 64\)"),
        ({"audio": AUDIO[..., :500]}, "audio of 500 samples: needs at least 0.04 s"),
        ({"num_frames": 1, "last_image": PICTURE}, "last_image in a clip of 1 frame"),
        ({"speech_start": -1.0}, "speech_start=-1.0"),
        ({"retake": (0.1, 0.2), "video": VIDEO}, "retake="),
    ],
)
def test_refusals(pipe, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipe, **changes)


def test_a_span_has_a_beginning_and_an_end() -> None:
    for wrong in (
        dict(start=0.4, end=0.2),
        dict(start=-1, end=1),
        dict(start=0, end=1, video=False, audio=False),
    ):
        with pytest.raises(ValueError, match="retake"):
            Retake(**wrong)


def test_numpy_agrees(pipe) -> None:
    a, b = (call(pipe, output_type=t, video=VIDEO) for t in ("np", "pt"))
    np.testing.assert_allclose(a.frames, b.frames.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)


def test_pictures_may_be_those_of_pil(pipe: AVDiffPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    picture = Image.fromarray(pixels)
    one, other = (
        call(pipe, image=picture, last_image=picture),
        call(pipe, image=tensor, last_image=tensor),
    )
    assert torch.equal(one.frames, other.frames) and torch.equal(one.audio, other.audio)
    with pytest.raises(ValueError, match="image"):
        call(pipe, image=picture.resize((100, 60)))
