"""JointFlowMatchScheduler: paths, solvers on a flow with a known answer, given parts, training
levels.
"""

import math

import pytest
import torch

from avdiff.latents import Joint, JointLatents
from avdiff.schedulers import JointFlowMatchScheduler
from avdiff.schedulers.joint_flow_match import shift_time

MEAN, SPREAD = Joint(0.7, -0.4), Joint(0.3, 2.0)  # data laws N(mean, spread^2) of the analytic flow


def make_state(batch=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 6, 4, generator=g, dtype=dtype)
    audio = torch.randn(batch, 5, 3, generator=g, dtype=dtype)
    sigmas, seconds = (
        Joint(torch.ones(batch), torch.ones(batch)),
        Joint(torch.zeros(6), torch.zeros(5)),
    )
    return JointLatents(video, audio, sigmas, seconds)


def gaussian_velocity(latents, sigmas):
    """E[eps - x | z] for x ~ N(m, c^2): linear in z, and the flow's solution is m + c z_1 at t =
    0.
    """

    def one(z, t, m, c):
        t = t.to(z)
        variance = (1 - t) ** 2 * c**2 + t**2
        return -m + (t - (1 - t) * c**2) / variance * (z - (1 - t) * m)

    return latents.map(one, sigmas, MEAN, SPREAD)


def sample(scheduler, state, steps):
    scheduler.set_timesteps(steps)
    for i in range(steps):
        sigmas = scheduler.sigmas.map(lambda s: s[i])  # noqa: B023 (used at once)
        velocity = gaussian_velocity(state.latents, sigmas)
        if scheduler.config.prediction_type == "x0":
            velocity = velocity.map(lambda v, z, s: z - s.to(z) * v, state.latents, sigmas)
        state = scheduler.step(velocity, i, state)
    return state


def test_path_runs_from_noise_to_data_with_a_shift_for_each_modality():
    scheduler = JointFlowMatchScheduler(shift_video=3.0, shift_audio=1.0)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas.audio, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(scheduler.sigmas.video, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1.0, 0.75, 0.5, 0.25]))
    assert scheduler.sigmas.video.dtype == torch.float32
    assert (
        scheduler.sigmas.audio[1:-1] < scheduler.sigmas.video[1:-1]
    ).all()  # the sound is ahead of the picture


def test_own_levels_are_shifted_as_a_sequence_and_kept_as_a_pair():
    scheduler = JointFlowMatchScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    torch.testing.assert_close(scheduler.sigmas.video, torch.tensor([1.0, 0.75, 0.0]))
    torch.testing.assert_close(scheduler.sigmas.audio, torch.tensor([1.0, 0.5, 0.0]))
    scheduler.set_timesteps(2, sigmas=Joint(torch.tensor([0.8, 0.3]), torch.tensor([0.6, 0.1])))
    torch.testing.assert_close(scheduler.sigmas.video, torch.tensor([0.8, 0.3, 0.0]))
    torch.testing.assert_close(scheduler.sigmas.audio, torch.tensor([0.6, 0.1, 0.0]))


def test_sampling_follows_the_coupling_of_training():
    scheduler = JointFlowMatchScheduler(coupling="shared")
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.sigmas.video, scheduler.sigmas.audio)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_solver_has_its_order_on_the_gaussian_flow(solver, order, prediction):
    start = make_state(dtype=torch.float64)
    answer = start.latents.map(lambda z, m, c: m + c * z, MEAN, SPREAD)
    scheduler = JointFlowMatchScheduler(solver=solver, prediction_type=prediction)
    errors = {
        m: [] for m in ("video", "audio")
    }  # video on unequal steps (shift 3), audio on equal ones
    for steps in (32, 64, 128):
        end = sample(scheduler, start, steps)
        for modality, tokens in end.latents.items():
            errors[modality].append((tokens - getattr(answer, modality)).abs().max().item())
    for coarse, middle, fine in errors.values():
        assert math.log2(middle / fine) == pytest.approx(order, abs=0.2)
        assert math.log2(coarse / middle) == pytest.approx(order, abs=0.3)


