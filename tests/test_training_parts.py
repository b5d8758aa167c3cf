"""Parts of the training: expert balance over a step, memory tables, text by branch, heads, early
refusals.
"""

import pytest
import torch

from avdiff.core.memory_table import memory_tables
from avdiff.core.moe import MoE
from avdiff.latents import Joint
from avdiff.models.conditions import Positions
from avdiff.phonetics.phone import Phone, inventory
from avdiff.phonetics.track import track_from_phones
from avdiff.phonetics.visemes import VISEMES, viseme_of
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler
from avdiff.train import finetune
from avdiff.train.joint import export
from avdiff.train.joint import model_init as start
from avdiff.train.joint.aux_heads import IGNORED, phoneme_labels, viseme_labels
from avdiff.train.joint.dataset import TrainingClips
from avdiff.train.joint.objective import Objective, RouterBalance
from avdiff.train.loop.fit import Run
from avdiff.train.loop.run_log import read_log
from avdiff.train.recipe import ExportOptions, ObjectiveOptions
from tests.test_finetune import CLIP, recipe, run, write_clips
from tests.tiny import fill_zeros, tiny_components


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return write_clips(root / "train", 32), write_clips(root / "held", 8, seed=1)


def test_experts_are_balanced_over_the_step_not_the_micro_batch():
    """Two micro-batches that use different experts are balanced together: the second one is not
    punished alone.
    """
    torch.manual_seed(0)
    moe = MoE(8, 8, 4, 1)
    rows = torch.randn(2, 64, 8)
    stats = [moe(r[None])[1] for r in rows]
    alone, together = RouterBalance(), RouterBalance()
    second_alone = alone([stats[1]])[0]
    together([stats[0]])
    second = together([stats[1]])[0]
    whole = RouterBalance()([moe(rows)[1]])[0]
    counts = moe(rows)[1].detach()
    assert not torch.isclose(second, second_alone)
    # the load of both is that of the whole; the mean probability is the second's own
    share, experts = counts[..., :4] / counts[..., :4].sum(-1, keepdim=True), 4
    prob = stats[1][..., 4:8] / stats[1][..., 8:]
    torch.testing.assert_close(second, (experts * (share * prob).sum(-1)).mean())
    together.forget()
    torch.testing.assert_close(together([moe(rows)[1]])[0], whole)


def test_memory_tables_are_averaged_and_clipped_with_the_rest(data, tmp_path):
    made = recipe(
        data,
        tmp_path,
        max_train_steps="2",
        ema_decay="0.5",
        checkpointing_steps="0",
        max_grad_norm="0.1",
    )
    task = finetune.setup(made)
    fill_zeros(task.transformer)  # the memory is heard from the first step
    loop = Run(task, made.training)
    loop.start()
    ((_, table),) = memory_tables(task.transformer)
    name = next(n for n in loop.ema.shadow if n.endswith("memory.table.rows"))
    before = table.rows.clone()
    norms = []
    original = task.model.rows.step

    def step():
        norms.append(
            (
                task.model.rows.grad_norm().item(),
                [p.grad for p in loop.phase_params["main"] if p.grad is not None],
            )
        )
        original()

    task.model.rows.step = step
    batches = loop.next_batches(None)
    loop.train_step(batches, 0.0)
    loop.loader.close()
    rows, dense = norms[0]
    total = torch.cat([g.flatten() for g in dense]).square().sum() + rows**2
    assert 0 < rows < 0.1
    torch.testing.assert_close(total.sqrt(), torch.tensor(0.1), rtol=1e-4, atol=0)
    decay = 1 / 10  # of the first update
    assert not torch.equal(table.rows, before)
    torch.testing.assert_close(loop.ema.shadow[name], before + (1 - decay) * (table.rows - before))
    with loop.ema.applied():
        torch.testing.assert_close(table.rows, loop.ema.shadow[name])


def test_one_branch_alone_can_leave_the_caption_unread(data, tmp_path):
    """The picture of rows that it does not read is that of a model without a caption; the sound
    still reads it.
    """
    task = finetune.setup(recipe(data, tmp_path))
    model = fill_zeros(task.transformer).eval()
    batch = task.collate([task.dataset[i] for i in range(3)])
    text, mask = torch.randn(3, 5, model.config.text_dim), torch.ones(3, 5, dtype=torch.bool)
    level = torch.full((3,), 0.5)

    def answer(conditions):
        out = model(batch.video, batch.audio, level, level, conditions=conditions, isolated=True)
        return out.video, out.audio

    with torch.no_grad():
        told = model.prepare(text, mask, Positions.of(CLIP))
        rows = Joint(torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool))
        (v, a), (v_part, a_part) = answer(told), answer(told.unread(rows))
        v_none, _ = answer(model.prepare(None, None, Positions.of(CLIP), batch_size=3))
    torch.testing.assert_close(v_part[[0, 2]], v_none[[0, 2]])
    torch.testing.assert_close(v_part[1], v[1])
    torch.testing.assert_close(a_part, a)
    assert not torch.allclose(v_part[0], v[0])


