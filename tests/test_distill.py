"""Distillation: targets against their slow twins, what a student learns, exact resume, the exported
pipeline.
"""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from avdiff.cli.generate import load_lora
from avdiff.latents import Joint, JointLatents
from avdiff.models import presets
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler
from avdiff.train import finetune
from avdiff.train.joint import distill_report
from avdiff.train.joint.objective import Objective
from avdiff.train.joint.teacher import inherit, matching_blocks
from avdiff.train.loop.fit import fit, row_generators
from avdiff.train.recipe import ObjectiveOptions
from tests.test_finetune import CLIP, recipe, run, write_clips
from tests.tiny import fill_zeros, tiny_components


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return write_clips(root / "train", 32), write_clips(root / "held", 8, seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline whose transformer reacts to all of its inputs: guidance moves its estimates."""
    folder = tmp_path_factory.mktemp("teacher")
    AVDiffPipeline(**tiny_components()).save_pretrained(folder)
    return str(folder)


def task_of(data, folder, start, **changes):
    changes = {
        "teacher": start,
        "pretrained_model_name_or_path": start,
        "student_steps": "4",
        "checkpointing_steps": "0",
        "video_phonemes": "0",
        **changes,
    }
    return finetune.setup(recipe(data, folder, **changes))


def batch_of(task, rows=3):
    batch = task.collate([task.dataset[i] for i in range(rows)])
    return batch, Positions.of(CLIP), Joint(batch.video, batch.audio)


def test_teacher_answers_as_its_pipeline_does(data, tmp_path, teacher):
    """One batched pass of both conditions = the pipeline's two passes and its guidance."""
    task = task_of(
        data, tmp_path, teacher, teacher_guidance_scale="3", teacher_audio_guidance_scale="1.5"
    )
    batch, positions, clean = batch_of(task)
    pipe = AVDiffPipeline.from_pretrained(teacher)
    pipe.set_progress_bar_config(disable=True)
    sigmas = Joint(torch.full((3,), 0.7), torch.full((3,), 0.4))
    question = task.teacher.conditions(batch, positions, batch.track)
    got = task.teacher.estimate(question, clean, sigmas)
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        text = pipe.text_encoder(batch.input_ids, batch.attention_mask)
        told = [
            pipe.transformer.prepare(text, mask, positions, batch.track),
            pipe.transformer.prepare(None, None, positions, batch.track.without(), 3),
        ]
        inputs = clean.video, clean.audio, sigmas.video, sigmas.audio
        cond, free = (pipe.transformer(*inputs, conditions=c) for c in told)
    for m, scale in (("video", 3.0), ("audio", 1.5)):
        c, u = getattr(cond, m), getattr(free, m)
        assert float((c - u).square().mean()) > 1e-4
        torch.testing.assert_close(getattr(got, m), u + scale * (c - u), rtol=1e-4, atol=1e-4)


def test_the_way_from_noise_to_data_is_that_of_the_teacher_unless_told(data, tmp_path):
    parts = tiny_components()
    parts["scheduler"] = JointFlowMatchScheduler(shift_video=5.0, frame_correlation=0.3)
    AVDiffPipeline(**parts).save_pretrained(tmp_path / "five")
    start = str(tmp_path / "five")
    taught = task_of(data, tmp_path, start).objective
    assert taught.scheduler.config.shift_video == 5 and taught.scheduler.config.shift_audio == 1
    assert float(taught.sigmas_at(torch.tensor([0.5])).video) == pytest.approx(5 / 6)
    tuned = finetune.setup(
        recipe(data, tmp_path, pretrained_model_name_or_path=start, shift_audio="2")
    )
    assert (
        tuned.objective.scheduler.config.shift_video == 5
        and tuned.objective.scheduler.config.shift_audio == 2
    )
    assert (
        taught.scheduler.config.frame_correlation
        == tuned.objective.scheduler.config.frame_correlation
        == 0.3
    )
    with pytest.raises(
        ValueError, match=r"shift_video=3.0: the teacher walks with 5.0; set the same"
    ):
        task_of(data, tmp_path, start, shift_video="3")
    with pytest.raises(
        ValueError, match=r"frame_correlation=0.0: the teacher walks with 0.3; set the same"
    ):
        task_of(data, tmp_path, start, frame_correlation="0")


def test_trained_further_a_distilled_pipeline_asks_for_guidance_again(data, tmp_path):
    told = {
        "num_inference_steps": 8,
        "guidance_scale": 1.0,
        "audio_guidance_scale": 1.5,
        "deflicker_strength": 3.0,
    }
    AVDiffPipeline(**tiny_components(), **told).save_pretrained(tmp_path / "base")
    tuned = finetune.setup(
        recipe(data, tmp_path, pretrained_model_name_or_path=str(tmp_path / "base"), rank="2")
    )
    assert tuned.model.sampling == {**told, "guidance_scale": 2.0}
    tuned.save(tmp_path / "lora")
    pipe = AVDiffPipeline.from_pretrained(tmp_path / "base")
    before = pipe.sampling_defaults
    pipe.load_lora_weights(str(tmp_path / "lora"))  # as in Python
    assert asdict(pipe.sampling_defaults) == tuned.model.sampling
    pipe.unload_lora_weights()
    assert pipe.sampling_defaults == before
    load_lora(pipe, str(tmp_path / "lora"))  # as on the command line
    assert asdict(pipe.sampling_defaults) == tuned.model.sampling
    # a file that says nothing: plain training unlearned the guidance
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    save_file(load_file(weights), weights)
    plain = AVDiffPipeline.from_pretrained(tmp_path / "base")
    plain.load_lora_weights(str(tmp_path / "lora"))
    assert (plain.config.guidance_scale, plain.config.audio_guidance_scale) == (2.0, 1.5)


def test_student_lands_where_the_teacher_lands(data, tmp_path, teacher):
    """One Euler step of the pipeline's scheduler with the target ends where its guided steps end,
    given tokens stay.
    """
    task = task_of(data, tmp_path, teacher, tasks="joint=1,extend=2", teacher_substeps="2")
    batch, positions, clean = batch_of(task)
    place = torch.tensor([3, 3, 3])
    rows = row_generators(torch.Generator().manual_seed(0), 3)
    n = task.objective.noised(clean, positions, rows, {"extend": 1.0}, place / 4)
    question = task.teacher.conditions(batch, positions, batch.track)
    target = task._target(question, n, place)

    def stepped(steps, first, count, estimate):
        scheduler = Objective(ObjectiveOptions()).scheduler
        scheduler.set_timesteps(steps)
        given = n.denoise_mask.map(torch.logical_not)
        state = JointLatents(n.noisy.video, n.noisy.audio, n.token_sigma, Joint())
        for i in range(first, first + count):
            levels = Joint(
                *(s[i].expand(3) for s in (scheduler.sigmas.video, scheduler.sigmas.audio))
            )
            told = given.map(lambda g, s: s[:, None].masked_fill(g, 0.0), levels)
            state = scheduler.step(estimate(state.latents, told), i, state, given)
        return state.latents

    slow = stepped(8, 2, 2, lambda z, s: task.teacher.estimate(question, z, s))
    fast = stepped(4, 1, 1, lambda z, s: target)
    for m, end in slow.items():
        assert not torch.allclose(end, getattr(n.noisy, m))
        torch.testing.assert_close(getattr(fast, m), end, rtol=1e-4, atol=1e-4)
        conditioning = ~getattr(n.denoise_mask, m)
        assert torch.equal(end[conditioning], getattr(clean, m)[conditioning])


def test_own_steps_walk_the_students_path(data, tmp_path, teacher):
    """From pure noise, two own steps are the first two steps of sampling; then the weights get a
    gradient in bf16.
    """
    task = task_of(data, tmp_path, teacher, own_steps="2", mixed_precision="bf16")
    batch, positions, clean = batch_of(task)
    rows = row_generators(torch.Generator().manual_seed(0), 3)
    n = task.objective.noised(clean, positions, rows, None, torch.ones(3))
    rolled = task._rolled(batch, n, positions, batch.track, False, torch.tensor([2, 2, 4]), 2)
    with torch.no_grad():
        network = task._student(task._conditions(batch, positions, batch.track))
        stops = [torch.full((3,), t) for t in (1.0, 0.75, 0.5)]
        whole = task.walk(n.noisy, n.denoise_mask, stops, network)
    for m, tokens in whole.items():
        torch.testing.assert_close(getattr(rolled.noisy, m)[:2], tokens[:2])
        assert torch.equal(
            getattr(rolled.noisy, m)[2], getattr(n.noisy, m)[2]
        )  # it starts in noise and stays there
    torch.testing.assert_close(rolled.sigma.audio, torch.tensor([0.5, 0.5, 1.0]))
    for seed in range(4):  # some of them take own steps
        task.common_seed = seed
        task.transformer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            task.loss(batch, "main", torch.Generator().manual_seed(seed)).total.backward()
        lazy = [name for name, p in task.transformer.named_parameters() if p.grad is None]
        assert lazy == ["phoneme_encoder.to_video.weight"]  # video_phonemes = 0


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("steps", {"own_steps": "1"}),
        ("guidance", {"own_steps": "1", "data_weight": "0.1"}),
        (
            "size",
            {
                "feature_weight": "0.1",
                "preset_changes": "num_layers=1",
                "pretrained_model_name_or_path": "none",
            },
        ),
    ],
)
def test_student_comes_near_its_teacher_and_says_how_to_run(data, tmp_path, teacher, kind, more):
    task = task_of(
        data,
        tmp_path,
        teacher,
        distill=kind,
        max_train_steps="14",
        train_batch_size="8",
        learning_rate="4e-3",
        validation_steps="14",
        log_every="14",
        **more,
    )
    with torch.no_grad():
        before = task.validate()
    summary = fit(task, task.recipe.training)
    assert summary.metrics["sample"] < 0.9 * before["sample"]
    assert ("closed/audio" in summary.metrics) == (kind != "size")
    pipe = AVDiffPipeline.from_pretrained(tmp_path / "final")
    told = tuple(
        pipe.config[k] for k in ("num_inference_steps", "guidance_scale", "audio_guidance_scale")
    )
    assert told == {"steps": (4, 1.0, 1.0), "guidance": (4, 1.0, 1.0), "size": (16, 2.0, 2.0)}[kind]
    if kind == "steps":
        pipe.set_progress_bar_config(disable=True)
        seen = []
        pipe(
            'a woman says "hello"',
            seconds=1,
            output_type="latent",
            callback_on_step_end=lambda pipe, i, *_: (
                seen.append((i, pipe._guidance.passes())) or {}
            ),
        )
        assert seen == [(i, ("cond",)) for i in range(4)]
        assert "made for 4 steps, guidance 1" in (tmp_path / "final" / "README.md").read_text()


