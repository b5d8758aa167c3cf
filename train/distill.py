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

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from avdiff.core.modulation import rms_norm
from avdiff.data.cache import LatentCache
from avdiff.latents import MODALITIES, Joint, per_token
from avdiff.models.conditions import Conditions, Positions
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack
from avdiff.train import finetune
from avdiff.train.joint.dataset import Batch, positions_of
from avdiff.train.joint.model_init import from_folder, from_preset
from avdiff.train.joint.objective import PATH, Noised, Objective, mask_sigma, parts_of
from avdiff.train.joint.teacher import (
    Features,
    Teacher,
    TeacherConditions,
    as_clean,
    estimate,
    inherit,
    matching_blocks,
    tapped,
)
from avdiff.train.joint.trained_model import TrainedModel
from avdiff.train.loop.dataloader import hash_seed
from avdiff.train.loop.fit import Loss, row_generators
from avdiff.train.recipe import Recipe

Tokens = Joint[torch.Tensor]
Estimate = Callable[
    [Tokens, Tokens], Tokens
]  # noisy (B, N, C), sigmas (B,) or (B, N) -> clean (B, N, C)


@dataclass(frozen=True)
class Reference:
    """A held-out batch and where the teacher leads.

    Args:
        batch: on the device. noise: where both start. target: the teacher's guided samples (B, N,
            C). plain: its samples when it is run like the student, without guidance and in few
            steps.
    """

    batch: Batch
    noise: Noised
    target: Tokens
    plain: Tokens


