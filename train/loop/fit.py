"""The one training loop: step, log, validate, save, resume. Codecs, evaluators, the networks of G2P
and the transformer all use it.

    summary = fit(MyTask(...), FitOptions(output_dir="runs/a", max_train_steps=1000))

Implement `Task` (see train/loop/task.py); `fit` owns the rest: AdamW by phase, warm-up and
schedule, clipping, bf16, EMA, accumulation, several processes, the order of the data, and
checkpoints from which a run goes on bit for bit. Gradients are averaged over processes in flat
buckets after the last micro-batch rather than by DDP's forward hooks: so a loss may call any method
of a module (encode, decode), and a branch that took no part keeps `grad = None`. Under FSDP the
blocks of a module are cut over the processes (train/loop/fsdp.py) and averaged by FSDP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device, set_seed

from avdiff.train.loop import checkpoint as state
from avdiff.train.loop import fsdp, optim
from avdiff.train.loop.accelerator import Stop, make_accelerator, open_trackers
from avdiff.train.loop.dataloader import SeededLoader, hash_seed
from avdiff.train.loop.ema import EMA, averaged_weights
from avdiff.train.loop.fsdp import Sharding
from avdiff.train.loop.malloc import keep_freed_memory
from avdiff.train.loop.optim import (
    average_gradients,
    build_optimizer,
    build_scheduler,
    clip_gradients,
    group_norms,
)
from avdiff.train.loop.run_log import MetricAverager, RunLogger
from avdiff.train.loop.task import FitOptions, FitSummary, Loss, Task, row_generators

__all__ = ["FitOptions", "FitSummary", "Loss", "NonFiniteError", "Task", "fit", "row_generators"]


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names the step and the part."""


def fit(task: Task[Any], options: FitOptions, sharding: Sharding | None = None) -> FitSummary:
    """Train `task` until `max_train_steps`, a signal or `max_seconds`; always leaves a checkpoint
    to go on from.

    `sharding`: how weights are cut over the processes; None: as accelerate was launched, which is
    not at all but for FSDP.

    Raises:
        ValueError: options that do not fit the data or the checkpoint. NonFiniteError: NaN or
            infinity.
        state.CheckpointError: a checkpoint could not be written (full disk).
    """
    run = Run(task, options, sharding)
    run.start()
    began = time.monotonic()
    first = run.step
    waited = 0.0
    reason = "finished"
    with Stop() as stop, run.log_open():
        while run.step < options.max_train_steps:
            asked = time.monotonic()
            batches = run.next_batches(stop)
            waited += time.monotonic() - asked
            if batches is None:
                reason = "interrupted"
                break
            run.train_step(batches, waited=time.monotonic() - asked)
            if run.due(options.log_every):
                run.record_means()
            if run.due(options.validation_steps):
                run.validate()
            out_of_time = (
                options.max_seconds > 0 and time.monotonic() - began >= options.max_seconds
            )
            if run.agree(stop.requested or out_of_time) and run.step < options.max_train_steps:
                reason = "time" if out_of_time and not stop.requested else "interrupted"
                break
            if run.due(options.checkpointing_steps):
                run.save()
        run.finish(reason)
    seconds = time.monotonic() - began
    rows = (run.step - first) * run.loader.rows_per_step
    return FitSummary(
        run.step,
        reason,
        seconds,
        rows / max(seconds, 1e-9),
        waited / max(seconds, 1e-9),
        run.losses,
        run.metrics,
        run.checkpoint,
    )