def test_distillation_resumes_bitwise(data, tmp_path, teacher):
    options = {
        "teacher": teacher,
        "preset_changes": "num_layers=1",
        "distill": "size",
        "feature_weight": "0.1",
        "own_steps": "2",
        "student_steps": "4",
        "ema_decay": "0.9",
        "max_train_steps": "3",
        "mixed_precision": "bf16",
        "tasks": "joint=1,a2v=1,t2a=1",
        "gradient_accumulation_steps": "2",
    }
    run(data, tmp_path / "whole", **options)
    run(data, tmp_path / "cut", **options, max_seconds="1e-6")
    run(data, tmp_path / "cut", **options, resume_from_checkpoint="latest")
    whole, again = (tmp_path / name / "checkpoint-3" for name in ("whole", "cut"))
    assert (whole / "bridge.safetensors").exists()
    for path in whole.glob("*.safetensors"):
        theirs = load_file(again / path.name)
        assert [k for k, v in load_file(path).items() if not torch.equal(v, theirs[k])] == [], (
            path.name
        )


def test_a_student_inherits_what_fits():
    teacher = fill_zeros(
        AVTransformer(
            **presets.tiny() | {"num_layers": 5, "text_every": 2, "shared_layers": (0, 3)}
        )
    )
    student = AVTransformer(
        **presets.tiny() | {"num_layers": 3, "text_every": 2, "shared_layers": (0,)}
    )
    pairs = matching_blocks(student, teacher)
    assert pairs == [0, 2, 4]
    same = AVTransformer(**teacher.config)
    assert inherit(same, teacher) == len(teacher.state_dict())
    assert inherit(student, teacher) == len(student.state_dict())
    own, theirs = student.state_dict(), teacher.state_dict()
    assert torch.equal(
        own["transformer_blocks.2.video.text_attn.to_q.weight"],
        theirs["transformer_blocks.4.video.text_attn.to_q.weight"],
    )


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        (
            {"teacher": "nowhere"},
            "teacher=nowhere: needs the folder or hub name of a whole pipeline",
        ),
        ({"shift_audio": "2"}, "shift_audio=2.0: the teacher walks with 1.0; set the same"),
        ({"student_steps": "0"}, "student_steps=0: needs at least 1"),
        (
            {"data_weight": "0.5"},
            "data_weight=0.5: a point where several steps lead has no plain loss",
        ),
        ({"teacher": "none", "own_steps": "2"}, "has no effect without a teacher; set teacher"),
        (
            {"preset_changes": "num_layers=1"},
            "preset_changes={'num_layers': 1}: change a preset, but this run starts from",
        ),
        (
            {"pretrained_model_name_or_path": "none", "preset_changes": "num_layer=1"},
            "'num_layer' is no number of",
        ),
        (
            {"pretrained_model_name_or_path": "none", "preset_changes": "num_stress_tones=4"},
            "num_stress_tones=8, the student 4",
        ),
        (
            {"pretrained_model_name_or_path": "nowhere"},
            "pretrained_model_name_or_path=nowhere: needs the folder",
        ),
        ({"codecs": "tests"}, "codecs=tests: has no vae in it"),
    ],
)
def test_wrong_distillations_are_refused_in_one_sentence(data, tmp_path, teacher, wrong, answer):
    with pytest.raises(ValueError, match=answer) as caught:
        task_of(data, tmp_path, teacher, **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_distillation_closes_its_gap_in_three_seeds(tmp_path, teacher):
    held = [
        write_clips(tmp_path / "train", 64),
        "--validation_data",
        write_clips(tmp_path / "held", 16, seed=1),
    ]
    distill_report.main(
        ["--train_data", *held, "--codecs", teacher, "--output_dir", str(tmp_path / "out")]
    )
    table = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {kind for kind, entry in table.items() if not entry["enough"]} <= {
        "size"
    }  # weights of its own gain nothing
