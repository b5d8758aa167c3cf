"""The recipe of training AVTransformer: what a TOML file and flags can say, checked before a model
is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import avdiff
from avdiff.train.loop.task import FitOptions

# drawn per row, both modalities present
TOGETHER = ("joint", "a2v", "v2a", "extend", "image", "retake", "inpaint")
# drawn per micro-batch: a modality is absent, or the two do not see each other
APART = ("t2v", "t2a", "isolated")
TASKS = (*TOGETHER, *APART)
BRANCHES = ("video", "audio", "cross", "shared", "text", "memory")
Modality = Literal["video", "audio"]


@dataclass(frozen=True)
class Target:
    """What a LoRA of a kind updates: these branches, where only that stream uses them."""

    owner: Modality
    branches: tuple[str, ...]


# what people train; the recipes lora_<name>.toml set the tasks that go with them
TARGETS = {
    "character": Target("video", ("video", "text")),  # how somebody or something looks
    "voice": Target("audio", ("audio", "text")),  # how somebody or something sounds
    "foley": Target("audio", ("audio", "cross", "text")),  # sound that follows a picture: v2a
    "a2v": Target("video", ("video", "cross", "text")),  # a picture that follows a sound
}


@dataclass(frozen=True)
class ModelOptions:
    """Which model is trained."""

    pretrained_model_name_or_path: str | None = None
    """Pipeline folder or hub name to start from, or presenter for the one in the package; nothing
    trains from scratch.
    """
    preset: str = "presenter"
    """Size of a model from scratch: tiny, presenter, base or large."""
    codecs: str | None = None
    """Folder with vae, audio_vae and vocoder for the exported pipeline; nothing takes those of the
    model or teacher.
    """
    vocab_size: int = 4096
    """Entries of the caption tokenizer that scratch training makes from the captions."""
    preset_changes: dict[str, int] = field(default_factory=dict)
    """Numbers of the preset that differ, such as { num_layers = 4 }; its lists of layers then end
    earlier.
    """
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        _find_shipped(self, "pretrained_model_name_or_path", "codecs")


@dataclass(frozen=True)
class DataOptions:
    """What it is trained on: folders of cached latents (`avdiff data cache`)."""

    train_data: tuple[str, ...] = ()
    """Cache folders for training."""
    validation_data: tuple[str, ...] = ()
    """Cache folders that are only measured on."""
    caption_dropout: float = 0.1
    """Share of rows that lose their description: what guidance compares with."""
    phoneme_dropout: float = 0.1
    """Share of rows that lose the spoken words."""
    text_dropout: float = 0.05
    """Share of rows that lose both."""
    video_caption_dropout: float = 0.0
    """Share of rows whose picture alone does not follow the description."""
    audio_caption_dropout: float = 0.0
    """Share of rows whose sound alone does not follow the description."""
    video_phonemes: float = 0.5
    """Share of micro-batches with sound in which the video branch reads the words too, warped by up
    to 80 ms.
    """
    attribute_lists: float = 0.0
    """Share of rows whose description is completed with the list of all that is drawn, as
    generation completes it; for clips of the corpus, whose attributes are known.
    """
    validation_items: int = 32
    """Held-out clips that each validation measures."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """What counts as good."""

    modalities: tuple[Modality, ...] = ("video", "audio")
    """Branches that are trained; the other one, and all that it reads, keeps its weights bit for
    bit.
    """
    tasks: dict[str, float] = field(default_factory=lambda: {"joint": 1.0})
    """Shares of tasks: joint, a2v, v2a, t2v, t2a, isolated, extend, image, retake, inpaint."""
    prediction_type: Literal["x0", "velocity"] = "x0"
    """What the network's output means; the loss is that of the velocity in either case."""
    noise_coupling: Literal["shared", "paired", "independent"] = "paired"
    """Noise levels of the two modalities: one for both, one time with two shifts, or two times."""
    shift_video: float | None = None
    """Time shift of video, above 1 towards noise; nothing takes that of the model or teacher, 3 for
    a preset.
    """
    shift_audio: float | None = None
    """Time shift of audio; nothing takes that of the model or teacher, 1 for a preset."""
    frame_correlation: float | None = None
    """Correlation of the video noise of any two frames of a clip, in [0, 1): what stands still is
    then settled with what moves, and flickers less; nothing takes that of the model or teacher, 0
    for a preset.
    """
    logit_mean: float = 0.0
    """Mean of the logit-normal density of noise levels."""
    logit_std: float = 1.0
    """Its standard deviation."""
    uniform_share: float = 0.1
    """Share of rows with uniform noise levels instead."""
    loss_floor: float = 0.05
    """Noise level below which the x0 loss is not weighted up further: weight 1 / max(t, floor)^2.
    """
    loss_balance: Literal["fixed", "ema", "uncertainty"] = "fixed"
    """How the two modalities share the loss: fixed weights, divided by their running means, or
    learned.
    """
    loss_weights: dict[str, float] = field(default_factory=lambda: {"video": 1.0, "audio": 1.0})
    """Weight of each modality, on top of the balance."""
    learned_guidance: dict[str, float] = field(default_factory=dict)
    """Text guidance that is trained into the weights, by modality, such as { video = 2.2, audio =
    2.0 }: one pass then answers like two; needs text_dropout. Nothing trains none, and unlearns
    what a distilled model has.
    """
    phoneme_head: float = 0.0
    """Weight of naming the phoneme that sounds, from the sound's middle block; 0 builds no head."""
    viseme_head: float = 0.0
    """Weight of naming the viseme that shows, from the picture's middle block; 0 builds no head."""
    router_balance: float = 0.01
    """Weight of the experts' load-balance loss."""


