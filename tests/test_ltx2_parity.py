"""LTX-2 under avdiff's own loop: equal to diffusers' pipelines where these are right, equal to
Lightricks' ltx-core where they are not.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline, LTX2VideoTransformer3DModel
from safetensors.torch import load_file

from avdiff.clip import ClipSpec, Clock
from avdiff.families.ltx2.denoiser import DIFFUSERS, LTX2Behavior, LTX2Denoiser
from avdiff.families.ltx2.layout import LTX2Layout
from avdiff.families.ltx2.texts import LTX2Text
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from tests import tiny_ltx2

GOLDEN = Path(__file__).parent / "golden" / "ltx_core.safetensors"
CLOCK = Clock(8, 32, 1, 640, 160)
LAYOUT = LTX2Layout(ClipSpec(17, Fraction(24), 64, 96, 16000, CLOCK), Joint(16, 2), 16)

ALL = Guidance(Joint(3.0, 7.0), Joint(3.0, 3.0), 0.7, perturbed=Joint(1.0, 1.0))


def scales(text: Joint, perturbed: float, cross: float, rescale: float) -> dict:
    """The guidance arguments of diffusers' pipelines, all of them."""
    names = dict(stg_scale=perturbed, modality_scale=cross, guidance_rescale=rescale)
    both = names | {f"audio_{name}": value for name, value in names.items()}
    return both | dict(guidance_scale=text.video, audio_guidance_scale=text.audio)


ONE = Joint(1.0, 1.0)
NONE = scales(ONE, 0.0, 1.0, 0.0)
LEVEL = Joint(3.0, 3.0)
OFFICIAL = Joint(3.0, 7.0)
SETTINGS = {
    "none": (Guidance(), NONE),
    "all": (ALL, scales(OFFICIAL, 1.0, 3.0, 0.7)),
    "text": (Guidance(text=OFFICIAL), scales(OFFICIAL, 0.0, 1.0, 0.0)),
    "perturbed": (Guidance(perturbed=ONE), scales(ONE, 1.0, 1.0, 0.0)),
    "cross": (Guidance(cross=LEVEL), scales(ONE, 0.0, 3.0, 0.0)),
    "text and rescale": (Guidance(text=LEVEL, rescale=0.7), scales(LEVEL, 0.0, 1.0, 0.7)),
}
CASES = [
    *((version, "all", seed) for version in tiny_ltx2.VERSIONS for seed in (0, 1)),
    *((version, "none", 0) for version in tiny_ltx2.VERSIONS),
    *(("2.3", name, 0) for name in ("text", "perturbed", "cross", "text and rescale")),
]


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def size(steps: int) -> dict:
    return dict(
        prompt="A woman says hello",
        negative_prompt="bad",
        height=64,
        width=96,
        num_frames=17,
        frame_rate=24.0,
        num_inference_steps=steps,
        max_sequence_length=32,
    )


def reference(version: str, kind: type = LTX2Pipeline):
    """diffusers' own pipeline on the very tensors of ours."""
    pipe = kind(**tiny_ltx2.loaded(version).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def as_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_ltx2.LTX2JointPipeline, "behavior", DIFFUSERS)


@pytest.mark.parametrize(("version", "name", "seed"), CASES)
def test_text_to_clip_equals_diffusers_to_the_last_bit(as_diffusers, version, name, seed) -> None:
    guidance, theirs = SETTINGS[name]
    steps = 5 if name == "all" else 2
    own = tiny_ltx2.loaded(version)
    ours = own(
        **size(steps),
        guidance=guidance,
        guidance_blocks=[1],
        generator=noise(seed),
        output_type="latent",
    )
    call = size(steps) | theirs | dict(spatio_temporal_guidance_blocks=[1])
    told = reference(version)(**call, generator=noise(seed), output_type="latent")
    layout = own.codec.layout(own.codec.clip(17, Fraction(24), 64, 96))
    assert torch.equal(own.codec.video_latents(ours.frames, layout), told.frames)
    assert torch.equal(own.codec.audio_latents(ours.audio, layout), told.audio)