class Run:
    """Everything that moves during training; `train_step` and `save` are its two halves."""

    def __init__(
        self, task: Task[Any], options: FitOptions, sharding: Sharding | None = None
    ) -> None:
        self.task = task
        self.options = options
        self.root = Path(options.output_dir)
        self.accelerator = make_accelerator(options)
        self.world_size = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.first = self.accelerator.is_main_process
        self.sharding = sharding or fsdp.requested(self.accelerator)
        task.device = self.accelerator.device
        if task.device.type == "cpu":
            keep_freed_memory()
        set_seed(options.seed, device_specific=True)
        if self.sharding is not None:
            fsdp.shard(task.modules, task.device, self.sharding)
        for module in task.modules.values() if self.sharding is None else ():
            fsdp.move_buffers(module.to(task.device), task.device)
        self.optimizers = {phase: build_optimizer(task, phase, options) for phase in task.phases}
        self.schedulers = {
            phase: build_scheduler(o, options) for phase, o in self.optimizers.items()
        }
        self.phase_params = {
            phase: [p for g in o.param_groups for p in g["params"]]
            for phase, o in self.optimizers.items()
        }
        names = optim.parameter_names(task.modules)
        self.norm_groups = {
            id(p): task.norm_group(names[id(p)]) for ps in self.phase_params.values() for p in ps
        }
        followed = (
            task.modules
            if task.ema_modules is None
            else {m: task.modules[m] for m in task.ema_modules}
        )
        self.ema = EMA(followed, options.ema_decay) if options.ema_decay else None
        self.loader = SeededLoader(
            task.dataset,
            task.collate,
            options.train_batch_size,
            options.gradient_accumulation_steps,
            self.rank,
            self.world_size,
            options.seed,
            options.dataloader_num_workers,
            task.groups,
        )
        self.means = MetricAverager()
        self.log = RunLogger(self.root / "log.jsonl", options.max_train_steps, self.first)
        self.step = 0
        self.best = float("inf")
        self.losses: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.checkpoint: Path | None = None
        self._window = time.monotonic()
        self._logged = 0
        self._last_loss = float("nan")
        self._lr: dict[str, float] = {}

    # ------------------------------------------------------------------------------------- one step
    def next_batches(self, stop: Stop) -> list[Any] | None:
        """Micro-batches of the next step on the device; None if the run was stopped while the
        workers died.
        """
        try:
            return [send_to_device(batch, self.task.device) for batch in self.loader.next_step()]
        except RuntimeError:
            if stop.requested:  # a signal to the whole group ends the workers before us
                return None
            raise

    def train_step(self, batches: Sequence[Any], waited: float) -> None:
        """Every phase once on the same micro-batches: forward, backward, average, clip, update."""
        phases = self.task.phases_at(self.step)
        for phase in phases:
            with optim.only_phase(self.phase_params, phase):
                for optimizer in self.optimizers.values():
                    optimizer.zero_grad(set_to_none=True)
                for micro, batch in enumerate(batches):
                    self._accumulate(phase, micro, batch)
            average_gradients(self.phase_params[phase], self.world_size)
            self._clip(phase)
            self._lr[phase] = self.options.learning_rate * _factor(self.schedulers[phase])
            self.optimizers[phase].step()
            self.schedulers[phase].step()
            self.task.after_step(phase, self._lr[phase])
        if self.ema:
            self.ema.update()
        self.step += 1
        self.means.add("data_wait", waited)
        self.log.tick(self.step, self._last_loss)

    def _accumulate(self, phase: str, micro: int, batch: Any) -> None:
        row = (micro * self.world_size + self.rank) * self.options.train_batch_size
        seed = hash_seed(self.options.seed, self.step, self.task.phases.index(phase)) + row
        generator = torch.Generator(self.task.device).manual_seed(seed)
        self.task.common_seed = hash_seed(
            self.options.seed, self.step, self.task.phases.index(phase), micro
        )
        with self.accelerator.autocast():
            loss = self.task.loss(batch, phase, generator)
        self._last_loss = loss.total.item()
        if not torch.isfinite(loss.total):
            bad = [name for name, part in loss.parts.items() if not torch.isfinite(part).all()]
            raise NonFiniteError(
                f"step {self.step}, phase {phase}: the loss is {self._last_loss}; first seen in "
                f"{bad[0] if bad else 'the total alone, no part is'}; the last checkpoint is "
                f"{self.checkpoint or 'none'}"
            )
        (loss.total / self.options.gradient_accumulation_steps).backward()
        self.means.add(self._key(phase, "loss"), self._last_loss)
        for name, part in (
            {f"loss/{k}": v for k, v in loss.parts.items()} | dict(loss.metrics)
        ).items():
            self.means.add(self._key(phase, name), float(part.detach().float().sum()), part.numel())

    @torch.no_grad()
    def _clip(self, phase: str) -> None:
        """Log the gradient norm of each group, then clip by the norm of all."""
        norms = group_norms(self.phase_params[phase], self.norm_groups)
        rows = self.task.row_optimizer(phase)
        if rows is not None:
            norms["memory_table"] = rows.grad_norm()
        for name, norm in norms.items():
            if not torch.isfinite(norm):
                raise NonFiniteError(
                    f"step {self.step}, phase {phase}: the gradient of {name} is {float(norm)}; "
                    f"the last checkpoint is {self.checkpoint or 'none'}"
                )
            self.means.add(self._key(phase, f"grad_norm/{name}"), float(norm))
        if self.options.max_grad_norm and norms:
            total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
            clip_gradients(self.phase_params[phase], self.options.max_grad_norm, total)
            if rows is not None:
                rows.scale_grads((self.options.max_grad_norm / (total + 1e-6)).clamp(max=1.0))

    def _key(self, phase: str, name: str) -> str:
        return name if len(self.task.phases) == 1 else f"{phase}/{name}"

    # ------------------------------------------------------------------------------------- watching
    def due(self, every: int) -> bool:
        """True at each `every`-th step; never for 0."""
        return every > 0 and self.step % every == 0

    def record_means(self) -> None:
        """One log line: means since the last one over all ranks, learning rate, speed, share of
        waiting.
        """
        steps = self.step - self._logged
        if self.world_size > 1:
            states = gather_object([self.means.state_dict()])
            self.means = MetricAverager()
            self.means.merge(states)
        values = self.means.pop()
        now = time.monotonic()
        elapsed = max(now - self._window, 1e-9)
        self._window = now
        self._logged = self.step
        waited = values.pop("data_wait", 0.0)
        self.losses = {k: v for k, v in values.items() if k.split("/")[0] == "loss" or "/loss" in k}
        values |= {
            self._key(phase, "lr"): lr for phase, lr in self._lr.items()
        } | self.task.report()
        values["samples_per_second"] = steps * self.loader.rows_per_step / elapsed
        values["data_wait"] = min(1.0, waited * steps / elapsed)
        self._record(values)
        for sentence in self.task.warnings(values):
            self.log.warn(self.step, sentence)

    def validate(self) -> None:
        """Measure with the averaged weights; keep them in `best` if the chosen metric never was
        better.
        """
        averaged = averaged_weights(self.task.modules, self.ema)
        with averaged, state.rng_kept(), torch.no_grad(), self.accelerator.autocast():
            self.task.step = self.step
            self.metrics = self.task.validate()
            self._record({f"validation/{k}": v for k, v in self.metrics.items()})
            name = self.options.best_metric.lstrip("+")
            if not name:
                return
            if name not in self.metrics:
                raise ValueError(
                    f"best_metric={name!r}: validation gives "
                    f"{', '.join(self.metrics) or 'no metrics'}"
                )
            value = (
                -self.metrics[name]
                if self.options.best_metric.startswith("+")
                else self.metrics[name]
            )
            if self.agree(
                self.first and value < self.best
            ):  # all ranks take part in an export, or none
                self.best = value
                self._export("best")

    def _export(self, name: str) -> None:
        with fsdp.exportable(self.task.modules, self.first):
            if self.first:
                with state.replacing(self.root / name) as directory:
                    self.task.save(directory)

    def _record(self, values: dict[str, float]) -> None:
        if values:
            self.log.record(self.step, values)
            self.accelerator.log(values, step=self.step)

    @contextmanager
    def log_open(self) -> Iterator[None]:
        """Progress bar up; down again, workers and trackers closed, whatever happens."""
        self.log.start(self.step)
        open_trackers(self.accelerator, self.options)
        try:
            yield
        finally:
            self.loader.close()
            self.log.stop()
            for tracker in self.accelerator.trackers:
                tracker.finish()

    # ------------------------------------------------------------------------------ save and resume
    def start(self) -> None:
        """Resume if asked for; refuse to mix a fresh run with an old one."""
        requested = self.options.resume_from_checkpoint
        found = state.find_checkpoint(self.root, requested) if requested else None
        if not requested and (old := state.list_checkpoints(self.root)):
            raise ValueError(
                f"output_dir={str(self.root)!r}: holds {old[-1].name} already; pass "
                "resume_from_checkpoint='latest' to go on, or choose another folder"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        if found:
            self._load(*found)
        elif requested:
            self.log.say(f"no checkpoint in {self.root} yet: starting at step 0")
        for key, count in self.loader.unused().items():
            self.log.say(
                f"{self.task.describe_group(key)}, {count} clips (fewer than a batch of "
                f"{self.loader.batch_size * self.world_size}: never used)"
            )
        for module in self.task.modules.values():
            module.train()
        self._logged = self.step
        self._window = time.monotonic()

    def save(self) -> None:
        """Write `checkpoint-<step>`: whole or not at all. Already there: nothing to do."""
        target = state.checkpoint_dir(self.root, self.step)
        if self.checkpoint == target:
            return
        error: Exception | None = None
        try:
            self._write(target)
        except state.CheckpointError as failure:
            error = failure
        if self.agree(error is not None):
            raise error or state.CheckpointError(
                f"{target}: another process could not write its part"
            )
        self.checkpoint = target
        if self.first:
            state.keep_newest(self.root, self.options.checkpoints_total_limit)

    def _write(self, target: Path) -> None:
        parts = self._parts()
        try:
            if self.first:
                with state.writing(target) as folder:
                    for name, content in parts:
                        write = (
                            state.write_tensors
                            if name.endswith(".safetensors")
                            else state.write_tree
                        )
                        write(folder / name, content)
                    state.seal(folder, target, self._facts())
        finally:  # the other ranks gather to the end, also when this one could not write
            for _ in parts:
                pass

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """Files of a checkpoint and what the first rank writes to them. All ranks must go through
        them all.
        """
        local = {"rng": state.rng_state(), "means": self.means.state_dict()}
        # small, so that rank 0 writes it all
        ranks = gather_object([local]) if self.world_size > 1 else [local]
        for name in self.task.modules:
            yield f"{name}.safetensors", fsdp.gathered(self.task.module_state(name), self.first)
        if self.ema:
            yield "ema.safetensors", fsdp.gathered(self.ema.state_dict(), self.first)
        if extra := self.task.extra_state_dict():
            yield "extra.safetensors", extra
        yield (
            "training.pt",
            {
                "step": self.step,
                "best": self.best,
                "loader": self.loader.state_dict(),
                "ranks": ranks,
                "optimizers": {
                    p: fsdp.gathered(o.state_dict(), self.first) for p, o in self.optimizers.items()
                },
                "schedulers": {p: s.state_dict() for p, s in self.schedulers.items()},
            },
        )

    def _facts(self) -> dict[str, Any]:
        sharded = {} if self.sharding is None else {"sharding": "fsdp2"}
        return {
            "step": self.step,
            "num_processes": self.world_size,
            "torch": torch.__version__,
            **sharded,
            "options": self.options.fixed(),
            "settings": self.task.settings(),
        }

    def _load(self, checkpoint: Path, manifest: dict[str, Any], skipped: list[str]) -> None:
        for reason in skipped:
            self.log.say(f"skipped: {reason}")
        for line in state.refuse_changes(
            checkpoint, manifest, self._facts(), self.options.allow_changed_options
        ):
            self.log.say(f"changed on resume: {line}")
        for name in self.task.modules:
            saved = state.read_tensors(checkpoint / f"{name}.safetensors")
            self.task.load_module_state(name, fsdp.slices(saved, self.task.module_state(name)))
        if self.ema and (checkpoint / "ema.safetensors").exists():
            self.ema.load_state_dict(state.read_tensors(checkpoint / "ema.safetensors"))
        if (checkpoint / "extra.safetensors").exists():
            self.task.load_extra_state_dict(state.read_tensors(checkpoint / "extra.safetensors"))
        tree = state.read_tree(checkpoint / "training.pt")
        for phase in self.task.phases:
            optimizer = self.optimizers[phase]
            sliced = fsdp.optimizer_slices(tree["optimizers"][phase], optimizer)
            optimizer.load_state_dict(sliced)
            self.schedulers[phase].load_state_dict(tree["schedulers"][phase])
        self.loader.load_state_dict(tree["loader"])
        self.step = tree["step"]
        self.best = tree["best"]
        self.checkpoint = checkpoint
        if self.rank < len(tree["ranks"]):
            state.set_rng_state(tree["ranks"][self.rank]["rng"])
            self.means.load_state_dict(tree["ranks"][self.rank]["means"])
        self.log.say(f"resumed from {checkpoint} at step {self.step}")

    def finish(self, reason: str) -> None:
        """Last log line, checkpoint and, if the run is complete, validation and export to
        `final`.
        """
        if self.step > self._logged and reason == "finished":
            self.record_means()
        if (
            reason == "finished"
            and self.options.validation_steps
            and not self.due(self.options.validation_steps)
        ):
            self.validate()
        self.save()
        if reason == "finished":
            with averaged_weights(self.task.modules, self.ema), state.rng_kept():
                self._export("final")
        else:
            self.log.say(
                f"stopped ({reason}) at step {self.step}; go on with "
                "resume_from_checkpoint='latest'"
            )

    # ---------------------------------------------------------------------------- several processes
    def agree(self, flag: bool) -> bool:
        """True if any rank says so."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.task.device)
        torch.distributed.all_reduce(votes)
        return bool(votes > 0)


def _factor(scheduler: torch.optim.lr_scheduler.LambdaLR) -> float:
    """Where the schedule stands, in units of the peak."""
    return float(scheduler.lr_lambdas[0](scheduler.last_epoch))
