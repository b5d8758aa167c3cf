"""The recipe of training AVTransformer: what a TOML file and flags can say, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from avdiff.train.task import FitOptions

TOGETHER = ("joint", "a2v", "v2a", "extend", "image", "retake", "inpaint")  # drawn per row, both modalities present
APART = ("t2v", "t2a", "isolated")  # drawn per micro-batch: a modality is absent, or the two do not see each other
TASKS = (*TOGETHER, *APART)
BRANCHES = ("video", "audio", "cross", "shared", "text", "memory")
Modality = Literal["video", "audio"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model is trained."""

    pretrained_model_name_or_path: str | None = None
    """Pipeline folder or hub name to start from; nothing trains from scratch."""
    preset: str = "presenter"
    """Size of a model from scratch: tiny, presenter, base or large."""
    codecs: str | None = None
    """Folder with vae, audio_vae and vocoder, to export a whole pipeline from scratch training."""
    vocab_size: int = 4096
    """Entries of the caption tokenizer that scratch training makes from the captions."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class DataOptions:
    """What it is trained on: folders of cached latents (`avdiff data cache`)."""

    train_data: tuple[str, ...] = ()
    """Cache folders for training."""
    validation_data: tuple[str, ...] = ()
    """Cache folders that are only measured on."""
    caption_dropout: float = 0.1
    """Share of rows that lose their description: what guidance compares with."""
    script_dropout: float = 0.1
    """Share of rows that lose the spoken words."""
    text_dropout: float = 0.05
    """Share of rows that lose both."""
    video_script: float = 0.5
    """Share of micro-batches with sound in which the video branch reads the words too, warped by up to 80 ms."""
    validation_items: int = 32
    """Held-out clips that each validation measures."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """What counts as good."""

    modalities: tuple[Modality, ...] = ("video", "audio")
    """Branches that are trained; the other one, and all that it reads, keeps its weights bit for bit."""
    tasks: dict[str, float] = field(default_factory=lambda: {"joint": 1.0})
    """Shares of tasks: joint, a2v, v2a, t2v, t2a, isolated, extend, image, retake, inpaint."""
    prediction_type: Literal["x0", "velocity"] = "x0"
    """What the network's output means; the loss is that of the velocity in either case."""
    noise_coupling: Literal["shared", "paired", "independent"] = "paired"
    """Noise levels of the two modalities: one for both, one time with two shifts, or two times."""
    shift_video: float = 3.0
    """Time shift of video, above 1 towards noise."""
    shift_audio: float = 1.0
    """Time shift of audio."""
    logit_mean: float = 0.0
    """Mean of the logit-normal density of noise levels."""
    logit_std: float = 1.0
    """Its standard deviation."""
    uniform_share: float = 0.1
    """Share of rows with uniform noise levels instead."""
    loss_floor: float = 0.05
    """Noise level below which the x0 loss is not weighted up further: weight 1 / max(t, floor)^2."""
    loss_balance: Literal["fixed", "ema", "uncertainty"] = "fixed"
    """How the two modalities share the loss: fixed weights, divided by their running means, or learned."""
    loss_weights: dict[str, float] = field(default_factory=lambda: {"video": 1.0, "audio": 1.0})
    """Weight of each modality, on top of the balance."""
    router_balance: float = 0.01
    """Weight of the experts' load-balance loss."""


@dataclass(frozen=True)
class RateOptions:
    """Learning rates that differ from `learning_rate`."""

    branch_learning_rate: dict[str, float] = field(default_factory=dict)
    """Learning rate of a branch: video, audio, cross, shared, text or memory; 0 freezes it."""
    memory_table_learning_rate: float = 0.05
    """Row-wise Adagrad rate of the memory tables, which follows the same schedule; 0 freezes them."""


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA; rank 0 trains the weights themselves."""

    rank: int = 0
    """Rank of the update; 0 for full training."""
    lora_alpha: float | None = None
    """Scale of the update is alpha / rank; nothing means alpha = rank."""
    lora_dropout: float = 0.0
    """Dropout before the update."""
    lora_targets: tuple[str, ...] = ("all",)
    """Branches that get an update: video, audio, cross, shared, text, memory or all."""
    branch_rank: dict[str, int] = field(default_factory=dict)
    """Rank of a branch where it differs."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run."""

    model: ModelOptions
    data: DataOptions
    objective: ObjectiveOptions
    rates: RateOptions
    adapter: AdapterOptions
    training: FitOptions

    def check(self) -> None:
        """Refuse what cannot work, without loading anything heavy.

        Raises:
            ValueError: names the option, its value and what fits.
        """
        o, d, a = self.objective, self.data, self.adapter
        if not d.train_data:
            raise ValueError("train_data=[]: needs folders of cached latents; `avdiff data cache` makes one")
        for name in ("train_data", "validation_data"):
            for folder in getattr(d, name):
                if not (Path(folder) / "cache.json").is_file():
                    raise ValueError(f"{name}: {folder} holds no cache.json; make it with `avdiff data cache`")
        if not o.modalities:
            raise ValueError("modalities=[]: needs video, audio or both")
        _shares("tasks", o.tasks, TASKS)
        if not sum(o.tasks.values()) > 0:
            raise ValueError(f"tasks={o.tasks}: needs at least one share above 0")
        for only, wrong in (("video", ("t2a", "v2a")), ("audio", ("t2v", "a2v", "image"))):
            hit = [t for t in wrong if o.tasks.get(t)]
            if o.modalities == (only,) and hit:
                raise ValueError(f"tasks contain {hit[0]}, but modalities={[only]} learns nothing from it; drop it")
        for name in ("caption_dropout", "script_dropout", "text_dropout", "video_script"):
            if not 0 <= getattr(d, name) <= 1:
                raise ValueError(f"{name}={getattr(d, name)}: needs a share from 0 to 1")
        for name in ("shift_video", "shift_audio", "logit_std", "loss_floor"):
            if not getattr(o, name) > 0:
                raise ValueError(f"{name}={getattr(o, name)}: needs a number above 0")
        _shares("loss_weights", o.loss_weights, ("video", "audio"))
        _shares("branch_learning_rate", self.rates.branch_learning_rate, BRANCHES)
        _shares("branch_rank", a.branch_rank, BRANCHES)
        if a.rank < 0:
            raise ValueError(f"rank={a.rank}: needs a whole number, 0 for full training")
        if a.rank and not self.model.pretrained_model_name_or_path:
            raise ValueError(f"rank={a.rank}: LoRA needs a trained model; set pretrained_model_name_or_path")
        for target in a.lora_targets:
            if target not in (*BRANCHES, "all"):
                raise ValueError(f"lora_targets: {target!r} matches nothing; needs {', '.join(BRANCHES)} or all")
        if a.branch_rank and not a.rank:
            raise ValueError(f"branch_rank={a.branch_rank}: has no effect with rank=0; set rank")


def taught(objective: ObjectiveOptions) -> tuple[str, ...]:
    """Modalities that are trained and that some task of the mix generates."""
    others = {"video": ("t2a", "v2a"), "audio": ("t2v", "a2v")}
    shares = objective.tasks.items()
    return tuple(m for m in objective.modalities if any(s > 0 and t not in others[m] for t, s in shares))


def _shares(name: str, table: Mapping[str, float], keys: tuple[str, ...]) -> None:
    for key, value in table.items():
        if key not in keys:
            raise ValueError(f"{name}: {key!r} is unknown; needs {', '.join(keys)}")
        if value < 0:
            raise ValueError(f"{name}.{key}={value}: needs a number of at least 0")