@pytest.mark.parametrize("version", tiny_ltx2.VERSIONS)
def test_frames_and_waveform_equal_those_of_diffusers(as_diffusers, version) -> None:
    ours = tiny_ltx2.loaded(version)(
        **size(2), guidance=Guidance(), generator=noise(), output_type="pt"
    )
    theirs = reference(version)(**size(2), **NONE, generator=noise(), output_type="pt")
    assert torch.equal(ours.frames, theirs.frames)
    assert torch.equal(ours.audio, theirs.audio)
    assert ours.audio.shape[1] == 2
    assert ours.sampling_rate == (24000 if version == "2.0" else 48000)


@pytest.mark.parametrize("version", tiny_ltx2.VERSIONS)
def test_image_to_clip_equals_diffusers_and_shows_its_error(monkeypatch, version) -> None:
    """0.0 with diffusers' gates; the reference's differ, since the first frame is clean."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    theirs = reference(version, LTX2ImageToVideoPipeline)(
        image=image,
        image_crf=0,
        **size(3),
        **scales(LEVEL, 0.0, 1.0, 0.0),
        use_cross_timestep=True,
        generator=noise(),
        output_type="latent",
    )
    own = tiny_ltx2.loaded(version)
    layout = own.codec.layout(own.codec.clip(17, Fraction(24), 64, 96))

    def difference(behavior: LTX2Behavior) -> float:
        monkeypatch.setattr(tiny_ltx2.LTX2JointPipeline, "behavior", behavior)
        guidance = Guidance(text=LEVEL)
        ours = own(
            **size(3), image=image, guidance=guidance, generator=noise(), output_type="latent"
        )
        video = own.codec.video_latents(ours.frames, layout) - theirs.frames
        audio = own.codec.audio_latents(ours.audio, layout) - theirs.audio
        return max(float(video.abs().max()), float(audio.abs().max()))

    assert difference(DIFFUSERS) == 0.0
    assert difference(LTX2Behavior(mark_first_frame=False)) > 1e-3


# ------------------------------------------------------------------------------ against ltx-core
def transformer(version: str) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(**tiny_ltx2.transformer_config(version)).eval()
    if version == "2.5":
        torch.manual_seed(3)
        model.keyframes_abs_pos_embedding.data.normal_(std=0.1)
    return model


def golden_levels() -> dict[str, Joint[torch.Tensor]]:
    level = torch.tensor([0.7, 0.3])
    zero = torch.zeros(2)
    first = torch.ones(2, 18)
    first[:, :6] = 0
    return {
        "t2av": Joint(level, level),
        "own_levels": Joint(level, 0.5 * level),
        "a2v": Joint(level, zero),
        "v2a": Joint(zero, level),
        "i2av": Joint(level[:, None] * first, level),
    }


@pytest.mark.parametrize("version", tiny_ltx2.VERSIONS)
@torch.no_grad()
def test_the_denoiser_equals_ltx_core_and_diffusers_flag_does_not(version: str) -> None:
    """The golden file holds what Lightricks' own transformer answers on these weights."""
    golden = load_file(GOLDEN)
    model = transformer(version)
    total = float(torch.stack([p.double().abs().sum() for p in model.parameters()]).sum())
    assert abs(total - float(golden[f"{version}/weights_sum"])) < 1e-6, "other weights"
    latents = Joint(golden[f"{version}/video"], golden[f"{version}/audio"])
    texts = (golden[f"{version}/text_video"], golden[f"{version}/text_audio"])
    text = LTX2Text(*texts, torch.ones(2, 16))

    def error(behavior: LTX2Behavior, name: str, key: str) -> float:
        out = LTX2Denoiser(model, behavior)(latents, golden_levels()[name], text, LAYOUT)
        told = Joint(*(golden[f"{version}/{key}/out_{m}"] for m in ("video", "audio")))
        return max(float((o - getattr(told, m)).abs().max()) for m, o in out.items())

    marks = (False, True) if version == "2.5" else (False,)
    for name in golden_levels():
        for mark in marks:
            key = f"{name}/marked" if mark else name
            assert error(LTX2Behavior(mark_first_frame=mark), name, key) <= 2e-6, key
    for flag in ("partner", "own"):
        for name in ("a2v", "v2a", "i2av"):
            assert error(LTX2Behavior(flag, mark_first_frame=False), name, name) > 1e-2
    if version == "2.5":
        assert error(LTX2Behavior(mark_first_frame=False), "i2av", "i2av/marked") > 1e-2


