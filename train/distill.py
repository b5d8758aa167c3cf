"""Distillation: a student learns from a teacher pipeline on cached latents, in the same loop as any
other training.

    avdiff train distill.toml --teacher FOLDER

Three kinds, one rule. At a point (z, t) of the path the student's estimate of the clean data shall
be
    size      x_T(z, t), the teacher's estimate: a smaller network (Hinton et al., arXiv 1503.02531,
    on velocities); guidance  x_T + (w-1)(x_T - x_U), the guided estimate: one pass in place of two
    (Meng et al., arXiv 2210.03142); steps     the estimate whose single Euler step to the next
    point of the student's grid ends where the teacher ends
              after k guided Euler steps: progressive distillation (Salimans and Ho, arXiv
              2202.00512, eq. 9).
Points are data with noise or, in a part of the micro-batches, what the student itself makes of them
by up to `own_steps` of its own steps: it learns to go on from where it really gets (DAgger, Ross et
al., arXiv 1011.0686).

Shape legend: B rows, N tokens of a modality, C values per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from avdiff.core.modulation import rms_norm
from avdiff.latents import MODALITIES, Joint, per_token
from avdiff.models.conditions import Conditions, Positions
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack
from avdiff.train import finetune
from avdiff.train.joint.dataset import positions_of, same_shape, to_device
from avdiff.train.joint.model_init import from_folder, from_preset
from avdiff.train.joint.objective import PATH, Noised, parts_of, supervised
from avdiff.train.joint.teacher import (
    Question,
    Teacher,
    as_clean,
    estimate,
    inherit,
    matching_blocks,
    tapped,
)
from avdiff.train.loop.dataloader import mix
from avdiff.train.loop.fit import Loss, row_generators
from avdiff.train.recipe import Recipe

Tokens = Joint[torch.Tensor]
Estimate = Callable[
    [Tokens, Tokens], Tokens
]  # noisy (B, N, C), sigmas (B,) or (B, N) -> clean (B, N, C)


class DistillTask(finetune.FinetuneTask):
    """A student on cached latents with a teacher at its side.

    Args:
        as for `FinetuneTask`; teacher: shares the tokenizer.

    Raises:
        ValueError: teacher and student do not fit together.
    """

    def __init__(
        self,
        recipe: Recipe,
        transformer: AVTransformer,
        text_encoder: CaptionEncoder,
        tokenizer: Any,
        train: Any,
        held_out: Any,
        teacher: Teacher,
    ) -> None:
        _refuse_misfits(recipe, transformer, tokenizer, teacher)
        super().__init__(recipe, transformer, text_encoder, tokenizer, train, held_out)
        self.teacher = teacher
        self.how = recipe.distillation
        self.prompt_domain = teacher.prompt_domain
        self.bridge: nn.ModuleDict | None = None
        if self.how.feature_weight:
            self.pairs = matching_blocks(transformer, teacher.transformer)
            self.bridge = _bridge(transformer, teacher.transformer)
            self.modules = {**self.modules, "bridge": self.bridge}
        self._references: list[tuple[dict[str, Any], Noised, Tokens, Tokens]] = []

    # ------------------------------------------------------------------------------------- the loss
    def loss(self, batch: Any, phase: str, generator: torch.Generator) -> Loss:
        """Velocity distance to the teacher's answer, per modality, plus features and the experts'
        balance.
        """
        self.teacher.to(self.device)
        side = torch.Generator().manual_seed(self.common_seed)  # what all ranks must do alike
        clean, structure = self._structure(batch, side)
        isolated = structure == "isolated"
        positions = positions_of(batch["clip"], str(self.device))
        alone = clean.audio is None or isolated
        track = self._script(batch["track"], alone, self.recipe.data.video_phonemes, side)
        own = int(torch.randint(0, self.how.own_steps + 1, (), generator=side))

        rows = row_generators(generator, len(batch["input_ids"]))
        place = self._places(rows) if own or self.how.distill == "steps" else None
        start = None if place is None else (place + own).clamp(max=self.how.student_steps)
        time = None if start is None else start / self.how.student_steps
        noised = self.objective.noised(clean, positions, rows, self.recipe.objective.tasks, time)
        if place is not None and own:
            noised = self._rolled(batch, noised, positions, track, isolated, place, own)
        question = self.teacher.ask(batch, positions, track, isolated)
        with tapped(self._watched(self.teacher.transformer)) as theirs:
            target = self._target(question, noised, place)
        with tapped(self._watched(self.transformer)) as ours:
            output, routing = self.predict(batch, noised, positions, track, isolated)
        answer = as_clean(
            output, self.recipe.objective.prediction_type, noised.noisy, noised.sigmas
        )

        losses = self._distance(answer, target, noised)
        if self.how.data_weight and not own:
            plain = self._distance(answer, clean, noised)
            w = self.how.data_weight
            losses = losses.map(lambda a, b: (1 - w) * a + w * b, plain)
        only = self.recipe.objective.modalities
        learned: dict[str, torch.Tensor] = {m: loss for m, loss in losses.items() if m in only}
        means = {m: loss.mean() for m, loss in learned.items()}
        self._remember(means)
        total = self.balance(means)
        parts = parts_of(losses, noised)
        if self.bridge is not None:
            parts["feature"] = self._features(ours, theirs, batch)
            total = total + self.how.feature_weight * parts["feature"]
        balance, load = self.router(routing)
        if balance is not None:
            total = total + self.recipe.objective.router_balance * balance
        trained = Joint(learned.get("video"), learned.get("audio"))
        return Loss(total, parts, supervised(trained, noised) | load)

    def _places(self, rows: list[torch.Generator]) -> torch.Tensor:
        """(B,) points of the student's grid, from 1 (the last step) to student_steps (pure
        noise).
        """
        return torch.cat(
            [
                torch.randint(1, self.how.student_steps + 1, (1,), generator=g, device=g.device)
                for g in rows
            ]
        )

    def _distance(self, answer: Tokens, target: Tokens, n: Noised) -> Joint[torch.Tensor]:
        """(B,) squared distance of the velocities: that of clean estimates over max(t, floor)^2,
        wanted tokens only.
        """
        floor = self.recipe.objective.loss_floor

        def one(
            x: torch.Tensor, target: torch.Tensor, level: torch.Tensor, wanted: torch.Tensor
        ) -> torch.Tensor:
            square = (x - target.float()).square().mean(-1) / level.clamp(min=floor)[
                :, None
            ].square()  # (B, N)
            return (square * wanted).sum(1) / wanted.sum(1).clamp(min=1)

        return answer.map(one, target, n.levels, n.wanted)

    # ------------------------------------------------------------------------- the teacher's answer
    def _target(self, question: Question, n: Noised, place: torch.Tensor | None) -> Tokens:
        """The clean tokens (B, N, C) that the student shall estimate at `n`."""
        asked: Estimate = partial(self.teacher.estimate, question)
        if self.how.distill != "steps" or place is None:
            return asked(n.noisy, n.sigmas)
        k = self.how.teacher_substeps
        stops = [(place * k - j) / (self.how.student_steps * k) for j in range(k + 1)]
        end = self.walk(n.noisy, n.wanted, stops, asked)
        last = self.objective.sigmas_at(stops[-1])

        def implied_x0(
            z: torch.Tensor, z_end: torch.Tensor, s: torch.Tensor, s_end: torch.Tensor
        ) -> torch.Tensor:
            return z - (z_end - z) * per_token(
                s / (s_end - s), z
            )  # x = z - s v with v = (z_end - z) / (s_end - s)

        return n.noisy.map(implied_x0, end, n.levels, last)

    def walk(
        self,
        tokens: Tokens,
        wanted: Joint[torch.Tensor],
        stops: list[torch.Tensor],
        network: Estimate,
    ) -> Tokens:
        """Euler steps through base times (B,) each; tokens that are not wanted stay. A stop twice
        is no step.
        """
        for here, there in pairwise(stops):
            s = self.objective.sigmas_at(here)
            s_next = self.objective.sigmas_at(there)
            clean = network(tokens, mask_levels(s, tokens, wanted))

            def moved(
                z: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor
            ) -> torch.Tensor:
                return torch.where(w[..., None], z + (z - x) * per_token((b - a) / a, z), z)

            tokens = tokens.map(moved, clean, s, s_next, wanted)
        return tokens

    def _rolled(
        self,
        batch: Mapping[str, Any],
        n: Noised,
        positions: Positions,
        track: PhonemeTrack | None,
        isolated: bool,
        place: torch.Tensor,
        own: int,
    ) -> Noised:
        """`n` after `own` steps of the student down to its point of the grid; rows that start in
        noise take fewer.
        """
        steps = self.how.student_steps
        stops = [(place + j).clamp(max=steps) / steps for j in range(own, -1, -1)]
        with torch.no_grad():
            network = self._student(self._conditions(batch, positions, track), isolated)
            tokens = self.walk(n.noisy, n.wanted, stops, network)
        # bf16 copies of weights made without gradients must not serve the next forward
        torch.clear_autocast_cache()
        levels = self.objective.sigmas_at(stops[-1])
        levels = Joint(
            *(None if getattr(tokens, m) is None else getattr(levels, m) for m in MODALITIES)
        )
        return replace(n, noisy=tokens, levels=levels, sigmas=mask_levels(levels, tokens, n.wanted))

    def _conditions(
        self, batch: Mapping[str, Any], positions: Positions, track: PhonemeTrack | None
    ) -> Conditions:
        text = self.text_of(batch)
        return self.transformer.prepare(
            text, batch["attention_mask"].bool(), positions, track, len(text)
        )

    def _student(self, conditions: Conditions, isolated: bool = False) -> Estimate:
        kind = self.recipe.objective.prediction_type
        return lambda z, s: estimate(self.transformer, kind, conditions, z, s, isolated)

    # ------------------------------------------------------------------------------------- features
    def _watched(self, transformer: AVTransformer) -> list[nn.Module]:
        blocks = list(transformer.transformer_blocks)
        if self.bridge is None:
            return []
        return (
            blocks
            if transformer is self.transformer
            else [blocks[j] for j in sorted(set(self.pairs))]
        )

    def _features(self, ours: Any, theirs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean squared distance of RMS-normalized block outputs, the student's through a learned
        linear map.
        """
        assert self.bridge is not None
        rows = len(batch["input_ids"])
        order = sorted(set(self.pairs))
        theirs = theirs[
            : len(order)
        ]  # of several passes the first: the point that the student sees
        costs = []
        for i, j in enumerate(self.pairs):
            for m, own, other in zip(MODALITIES, ours[i], theirs[order.index(j)], strict=True):
                if own is not None and batch.get(m) is not None:
                    tokens = batch[m].shape[1]
                    mapped = rms_norm(self.bridge[m].get_submodule(str(i))(own[:, :tokens]).float())
                    costs.append((mapped - rms_norm(other[:rows, :tokens].float())).square().mean())
        return torch.stack(costs).mean()

    # ----------------------------------------------------------------------------- what is measured
    def validate(self) -> dict[str, float]:
        """Held-out losses, and how far the student's samples are from the teacher's out of the same
        noise.

        sample/m: squared distance over the squared size of the teacher's sample. closed/m: share of
        the distance of the teacher itself, run like the student (few steps, no guidance), that
        distillation has closed; 1 is all.
        """
        metrics = super().validate()
        if self.held_out is None or not len(self.held_out):
            return metrics
        if not self._references:
            self._references = list(self._teach())
        sums: dict[str, float] = dict.fromkeys(
            (f"{k}/{m}" for k in ("far", "plain", "size") for m in MODALITIES), 0.0
        )
        for batch, noise, target, plain in self._references:
            positions = positions_of(batch["clip"], str(self.device))
            track = self._script(batch["track"], target.audio is None, 0.0, torch.Generator())
            network = self._student(self._conditions(batch, positions, track))
            made = self._sample(noise, network, self._shown_steps)
            for m, x in target.items():
                sums[f"far/{m}"] += float((getattr(made, m) - x).square().sum())
                sums[f"plain/{m}"] += float((getattr(plain, m) - x).square().sum())
                sums[f"size/{m}"] += float(x.square().sum())
        for m in MODALITIES:
            if sums[f"size/{m}"] > 0:
                metrics[f"sample/{m}"] = sums[f"far/{m}"] / sums[f"size/{m}"]
                if sums[f"plain/{m}"] > 0:
                    metrics[f"closed/{m}"] = 1 - sums[f"far/{m}"] / sums[f"plain/{m}"]
        metrics["sample"] = sum(v for k, v in metrics.items() if k.startswith("sample/"))
        self.last_metrics = metrics
        return metrics

    @property
    def _shown_steps(self) -> int:
        """Steps with which the student is measured, and which its pipeline will recommend."""
        own_grid = self.how.distill == "steps" or self.how.own_steps > 0
        return (
            self.how.student_steps
            if own_grid
            else int(self.teacher.recommended["num_inference_steps"])
        )

    def _sample(self, start: Noised, network: Estimate, steps: int) -> Tokens:
        rows = len(next(x for _, x in start.noisy.items()))
        stops = [torch.full((rows,), i / steps, device=self.device) for i in range(steps, -1, -1)]
        return self.walk(start.noisy, start.wanted, stops, network)

    def _teach(self) -> Any:
        """Held-out batches, pure noise, the teacher's guided samples, and its samples when run like
        the student.
        """
        assert self.held_out is not None
        self.teacher.to(self.device)
        size = self.recipe.training.train_batch_size
        steps = self._shown_steps * (
            self.how.teacher_substeps if self.how.distill == "steps" else 1
        )
        for indices in same_shape(self.held_out, self.recipe.data.validation_items, size):
            batch = to_device(self.collate([self.held_out[i] for i in indices]), self.device)
            clean = Joint(batch.get("video"), batch.get("audio"))
            positions = positions_of(batch["clip"], str(self.device))
            track = self._script(batch["track"], clean.audio is None, 0.0, torch.Generator())
            noise = [torch.Generator(self.device).manual_seed(mix(i, 97)) for i in indices]
            start = self.objective.noised(clean, positions, noise, time=1.0)
            samples = []
            for guided, count in ((True, steps), (False, self._shown_steps)):
                question = self.teacher.ask(batch, positions, track, guided=guided)
                samples.append(self._sample(start, partial(self.teacher.estimate, question), count))
            yield batch, start, samples[0], samples[1]

    def recommended(self) -> dict[str, Any]:
        """Steps and guidance of the exported pipeline: what was distilled into the student is not
        asked for again.
        """
        told = dict(self.teacher.recommended)
        if self.how.distill != "size" or self.teacher.guided:
            told |= {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
        return {**told, "num_inference_steps": self._shown_steps}


def mask_levels(
    levels: Joint[torch.Tensor], tokens: Tokens, wanted: Joint[torch.Tensor]
) -> Joint[torch.Tensor]:
    """Levels (B,) as the network is told them: (B,), or (B, N) with 0 at tokens that are given."""
    return tokens.map(
        lambda _, s, w: s if bool(w.all()) else s[:, None].masked_fill(~w, 0.0), levels, wanted
    )


def setup_distillation(recipe: Recipe, train: Any, held_out: Any) -> DistillTask:
    """Teacher and student that a recipe names.

    Raises:
        ValueError: something it names does not exist, or the two do not fit together.
    """
    teacher = Teacher.load(recipe)
    if recipe.model.pretrained_model_name_or_path is not None:
        transformer, text_encoder, tokenizer = from_folder(
            recipe.model.pretrained_model_name_or_path
        )
    else:
        transformer = from_preset(recipe)
        tokenizer = teacher.tokenizer
        if transformer.config.text_dim == teacher.text_encoder.config.dim:
            text_encoder = deepcopy(teacher.text_encoder).requires_grad_(True)
        else:
            text_encoder = CaptionEncoder(
                teacher.text_encoder.config.vocab_size,
                transformer.config.text_dim,
                max_length=teacher.text_encoder.config.max_length,
            )
        if recipe.distillation.start_from_teacher:
            inherit(transformer, teacher.transformer)
    return DistillTask(recipe, transformer, text_encoder, tokenizer, train, held_out, teacher)


def _bridge(student: AVTransformer, teacher: AVTransformer) -> nn.ModuleDict:
    """A linear map from each block of the student to its teacher's width, for each modality."""
    widths = {
        m: (getattr(student.config, f"{m}_dim"), getattr(teacher.config, f"{m}_dim"))
        for m in MODALITIES
    }
    return nn.ModuleDict(
        {
            m: nn.ModuleList(nn.Linear(*widths[m], bias=False) for _ in student.transformer_blocks)
            for m in MODALITIES
        }
    )


def _refuse_misfits(
    recipe: Recipe, student: AVTransformer, tokenizer: Any, teacher: Teacher
) -> None:
    o = recipe.objective
    theirs = teacher.scheduler.config
    for name in PATH:
        if getattr(o, name) != theirs[name]:
            raise ValueError(
                f"{name}={getattr(o, name)}: the teacher walks with {theirs[name]}; set the same"
            )
    if recipe.distillation.distill == "steps" and (o.noise_coupling == "shared") != (
        theirs.coupling == "shared"
    ):
        raise ValueError(
            f"noise_coupling={o.noise_coupling!r}: the teacher walks {theirs.coupling!r}; set the "
            "same"
        )
    for name in (
        "video_channels",
        "audio_channels",
        "num_phonemes",
        "num_stress_tones",
        "mels_per_token",
        "shared_rate",
    ):
        own = getattr(student.config, name)
        other = getattr(teacher.transformer.config, name)
        if own != other:
            raise ValueError(
                f"teacher={recipe.distillation.teacher}: has {name}={other}, the student {own}; "
                "choose a student that works on the same latents and clock"
            )
    if tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError(
            f"teacher={recipe.distillation.teacher}: reads captions with another tokenizer than "
            "the "
            "student; start the student from the teacher or from a preset"
        )
