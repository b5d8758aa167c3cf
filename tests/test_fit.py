"""The training loop: equal to a plain loop, exact resume from any death, one clear error for every
refusal.
"""

import os
import random
import resource
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from avdiff.train.loop.checkpoint import (
    CheckpointError,
    list_checkpoints,
    read_tensors,
    read_tree,
    write_tensors,
)
from avdiff.train.loop.dataloader import SeededDataset, SeededLoader, hash_seed
from avdiff.train.loop.fit import FitOptions, Loss, NonFiniteError, Task, fit, row_generators
from avdiff.train.loop.run_log import read_log

STEPS, ITEMS = 12, 40


class Items(SeededDataset):
    """Item i is a fixed vector plus jitter from the row's seed; `at` maps a fetch number to
    something that happens then.
    """

    def __init__(self, jitter=0.1, at=None):
        self.jitter, self.at, self.fetched = jitter, at or {}, 0

    def __len__(self):
        return ITEMS

    def sample(self, i, seed):
        self.fetched += 1
        self.at.get(self.fetched, lambda: None)()
        x = torch.randn(6, generator=torch.Generator().manual_seed(i))
        shake = torch.rand(6, generator=torch.Generator().manual_seed(seed))
        return {"x": x + self.jitter * shake, "i": i}


class Denoise(Task):
    """A small net with dropout and batch statistics, and a table trained outside the optimizer."""

    def __init__(self, at=None, jitter=0.1, dropout=0.2, when_saving=None):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 6)
        )
        self.modules = {"net": net, "idle": nn.Linear(2, 2)}
        self.table = torch.zeros(ITEMS, 6)
        self.dataset, self.when_saving = Items(jitter, at), when_saving or (lambda: None)

    def loss(self, batch, phase, generator):
        x = batch["x"]
        noise = torch.stack(
            [torch.randn(6, generator=g) for g in row_generators(generator, len(x))]
        )
        self.rows = batch["i"]
        error = (self.modules["net"](x + 0.3 * noise) - x - self.table[batch["i"]]).square().mean(1)
        return Loss(error.mean(), {"error": error})

    def after_step(self, phase, lr):
        self.table[self.rows] += lr * torch.rand(len(self.rows), 6)

    def validate(self):
        return {"drawn": float(torch.rand(()) + self.modules["net"](torch.ones(1, 6)).sum())}

    def extra_state_dict(self):
        self.when_saving()
        return {"table": self.table}

    def load_extra_state_dict(self, state):
        self.table = state["table"]


def options(folder, **changes):
    return FitOptions(
        **{
            "output_dir": str(folder),
            "max_train_steps": STEPS,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_warmup_steps": 3,
            "ema_decay": 0.9,
            "checkpointing_steps": 3,
            "validation_steps": 4,
            "log_every": 2,
            "seed": 5,
            **changes,
        }
    )