@dataclass(frozen=True)
class RateOptions:
    """The optimizer, and learning rates that differ from `learning_rate`."""

    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    """adamw; adamw8bit (package bitsandbytes) with a quarter of its memory; or muon for the
    matrices inside the blocks and adamw for the rest, with one learning rate for both.
    """
    branch_learning_rate: dict[str, float] = field(default_factory=dict)
    """Learning rate of a branch: video, audio, cross, shared, text or memory; 0 freezes it."""
    memory_table_learning_rate: float = 0.05
    """Row-wise Adagrad rate of the memory tables, which follows the same schedule; 0 freezes them.
    """


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
    """Branches that get an update: video, audio, cross, shared, text, memory or all; or what it is
    for: character (the picture's video and text), voice (the sound's audio and text), foley (the
    sound's audio, cross and text) or a2v (the picture's video, cross and text).
    """
    branch_rank: dict[str, int] = field(default_factory=dict)
    """Rank of a branch where it differs."""


@dataclass(frozen=True)
class DistillOptions:
    """Learning from a teacher. `pretrained_model_name_or_path` is what the student starts from,
    usually the teacher.
    """

    teacher: str | None = None
    """Pipeline folder or hub name of the teacher; without one the run is no distillation."""
    distill: Literal["size", "guidance", "steps"] = "steps"
    """What is learned: the teacher's estimates in a smaller model, its guided estimates in one
    pass, or where several of its guided steps lead in one.
    """
    teacher_guidance_scale: float | None = None
    """Text guidance of the teacher's picture; nothing takes what its pipeline recommends, and 1 for
    size.
    """
    teacher_audio_guidance_scale: float | None = None
    """Text guidance of the teacher's sound; likewise."""
    student_steps: int = 8
    """Steps of the student's sampler: its grid for `steps` and with `own_steps`, and then what its
    pipeline uses.
    """
    teacher_substeps: int = 2
    """Guided steps of the teacher inside one step of the student."""
    own_steps: int = 0
    """Before it learns, the student takes up to so many steps of its own from a noisier point
    (DAgger); 0 never.
    """
    data_weight: float = 0.0
    """Share of the plain loss on the data, for size and guidance."""
    feature_weight: float = 0.0
    """Weight of the distance between the normalized outputs of matching blocks."""
    start_from_teacher: bool = True
    """A student from a preset starts with those weights of the teacher's that fit."""

    def __post_init__(self) -> None:
        _find_shipped(self, "teacher")


@dataclass(frozen=True)
class SampleOptions:
    """Clips made and judged at each validation."""

    sample_prompts: tuple[str, ...] = ()
    """Prompts, words to speak in double quotes; in TOML, since a comma on the command line makes a
    list.
    """