def test_second_order_is_exact_for_a_linear_velocity_on_uneven_steps():
    """v = a + b t integrates to a t + b t^2 / 2; all but the first step, which has no past, must
    hit it.
    """
    scheduler = JointFlowMatchScheduler(solver="ab2", prediction_type="velocity")
    path = torch.tensor([1.0, 0.9, 0.55, 0.5, 0.2, 0.15])
    scheduler.set_timesteps(sigmas=Joint(path, path))
    state, slope, offset = make_state(), make_state(seed=1).latents, make_state(seed=2).latents
    for i, t in enumerate(path):
        if i == 1:
            start = state
        state = scheduler.step(offset.map(lambda a, b: a + b * t, slope), i, state)  # noqa: B023 (used at once)
    wanted = start.latents.map(lambda z, a, b: z - a * 0.9 - b * 0.9**2 / 2, offset, slope)
    torch.testing.assert_close(state.video, wanted.video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.audio, wanted.audio, atol=1e-5, rtol=1e-5)


def test_second_order_is_closer_at_the_same_cost():
    start = make_state(dtype=torch.float64)
    answer = start.latents.map(lambda z, m, c: m + c * z, MEAN, SPREAD)
    error = {}
    for solver in ("euler", "ab2"):
        end = sample(JointFlowMatchScheduler(solver=solver), start, 16)
        error[solver] = (end.video - answer.video).abs().max()
    assert error["ab2"] < error["euler"] / 2


def test_last_step_lands_on_the_clean_estimate():
    scheduler, state = JointFlowMatchScheduler(), make_state()
    scheduler.set_timesteps(3)
    clean = make_state(seed=1).latents
    end = scheduler.step(clean, 2, state)
    torch.testing.assert_close(end.video, clean.video)
    torch.testing.assert_close(end.sigmas.audio, torch.zeros(2))


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_given_parts_stay_and_have_no_noise(solver):
    scheduler, start = JointFlowMatchScheduler(solver=solver), make_state()
    first_frame = torch.zeros(2, 6, dtype=torch.bool)
    first_frame[:, :2] = True
    given = Joint(video=first_frame, audio=torch.tensor([True, False]))
    scheduler.set_timesteps(4)
    state = start
    for i in range(4):
        state = scheduler.step(make_state(seed=i + 5).latents, i, state, given)
    assert torch.equal(state.video[:, :2], start.video[:, :2])
    assert not torch.isclose(state.video[:, 2:], start.video[:, 2:]).any()
    assert torch.equal(state.audio[0], start.audio[0])
    assert not torch.isclose(state.audio[1], start.audio[1]).any()
    halfway = scheduler.step(make_state(seed=9).latents, 1, start, given).sigmas
    torch.testing.assert_close(halfway.video[0], torch.tensor([0, 0, 0.75, 0.75, 0.75, 0.75]))
    torch.testing.assert_close(halfway.audio, torch.tensor([0.0, 0.5]))


def test_mask_does_not_change_the_other_tokens():
    scheduler, state, output = JointFlowMatchScheduler(), make_state(), make_state(seed=3).latents
    scheduler.set_timesteps(4)
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    masked = scheduler.step(output, 1, state, Joint(video=mask))
    free = scheduler.step(output, 1, state)
    assert torch.equal(masked.video[~mask], free.video[~mask])
    assert torch.equal(masked.audio, free.audio)


def test_absent_modality_passes_through():
    scheduler, state = JointFlowMatchScheduler(), make_state()
    scheduler.set_timesteps(2)
    silent = JointLatents(state.video, None, Joint(state.sigmas.video), Joint(state.seconds.video))
    after = scheduler.step(Joint(video=state.video * 0.5), 0, silent)
    assert after.audio is None
    assert after.sigmas.audio is None
    still = scheduler.step(
        Joint(video=state.video * 0.5), 0, state
    )  # audio is there but was not predicted
    assert torch.equal(still.audio, state.audio)
    assert torch.equal(still.sigmas.audio, state.sigmas.audio)
    assert torch.equal(after.video, still.video)


def test_half_precision_tokens_are_stepped_in_fp32():
    scheduler = JointFlowMatchScheduler(prediction_type="velocity")
    scheduler.set_timesteps(sigmas=[1.0, 0.999])
    state, output = (
        make_state(dtype=torch.bfloat16),
        make_state(seed=2, dtype=torch.bfloat16).latents,
    )
    after = scheduler.step(output, 0, state)
    sigma = scheduler.sigmas.video
    assert after.video.dtype == torch.bfloat16
    assert torch.equal(
        after.video, (state.video.float() + (sigma[1] - sigma[0]) * output.video.float()).bfloat16()
    )