@torch.no_grad()
def test_perturbation_of_a_converted_2_0_is_repaired() -> None:
    """Its config says perturbed_attn=False, so that diffusers' pass equals the conditional one."""
    config = tiny_ltx2.transformer_config("2.0")
    golden = load_file(GOLDEN)
    latents = Joint(golden["2.0/video"], golden["2.0/audio"])
    text = LTX2Text(golden["2.0/text_video"], golden["2.0/text_audio"], torch.ones(2, 16))
    levels = golden_levels()["t2av"]

    def run(behavior: LTX2Behavior, perturbed: tuple[int, ...], **changed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = LTX2VideoTransformer3DModel(**config | changed).eval()
        out = LTX2Denoiser(model, behavior)(latents, levels, text, LAYOUT, perturbed=perturbed)
        return torch.cat([out.video.flatten(), out.audio.flatten()])

    plain = run(LTX2Behavior(), ())
    assert torch.equal(run(DIFFUSERS, (1,)), plain)
    repaired = run(LTX2Behavior(), (1,))
    assert float((repaired - plain).abs().max()) > 1e-2
    assert torch.equal(repaired, run(LTX2Behavior(), (1,), perturbed_attn=True))


@pytest.mark.parametrize("version", tiny_ltx2.VERSIONS)
@torch.no_grad()
def test_an_absent_modality_equals_the_isolated_pass(version: str) -> None:
    own = tiny_ltx2.loaded(version)
    layout = own.codec.layout(own.codec.clip(17, Fraction(24), 64, 96))
    latents = layout.noise(1, noise(), torch.device("cpu"))
    level = torch.tensor([0.7])
    text = own.texts(["A woman says hello"], 32)
    apart = own.denoiser(latents, Joint(level, level), text, layout, isolated=True)
    video = own.denoiser(Joint(latents.video, None), Joint(level, None), text, layout)
    audio = own.denoiser(Joint(None, latents.audio), Joint(None, level), text, layout)
    assert torch.equal(video.video, apart.video)
    assert torch.equal(audio.audio, apart.audio)
    assert video.audio is None
    assert audio.video is None


def test_the_registry_loads_the_folder_and_saving_leaves_it_an_ltx2_folder(tmp_path) -> None:
    from avdiff.families import family_of, load
    from avdiff.families.protocols import Codec, Denoiser, Layout, Texts

    pipe = load(tiny_ltx2.folder("2.3"))
    assert family_of(tiny_ltx2.folder("2.3")).name == "LTX-2"
    layout = pipe.codec.layout(pipe.codec.clip(17, Fraction(24), 64, 96))
    for part, kind in (
        (pipe.codec, Codec),
        (pipe.texts, Texts),
        (pipe.denoiser, Denoiser),
        (layout, Layout),
    ):
        assert isinstance(part, kind)
    pipe.save_pretrained(tmp_path / "saved")
    again = LTX2Pipeline.from_pretrained(tmp_path / "saved")
    assert LTX2Pipeline.load_config(tmp_path / "saved")["_class_name"] == "LTX2Pipeline"
    own, theirs = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
