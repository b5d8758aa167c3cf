"""What a family of models brings, so that one scheduler, cache and trainer serve it.

Four small parts; the loop that uses them knows neither networks nor file formats. `presenter` is
the family of this package's own models, others stand beside it.

Shape legend: B batch, N tokens of a modality, C values of a token, F frames, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from avdiff.clip import ClipSpec, Clock
    from avdiff.latents import Joint

# Everything that a call may ask for beyond a plain prompt. A family lists what it can do, and the
# rest is refused by one sentence.
ABILITIES = (
    "audio",  # sound may be given
    "deflicker",
    "extend",
    "image",
    "perturbed",  # a pass with cut self-attention
    "phoneme_track",  # words on the clock
    "prompt_domain",
    "retake",
    "stream",  # long clips piece by piece, in constant memory
    "video",  # film may be given
)


@runtime_checkable
class Layout(Protocol):
    """How one clip lies on the latents; it knows nothing of weights."""

    @property
    def clip(self) -> ClipSpec:
        """Size and length of the clip."""
        ...

    def tokens(self) -> Joint[int]:
        """N of each modality."""
        ...

    def widths(self) -> Joint[int]:
        """C of each modality."""
        ...

    def edges(self) -> Joint[torch.Tensor]:
        """(N, 2) seconds at which each token begins and ends; a retake is found by them."""
        ...

    def noise(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Joint[torch.Tensor]:
        """Starting noise (B, N, C) fp32, packed, drawn in the family's own order, so that a seed
        gives here the clip that it gives elsewhere.
        """
        ...


@runtime_checkable
class Codec(Protocol):
    """Pixels and waveforms outside, packed and normalized latents inside."""

    @property
    def clock(self) -> Clock:
        """Strides of the codecs."""
        ...

    @property
    def sample_rate(self) -> int:
        """Hz of the sound that `encode_audio` takes."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the sound that `encode_audio` takes: 1 mono, 2 stereo."""
        ...

    @property
    def out_rate(self) -> int:
        """Hz of the sound that `decode_audio` returns."""
        ...

    def layout(self, clip: ClipSpec) -> Layout:
        """Where the tokens of a clip lie."""
        ...

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] -> tokens (B, N, C) fp32."""
        ...

    def encode_audio(self, waveform: torch.Tensor) -> torch.Tensor:
        """Waveform (B, channels, S) in [-1, 1] at `sample_rate` -> tokens (B, N, C) fp32."""
        ...

    def decode_video(self, tokens: torch.Tensor, layout: Any) -> torch.Tensor:
        """Tokens -> video (B, 3, F, H, W) fp32 in [-1, 1]; the layout is one of `layout`."""
        ...

    def decode_audio(self, tokens: torch.Tensor, layout: Any) -> torch.Tensor:
        """Tokens -> waveform (B, channels, S) fp32 in [-1, 1] at `out_rate`."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Hash of the weights of each codec by name: what a cache of latents depends on."""
        ...


@runtime_checkable
class PassConditions(Protocol):
    """What one pass of the network reads: a record of the family that only its denoiser opens.

    `pipelines.denoise.ConditionCache` makes it when a pass first needs it, keeps it for all steps
    and joins passes that run as one batch by `cat`.
    """

    @staticmethod
    def cat(parts: Sequence[Any]) -> Any:
        """Join the batches of several passes, in this order."""
        ...


@runtime_checkable
class Texts(Protocol):
    """Prompts to features, of which the denoiser's conditions are made."""

    def __call__(self, prompts: Sequence[str]) -> Any:
        """Features of a batch of prompts: (B, L, D) and what else the family needs beside them."""
        ...

    def fingerprint(self) -> str:
        """Hash of what made the features: a cache of them depends on it."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """The network, called once for the passes that run as one batch."""

    prediction_type: Literal["x0", "velocity"]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What training may touch, by component name."""
        ...

    def __call__(
        self,
        latents: Joint[torch.Tensor],
        token_sigma: Joint[torch.Tensor],
        conditions: Any,
        layout: Any,
        /,
        isolated: bool = False,
        perturbed: Sequence[int] = (),
    ) -> Joint[torch.Tensor]:
        """One prediction (B, N, C) of each modality, at least fp32.

        Args:
            latents: (B, N, C) fp32; a modality that is None takes no part and costs nothing.
            token_sigma: noise levels in [0, 1], (B,) or (B, N); what has 0 is given and stays.
            conditions: what the passes read, a `PassConditions`.
            isolated: the modalities do not hear each other.
            perturbed: blocks whose self-attention is cut.
        """
        ...


@dataclass(frozen=True)
class Family:
    """One entry of the registry.

    Args:
        name: as messages say it. class_names: `_class_name` of the model folders that it reads.
        abilities: some of `ABILITIES`.
        load: folder or hub name, and keyword arguments of `from_pretrained`, -> pipeline.
        branch_of: name of a weight -> "video", "audio", "text", "cross" or another branch.
        owner_of: name of a weight -> "video", "audio" or "both": whose training changes it.
        shard_classes: names of the modules that FSDP wraps.
    """

    name: str
    class_names: tuple[str, ...]
    abilities: frozenset[str]
    load: Callable[..., Any]
    branch_of: Callable[[str], str]
    owner_of: Callable[[str], str]
    shard_classes: tuple[str, ...]

    def __post_init__(self) -> None:
        strange = self.abilities - set(ABILITIES)
        assert not strange, f"{self.name}: {strange} are not among the abilities"

    def require(self, ability: str, argument: str) -> None:
        """Refuse an argument that this family cannot follow.

        Raises:
            ValueError: the family lacks the ability.
        """
        if ability not in self.abilities:
            wanted = ability.replace("_", " ")
            raise ValueError(f"{argument}: {self.name} knows no {wanted}; leave it out")