def test_solver_memory_never_leaks_into_another_run():
    fresh = sample(JointFlowMatchScheduler(solver="ab2"), make_state(seed=4), 6)
    used = JointFlowMatchScheduler(solver="ab2")
    sample(used, make_state(batch=3), 9)
    assert torch.equal(sample(used, make_state(seed=4), 6).video, fresh.video)
    output, state = make_state(seed=6).latents, make_state()
    half = JointFlowMatchScheduler(solver="ab2")
    half.set_timesteps(6)
    half.step(make_state(seed=7).latents, 2, state)  # a run that was broken off
    half.set_timesteps(6)
    euler = JointFlowMatchScheduler()
    euler.set_timesteps(6)
    assert torch.equal(half.step(output, 3, state).video, euler.step(output, 3, state).video)
    # Starting over without set_timesteps, and jumping ahead: no past that fits, so an Euler step.
    assert torch.equal(used.step(output, 0, state).video, euler.step(output, 0, state).video)
    assert torch.equal(used.step(output, 3, state).video, euler.step(output, 3, state).video)
    assert not torch.equal(
        used.step(make_state(seed=8).latents, 4, state).video,
        euler.step(make_state(seed=8).latents, 4, state).video,
    )


def test_noise_and_conversions_agree_by_sample_and_by_token():
    scheduler, clean, noise = (
        JointFlowMatchScheduler(),
        make_state().latents,
        make_state(seed=1).latents,
    )
    g = torch.Generator().manual_seed(2)
    sigmas = Joint(torch.rand(2, 6, generator=g) * 0.9 + 0.05, torch.tensor([0.3, 1.0]))
    noisy = scheduler.add_noise(clean, noise, sigmas)
    torch.testing.assert_close(noisy.audio[0], 0.7 * clean.audio[0] + 0.3 * noise.audio[0])
    torch.testing.assert_close(noisy.audio[1], noise.audio[1])
    velocity = scheduler.velocity_from_x0(clean, noisy, sigmas)
    torch.testing.assert_close(velocity.video, noise.video - clean.video, atol=1e-4, rtol=1e-4)
    back = scheduler.x0_from_velocity(velocity, noisy, sigmas)
    torch.testing.assert_close(back.video, clean.video, atol=1e-5, rtol=1e-5)


def test_velocity_is_bounded_at_zero_noise():
    scheduler, clean = JointFlowMatchScheduler(sigma_min=0.01), make_state().latents
    velocity = scheduler.velocity_from_x0(
        clean, clean.map(lambda x: x + 0.001), Joint(torch.zeros(2), torch.zeros(2))
    )
    torch.testing.assert_close(velocity.video, torch.full_like(clean.video, 0.1), atol=1e-4, rtol=0)


def unshift(sigma, shift):
    return sigma / (shift - (shift - 1) * sigma)


def test_couplings_really_differ():
    scheduler, draw = JointFlowMatchScheduler(shift_video=3.0, shift_audio=1.5), {}
    for coupling in ("shared", "paired", "independent"):
        draw[coupling] = scheduler.sample_sigmas(
            4000, torch.Generator().manual_seed(0), coupling=coupling
        )
        assert torch.equal(draw[coupling].video, draw["shared"].video)
    assert torch.equal(draw["shared"].video, draw["shared"].audio)
    paired, independent = draw["paired"], draw["independent"]
    torch.testing.assert_close(
        unshift(paired.video, 3.0), unshift(paired.audio, 1.5), atol=1e-5, rtol=0
    )
    assert (paired.audio < paired.video).float().mean() > 0.99
    correlation = torch.corrcoef(torch.stack([independent.video, independent.audio]))[0, 1]
    assert abs(correlation) < 0.05
    assert (independent.audio > independent.video).float().mean() > 0.2