@dataclass(frozen=True)
class ExportOptions:
    """What happens to the finished model besides output_dir/final."""

    push_to_hub: bool = False
    """Upload output_dir/final to the hub at the end."""
    hub_model_id: str | None = None
    """Name on the hub: user/model."""
    hub_private: bool = False
    """Make a private repository there."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run."""

    model: ModelOptions
    data: DataOptions
    objective: ObjectiveOptions
    rates: RateOptions
    adapter: AdapterOptions
    distillation: DistillOptions
    samples: SampleOptions
    export: ExportOptions
    training: FitOptions

    def check(self) -> None:
        """Refuse what cannot work, without loading anything heavy.

        Raises:
            ValueError: names the option, its value and what fits.
        """
        for section, rules in RANGES.items():
            options = getattr(self, section)
            for name, rule in rules.items():
                value = getattr(options, name)
                if value is not None and not rule.fits(value):
                    raise ValueError(f"{name}={value}: needs {rule.words}")
        for section, tables in TABLES.items():
            for name, keys in tables.items():
                _shares(name, getattr(getattr(self, section), name), keys)
        for rule in RULES:
            rule(self)

    def settings(self) -> dict[str, object]:
        """What must not change between interruption and resume, by "section.name"."""
        sections = ["model", "data", "objective", "rates", "adapter"]
        if self.distillation.teacher is not None:
            sections.append("distillation")
        flat: dict[str, object] = {}
        for section in sections:
            flat |= {f"{section}.{k}": v for k, v in asdict(getattr(self, section)).items()}
        return flat


@dataclass(frozen=True)
class Range:
    """What a number must be, as a test and in words."""

    fits: Callable[[float], bool]
    words: str


SHARE = Range(lambda value: 0 <= value <= 1, "a share from 0 to 1")
WEIGHT = Range(lambda value: value >= 0, "a weight of at least 0")
POSITIVE = Range(lambda value: value > 0, "a number above 0")
AT_LEAST_0 = Range(lambda value: value >= 0, "at least 0")
AT_LEAST_1 = Range(lambda value: value >= 1, "at least 1")
CORRELATION = Range(lambda value: 0 <= value < 1, "a number from 0 to below 1")
RANK = Range(lambda value: value >= 0, "a whole number, 0 for full training")

# section -> option -> what fits; an option without a value passes
RANGES: dict[str, dict[str, Range]] = {
    "data": {
        "caption_dropout": SHARE,
        "phoneme_dropout": SHARE,
        "text_dropout": SHARE,
        "video_phonemes": SHARE,
        "attribute_lists": SHARE,
        "video_caption_dropout": SHARE,
        "audio_caption_dropout": SHARE,
    },
    "objective": {
        "phoneme_head": WEIGHT,
        "viseme_head": WEIGHT,
        "router_balance": WEIGHT,
        "shift_video": POSITIVE,
        "shift_audio": POSITIVE,
        "logit_std": POSITIVE,
        "loss_floor": POSITIVE,
        "frame_correlation": CORRELATION,
    },
    "adapter": {"rank": RANK},
    "distillation": {
        "student_steps": AT_LEAST_1,
        "teacher_substeps": AT_LEAST_1,
        "own_steps": AT_LEAST_0,
        "feature_weight": AT_LEAST_0,
        "data_weight": SHARE,
    },
}
# section -> option -> keys that its table may have, each with a number of at least 0
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "objective": {"tasks": TASKS, "loss_weights": ("video", "audio")},
    "rates": {"branch_learning_rate": BRANCHES},
    "adapter": {"branch_rank": BRANCHES},
}


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    if not data.train_data:
        raise ValueError(
            "train_data=[]: needs folders of cached latents; `avdiff data cache` makes one"
        )
    for name in ("train_data", "validation_data"):
        for folder in getattr(data, name):
            if not (Path(folder) / "cache.json").is_file():
                raise ValueError(
                    f"{name}: {folder} holds no cache.json; make it with `avdiff data cache`"
                )


def _check_tasks(recipe: Recipe) -> None:
    o = recipe.objective
    if not o.modalities:
        raise ValueError("modalities=[]: needs video, audio or both")
    if not sum(o.tasks.values()) > 0:
        raise ValueError(f"tasks={o.tasks}: needs at least one share above 0")
    for only, useless in (("video", ("t2a", "v2a")), ("audio", ("t2v", "a2v", "image"))):
        hit = [task for task in useless if o.tasks.get(task)]
        if o.modalities == (only,) and hit:
            raise ValueError(
                f"tasks contain {hit[0]}, but modalities={[only]} learns nothing from it; drop it"
            )


def _check_guidance(recipe: Recipe) -> None:
    guidance = recipe.objective.learned_guidance
    for m, scale in guidance.items():
        if m not in ("video", "audio") or not 1 <= scale <= 20:
            raise ValueError(
                f"learned_guidance={guidance}: needs video, audio or both, from 1 to 20"
            )
    if guidance and not recipe.data.text_dropout:
        raise ValueError(
            "learned_guidance: leads away from the answer without text, which only rows without "
            "text teach; set text_dropout above 0, such as 0.1"
        )


