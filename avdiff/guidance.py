"""Guidance for each modality: how several predictions of one step become one.

All of it happens in x0 space and fp32, one formula for each modality, LTX-2's:

    g = c + (w - 1)(c - u) + s (c - p) + (m - 1)(c - i)
    g <- r (g std(c)/std(g)) + (1 - r) g

c is the conditional estimate ("cond"), u the one without the text ("no_text"; classifier-free
guidance, arXiv 2207.12598), p the one whose self-attention is cut in some blocks ("perturbed";
spatio-temporal guidance, arXiv 2411.18664), i the one whose modalities do not hear each other
("isolated"), r the rescale (arXiv 2305.08891 eq. 15-16). A scale w or m of 1 is none and costs no
pass, as is s of 0; any other number is a value, 0 for w and m as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avdiff.latents import MODALITIES, Joint

PASSES = ("cond", "no_text", "perturbed", "isolated")


@dataclass(frozen=True)
class TextGuidance:
    """Away from the estimate that did not read the text.

    Args:
        video, audio: scale w of each modality; 1 none, 0 the estimate without text.
    """

    video: float = 1.0
    audio: float = 1.0
    against = "no_text"
    idle = 1.0  # the scale that changes nothing

    def delta(self, modality: str, cond: Tensor, weak: Tensor) -> Tensor:
        """(w - 1)(c - u)."""
        return (getattr(self, modality) - 1.0) * (cond - weak)


@dataclass(frozen=True)
class CrossModalGuidance:
    """Away from the estimate whose modality did not hear the other: tightens lips to sound.

    Args:
        video, audio: scale m of each modality; 1 none, 0 the isolated estimate.
    """

    video: float = 1.0
    audio: float = 1.0
    against = "isolated"
    idle = 1.0

    def delta(self, modality: str, cond: Tensor, weak: Tensor) -> Tensor:
        """(m - 1)(c - i)."""
        return (getattr(self, modality) - 1.0) * (cond - weak)


@dataclass(frozen=True)
class PerturbedGuidance:
    """Away from the estimate whose self-attention is cut in some blocks, where a network has one.

    Args:
        video, audio: scale s of each modality; 0 none.
    """

    video: float = 0.0
    audio: float = 0.0
    against = "perturbed"
    idle = 0.0

    def delta(self, modality: str, cond: Tensor, weak: Tensor) -> Tensor:
        """s (c - p)."""
        return getattr(self, modality) * (cond - weak)


Term = TextGuidance | PerturbedGuidance | CrossModalGuidance


@dataclass(frozen=True)
class Rescale:
    """Pull the spread of the guided estimate back to that of the conditional one.

    Args:
        video, audio: share r in [0, 1]; 0 none, 1 full.
    """

    video: float = 0.0
    audio: float = 0.0

    def __post_init__(self) -> None:
        for modality in MODALITIES:
            value = getattr(self, modality)
            if not 0 <= value <= 1:
                raise ValueError(f"rescale={value} for {modality}: must lie in [0, 1]")

    def apply(self, modality: str, guided: Tensor, cond: Tensor) -> Tensor:
        """Rescale (B, ...) tokens by the standard deviation of each sample; a constant estimate is
        left alone.
        """
        share = getattr(self, modality)
        if share == 0:
            return guided
        dims = tuple(range(1, guided.ndim))
        spread = guided.std(dims, keepdim=True)
        ratio = torch.where(spread > 0, cond.std(dims, keepdim=True) / spread, 1.0)
        return share * (guided * ratio) + (1 - share) * guided  # the reference's order of products


@dataclass(frozen=True)
class Interval:
    """Guide only where start <= step / steps < stop (arXiv 2404.07724); fractions of the run, 0 is
    its noisy end.
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"interval=({self.start}, {self.stop}): needs 0 <= start <= stop <= 1")

    def __contains__(self, fraction: float) -> bool:
        return self.start <= fraction < self.stop