def test_training_levels_follow_their_law():
    scheduler = JointFlowMatchScheduler(shift_audio=1.0)
    peaked = scheduler.sample_sigmas(
        20000, torch.Generator().manual_seed(1), logit_mean=0.5, uniform_share=0.0
    ).audio
    logit = peaked.double().logit()
    assert logit.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logit.std().item() == pytest.approx(1.0, abs=0.03)
    flat = scheduler.sample_sigmas(20000, torch.Generator().manual_seed(1), uniform_share=1.0)
    grid = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(flat.audio.quantile(grid), grid, atol=0.015, rtol=0)
    torch.testing.assert_close(flat.video.quantile(grid), shift_time(grid, 3.0), atol=0.015, rtol=0)
    assert flat.video.min() >= scheduler.config.sigma_min
    assert flat.video.max() <= 1


@pytest.mark.parametrize("correlation", [0.25, 0.6])
def test_frames_share_their_noise_as_configured(correlation):
    white = torch.randn(
        6000, 4 * 3, 2, generator=torch.Generator().manual_seed(0)
    )  # 4 frames of 3 tokens
    noise = (
        JointFlowMatchScheduler(frame_correlation=correlation)
        .share_frames(white, 4)
        .unflatten(1, (4, 3))
    )
    expected = torch.full((4, 4), correlation).fill_diagonal_(1.0)
    for token in range(3):
        between = torch.cov(noise[:, :, token].transpose(1, 2).flatten(0, 1).T)
        torch.testing.assert_close(between, expected, atol=0.05, rtol=0)
    assert (
        abs(float((noise[:, 0, 0] * noise[:, 1, 2]).mean())) < 0.05
    )  # places have nothing in common
    free = JointFlowMatchScheduler()
    assert (
        free.share_frames(white, 4) is white
    )  # and so has one frame, or a scheduler that does not say so
    assert JointFlowMatchScheduler(frame_correlation=correlation).share_frames(white, 1) is white


def test_training_levels_repeat_under_a_seed():
    scheduler = JointFlowMatchScheduler()
    first, again, other = (
        scheduler.sample_sigmas(8, torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(first.video, again.video)
    assert not torch.equal(first.video, other.video)


def test_config_survives_save_and_load(tmp_path):
    config = {
        "shift_video": 2.5,
        "shift_audio": 1.25,
        "coupling": "independent",
        "solver": "ab2",
        "prediction_type": "velocity",
        "sigma_min": 0.02,
        "frame_correlation": 0.5,
    }
    JointFlowMatchScheduler(**config).save_pretrained(tmp_path)
    loaded = JointFlowMatchScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in config} == config
    loaded.set_timesteps(3)
    torch.testing.assert_close(
        loaded.sigmas.video, shift_time(torch.tensor([1, 2 / 3, 1 / 3, 0]), 2.5)
    )


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("shift_video", 0.0),
        ("shift_audio", float("nan")),
        ("coupling", "both"),
        ("solver", "heun"),
        ("prediction_type", "epsilon"),
        ("sigma_min", 0.0),
        ("frame_correlation", 1.0),
        ("frame_correlation", -0.5),
    ],
)
def test_refuses_a_bad_configuration(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        JointFlowMatchScheduler(**{argument: value})


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({}, "num_inference_steps=None"),
        ({"sigmas": [0.5, 0.5]}, "fall strictly"),
        ({"sigmas": [0.5, 0.0]}, "must fall strictly and lie in"),
        ({"sigmas": [1.2, 0.5]}, "must fall strictly and lie in"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "needs 3 values"),
        ({"sigmas": Joint()}, "at least one modality"),
        ({"sigmas": Joint(torch.tensor([1.0, 0.5]), torch.tensor([1.0]))}, "sigmas of audio"),
    ],
)
def test_refuses_a_bad_path(kwargs, text):
    with pytest.raises(ValueError, match=text):
        JointFlowMatchScheduler().set_timesteps(**kwargs)


def test_refuses_steps_off_the_path():
    scheduler, state = JointFlowMatchScheduler(), make_state()
    with pytest.raises(ValueError, match="set_timesteps first"):
        scheduler.step(state.latents, 0, state)
    scheduler.set_timesteps(2)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"index={index}"):
            scheduler.step(state.latents, index, state)
    with pytest.raises(ValueError, match="coupling='none'"):
        scheduler.sample_sigmas(2, coupling="none")
    with pytest.raises(ValueError, match="uniform_share=2"):
        scheduler.sample_sigmas(2, uniform_share=2)