def _check_adapter(recipe: Recipe) -> None:
    a = recipe.adapter
    if a.rank and not recipe.model.pretrained_model_name_or_path:
        raise ValueError(
            f"rank={a.rank}: LoRA needs a trained model; set pretrained_model_name_or_path"
        )
    modalities = recipe.objective.modalities
    for target in a.lora_targets:
        if target not in (*BRANCHES, *TARGETS, "all"):
            names = ", ".join((*BRANCHES, *TARGETS))
            raise ValueError(f"lora_targets: {target!r} matches nothing; needs {names} or all")
        if target in TARGETS and TARGETS[target].owner not in modalities:
            raise ValueError(
                f"lora_targets: {target!r} updates the {TARGETS[target].owner} stream, but "
                f"modalities={list(modalities)} leaves it alone; add it"
            )
    if a.branch_rank and not a.rank:
        raise ValueError(f"branch_rank={a.branch_rank}: has no effect with rank=0; set rank")


def _check_model(recipe: Recipe) -> None:
    changes = recipe.model.preset_changes
    if changes and recipe.model.pretrained_model_name_or_path:
        raise ValueError(
            f"preset_changes={changes}: change a preset, but this run starts from "
            "pretrained_model_name_or_path; drop one of them"
        )


def _check_distillation(recipe: Recipe) -> None:
    d = recipe.distillation
    heads = recipe.objective.phoneme_head or recipe.objective.viseme_head
    if d.teacher is None:
        changed = [f.name for f in fields(d) if getattr(d, f.name) != f.default]
        if changed:
            raise ValueError(
                f"{changed[0]}={getattr(d, changed[0])}: has no effect without a teacher; set "
                "teacher"
            )
    elif heads:
        raise ValueError(
            "phoneme_head, viseme_head: have no effect in a distillation; use feature_weight"
        )
    elif d.distill == "steps" and d.data_weight:
        raise ValueError(
            f"data_weight={d.data_weight}: a point where several steps lead has no plain loss; "
            "set it to 0 or distill to size or guidance"
        )


def _check_export(recipe: Recipe) -> None:
    export = recipe.export
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    if export.push_to_hub and not export.hub_model_id:
        raise ValueError("push_to_hub=true: needs hub_model_id, such as user/model")
    if export.push_to_hub and offline:
        raise ValueError(
            "push_to_hub=true: HF_HUB_OFFLINE is set, so nothing can be pushed; unset one of them"
        )


def _check_samples(recipe: Recipe) -> None:
    model = recipe.model
    if not recipe.samples.sample_prompts:
        return
    if not recipe.training.validation_steps:
        raise ValueError("sample_prompts: are made at validations, but validation_steps=0; set it")
    teacher = recipe.distillation.teacher
    if not (model.codecs or model.pretrained_model_name_or_path or teacher):
        raise ValueError(
            "sample_prompts: need codecs to be heard and seen; set codecs to a folder with vae, "
            "audio_vae and vocoder, such as presenter"
        )


# what no single option tells; the first that is broken is the one that is said
RULES: tuple[Callable[[Recipe], None], ...] = (
    _check_data,
    _check_tasks,
    _check_guidance,
    _check_adapter,
    _check_model,
    _check_distillation,
    _check_export,
    _check_samples,
)


def taught(objective: ObjectiveOptions) -> tuple[str, ...]:
    """Modalities that are trained and that some task of the mix generates."""
    others = {"video": ("t2a", "v2a"), "audio": ("t2v", "a2v")}
    shares = objective.tasks.items()
    return tuple(
        m for m in objective.modalities if any(s > 0 and t not in others[m] for t, s in shares)
    )


def _find_shipped(options: object, *names: str) -> None:
    """`presenter` -> the folder of the pipeline in the package."""
    for name in names:
        if getattr(options, name) == "presenter":
            object.__setattr__(options, name, str(avdiff.PRESENTER))


def _shares(name: str, table: Mapping[str, float], keys: tuple[str, ...]) -> None:
    for key, value in table.items():
        if key not in keys:
            raise ValueError(f"{name}: {key!r} is unknown; needs {', '.join(keys)}")
        if value < 0:
            raise ValueError(f"{name}.{key}={value}: needs a number of at least 0")
