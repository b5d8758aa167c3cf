"""The recipe of fine-tuning an LTX-2 folder: names and defaults are those that its users know from
ltx-trainer, sections those of `avdiff train`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from avdiff.families.ltx2.names import BRANCHES
from avdiff.train.loop.task import FitOptions

TASKS = ("joint", "image", "a2v", "v2a", "extend", "retake")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Modality = Literal["video", "audio"]


@dataclass(frozen=True)
class LTX2ModelOptions:
    """Which model is trained."""

    pretrained_model_name_or_path: str
    """Folder or hub name of an LTX-2 pipeline."""
    family: Literal["LTX-2"] = "LTX-2"
    """Says that this recipe is for LTX-2."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights; trained ones are float32."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Frozen linear layers in eight or four bits; int8 needs no other package, nf4 bitsandbytes
    and a CUDA device.
    """
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a twentieth of the memory, a third more time."""
    mark_first_frame: bool = True
    """LTX-2.5: mark the first latent frame, as its pipelines do."""


@dataclass(frozen=True)
class LTX2DataOptions:
    """Folders of `avdiff data cache --codecs LTX2_FOLDER --text`."""

    train_data: tuple[str, ...] = ()
    """Cache folders for training."""
    validation_data: tuple[str, ...] = ()
    """Cache folders that are only measured on."""
    validation_items: int = 8
    """Held-out clips that each validation measures."""


@dataclass(frozen=True)
class LTX2ObjectiveOptions:
    """What counts as good."""

    modalities: tuple[Modality, ...] = ("video", "audio")
    """Streams that are trained; the weights of the other one stay bit for bit."""
    tasks: dict[str, float] = field(default_factory=lambda: {"joint": 1.0})
    """Shares of tasks: joint, image (first frame given), a2v, v2a, extend, retake."""
    loss_weights: dict[str, float] = field(default_factory=lambda: {"video": 1.0, "audio": 1.0})
    """Weight of each modality."""


@dataclass(frozen=True)
class LTX2AdapterOptions:
    """LoRA; rank 0 trains the weights themselves."""

    rank: int = 0
    """Rank of the update; 0 for full training."""
    lora_alpha: float | None = None
    """Scale of the update is alpha / rank; nothing means alpha = rank."""
    lora_dropout: float = 0.0
    """Dropout before the update."""
    lora_targets: tuple[str, ...] = ("all",)
    """Branches that get an update: video, audio, text, cross or all."""
    lora_layers: tuple[str, ...] = ATTENTION
    """Ends of the names of the layers that get one; [] takes every linear layer of the blocks."""
    trigger: str = ""
    """Word that calls what was learned: kept in the file's metadata."""


@dataclass(frozen=True)
class LTX2Recipe:
    """Everything that decides a training run of an LTX-2."""

    model: LTX2ModelOptions
    data: LTX2DataOptions
    objective: LTX2ObjectiveOptions
    adapter: LTX2AdapterOptions
    training: FitOptions

    def check(self) -> None:
        """Refuse what cannot work, without loading anything heavy.

        Raises:
            ValueError: names the option, its value and what fits.
        """
        _check_shares("tasks", self.objective.tasks, TASKS)
        _check_shares("loss_weights", self.objective.loss_weights, ("video", "audio"))
        self._check_modalities()
        a = self.adapter
        if a.rank < 0:
            raise ValueError(f"rank={a.rank}: needs a whole number, 0 for full training")
        for target in a.lora_targets:
            if target not in (*BRANCHES, "all"):
                raise ValueError(
                    f"lora_targets: {target!r} matches nothing; needs {', '.join(BRANCHES)} or all"
                )
        if self.model.quantization != "none" and not a.rank:
            raise ValueError(
                f"quantization={self.model.quantization}: only frozen weights can be quantized; "
                "set rank"
            )

    def _check_modalities(self) -> None:
        o = self.objective
        if not o.modalities:
            raise ValueError("modalities=[]: needs video, audio or both")
        for only, useless in (("video", ("v2a",)), ("audio", ("a2v", "image"))):
            hit = [task for task in useless if o.tasks.get(task)]
            if o.modalities == (only,) and hit:
                raise ValueError(
                    f"tasks contain {hit[0]}, but modalities={[only]} learns nothing from it; "
                    "drop it"
                )

    def check_data(self) -> None:
        """Refuse caches that are not there; a dry run needs none."""
        if not self.data.train_data:
            raise ValueError(
                "train_data=[]: needs folders of cached latents; `avdiff data cache FOLDER --data "
                "CLIPS --codecs LTX2_FOLDER --text` makes one"
            )
        for folder in (*self.data.train_data, *self.data.validation_data):
            if not (Path(folder) / "cache.json").is_file():
                raise ValueError(f"train_data: {folder} holds no cache.json")

    def settings(self) -> dict[str, object]:
        """What must not change between interruption and resume, by "section.name"."""
        flat: dict[str, object] = {}
        for section in ("model", "data", "objective", "adapter"):
            flat |= {f"{section}.{k}": v for k, v in asdict(getattr(self, section)).items()}
        return flat


def _check_shares(name: str, shares: dict[str, float], keys: tuple[str, ...]) -> None:
    strange = set(shares) - set(keys)
    if strange or not sum(shares.values()) > 0 or any(share < 0 for share in shares.values()):
        raise ValueError(f"{name}={shares}: needs numbers of at least 0 for {', '.join(keys)}")