def test_heads_read_exact_labels_and_learn(data, tmp_path):
    symbols = list(inventory()[0][1:4])
    third = float(CLIP.seconds) / 3
    track = track_from_phones(
        [[Phone(s, i * third, (i + 1) * third, 0) for i, s in enumerate(symbols)], []], CLIP
    )
    said = phoneme_labels(track, 4)
    assert [inventory()[0][i] for i in said[0].unique_consecutive()] == symbols
    assert (said[1] == IGNORED).all()
    seen = viseme_labels(track, Positions.of(CLIP))
    assert seen.shape == (2, CLIP.video_grid[0])
    assert [VISEMES[i] for i in seen[0].unique_consecutive()] == [viseme_of(s)[0] for s in symbols]
    _, summary = run(
        data,
        tmp_path,
        phoneme_head="0.1",
        viseme_head="0.1",
        max_train_steps="30",
        log_every="1",
        train_batch_size="8",
        learning_rate="6e-3",
        checkpointing_steps="0",
        video_caption_dropout="0.2",
        audio_caption_dropout="0.2",
    )
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "loss/phoneme" in line]
    for name in ("phoneme", "viseme"):
        assert lines[-1][f"loss/{name}"] < 0.6 * lines[0][f"loss/{name}"]
    assert not (tmp_path / "final" / "heads").exists()
    assert summary.reason == "finished"


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"optimizer": "adamw8bit"}, "optimizer='adamw8bit': needs the package bitsandbytes"),
        ({"push_to_hub": "true"}, "push_to_hub=true: needs hub_model_id, such as user/model"),
        (
            {"push_to_hub": "true", "hub_model_id": "a/b"},
            "HF_HUB_OFFLINE is set, so nothing can be pushed",
        ),
        (
            {"sample_prompts": "hello"},
            "sample_prompts: are made at validations, but validation_steps=0",
        ),
        ({"sample_prompts": "hello", "validation_steps": "2"}, "sample_prompts: need codecs"),
        (
            {"preset_changes": "video_channels=128"},
            "train_data: holds video of 64 values a token, the model takes 128",
        ),
        ({"video_caption_dropout": "2"}, "video_caption_dropout=2.0: needs a share"),
        ({"phoneme_head": "-1"}, "phoneme_head=-1.0: needs a weight of at least 0"),
        ({"report_to": "pigeon"}, "report_to='pigeon': needs one of"),
        (
            {"train_batch_size": "100"},
            "train_batch_size=100: a step needs 100 items that fit, the dataset has 32",
        ),
        (
            {"pretrained_model_name_or_path": "nowhere"},
            "pretrained_model_name_or_path=nowhere: needs the folder",
        ),
    ],
)
def test_wrong_recipes_are_refused_before_a_model_is_loaded(
    data, tmp_path, monkeypatch, wrong, answer
):
    def loaded(*_, **__):
        raise AssertionError("a model was made")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(start.AVTransformer, "__init__", loaded)
    if wrong.get("optimizer") and start.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed here")
    with pytest.raises(ValueError, match=answer) as caught:
        finetune.setup(recipe(data, tmp_path, **wrong))
    assert "\n" not in str(caught.value)


def test_a_missing_caption_is_refused(tmp_path):
    folder = write_clips(tmp_path / "cache", 4)
    path = tmp_path / "cache" / "shard-00000.json"
    path.write_text(
        path.read_text().replace('a woman says \\"hello\\"', " ").replace("a talking face", "")
    )
    with pytest.raises(
        ValueError, match=r"train_data: clip 0 \(speech\) has no caption; write one"
    ):
        finetune.setup(recipe((folder, folder), tmp_path / "out"))
    finetune.setup(recipe((folder, folder), tmp_path / "out", caption_dropout="1"))