@dataclass(frozen=True, init=False)
class Guidance:
    """All guidance of a run, e.g. `Guidance(text=Joint(3, 5), rescale=0.7, interval=(0.0, 0.8))`.

    Args:
        text: scales w. cross: scales m. rescale: r, one number for both modalities or a pair.
            interval: the part of the run that is guided. Pairs may be given as `Joint` (a missing
                modality is not guided), interval as a tuple.
            perturbed: scales s of the pass with cut self-attention.
    """

    text: TextGuidance
    cross: CrossModalGuidance
    rescale: Rescale
    interval: Interval
    perturbed: PerturbedGuidance

    def __init__(
        self,
        text: TextGuidance | Joint[float] | None = None,
        cross: CrossModalGuidance | Joint[float] | None = None,
        rescale: Rescale | Joint[float] | float = 0.0,
        interval: Interval | tuple[float, float] = (0.0, 1.0),
        perturbed: PerturbedGuidance | Joint[float] | None = None,
    ) -> None:
        if isinstance(text, Joint):
            text = TextGuidance(**dict(text.items()))
        if isinstance(cross, Joint):
            cross = CrossModalGuidance(**dict(cross.items()))
        if isinstance(perturbed, Joint):
            perturbed = PerturbedGuidance(**dict(perturbed.items()))
        if isinstance(rescale, int | float):
            rescale = Joint(rescale, rescale)
        if isinstance(rescale, Joint):
            rescale = Rescale(**dict(rescale.items()))
        if not isinstance(interval, Interval):
            interval = Interval(*interval)
        # The record is frozen for everyone but its constructor.
        object.__setattr__(self, "text", text or TextGuidance())
        object.__setattr__(self, "cross", cross or CrossModalGuidance())
        object.__setattr__(self, "rescale", rescale)
        object.__setattr__(self, "interval", interval)
        object.__setattr__(self, "perturbed", perturbed or PerturbedGuidance())

    @classmethod
    def without_text(cls) -> Guidance:
        """What the model makes without the text: w = 0 for both modalities. The scales of a
        pipeline's call read 0 as "off" instead, as all of diffusers does.
        """
        return cls(text=TextGuidance(0.0, 0.0))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The guiding terms that change something, in the order in which they are added."""
        ordered: tuple[Term, ...] = (self.text, self.perturbed, self.cross)
        return tuple(t for t in ordered if any(getattr(t, m) != t.idle for m in MODALITIES))

    def only(self, generated: Collection[str], heard: bool = True) -> Guidance:
        """The same guidance without scales that change nothing: of modalities that are given or
        absent, and those of cross-modal guidance where a modality has no partner to hear (`heard`
        is False).
        """
        text = {m: getattr(self.text, m) if m in generated else 1.0 for m in MODALITIES}
        cut = {m: getattr(self.perturbed, m) if m in generated else 0.0 for m in MODALITIES}
        cross = {m: getattr(self.cross, m) if m in generated and heard else 1.0 for m in MODALITIES}
        return replace(
            self,
            text=TextGuidance(**text),
            cross=CrossModalGuidance(**cross),
            perturbed=PerturbedGuidance(**cut),
        )

    def passes(self, step_fraction: float | None = None) -> tuple[str, ...]:
        """Names of the network passes that the step at `step_fraction` = index / steps needs,
        "cond" first.

        None asks for all passes that any step of the run can need.
        """
        guided = (
            self.interval.start < self.interval.stop
            if step_fraction is None
            else step_fraction in self.interval
        )
        return ("cond", *(t.against for t in self.terms)) if guided else ("cond",)

    def combine(self, estimates: Mapping[str, Joint[Tensor]]) -> Joint[Tensor]:
        """One x0 estimate out of those of the passes that ran.

        Args:
            estimates: x0 estimates (B, N, C) by pass name, those that `passes` asked for: a term
                whose pass did not run is not applied.

        Returns:
            guided x0 estimates, at least fp32; a modality that is None in "cond" stays None.

        Raises:
            ValueError: "cond" is missing, or a pass has an unknown name.
        """
        unknown = set(estimates) - set(PASSES)
        if unknown or "cond" not in estimates:
            raise ValueError(
                f"estimates of {sorted(estimates)}: needs 'cond', and else only "
                f"{', '.join(PASSES[1:])}"
            )
        guided: dict[str, Tensor] = {}
        for modality, estimate in estimates["cond"].items():
            cond = _wide(estimate)
            out = cond
            for term in self.terms:
                weak = getattr(estimates.get(term.against, Joint()), modality)
                if weak is not None:
                    out = out + term.delta(modality, cond, _wide(weak))
            guided[modality] = self.rescale.apply(modality, out, cond)
        return Joint(**guided)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
