"""The joint flow-matching objective: what is noised, what is given, and what each row of each
modality costs.

z_t = (1 - t) x + t eps. The network estimates x; the loss is that of the velocity v = eps - x, so
an error of x counts 1 / t^2 (v_hat - v = (x - x_hat) / t), with t floored so that nearly clean rows
do not drown the rest.

Shape legend: B rows, N tokens of a modality, C values per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from avdiff.core.moe import RoutingStats, balance_loss, load_report
from avdiff.latents import MODALITIES, Joint
from avdiff.models.conditions import Positions
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler, shift_time
from avdiff.train.recipe import APART, TOGETHER, ObjectiveOptions

PATH = {"shift_video": 3.0, "shift_audio": 1.0, "frame_correlation": 0.0}  # of a model from scratch
BUCKETS = 5  # noise levels are told apart in fifths


@dataclass(frozen=True)
class Noised:
    """One micro-batch on its way into the network.

    Args:
        noisy: tokens (B, N, C). noise: the eps they were mixed with. levels: noise level of each
            row (B,).
        sigmas: what the network is told: (B,), or (B, N) where some tokens are given. wanted: (B,
            N) bool, tokens that are to be learned; given ones are False and have level 0.
    """

    noisy: Joint[torch.Tensor]
    noise: Joint[torch.Tensor]
    levels: Joint[torch.Tensor]
    sigmas: Joint[torch.Tensor]
    wanted: Joint[torch.Tensor]


def draw_structure(tasks: Mapping[str, float], generator: torch.Generator) -> str:
    """What a micro-batch is: "together", or one of "t2v", "t2a", "isolated", by the shares of the
    tasks.
    """
    names = ("together", *APART)
    shares = [sum(tasks.get(t, 0.0) for t in TOGETHER), *(tasks.get(t, 0.0) for t in APART)]
    return names[int(torch.multinomial(torch.tensor(shares), 1, generator=generator))]


def draw_task(tasks: Mapping[str, float], generator: torch.Generator) -> str:
    """Task of one row among those with both modalities."""
    shares = torch.tensor([tasks.get(t, 0.0) for t in TOGETHER])
    return TOGETHER[int(torch.multinomial(shares, 1, generator=generator))]


def given_tokens(
    task: str, positions: Positions, generator: torch.Generator
) -> Joint[torch.Tensor]:
    """Bool masks (N_v,), (N_a,) of the tokens that a task gives.

    extend: the first 15 to 75 % of both. image: the first frame, in a quarter of the cases the last
        one too.
    retake: all but a span of 20 to 60 % of picture, sound or both. inpaint: all but a rectangle,
        with the sound in
    half the cases.
    """
    v = positions.video[:, 0].cpu()
    a = positions.audio[:, 0].cpu()
    no_video = torch.zeros(len(v), dtype=torch.bool)
    no_audio = torch.zeros(len(a), dtype=torch.bool)
    length = float(torch.cat([v, a]).max())
    p, q, r = torch.rand(3, generator=generator, device=generator.device).tolist()
    if task == "a2v":
        return Joint(no_video, ~no_audio)
    if task == "v2a":
        return Joint(~no_video, no_audio)
    if task == "extend":
        cut = (0.15 + 0.6 * p) * length
        return Joint(v < cut, a < cut)
    if task == "image":
        return Joint((v == v.min()) | ((v == v.max()) & (p < 0.25)), no_audio)
    if task == "retake":
        span = (0.2 + 0.4 * p) * length
        start = q * (length - span)
        kept = [(s < start) | (s > start + span) for s in (v, a)]
        return (Joint(*kept), Joint(kept[0], ~no_audio), Joint(~no_video, kept[1]))[int(3 * r)]
    if task == "inpaint":
        return Joint(_outside_a_rectangle(positions, generator), ~no_audio if r < 0.5 else no_audio)
    return Joint(no_video, no_audio)


def _outside_a_rectangle(positions: Positions, generator: torch.Generator) -> torch.Tensor:
    """(N_v,) True outside a rectangle that covers a third to two thirds of each side, at least one
    token.
    """
    inside = torch.ones(len(positions.video), dtype=torch.bool)
    for axis in (1, 2):
        places = positions.video[:, axis].cpu()
        low = float(places.min())
        high = float(places.max())
        share, start = torch.rand(2, generator=generator, device=generator.device).tolist()
        size = (1 + share) / 3 * (high - low)
        begin = low + start * (high - low - size)
        hit = (places >= begin) & (places <= begin + size)
        inside &= hit if hit.any() else (places - begin).abs() <= (places - begin).abs().min()
    return ~inside


class Objective:
    """Noises a micro-batch and weighs the network's answer.

    Args:
        options: of the recipe.
    """

    def __init__(self, options: ObjectiveOptions) -> None:
        self.options = options
        path = {
            name: usual if getattr(options, name) is None else getattr(options, name)
            for name, usual in PATH.items()
        }
        self.scheduler = JointFlowMatchScheduler(
            coupling=options.noise_coupling, prediction_type=options.prediction_type, **path
        )

    def noised(
        self,
        clean: Joint[torch.Tensor],
        positions: Positions,
        generators: Sequence[torch.Generator],
        tasks: Mapping[str, float] | None = None,
        time: torch.Tensor | float | None = None,
    ) -> Noised:
        """Draw noise, level and task of each row from the row's own generator; clean tokens (B, N,
        C).

        With `time` in (0, 1], for all rows or one for each (B,), levels are those of the sampler at
        this base time.
        """
        tasks = (
            tasks if tasks is not None and any(tasks.get(t) for t in TOGETHER) else {"joint": 1.0}
        )
        o = self.options
        both = clean.video is not None and clean.audio is not None
        levels = []
        noise = []
        given = []
        for row, generator in enumerate(generators):
            drawn = self.scheduler.sample_sigmas(
                1, generator, None, o.logit_mean, o.logit_std, o.uniform_share
            )
            if time is not None:
                base = time[row] if isinstance(time, torch.Tensor) else torch.tensor(time)
                drawn = self.sigmas_at(base.reshape(1).to(generator.device))
            levels.append(
                Joint(
                    *(
                        getattr(drawn, m) if getattr(clean, m) is not None else None
                        for m in MODALITIES
                    )
                )
            )
            noise.append(
                clean.map(
                    lambda x, r=row, g=generator: torch.randn(
                        x[r].shape, generator=g, device=g.device
                    )
                )
            )
            task = draw_task(tasks, generator) if both and tasks != {"joint": 1.0} else "joint"
            given.append(given_tokens(task, positions, generator))
        level = levels[0].map(lambda *rows: torch.cat(rows), *levels[1:])
        eps = noise[0].map(lambda *rows: torch.stack(rows), *noise[1:])
        if eps.video is not None:
            eps = replace(eps, video=self.scheduler.share_frames(eps.video, positions.grid[0]))
        known = clean.map(lambda x, *rows: torch.stack(rows).to(x.device), *given)
        sigmas = level.map(lambda s, k: s if not k.any() else s[:, None].masked_fill(k, 0.0), known)
        return Noised(
            self.scheduler.add_noise(clean, eps, sigmas),
            eps,
            level,
            sigmas,
            known.map(torch.logical_not),
        )

    def sigmas_at(self, base: torch.Tensor) -> Joint[torch.Tensor]:
        """Noise levels (B,) of both modalities where the sampler is at base times (B,)."""
        c = self.scheduler.config
        audio = c.shift_video if c.coupling == "shared" else c.shift_audio
        return Joint(shift_time(base, c.shift_video), shift_time(base, audio))

    def guided(
        self, clean: Joint[torch.Tensor], told: Joint[torch.Tensor], uncond: Joint[torch.Tensor]
    ) -> Joint[torch.Tensor]:
        """What stands for the clean tokens (B, N, C) where guidance w is trained into the weights:
        x + s (x_c - x_u) with s = 1 - 1/w and the network's own answers with and without text (Tang
        et al., arXiv 2502.12154).

        At the fixed point x_c = E[x|c] + (w-1) (E[x|c] - x_u), the estimate that two passes guided
        by w would give.
        """
        sign = -1.0 if self.options.prediction_type == "velocity" else 1.0
        scales = {m: self.options.learned_guidance.get(m, 1.0) for m in MODALITIES}
        shares = Joint(*(sign * (1 - 1 / scales[m]) for m in MODALITIES))
        return clean.map(lambda x, c, u, s: x + s * (c.detach() - u).to(x), told, uncond, shares)

    def row_losses(
        self, output: Joint[torch.Tensor], clean: Joint[torch.Tensor], n: Noised
    ) -> Joint[torch.Tensor]:
        """(B,) velocity loss of each row and modality in fp32, mean over its wanted tokens; 0 where
        all is given.
        """
        floor = self.options.loss_floor

        def one(
            out: torch.Tensor,
            x: torch.Tensor,
            eps: torch.Tensor,
            level: torch.Tensor,
            wanted: torch.Tensor,
        ) -> torch.Tensor:
            if self.options.prediction_type == "velocity":
                square = (out.float() - (eps - x).float()).square().mean(-1)  # (B, N)
            else:
                square = (out.float() - x.float()).square().mean(-1) / level.clamp(min=floor)[
                    :, None
                ].square()
            return (square * wanted).sum(1) / wanted.sum(1).clamp(min=1)

        return output.map(one, clean, n.noise, n.levels, n.wanted)


def parts_of(losses: Joint[torch.Tensor], n: Noised) -> dict[str, torch.Tensor]:
    """For the log: loss of the rows that learned something, by modality and by noise bucket."""
    parts: dict[str, torch.Tensor] = {}
    for m, loss in losses.items():
        wanted = getattr(n.wanted, m)
        level = getattr(n.levels, m)
        learns = wanted.any(1)
        parts[m] = loss[learns]
        bucket = (level * BUCKETS).long().clamp(max=BUCKETS - 1)
        for k in range(BUCKETS):
            parts[f"{m}/t{k / BUCKETS:.1f}"] = loss[learns & (bucket == k)]
    return parts


def supervised(losses: Joint[torch.Tensor], n: Noised) -> dict[str, torch.Tensor]:
    """Share of each row's tokens that carry a loss (B,), by modality; 0 for one that took no
    part.
    """
    rows = len(next(loss for _, loss in losses.items()))
    absent = {f"supervised/{m}": torch.zeros(rows) for m in MODALITIES}
    return absent | {
        f"supervised/{m}": getattr(n.wanted, m).float().mean(1) for m, _ in losses.items()
    }


class LossBalance(nn.Module):
    """Weights of the modalities: a module, so that what it learns is trained and saved like the
    rest.

    fixed: w_m. ema: w_m / running mean of L_m, scaled to the same sum. uncertainty: w_m (exp(-s_m)
        L_m + s_m) with
    learned s_m (Kendall et al., arXiv 1705.07115 eq. 10, constants dropped).
    """

    means: torch.Tensor
    seen: torch.Tensor

    def __init__(self, kind: str, weights: Mapping[str, float], decay: float = 0.99) -> None:
        super().__init__()
        self.kind = kind
        self.decay = decay
        self.weights = {m: float(weights.get(m, 1.0)) for m in MODALITIES}
        self.register_buffer("means", torch.ones(2))
        self.register_buffer("seen", torch.zeros(2))
        if kind == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(2))

    def forward(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scalar losses by modality -> their weighted sum."""
        total = torch.zeros(())
        norm = self._norm(losses)
        for m, loss in losses.items():
            i = MODALITIES.index(m)
            weight = self.weights[m]
            if self.kind == "uncertainty":
                total = total.to(loss) + weight * (
                    torch.exp(-self.log_variance[i]) * loss + self.log_variance[i]
                )
            else:
                total = total.to(loss) + weight * norm[m] * loss
        return total

    def _norm(self, losses: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if self.kind != "ema":
            return dict.fromkeys(losses, 1.0)
        inverse = {m: 1 / self.means[MODALITIES.index(m)].clamp(min=1e-6) for m in losses}
        scale = len(inverse) / sum(inverse.values())
        return {m: value * scale for m, value in inverse.items()}

    @torch.no_grad()
    def observe(self, means: Mapping[str, float]) -> None:
        """Take in a step's mean loss of each modality; the first one sets the mean."""
        for m, value in means.items():
            i = MODALITIES.index(m)
            keep = self.decay if self.seen[i] else 0.0
            self.means[i] = keep * self.means[i] + (1 - keep) * value
            self.seen[i] = 1.0


class RouterBalance:
    """Balance loss of the experts over the micro-batches of a step and all ranks.

    Experts specialise only if balance is asked of many rows together (arXiv 2501.11873): the load
    that a micro-batch is judged by is that of all before it in the step as well, on all ranks. Call
    `forget` after the step.
    """

    def __init__(self) -> None:
        self._load: dict[tuple[Any, ...], torch.Tensor] = {}

    def forget(self) -> None:
        """Start a new step."""
        self._load.clear()

    def __call__(
        self, routing: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Mean balance loss over layers (1 at balance) and, for the log, it and the experts'
        load.
        """
        if not routing:
            return None, {}
        losses = []
        for layer, data in enumerate(routing):
            stats = RoutingStats(data)
            key = (len(routing), layer)
            total = stats.all_reduce().data
            if key in self._load:
                total = total + self._load[key]
            self._load[key] = total
            losses.append(balance_loss(stats, RoutingStats(total)).mean())
        balance = torch.stack(losses).mean()
        reports = [load_report(RoutingStats(r)) for r in routing]
        return balance, {
            "experts/balance": balance.detach(),
            "experts/max_over_mean": torch.stack([r.max_over_mean.max() for r in reports]),
            "experts/dead": torch.stack([r.dead.sum().float() for r in reports]),
        }
