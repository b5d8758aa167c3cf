"""AVTransformer: batch independence, identities at the start, cut connections, the clock,
gradients, saving.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from fractions import Fraction

import pytest
import torch

from avdiff.clip import ClipSpec, Clock
from avdiff.latents import Joint, JointLatents, clean_estimate
from avdiff.models import presets
from avdiff.models.conditions import Conditions, Positions, overlap_matrix, window_mask
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack

CLIP = ClipSpec(num_frames=9)


def make_model(**changes) -> AVTransformer:
    """Tiny model whose zero-initialised parts are filled, so that every part matters."""
    torch.manual_seed(0)
    model = AVTransformer(**{**presets.tiny(), **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape) * 0.2)
    return model


def make_inputs(
    model: AVTransformer, batch: int = 2, clip: ClipSpec = CLIP, start: float = 0.0
) -> dict:
    g = torch.Generator().manual_seed(1)
    c = model.config
    frames = (torch.arange(clip.mel_frames) * 5 // clip.mel_frames)[None].repeat(batch, 1)
    track = PhonemeTrack(
        torch.randint(1, 40, (batch, 5), generator=g),
        torch.randint(0, 3, (batch, 5), generator=g),
        frames,
        torch.ones(batch, dtype=torch.bool),
        frames,
    )
    return dict(
        hidden_states=torch.randn(batch, clip.video_tokens, c.video_channels, generator=g),
        audio_hidden_states=torch.randn(batch, clip.audio_tokens, c.audio_channels, generator=g),
        timestep=torch.rand(batch, generator=g),
        audio_timestep=torch.rand(batch, generator=g),
        text=torch.randn(batch, 6, c.text_dim, generator=g),
        text_mask=torch.ones(batch, 6, dtype=torch.bool),
        positions=Positions.of(clip, start=start),
        track=track,
    )


def run(model: AVTransformer, inputs: dict, **changes) -> Joint[torch.Tensor]:
    with torch.no_grad():
        out = model(**{**inputs, **changes})
    return Joint(out.video, out.audio)


def rows(inputs: dict, index: torch.Tensor) -> dict:
    """The same inputs with the batch reordered or cut."""

    def pick(x):
        if isinstance(x, PhonemeTrack):
            return PhonemeTrack(*(None if v is None else v[index] for v in vars(x).values()))
        return x[index] if isinstance(x, torch.Tensor) else x

    return {k: pick(v) for k, v in inputs.items()}


def assert_joint_close(a: Joint, b: Joint, atol: float = 2e-5) -> None:
    for m, value in a.items():
        torch.testing.assert_close(value, getattr(b, m), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("experts", [0, 4])
def test_batch_is_a_set(experts: int) -> None:
    model = make_model(video_experts=experts, audio_experts=experts)
    inputs = make_inputs(model, batch=3)
    whole = run(model, inputs)
    order = torch.tensor([2, 0, 1])
    assert_joint_close(run(model, rows(inputs, order)), whole.map(lambda x: x[order]))
    assert_joint_close(run(model, rows(inputs, torch.tensor([1]))), whole.map(lambda x: x[1:2]))


def test_fresh_model_gives_the_linear_estimate_and_ignores_its_zero_parts() -> None:
    torch.manual_seed(0)
    model = AVTransformer(**presets.tiny()).eval()
    inputs = make_inputs(model)
    z, t = inputs["hidden_states"], inputs["timestep"][:, None, None]
    torch.testing.assert_close(
        run(model, inputs).video, z * (1 - t) / ((1 - t) ** 2 + t**2)
    )  # output heads start at zero
    torch.nn.init.normal_(model.proj_out_video.weight)
    torch.nn.init.normal_(model.proj_out_audio.weight)
    before = run(model, inputs)
    model.transformer_blocks[
        0
    ].memory.table.rows.normal_()  # W_V is zero: a fresh memory changes nothing
    assert_joint_close(run(model, inputs), before, atol=0.0)
    moved = run(model, inputs, hidden_states=inputs["hidden_states"] + 1)
    assert not torch.allclose(moved.video, before.video)


def test_cut_connections_equal_two_branches_alone() -> None:
    model = make_model()
    inputs = make_inputs(model)
    inputs["track"] = replace(inputs["track"], video_frame_to_phone=inputs["track"].frame_to_phone)
    together = run(model, inputs, isolated=True)
    alone_video = run(model, inputs, isolated=True, audio_hidden_states=None, audio_timestep=None)
    alone_audio = run(model, inputs, isolated=True, hidden_states=None, timestep=None)
    torch.testing.assert_close(together.video, alone_video.video, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together.audio, alone_audio.audio, atol=2e-5, rtol=1e-4)
    joint = run(model, inputs)
    assert (joint.video - together.video).abs().max() > 1e-3 and (
        joint.audio - together.audio
    ).abs().max() > 1e-3


def test_without_shared_stream_the_branches_still_meet() -> None:
    model = make_model(shared_rate=0.0, shared_layers=())
    inputs = make_inputs(model)
    assert not any(re.search(r"(^|\.)shared[._]", name) for name, _ in model.named_parameters())
    moved = run(model, inputs, audio_hidden_states=inputs["audio_hidden_states"] + 1)
    assert (moved.video - run(model, inputs).video).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("cross_modal", "shared_rate", "meet"),
    [(False, 12.5, True), (False, 0.0, False), (True, 0.0, True)],
)
def test_which_links_there_are(cross_modal: bool, shared_rate: float, meet: bool) -> None:
    model = make_model(cross_modal=cross_modal, shared_rate=shared_rate)
    inputs = make_inputs(model)
    joint, louder = (
        run(model, inputs),
        run(model, inputs, audio_hidden_states=inputs["audio_hidden_states"] + 1),
    )
    brighter = run(model, inputs, hidden_states=inputs["hidden_states"] + 1)
    assert bool((louder.video - joint.video).abs().max() > 1e-3) == meet
    assert bool((brighter.audio - joint.audio).abs().max() > 1e-3) == meet


def test_absent_branch_is_absent_from_the_output_and_untouched_by_gradients() -> None:
    model = make_model().train()
    inputs = make_inputs(model)
    out = model(**{**inputs, "audio_hidden_states": None, "audio_timestep": None})
    assert out.audio is None and out.video.shape == inputs["hidden_states"].shape
    out.video.square().mean().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert not any(".audio." in n for n in touched if "transformer_blocks" in n)
    with pytest.raises(ValueError, match="both None"):
        model(positions=inputs["positions"])


def test_gradients_reach_every_parameter() -> None:
    model = make_model(video_experts=2, audio_experts=2).train()
    model.transformer_blocks[0].memory.table.collecting = True  # as its row optimizer does
    out = model(**make_inputs(model, batch=4))
    (out.video.square().mean() + out.audio.square().mean()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    pending = model.transformer_blocks[0].memory.table.take_pending()
    assert pending is not None and pending[1].any()


def test_only_time_differences_matter() -> None:
    model = make_model()
    at_zero, later = run(model, make_inputs(model)), run(model, make_inputs(model, start=7.25))
    assert_joint_close(at_zero, later, atol=2e-4)
    stretched = ClipSpec(
        num_frames=9, fps=Fraction(20), clock=Clock(audio_stride=1200, mel_hop=300)
    )
    assert stretched.audio_tokens == CLIP.audio_tokens
    slower = run(model, make_inputs(model, clip=stretched))
    assert (slower.video - at_zero.video).abs().max() > 1e-4  # the clock is felt


def test_noise_level_per_token_equals_per_sample_when_constant() -> None:
    model = make_model()
    inputs = make_inputs(model)
    per_token = {
        k: inputs[k][:, None].expand(-1, inputs[h].shape[1])
        for k, h in (("timestep", "hidden_states"), ("audio_timestep", "audio_hidden_states"))
    }
    assert_joint_close(run(model, inputs, **per_token), run(model, inputs))
    per_token["timestep"] = per_token["timestep"].clone()
    per_token["timestep"][:, :4] = 0
    assert (run(model, inputs, **per_token).video - run(model, inputs).video).abs().max() > 1e-4


def test_prepared_conditions_equal_raw_ones_and_are_made_once() -> None:
    model = make_model()
    inputs = make_inputs(model)
    conditions = model.prepare(*(inputs[k] for k in ("text", "text_mask", "positions", "track")))
    given = {
        k: inputs[k] for k in ("hidden_states", "audio_hidden_states", "timestep", "audio_timestep")
    }
    assert_joint_close(run(model, given, conditions=conditions), run(model, inputs), atol=0.0)


def test_masked_text_and_absent_script_are_not_seen() -> None:
    model = make_model()
    inputs = make_inputs(model)
    hidden = torch.zeros_like(inputs["text_mask"])
    blind = run(model, inputs, text_mask=hidden)
    assert_joint_close(run(model, inputs, text_mask=hidden, text=inputs["text"] + 3), blind)
    quiet = inputs["track"].without()
    other = replace(quiet, phonemes=quiet.phonemes.flip(1))
    assert_joint_close(run(model, inputs, track=quiet), run(model, inputs, track=other))
    assert (run(model, inputs, track=quiet).audio - run(model, inputs).audio).abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = make_model(video_experts=2).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        out = model(**make_inputs(model))
        (
            out.video.square().mean()
            + out.audio.square().mean()
            + sum(r.sum() for r in out.routing) * 1e-3
        ).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-4)


def test_save_and_load_is_bit_equal(tmp_path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    again = AVTransformer.from_pretrained(tmp_path)
    assert_joint_close(run(again, make_inputs(again)), run(model, make_inputs(model)), atol=0.0)


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("presenter", 20e6, 30e6), ("base", 0.8e9, 1.4e9), ("large", 8e9, 12e9)],
)
def test_presets_have_their_size(preset: str, low: float, high: float) -> None:
    with torch.device("meta"):
        model = AVTransformer(**presets.PRESETS[preset]())
    assert low < sum(p.numel() for p in model.parameters()) < high


def test_estimate_has_unit_error_scale_and_keeps_given_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(4, 5000, 1, generator=g), torch.randn(4, 5000, 1, generator=g)
    sigma = torch.tensor([0.0, 0.1, 0.5, 1.0])
    z = (1 - sigma[:, None, None]) * x + sigma[:, None, None] * eps
    nothing = torch.zeros_like(z)
    torch.testing.assert_close(clean_estimate(z, nothing + 7, sigma)[0], x[0])
    scale = clean_estimate(z, nothing + 1, sigma) - clean_estimate(z, nothing, sigma)
    residual = (x - clean_estimate(z, nothing, sigma)).std(dim=(1, 2))
    torch.testing.assert_close(residual[1:], scale[1:, 0, 0], atol=0.02, rtol=0.03)


def test_windows_and_overlaps() -> None:
    seconds, keys = torch.tensor([0.1, 5.0]), torch.tensor([0.0, 0.2, 0.5])
    assert window_mask(seconds, keys, 0.15)[0, 0].tolist() == [
        [True, True, False],
        [False, False, True],
    ]
    weights = overlap_matrix(torch.tensor([0.04, 0.12]), torch.tensor([0.02, 0.06, 0.10, 0.14]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))


@pytest.mark.parametrize("record", [Conditions, Positions, PhonemeTrack, JointLatents])
def test_documented_names_are_the_fields(record) -> None:
    documented = set()
    for names in re.findall(r"(?:^|\. )\s*((?:\w+, )*\w+): ", record.__doc__ or "", re.M):
        documented |= set(names.split(", "))
    assert documented - {"Args"} == {field.name for field in fields(record)}