class DistillTask(finetune.FinetuneTask):
    """A student on cached latents with a teacher at its side.

    Args:
        as for `FinetuneTask`; teacher: shares the tokenizer.

    Raises:
        ValueError: teacher and student do not fit together.
    """

    def __init__(
        self,
        model: TrainedModel,
        train: LatentCache,
        held_out: LatentCache | None,
        teacher: Teacher,
    ) -> None:
        _refuse_misfits(model, teacher)
        self.teacher = teacher
        self.how = model.recipe.distillation
        model.prompt_domain = teacher.prompt_domain
        model.sampling = self._sampling()
        super().__init__(model, train, held_out)
        self.bridge: nn.ModuleDict | None = None
        if self.how.feature_weight:
            self.pairs = matching_blocks(model.transformer, teacher.transformer)
            self.bridge = _bridge(model.transformer, teacher.transformer)
            model.modules["bridge"] = self.bridge
        self._references: list[Reference] = []

    # ------------------------------------------------------------------------------------- the loss
    def loss(self, batch: Batch, phase: str, generator: torch.Generator) -> Loss:
        """Velocity distance to the teacher's answer, per modality, plus features and the experts'
        balance.
        """
        self.teacher.to(self.device)
        common = torch.Generator().manual_seed(self.common_seed)  # what all ranks must do alike
        clean, structure = self.structure(batch, common)
        isolated = structure == "isolated"
        positions = positions_of(batch.clip, str(self.device))
        alone = clean.audio is None or isolated
        track = self.visible_track(batch.track, alone, self.recipe.data.video_phonemes, common)
        steps_back = int(torch.randint(0, self.how.own_steps + 1, (), generator=common))

        rows = row_generators(generator, len(batch))
        grid = self._grid_points(rows) if steps_back or self.how.distill == "steps" else None
        time = None
        if grid is not None:
            time = (grid + steps_back).clamp(max=self.how.student_steps) / self.how.student_steps
        noised = self.objective.noised(clean, positions, rows, self.recipe.objective.tasks, time)
        if grid is not None and steps_back:
            noised = self._rolled(batch, noised, positions, track, isolated, grid, steps_back)
        conditions = self.teacher.conditions(batch, positions, track, isolated)
        with tapped(self._tapped_blocks(self.teacher.transformer)) as theirs:
            target = self._target(conditions, noised, grid)
        with tapped(self._tapped_blocks(self.transformer)) as ours:
            output, routing = self.predict(batch, noised, positions, track, isolated)
        prediction = self.recipe.objective.prediction_type
        answer = as_clean(output, prediction, noised.noisy, noised.token_sigma)

        losses = self._distance(answer, target, noised)
        share = self.how.data_weight
        if share and not steps_back:
            plain = self._distance(answer, clean, noised)
            losses = losses.map(lambda taught, data: (1 - share) * taught + share * data, plain)
        parts = parts_of(losses, noised)
        total, metrics = self.weighted(losses, noised, None)
        if self.bridge is not None:
            parts["feature"] = self._features(ours, theirs, batch)
            total = total + self.how.feature_weight * parts["feature"]
        # after the features: a sum's order is part of its last bit
        balance, load = self.router(routing)
        if balance is not None:
            total = total + self.recipe.objective.router_balance * balance
        return Loss(total, parts, metrics | load)

    def _grid_points(self, rows: Sequence[torch.Generator]) -> torch.Tensor:
        """(B,) points of the student's grid, from 1 (the last step) to student_steps (pure
        noise).
        """
        last = self.how.student_steps
        points = [torch.randint(1, last + 1, (1,), generator=g, device=g.device) for g in rows]
        return torch.cat(points)

    def _distance(self, answer: Tokens, target: Tokens, n: Noised) -> Joint[torch.Tensor]:
        """(B,) squared distance of the velocities: that of clean estimates over max(t, floor)^2,
        tokens of `denoise_mask` only.
        """
        floor = self.recipe.objective.loss_floor

        def row_distance(
            x: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, mask: torch.Tensor
        ) -> torch.Tensor:
            square = (x - target.float()).square().mean(-1)  # (B, N)
            square = square / sigma.clamp(min=floor)[:, None].square()
            return (square * mask).sum(1) / mask.sum(1).clamp(min=1)

        return answer.map(row_distance, target, n.sigma, n.denoise_mask)

    # ------------------------------------------------------------------------- the teacher's answer
    def _target(
        self, conditions: TeacherConditions, n: Noised, grid: torch.Tensor | None
    ) -> Tokens:
        """The clean tokens (B, N, C) that the student shall estimate at `n`."""
        network: Estimate = partial(self.teacher.estimate, conditions)
        if self.how.distill != "steps" or grid is None:
            return network(n.noisy, n.token_sigma)
        k = self.how.teacher_substeps
        stops = [(grid * k - j) / (self.how.student_steps * k) for j in range(k + 1)]
        end = self.walk(n.noisy, n.denoise_mask, stops, network)
        last = self.objective.sigmas_at(stops[-1])

        def implied_x0(
            z: torch.Tensor, z_end: torch.Tensor, s: torch.Tensor, s_end: torch.Tensor
        ) -> torch.Tensor:
            # x = z - s v with v = (z_end - z) / (s_end - s)
            return z - (z_end - z) * per_token(s / (s_end - s), z)

        return n.noisy.map(implied_x0, end, n.sigma, last)

    def walk(
        self,
        tokens: Tokens,
        denoise_mask: Joint[torch.Tensor],
        stops: list[torch.Tensor],
        network: Estimate,
    ) -> Tokens:
        """Euler steps through base times (B,) each; tokens outside of the mask stay. A stop twice
        is no step.
        """
        for here, there in pairwise(stops):
            s = self.objective.sigmas_at(here)
            s_next = self.objective.sigmas_at(there)
            here_sigma = tokens.map(lambda _, levels: levels, s)
            clean = network(tokens, mask_sigma(here_sigma, denoise_mask))

            def moved(
                z: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor
            ) -> torch.Tensor:
                return torch.where(w[..., None], z + (z - x) * per_token((b - a) / a, z), z)

            tokens = tokens.map(moved, clean, s, s_next, denoise_mask)
        return tokens

    def _rolled(
        self,
        batch: Batch,
        n: Noised,
        positions: Positions,
        track: PhonemeTrack | None,
        isolated: bool,
        grid: torch.Tensor,
        steps_back: int,
    ) -> Noised:
        """`n` after `steps_back` steps of the student down to its point of the grid; rows that
        start in noise take fewer.
        """
        steps = self.how.student_steps
        stops = [(grid + j).clamp(max=steps) / steps for j in range(steps_back, -1, -1)]
        with torch.no_grad():
            network = self._student(self._conditions(batch, positions, track), isolated)
            tokens = self.walk(n.noisy, n.denoise_mask, stops, network)
        # bf16 copies of weights made without gradients must not serve the next forward
        torch.clear_autocast_cache()
        sigma = tokens.map(lambda _, levels: levels, self.objective.sigmas_at(stops[-1]))
        token_sigma = mask_sigma(sigma, n.denoise_mask)
        return replace(n, noisy=tokens, sigma=sigma, token_sigma=token_sigma)

    def _conditions(
        self, batch: Batch, positions: Positions, track: PhonemeTrack | None
    ) -> Conditions:
        text = self.text_of(batch)
        mask = batch.attention_mask.bool()
        return self.transformer.prepare(text, mask, positions, track, len(text))

    def _student(self, conditions: Conditions, isolated: bool = False) -> Estimate:
        kind = self.recipe.objective.prediction_type
        return lambda z, s: estimate(self.transformer, kind, conditions, z, s, isolated)

    # ------------------------------------------------------------------------------------- features
    def _tapped_blocks(self, transformer: AVTransformer) -> list[nn.Module]:
        """Blocks whose outputs are compared: all of the student's, their partners of the
        teacher's.
        """
        blocks = list(transformer.transformer_blocks)
        if self.bridge is None:
            return []
        if transformer is self.transformer:
            return blocks
        return [blocks[j] for j in sorted(set(self.pairs))]

    def _features(self, ours: Features, theirs: Features, batch: Batch) -> torch.Tensor:
        """Mean squared distance of RMS-normalized block outputs, the student's through a learned
        linear map.
        """
        assert self.bridge is not None
        rows = len(batch)
        order = sorted(set(self.pairs))
        theirs = theirs[: len(order)]  # of several passes the first: where the student is too
        costs = []
        for i, j in enumerate(self.pairs):
            outputs = zip(MODALITIES, ours[i], theirs[order.index(j)], strict=True)
            for m, mine, other in outputs:
                tokens = getattr(batch, m)
                if mine is None or other is None or tokens is None:
                    continue
                length = tokens.shape[1]
                mapped = self.bridge[m].get_submodule(str(i))(mine[:, :length])
                wanted = rms_norm(other[:rows, :length].float())
                costs.append((rms_norm(mapped.float()) - wanted).square().mean())
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
            self._references = list(self._make_references())
        sums: dict[str, float] = dict.fromkeys(
            (f"{k}/{m}" for k in ("far", "plain", "size") for m in MODALITIES), 0.0
        )
        for reference in self._references:
            batch = reference.batch
            target = reference.target
            positions = positions_of(batch.clip, str(self.device))
            track = self.visible_track(batch.track, target.audio is None, 0.0, torch.Generator())
            network = self._student(self._conditions(batch, positions, track))
            made = self._sample(reference.noise, network, self._sampling_steps)
            for m, x in target.items():
                sums[f"far/{m}"] += float((getattr(made, m) - x).square().sum())
                sums[f"plain/{m}"] += float((getattr(reference.plain, m) - x).square().sum())
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
    def _sampling_steps(self) -> int:
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
        return self.walk(start.noisy, start.denoise_mask, stops, network)

    def _make_references(self) -> Iterator[Reference]:
        """Held-out batches, pure noise, and the teacher's samples with and without guidance."""
        self.teacher.to(self.device)
        factor = self.how.teacher_substeps if self.how.distill == "steps" else 1
        for indices, batch in self.held_out_batches():
            clean = batch.tokens
            positions = positions_of(batch.clip, str(self.device))
            track = self.visible_track(batch.track, clean.audio is None, 0.0, torch.Generator())
            seeds = [hash_seed(i, 97) for i in indices]
            noise = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
            start = self.objective.noised(clean, positions, noise, time=1.0)
            samples = []
            for guided, steps in (
                (True, self._sampling_steps * factor),
                (False, self._sampling_steps),
            ):
                conditions = self.teacher.conditions(batch, positions, track, guided=guided)
                network = partial(self.teacher.estimate, conditions)
                samples.append(self._sample(start, network, steps))
            yield Reference(batch, start, samples[0], samples[1])

    def _sampling(self) -> dict[str, float]:
        """Steps and guidance of the exported pipeline: what was distilled into the student is not
        asked for again.
        """
        defaults = dict(self.teacher.recommended)
        if self.how.distill != "size" or self.teacher.guided:
            defaults |= {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
        return {**defaults, "num_inference_steps": self._sampling_steps}


def setup_distillation(
    recipe: Recipe, train: LatentCache, held_out: LatentCache | None
) -> DistillTask:
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
    scheduler = Objective(recipe.objective).scheduler
    model = TrainedModel(recipe, transformer, text_encoder, tokenizer, scheduler)
    return DistillTask(model, train, held_out, teacher)


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


def _refuse_misfits(model: TrainedModel, teacher: Teacher) -> None:
    recipe = model.recipe
    student = model.transformer
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
        mine = getattr(student.config, name)
        other = getattr(teacher.transformer.config, name)
        if mine != other:
            raise ValueError(
                f"teacher={recipe.distillation.teacher}: has {name}={other}, the student {mine}; "
                "choose a student that works on the same latents and clock"
            )
    if model.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError(
            f"teacher={recipe.distillation.teacher}: reads captions with another tokenizer than "
            "the "
            "student; start the student from the teacher or from a preset"
        )
