"""Guidance: the formula for each modality, which passes it needs, and that 0 is a value."""

import pytest
import torch

from avdiff.guidance import CrossModalGuidance, Guidance, Interval, Rescale, TextGuidance
from avdiff.latents import Joint


def estimates(*names, dtype=torch.float32, spread=1.0):
    out = {}
    for seed, name in enumerate(names):
        g = torch.Generator().manual_seed(seed)
        out[name] = Joint(
            (torch.randn(2, 6, 4, generator=g) * spread).to(dtype),
            torch.randn(2, 5, 3, generator=g).to(dtype),
        )
    return out


ALL = ("cond", "no_text", "isolated")


def test_each_modality_follows_the_formula_with_its_own_scales():
    e = estimates(*ALL)
    c, u, i = (e[name] for name in ALL)
    out = Guidance(text=Joint(3.0, 5.0), cross=Joint(2.0, 0.5)).combine(e)
    torch.testing.assert_close(
        out.video, c.video + 2 * (c.video - u.video) + 1 * (c.video - i.video)
    )
    torch.testing.assert_close(
        out.audio, c.audio + 4 * (c.audio - u.audio) - 0.5 * (c.audio - i.audio)
    )


def test_no_guidance_is_the_conditional_estimate():
    e = estimates("cond")
    out = Guidance().combine(e)
    assert torch.equal(out.video, e["cond"].video)
    assert torch.equal(out.audio, e["cond"].audio)
    assert Guidance().passes(0.0) == ("cond",)


def test_zero_is_a_value():
    e = estimates("cond", "no_text")
    guidance = Guidance(text=Joint(1.0, 0.0))
    assert guidance.passes(0.0) == ("cond", "no_text")
    out = guidance.combine(e)
    assert torch.equal(out.video, e["cond"].video)
    torch.testing.assert_close(out.audio, e["no_text"].audio)


@pytest.mark.parametrize(
    ("guidance", "names"),
    [
        (Guidance(text=Joint(3.0, 1.0)), ("cond", "no_text")),
        (Guidance(cross=Joint(1.0, 2.0)), ("cond", "isolated")),
        (Guidance(text=Joint(audio=2.0), cross=CrossModalGuidance(video=2.0)), ALL),
        (Guidance(text=TextGuidance(1.0, 1.0), rescale=0.7), ("cond",)),
    ],
)
def test_only_needed_passes_are_asked_for(guidance, names):
    assert guidance.passes(0.5) == names


def test_interval_limits_the_guided_steps():
    guidance = Guidance(text=Joint(3.0, 3.0), interval=(0.25, 0.75))
    asked = [guidance.passes(i / 8) for i in range(8)]
    assert [len(names) for names in asked] == [1, 1, 2, 2, 2, 2, 1, 1]
    assert guidance.passes() == ("cond", "no_text")  # what the run needs at all
    assert Guidance(text=Joint(3.0, 3.0), interval=(0.5, 0.5)).passes() == ("cond",)
    e = estimates("cond")
    assert torch.equal(guidance.combine(e).video, e["cond"].video)


def test_rescale_restores_the_spread_of_each_sample_and_modality():
    e = estimates("cond", "no_text")
    e["cond"] = e["cond"].map(lambda x: x * torch.tensor([1.0, 4.0])[:, None, None])
    plain = Guidance(text=Joint(5.0, 5.0)).combine(e)
    full = Guidance(text=Joint(5.0, 5.0), rescale=1.0).combine(e)
    half = Guidance(text=Joint(5.0, 5.0), rescale=Joint(0.5, 0.0)).combine(e)
    for modality in ("video", "audio"):
        spread = getattr(full, modality).std((1, 2))
        torch.testing.assert_close(spread, getattr(e["cond"], modality).std((1, 2)))
    torch.testing.assert_close(half.video, (plain.video + full.video) / 2)
    assert torch.equal(half.audio, plain.audio)


def test_rescale_leaves_a_constant_estimate_alone():
    flat = {
        name: Joint(video=torch.full((1, 3, 2), value))
        for name, value in (("cond", 2.0), ("no_text", 1.0))
    }
    out = Guidance(text=Joint(2.0, 2.0), rescale=1.0).combine(flat)
    torch.testing.assert_close(out.video, torch.full((1, 3, 2), 3.0))


def test_half_precision_estimates_are_combined_in_fp32():
    e = estimates("cond", "no_text", dtype=torch.bfloat16)
    out = Guidance(text=Joint(7.0, 7.0)).combine(e)
    wide = Guidance(text=Joint(7.0, 7.0)).combine(
        {name: x.map(torch.Tensor.float) for name, x in e.items()}
    )
    assert out.video.dtype == torch.float32
    assert torch.equal(out.video, wide.video)


def test_absent_modality_stays_absent():
    e = {name: Joint(audio=x.audio) for name, x in estimates("cond", "no_text").items()}
    out = Guidance(text=Joint(3.0, 3.0)).combine(e)
    assert out.video is None
    torch.testing.assert_close(out.audio, 3 * e["cond"].audio - 2 * e["no_text"].audio)


def test_samples_of_a_batch_do_not_mix():
    e = estimates(*ALL)
    guidance = Guidance(text=Joint(3.0, 4.0), cross=Joint(2.0, 2.0), rescale=0.7)
    second = guidance.combine({name: x.map(lambda t: t[1:]) for name, x in e.items()})
    torch.testing.assert_close(second.video, guidance.combine(e).video[1:])


def test_records_are_frozen_and_compare_by_value():
    guidance = Guidance(text=Joint(3.0, 5.0), rescale=0.5, interval=(0.1, 0.9))
    assert guidance == Guidance(TextGuidance(3.0, 5.0), None, Rescale(0.5, 0.5), Interval(0.1, 0.9))
    with pytest.raises(AttributeError):
        guidance.text = TextGuidance()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Guidance(rescale=1.5), "rescale=1.5"),
        (lambda: Guidance(interval=(0.8, 0.2)), r"interval=\(0.8, 0.2\)"),
        (lambda: Guidance().combine({"no_text": Joint()}), "needs 'cond'"),
        (
            lambda: Guidance().combine({"cond": Joint(), "uncond": Joint()}),
            "needs 'cond', and else only",
        ),
    ],
)
def test_refuses_what_does_not_fit(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_perturbed_guidance_adds_its_scaled_difference_and_zero_costs_no_pass() -> None:
    cond, weak = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    guidance = Guidance(perturbed=Joint(1.5, 0.0))
    assert guidance.passes(0.0) == ("cond", "perturbed")
    assert Guidance(perturbed=Joint(0.0, 0.0)).passes(0.0) == ("cond",)
    guided = guidance.combine({"cond": Joint(cond, cond), "perturbed": Joint(weak, weak)})
    assert torch.equal(guided.video, cond + 1.5 * (cond - weak))
    assert torch.equal(guided.audio, cond)
    assert guidance.only({"audio"}).passes(0.0) == ("cond",)


def test_rescale_multiplies_in_the_reference_order() -> None:
    guided, cond = torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    ratio = cond.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True)
    expected = 0.7 * (guided * ratio) + (1 - 0.7) * guided
    assert torch.equal(Rescale(0.7, 0.7).apply("video", guided, cond), expected)