def test_a_push_that_fails_leaves_the_model(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"hub_model_id=a/b: could not be pushed .* the model is whole in"
    ) as caught:
        export.push(tmp_path, ExportOptions(push_to_hub=True, hub_model_id="a/b"))
    assert "\n" not in str(caught.value)


def test_long_captions_pad_no_others_where_there_are_many():
    class Cache:
        def __init__(self, captions):
            self.items = [(None, {"captions": ["short", c]}) for c in captions]

        def __len__(self):
            return len(self.items)

        def clip(self, index):
            return CLIP

        def modalities(self, index):
            return ("video",)

    long = "ब" * 80  # 240 bytes
    keys = TrainingClips(Cache([long] * 256 + ["brief"] * 10), None).groups()
    assert keys == [(CLIP, "video", "long captions")] * 256 + [(CLIP, "video")] * 10
    assert (
        TrainingClips(Cache([long] * 255 + ["brief"] * 10), None).groups()
        == [(CLIP, "video")] * 265
    )


def test_training_and_sampling_begin_in_the_same_noise():
    """What frames have in common is the same in a training row at level 1 and in the pipeline's
    first tokens.
    """
    rows, positions = [torch.Generator().manual_seed(k) for k in range(400)], Positions.of(CLIP)
    clean = Joint(torch.zeros(400, CLIP.video_tokens, 64), torch.zeros(400, CLIP.audio_tokens, 48))
    n = Objective(ObjectiveOptions(frame_correlation=0.6)).noised(clean, positions, rows, time=1.0)
    pipe = AVDiffPipeline(
        **{**tiny_components(), "scheduler": JointFlowMatchScheduler(frame_correlation=0.6)}
    )
    generator = torch.Generator().manual_seed(1)
    white = pipe.codec.layout(CLIP).noise(400, generator, torch.device("cpu"), Joint(True, True))
    sampled = pipe.scheduler.share_frames(white.video, CLIP.video_grid[0])
    for tokens in (n.noisy.video, sampled):
        w = tokens.unflatten(1, (CLIP.latent_frames, -1))
        assert float((w[:, 0] * w[:, 1]).mean()) == pytest.approx(0.6, abs=0.05)
        assert float(w.square().mean()) == pytest.approx(1.0, abs=0.05)
    assert abs(float((n.noisy.audio[:, 0] * n.noisy.audio[:, 1]).mean())) < 0.05


def test_learned_guidance_settles_at_the_guided_estimate():
    """A free answer for text a, another without text: descent on the moved goal ends where two
    guided passes would.
    """
    objective = Objective(ObjectiveOptions(learned_guidance={"video": 2.5}))
    clean = Joint(torch.randn(1, 2, 3), torch.randn(1, 2, 3))  # E[x|c]
    uncond, told = (
        Joint(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)),
        Joint(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)),
    )
    for _ in range(60):
        told = objective.guided(clean, told, uncond)  # what minimises the loss for this goal
    torch.testing.assert_close(told.video, 2.5 * clean.video, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told.audio, clean.audio)
    as_v = Objective(ObjectiveOptions(learned_guidance={"video": 2.5}, prediction_type="velocity"))
    noise, told, free = (
        Joint(torch.randn(1, 2, 3), torch.randn(1, 2, 3)) for _ in range(3)
    )  # velocities
    target = as_v.guided(clean, told, free)
    torch.testing.assert_close(
        noise.video - target.video, (noise.video - clean.video) + 0.6 * (told.video - free.video)
    )


def test_learned_guidance_leaves_rows_without_text_alone(data, tmp_path):
    """Without words and captions the answer with text is the answer without: the loss is the plain
    one.
    """
    guided, losses = {"learned_guidance": "video=3,audio=2"}, []
    for dropout, more in (("1", {}), ("1", guided), ("1e-9", {}), ("1e-9", guided)):
        task = finetune.setup(
            recipe(data, tmp_path, text_dropout=dropout, router_balance="0", **more)
        )
        fill_zeros(task.transformer)
        batch = task.collate([task.dataset[i] for i in range(4)])
        with torch.no_grad():
            losses.append(float(task.loss(batch, "main", torch.Generator().manual_seed(3)).total))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] != pytest.approx(losses[3], rel=1e-3)
    with pytest.raises(ValueError, match="learned_guidance: leads away"):
        recipe(data, tmp_path, learned_guidance="video=2", text_dropout="0").check()
    with pytest.raises(ValueError, match=r"learned_guidance=.*from 1 to 20"):
        recipe(data, tmp_path, learned_guidance="video=0.5", text_dropout="0.1").check()