def result(folder):
    """All that a run leaves: tensors of its last checkpoint and exports, and the log without
    timings.
    """
    last = folder / f"checkpoint-{STEPS}"
    tensors = {
        f"{path.parent.name}/{path.name}/{k}": v
        for path in (*last.glob("*.safetensors"), *(folder / "final").glob("*.safetensors"))
        for k, v in read_tensors(path).items()
    }
    log = [
        {k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait")}
        for line in read_log(folder / "log.jsonl")
    ]
    return tensors, log, read_tree(last / "training.pt")["optimizers"]["main"]["state"]


def assert_same(folder, reference):
    (tensors, log, moments), (tensors_0, log_0, moments_0) = result(folder), reference
    assert tensors.keys() == tensors_0.keys()
    assert [k for k in tensors if not torch.equal(tensors[k], tensors_0[k])] == []
    assert log == log_0
    assert all(torch.equal(moments[p][k], moments_0[p][k]) for p in moments_0 for k in moments_0[p])


def in_child(work):
    """Run `work` in a forked process with its output thrown away; returns its exit code (77: it
    raised).
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        os._exit(0)
    except BaseException:
        os._exit(77)


def kill():
    os._exit(9)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert fit(Denoise(), options(folder)).reason == "finished"
    return result(folder)


class Plain(Denoise):
    """Without dropout, batch statistics, jitter and table: rows do not touch each other."""

    def __init__(self):
        super().__init__(jitter=0)
        torch.manual_seed(0)
        self.modules = {"net": nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))}

    def after_step(self, phase, lr):
        pass


def test_equals_a_plain_loop(tmp_path):
    """Twenty lines of ordinary torch give the same weights: order, noise, AdamW, warm-up, cosine,
    clipping, EMA.
    """
    task, twin = Plain(), Plain()
    fit(task, options(tmp_path, ema_decay=0.5, max_grad_norm=0.5))
    named = dict(twin.modules["net"].named_parameters())
    average = {n: p.detach().clone() for n, p in named.items()}
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=False)
    loader = SeededLoader(twin.dataset, None, 4, 2, seed=5)
    for step in range(STEPS):
        for group in adam.param_groups:
            group["lr"] = 1e-2 * (
                step / 3 if step < 3 else 0.5 * (1 + np.cos(np.pi * (step - 3) / (STEPS - 3)))
            )
        adam.zero_grad()
        for micro, batch in enumerate(loader.next_step()):
            generator = torch.Generator().manual_seed(hash_seed(5, step, 0) + 4 * micro)
            (twin.loss(batch, "main", generator).total / 2).backward()
        nn.utils.clip_grad_norm_(named.values(), 0.5)
        adam.step()
        decay = min(0.5, (1 + step) / (10 + step))
        average = {n: decay * average[n] + (1 - decay) * p.detach() for n, p in named.items()}
    final = read_tensors(tmp_path / "final" / "net.safetensors")
    for name, p in task.modules["net"].named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(final[name], average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_death_is_bitwise(tmp_path, reference, workers):
    """Killed in the middle of steps and of saves: the run goes on as if nothing had happened."""
    points = [
        ("fetch", n)
        for n in random.Random(workers).sample(range(30, STEPS * 8), 16 if not workers else 1)
    ]
    points += [("save", n) for n in ((1, 2, 3, 4) if not workers else (2,))]
    for kind, number in points:
        folder = tmp_path / f"{kind}-{number}"
        saves = iter(range(1, 100))
        dies = (
            Denoise(at={number: kill})
            if kind == "fetch"
            else Denoise(
                when_saving=lambda saves=saves, number=number: (
                    kill() if next(saves) == number else None
                )
            )
        )
        if (
            workers and kind == "fetch"
        ):  # the workers fetch, so the parent is killed from its own hook
            dies = Denoise()
            dies.validate = kill
        assert in_child(partial(fit, dies, options(folder, dataloader_num_workers=workers))) == 9
        fit(
            Denoise(),
            options(folder, dataloader_num_workers=workers, resume_from_checkpoint="latest"),
        )
        assert_same(folder, reference)


def test_full_disk_keeps_what_was_there(tmp_path, reference):
    def fills_up():
        limit = 8000  # bytes a file may have: less than training.pt, more than the log
        at = {
            8 * 5: lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)
            )
        }
        try:
            fit(Denoise(at=at), options(tmp_path))
        except CheckpointError as error:
            os._exit(5 if "checkpoint-6" in str(error) and "untouched" in str(error) else 6)

    assert in_child(fills_up) == 5
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not list(tmp_path.glob(".*.tmp"))
    fit(Denoise(), options(tmp_path, resume_from_checkpoint="latest"))
    assert_same(tmp_path, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(tmp_path, reference, number):
    before = signal.getsignal(number)
    summary = fit(Denoise(at={35: lambda: os.kill(os.getpid(), number)}), options(tmp_path))
    assert (summary.reason, summary.step) == ("interrupted", 5)
    assert signal.getsignal(number) is before
    fit(Denoise(), options(tmp_path, resume_from_checkpoint="latest"))
    assert_same(tmp_path, reference)


def test_time_limit_saves_and_leaves(tmp_path, reference):
    summary = fit(Denoise(), options(tmp_path, max_seconds=1e-6))
    assert (summary.reason, summary.step, summary.checkpoint.name) == ("time", 1, "checkpoint-1")
    fit(Denoise(), options(tmp_path, resume_from_checkpoint="latest"))
    assert_same(tmp_path, reference)


def test_broken_checkpoints_are_skipped_and_old_ones_deleted(tmp_path, reference, capsys):
    fit(Denoise(), options(tmp_path, checkpoints_total_limit=3))
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "checkpoint-6",
        "checkpoint-9",
        "checkpoint-12",
    ]
    damaged = tmp_path / "checkpoint-12" / "net.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    (tmp_path / "checkpoint-9" / "training.pt").unlink()
    fit(Denoise(), options(tmp_path, resume_from_checkpoint="latest"))
    said = capsys.readouterr().out
    for words in ("net.safetensors is damaged", "training.pt is missing", "at step 6"):
        assert words in said
    assert_same(tmp_path, reference)
    for path in list_checkpoints(tmp_path):
        (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is broken"):
        fit(Denoise(), options(tmp_path, resume_from_checkpoint="latest"))


def test_changed_options_are_listed(tmp_path):
    fit(Denoise(), options(tmp_path, max_seconds=1e-6))
    again = {"resume_from_checkpoint": "latest", "learning_rate": 2e-2, "log_every": 1}
    with pytest.raises(ValueError, match=r"other options \(learning_rate: 0.01 -> 0.02\)"):
        fit(Denoise(), options(tmp_path, **again))
    assert fit(Denoise(), options(tmp_path, allow_changed_options=True, **again)).step == STEPS
    with pytest.raises(ValueError, match="holds checkpoint-12 already"):
        fit(Denoise(), options(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"learning_rate": -1.0}, "learning_rate=-1.0: needs at least 0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"mixed_precision": "fp16"}, "needs no or bf16 or auto"),
        ({"train_batch_size": 99}, "a step needs 198 items"),
        ({"report_to": "carrier_pigeon"}, "report_to='carrier_pigeon': needs one of"),
        ({"resume_from_checkpoint": "nowhere"}, "no such directory"),
        ({"lr_scheduler": "wild"}, "cosine or constant"),
    ],
)
def test_wrong_options_are_refused(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        fit(Denoise(), options(tmp_path, **wrong))


@pytest.mark.parametrize("native", [False, True])
def test_precision_follows_the_device(tmp_path, monkeypatch, capsys, native):
    for place in ("task", "accelerator"):
        monkeypatch.setattr(f"avdiff.train.loop.{place}.native_bf16", lambda: native)
    assert options(tmp_path, mixed_precision="auto").mixed_precision == ("bf16" if native else "no")
    fit(Denoise(), options(tmp_path, mixed_precision="bf16"))
    assert ("only emulates bf16" in capsys.readouterr().out) is not native


def test_nan_names_step_and_part(tmp_path):
    class Breaks(Denoise):
        def loss(self, batch, phase, generator):
            loss = super().loss(batch, phase, generator)
            self.calls = getattr(self, "calls", 0) + 1
            hurt = loss.parts["error"] * (float("inf") if self.calls == 9 else 1)
            return Loss(hurt.mean(), {"fine": torch.ones(4), "error": hurt})

    with pytest.raises(
        NonFiniteError, match=r"step 4, phase main: the loss is inf; first seen in error; .*-3"
    ):
        fit(Breaks(), options(tmp_path))


class Pair(Task):
    """Two phases, as a GAN has them; `other` takes no part in any loss."""

    phases = ("generator", "discriminator")

    def __init__(self):
        torch.manual_seed(1)
        self.modules = {"g": nn.Linear(6, 6), "d": nn.Linear(6, 1), "other": nn.Linear(3, 3)}
        self.dataset, self.seen = Items(), []

    def parameters(self, phase):
        owner = self.modules[phase[0]]
        return [
            *owner.parameters(),
            *(self.modules["other"].parameters() if phase == "generator" else ()),
        ]

    def phases_at(self, step):
        return self.phases if step >= 2 else ("generator",)

    def loss(self, batch, phase, generator):
        fake = self.modules["g"](batch["x"])
        self.seen.append((phase, fake.requires_grad, self.modules["d"].weight.requires_grad))
        sign = 1 if phase == "generator" else -1
        return Loss(sign * self.modules["d"](fake).mean())


def test_phases_train_only_their_own(tmp_path):
    task = Pair()
    before = {
        k: v.clone() for m in task.modules for k, v in ((m, task.modules[m].weight.detach()),)
    }
    fit(task, options(tmp_path, max_train_steps=2, ema_decay=0))
    assert torch.equal(task.modules["d"].weight, before["d"])
    assert not torch.equal(task.modules["g"].weight, before["g"])
    fit(
        task,
        options(
            tmp_path,
            max_train_steps=4,
            ema_decay=0,
            resume_from_checkpoint="latest",
            allow_changed_options=True,
        ),
    )
    assert not torch.equal(task.modules["d"].weight, before["d"])
    assert torch.equal(
        task.modules["other"].weight, before["other"]
    )  # no gradient, no decay, bit for bit
    assert set(task.seen) == {("generator", True, False), ("discriminator", False, True)}
    logged = read_log(tmp_path / "log.jsonl")[-1]
    assert {"generator/loss", "discriminator/loss", "generator/grad_norm/g"} <= logged.keys()


def losses(folder):
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def test_two_processes_see_what_one_sees(tmp_path):
    """Two gloo processes of 4 rows, one of 8, and one of 4 with accumulation: the same loss
    curve.
    """

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
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        fit(Plain(), options(tmp_path / "two", gradient_accumulation_steps=1))
        torch.distributed.destroy_process_group()

    children = []
    port = 29500 + os.getpid() % 2000
    for rank in range(2):
        pid = os.fork()
        if not pid:
            os._exit(in_child(lambda rank=rank: work(rank, port)))
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0, 0]
    fit(Plain(), options(tmp_path / "one", gradient_accumulation_steps=1, train_batch_size=8))
    fit(Plain(), options(tmp_path / "micro"))
    assert len(losses(tmp_path / "two")) == STEPS // 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "micro"), losses(tmp_path / "one"), rtol=1e-5)


def test_feed_visits_everything_and_keeps_groups_apart():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return i

    groups = [i % 3 for i in range(24)]
    feeds = [
        SeededLoader(Numbers(), None, 2, 2, rank, 2, seed=3, groups=groups) for rank in range(2)
    ]
    assert feeds[0].steps_per_epoch == 3
    epochs = []
    for _ in range(2):
        steps = [[loader.next_step() for loader in feeds] for _ in range(3)]
        for step in steps:
            for micro in zip(*step, strict=True):  # the same micro-batch on both ranks
                assert len({int(i) % 3 for batch in micro for i in batch}) == 1
        epochs.append([int(i) for step in steps for rank in step for batch in rank for i in batch])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]


def test_tied_weights_and_views_are_saved(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    write_tensors(
        tmp_path / "t.safetensors", {"a": weight, "b": weight, "row": weight[1], "t": weight.T}
    )
    read = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(read["b"], weight)
    assert torch.equal(read["row"], weight[1])
    assert torch.equal(read["t"], weight.T)


def test_best_weights_are_kept(tmp_path):
    class Judged(Denoise):
        scores = iter([3.0, 1.0, 2.0])

        def validate(self):
            score = next(self.scores)
            if score == 1.0:
                self.at_best = self.modules["net"][0].weight.clone()
            return {"score": score}

    task = Judged()
    fit(task, options(tmp_path, best_metric="score"))
    assert torch.equal(
        read_tensors(tmp_path / "best" / "net.safetensors")["0.weight"], task.at_best
    )
    Judged.scores = iter([1.0])
    with pytest.raises(ValueError, match="best_metric='wrong': validation gives score"):
        fit(Judged(), options(tmp_path / "b", best_metric="wrong"))
