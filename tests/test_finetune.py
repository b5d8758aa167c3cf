"""Training the transformer: the objective, what is given, whose weights move, resume, adapters,
export.
"""

import json
import os
import traceback
from fractions import Fraction

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from avdiff.clip import ClipSpec
from avdiff.core.memory_table import memory_tables
from avdiff.data.cache import FORMAT, SHARD
from avdiff.latents import Joint
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.phone import inventory
from avdiff.train import finetune
from avdiff.train.joint.lora import branch_of, owner_of
from avdiff.train.joint.objective import LossBalance, Objective, conditioning_tokens
from avdiff.train.loop.config import load_options, to_toml
from avdiff.train.loop.fit import fit
from avdiff.train.loop.run_log import read_log
from avdiff.train.recipe import BRANCHES, TASKS, TOGETHER, ObjectiveOptions, Recipe

CLIP = ClipSpec(13, Fraction(25), 128, 128)


def write_clips(folder, count, seed=0, clips=(CLIP,), sound=True):
    """A latent cache in its real format, of latents that follow from the phones: there is something
    to learn.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    symbols = inventory()[0][1:7]
    nature = torch.Generator().manual_seed(7)
    voices, looks = torch.randn(6, 48, generator=nature), torch.randn(64, generator=nature)
    tensors, records = {}, []
    for i in range(count):
        clip = clips[i % len(clips)]
        ids = torch.randint(0, 6, (3,), generator=generator).tolist()
        length = float(clip.seconds) / 3
        phones = [[symbols[k], n * length, (n + 1) * length, 1] for n, k in enumerate(ids)]
        at = lambda s, ids=ids, length=length: ids[min(2, int(float(s) / length))]  # noqa: E731
        audio = torch.stack([voices[at(s)] for s in clip.audio_seconds()])
        cell = clip.video_grid[1] * clip.video_grid[2]
        video = torch.stack(
            [looks * (0.2 + 0.3 * at(s)) for s in clip.video_seconds() for _ in range(cell)]
        )
        tensors |= {f"{i}/video": video.half()} | ({f"{i}/audio": audio.half()} if sound else {})
        captions = ['a woman says "hello"', "a talking face"]
        records.append(
            {
                "index": i,
                "caption": captions[0],
                "captions": captions,
                "phones": phones,
                "kind": "speech",
                "split": "train",
                "sample_rate": 24000,
                "fps": str(clip.fps),
                "num_frames": clip.num_frames,
                "height": clip.height,
                "width": clip.width,
            }
        )
    assert count <= SHARD
    save_file(tensors, folder / "shard-00000.safetensors")
    (folder / "shard-00000.json").write_text(json.dumps(records))
    (folder / "cache.json").write_text(
        json.dumps({"format": FORMAT, "count": count, "vae": "v", "audio_vae": "a"})
    )
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return write_clips(root / "train", 32), write_clips(root / "held", 8, seed=1)


def recipe(data, folder, **changes):
    values = {
        "train_data": data[0],
        "validation_data": data[1],
        "output_dir": str(folder),
        "preset": "tiny",
        "vocab_size": "300",
        "max_train_steps": "6",
        "train_batch_size": "4",
        "learning_rate": "2e-3",
        "checkpointing_steps": "2",
        "log_every": "2",
        **changes,
    }
    return load_options(Recipe, None, [f"--{k}={v}" for k, v in values.items()])


def run(data, folder, **changes):
    made = recipe(data, folder, **changes)
    task = finetune.setup(made)
    return task, fit(task, made.training)


def weights(task):
    return {n: p.detach().clone() for n, p in task.model.named_parameters()} | {
        n: t.rows.clone() for n, t in memory_tables(task.transformer)
    }


def moved(before, task):
    return {n for n, p in weights(task).items() if not torch.equal(p, before[n])}


def random_tokens(generator):
    positions = Positions.of(CLIP)
    return Joint(
        torch.randn(3, CLIP.video_tokens, 64, generator=generator),
        torch.randn(3, CLIP.audio_tokens, 48, generator=generator),
    ), positions


def test_loss_equals_its_formula_token_by_token():
    generator = torch.Generator().manual_seed(0)
    clean, positions = random_tokens(generator)
    answer, _ = random_tokens(generator)
    objective = Objective(ObjectiveOptions(tasks={"retake": 1.0}, loss_floor=0.3))
    n = objective.noised(
        clean, positions, [torch.Generator().manual_seed(k) for k in range(3)], {"retake": 1.0}
    )
    losses = objective.row_losses(answer, clean, n)
    for m, x in clean.items():
        z, t, out = getattr(n.noisy, m), getattr(n.sigma, m), getattr(answer, m)
        wanted, eps = getattr(n.denoise_mask, m), getattr(n.noise, m)
        for row in range(3):
            costs = []
            for k in range(x.shape[1]):
                level = float(t[row]) if wanted[row, k] else 0.0
                torch.testing.assert_close(z[row, k], (1 - level) * x[row, k] + level * eps[row, k])
                if wanted[row, k]:
                    costs.append(
                        float(((out[row, k] - x[row, k]) ** 2).mean()) / max(level, 0.3) ** 2
                    )
            assert float(getattr(losses, m)[row]) == pytest.approx(
                sum(costs) / max(1, len(costs)), rel=1e-4
            )


def test_both_predictions_cost_the_same():
    """x_hat = z - t v_hat: the same answer said in two ways has one price, above the floor."""
    clean, positions = random_tokens(torch.Generator().manual_seed(0))
    velocity, _ = random_tokens(torch.Generator().manual_seed(1))
    as_x0, as_v = (
        Objective(ObjectiveOptions(prediction_type=p, loss_floor=1e-3)) for p in ("x0", "velocity")
    )
    rows = [torch.Generator().manual_seed(k) for k in range(3)]
    n = as_x0.noised(clean, positions, rows)
    x0 = as_x0.scheduler.x0_from_velocity(velocity, n.noisy, n.token_sigma)
    for m, loss in as_v.row_losses(velocity, clean, n).items():
        torch.testing.assert_close(
            loss, getattr(as_x0.row_losses(x0, clean, n), m), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("task", TOGETHER)
def test_what_a_task_gives(task):
    positions = Positions.of(ClipSpec(49, Fraction(25), 128, 128))
    v, a = positions.video[:, 0], positions.audio[:, 0]
    for seed in range(20):
        given = conditioning_tokens(task, positions, torch.Generator().manual_seed(seed))
        shares = (float(given.video.float().mean()), float(given.audio.float().mean()))
        if task == "joint":
            assert shares == (0, 0)
        elif task in ("a2v", "v2a"):
            assert shares == ((0, 1) if task == "a2v" else (1, 0))
        elif task == "extend":  # a beginning, cut at one moment in both streams
            assert all(0.1 < s < 0.8 for s in shares)
            cut = max(float(v[given.video].max()), float(a[given.audio].max()))
            assert float(v[~given.video].min()) >= cut - 0.04
            assert float(a[~given.audio].min()) >= cut - 0.08
        elif task == "image":
            assert given.video[v == v.min()].all()
            assert shares[1] == 0
            assert shares[0] <= 2 / 25
        elif task == "retake":
            assert max(shares) > 0
            assert min(shares) < 1
        elif task == "inpaint":  # the same rectangle in all frames, and something left to paint
            per_frame = given.video.view(25, -1)
            assert (per_frame == per_frame[0]).all()
            assert 0 < shares[0] < 1


def test_rows_do_not_depend_on_the_split():
    clean, positions = random_tokens(torch.Generator().manual_seed(0))
    objective, tasks = Objective(ObjectiveOptions()), dict.fromkeys(TOGETHER, 1.0)
    whole = objective.noised(
        clean, positions, [torch.Generator().manual_seed(k) for k in range(3)], tasks
    )
    last = objective.noised(
        clean.map(lambda x: x[2:]), positions, [torch.Generator().manual_seed(2)], tasks
    )
    assert torch.equal(whole.noisy.video[2:], last.noisy.video)
    assert torch.equal(whole.sigma.audio[2:], last.sigma.audio)


def test_balances():
    losses = {"video": torch.tensor(8.0), "audio": torch.tensor(2.0)}
    assert float(LossBalance("fixed", {"video": 0.5})(losses)) == 6.0
    running = LossBalance("ema", {})
    running.observe({"video": 8.0, "audio": 2.0})
    total = running(losses)
    assert float(total) == pytest.approx(2 * (0.4 * 8))  # weights 0.4 and 1.6: both now cost 3.2
    learned = LossBalance("uncertainty", {})
    optimizer = torch.optim.SGD(learned.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        learned(losses).backward()
        optimizer.step()
    torch.testing.assert_close(
        learned.log_variance.exp(), torch.tensor([8.0, 2.0]), rtol=0.02, atol=0
    )


def test_both_losses_fall(data, tmp_path):
    made = recipe(
        data,
        tmp_path,
        max_train_steps="20",
        train_batch_size="8",
        learning_rate="6e-3",
        ema_decay="0.8",
        checkpointing_steps="0",
        validation_steps="20",
        log_every="20",
        branch_learning_rate="audio=5e-3",
    )
    task = finetune.setup(made)
    with torch.no_grad():
        before = task.validate()
    summary = fit(task, made.training)
    for m in ("video", "audio"):
        assert summary.metrics[m] < 0.7 * before[m]
    trained = next(line for line in read_log(tmp_path / "log.jsonl") if "loss" in line)
    assert trained["supervised/audio"] == trained["supervised/video"] == 1
    assert {f"grad_norm/{b}" for b in (*BRANCHES, "memory_table")} <= trained.keys()
    assert summary.metrics == task.last_metrics
    loaded = AVTransformer.from_pretrained(
        tmp_path / "final" / "transformer"
    )  # the averaged weights
    own = dict(task.transformer.named_parameters())
    assert any(not torch.equal(p, own[n]) for n, p in loaded.named_parameters())
    card = (tmp_path / "final" / "README.md").read_text()
    assert "audio/t0.1" in card
    assert "learning_rate = 0.006" in card


def test_validation_repeats(data, tmp_path):
    task = finetune.setup(recipe(data, tmp_path))
    with torch.no_grad():
        first = task.validate()
        torch.rand(7)
        assert task.validate() == first
    levels = ("", "/t0.1", "/t0.3", "/t0.5", "/t0.7", "/t0.9")
    assert set(first) == {m + level for m in ("video", "audio") for level in levels}


@pytest.mark.parametrize(
    ("changes", "still"),
    [
        ({"modalities": "video", "tasks": "joint=1,a2v=1"}, lambda n: owner_of(n) != "video"),
        ({"modalities": "audio"}, lambda n: owner_of(n) != "audio"),
        ({"tasks": "t2a=1"}, lambda n: owner_of(n) == "video"),
        ({"tasks": "t2v=1"}, lambda n: owner_of(n) == "audio" and "phoneme_encoder" not in n),
        (
            {"branch_learning_rate": "text=0,memory=0", "memory_table_learning_rate": "0"},
            lambda n: branch_of(n) in ("text", "memory") or ".memory." in n,
        ),
    ],
)
def test_what_is_left_alone_stays_bit_identical(data, tmp_path, changes, still):
    made = recipe(
        data,
        tmp_path,
        max_train_steps="2",
        checkpointing_steps="0",
        adam_weight_decay="0.1",
        **changes,
    )
    task = finetune.setup(made)
    before = weights(task)
    fit(task, made.training)
    changed = moved(before, task)
    assert not [n for n in changed if still(n)]
    assert len(changed) > 10


def test_resume_is_bitwise_with_everything_on(data, tmp_path):
    options = {
        "tasks": ",".join(f"{t}=1" for t in TASKS),
        "loss_balance": "ema",
        "ema_decay": "0.9",
        "gradient_accumulation_steps": "2",
        "max_train_steps": "4",
        "train_batch_size": "3",
        "mixed_precision": "bf16",
        "noise_coupling": "independent",
    }
    run(data, tmp_path / "whole", **options)
    _, cut = run(data, tmp_path / "cut", **options, max_seconds="1e-6")
    assert (cut.reason, cut.step) == ("time", 1)
    run(data, tmp_path / "cut", **options, resume_from_checkpoint="latest")
    whole, again = (tmp_path / name / "checkpoint-4" for name in ("whole", "cut"))
    for path in whole.glob("*.safetensors"):
        theirs = load_file(again / path.name)
        assert [k for k, v in load_file(path).items() if not torch.equal(v, theirs[k])] == [], (
            path.name
        )
    assert (
        len(list(whole.glob("*.safetensors"))) == 5
    )  # transformer, text_encoder, balance, ema, extra
    with pytest.raises(ValueError, match=r"objective.loss_floor: 0.05 -> 0.1"):
        run(data, tmp_path / "cut", **options, resume_from_checkpoint="latest", loss_floor="0.1")


def test_two_processes_learn_what_one_learns(data, tmp_path):
    """Dense weights and memory tables alike: the same loss curve as one process with the same
    global batch.
    """
    options = {
        "max_train_steps": "4",
        "log_every": "1",
        "checkpointing_steps": "0",
        "tasks": "joint=2,a2v=1,t2a=1,isolated=1",
        "learning_rate": "1e-3",
    }

    def work(rank, port):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            ACCELERATE_USE_CPU="true",
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        run(data, tmp_path / "two", train_batch_size="2", **options)
        torch.distributed.destroy_process_group()

    children = []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            try:
                work(rank, 31500 + os.getppid() % 2000)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(77)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    run(data, tmp_path / "one", **options)
    two, one = (read_log(tmp_path / name / "log.jsonl") for name in ("two", "one"))
    assert len(two) == len(one) == 4
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for key in (k for k in a if k.startswith(("loss", "grad_norm"))):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-6), (a["step"], key)


def test_clips_of_two_lengths_share_no_batch(tmp_path):
    clips = (CLIP, ClipSpec(17, Fraction(25), 64, 128))
    held = write_clips(tmp_path / "mixed", 16, clips=clips)
    task, _ = run((held, held), tmp_path / "out", max_train_steps="2", checkpointing_steps="0")
    assert len(set(task.groups)) == 2
    assert set(task.validate()) >= {"video", "audio"}


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"learning_rat": "1"}, "option --learning_rat: unknown; did you mean learning_rate?"),
        (
            {"train_data": "nowhere"},
            "train_data: nowhere holds no cache.json; make it with `avdiff data cache`",
        ),
        ({"train_data": ""}, r"train_data=\[\]: needs folders of cached latents"),
        ({"tasks": "joint=1,a2w=1"}, "tasks: 'a2w' is unknown; needs joint, a2v"),
        ({"tasks": "joint=0"}, "needs at least one share above 0"),
        (
            {"tasks": "t2a=1", "modalities": "video"},
            r"tasks contain t2a, but modalities=\['video'\] learns nothing",
        ),
        ({"modalities": "smell"}, r"modalities=\['smell'\]: needs a list"),
        ({"rank": "4"}, "rank=4: LoRA needs a trained model; set pretrained_model_name_or_path"),
        ({"lora_targets": "ears"}, "lora_targets: 'ears' matches nothing"),
        (
            {"train_batch_size": "100"},
            "train_batch_size=100: a step needs 100 items that fit, the dataset has 32",
        ),
        ({"report_to": "pigeon"}, "report_to='pigeon': needs one of"),
        ({"preset": "hugh"}, "preset='hugh': needs one of tiny, presenter"),
        ({"caption_dropout": "1.5"}, "caption_dropout=1.5: needs a share from 0 to 1"),
        (
            {"noise_coupling": "pared"},
            "needs one of shared, paired, independent; did you mean paired",
        ),
        ({"prediction_type": "eps"}, "prediction_type='eps': needs one of x0, velocity"),
    ],
)
def test_wrong_recipes_are_refused_in_one_sentence(data, tmp_path, wrong, answer):
    with pytest.raises(ValueError, match=answer) as caught:
        run(data, tmp_path, **wrong)
    assert "\n" not in str(caught.value)


def test_stale_cache_is_refused(data, tmp_path):
    other = write_clips(tmp_path / "other", 4)
    path = tmp_path / "other" / "cache.json"
    path.write_text(path.read_text().replace('"v"', '"new"'))
    with pytest.raises(ValueError, match="was made by something else"):
        run((f"{data[0]},{other}", data[1]), tmp_path / "out")


def test_dry_run_says_what_would_happen(data, tmp_path, capsys):
    made = recipe(data, tmp_path / "out")
    (tmp_path / "r.toml").write_text(to_toml(made))
    assert finetune.main([str(tmp_path / "r.toml"), "--dry-run", "--max_train_steps", "16"]) is None
    said = capsys.readouterr().out
    assert "max_train_steps = 16" in said
    assert "8 steps of 4 clips in an epoch, 16 steps = 2.0 epochs" in said
    assert (
        "bucket 13 frames, 128x128, 0.52 s, video + audio: 28 video and 13 audio tokens, 32 clips"
        in said
    )
    assert not (tmp_path / "out").exists()


def test_a_modality_that_vanishes_is_reported(data, tmp_path, capsys):
    """Joint training on clips that came without sound: three log lines later the user knows."""
    mute = write_clips(tmp_path / "mute", 8, sound=False)
    run((mute, mute), tmp_path, max_train_steps="4", log_every="1", checkpointing_steps="0")
    warned = [line for line in read_log(tmp_path / "log.jsonl") if "warning" in line]
    assert [line["step"] for line in warned] == [3] * len(warned)
    told = " ".join(line["warning"] for line in warned)
    assert "audio supervision fell to 0%" in told
    assert "the audio branch gets no gradient" in told
    assert "video" not in told.replace("the video", "")
    assert "warning at step 3: audio supervision" in capsys.readouterr().out
    for tasks in ("joint=1", "t2v=1"):  # nobody asked for sound: no warning
        folder = tmp_path / tasks
        run(data, folder, tasks=tasks, max_train_steps="3", log_every="1", checkpointing_steps="0")
        assert not [line for line in read_log(folder / "log.jsonl") if "warning" in line]
