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
        noisy: tokens (B, N, C). noise: the eps they were mixed with. sigma: noise level of each row
            (B,), in (0, 1].
        token_sigma: what the network is told: (B,), or (B, N) where some tokens are conditioning.
        denoise_mask: (B, N) bool, tokens that are to be learned; conditioning is False and has
            level 0.
    """

    noisy: Joint[torch.Tensor]
    noise: Joint[torch.Tensor]
    sigma: Joint[torch.Tensor]
    token_sigma: Joint[torch.Tensor]
    denoise_mask: Joint[torch.Tensor]


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


def conditioning_tokens(
    task: str, positions: Positions, generator: torch.Generator
) -> Joint[torch.Tensor]:
    """Bool masks (N_v,), (N_a,) of the conditioning tokens of a task.

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


def mask_sigma(
    sigma: Joint[torch.Tensor], denoise_mask: Joint[torch.Tensor]
) -> Joint[torch.Tensor]:
    """Noise levels of rows (B,) as the network is told them: (B,), or (B, N) with 0 at conditioning
    tokens, where there are any.
    """

    def masked(levels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return levels if bool(mask.all()) else levels[:, None].masked_fill(~mask, 0.0)

    return sigma.map(masked, denoise_mask)


def _row_noise(
    clean: Joint[torch.Tensor], row: int, generator: torch.Generator
) -> Joint[torch.Tensor]:
    """(N, C) noise of one row and each modality, video first."""

    def draw(tokens: torch.Tensor) -> torch.Tensor:
        return torch.randn(tokens[row].shape, generator=generator, device=generator.device)

    return clean.map(draw)


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
        together = tasks is not None and any(tasks.get(t) for t in TOGETHER)
        tasks = tasks if tasks is not None and together else {"joint": 1.0}
        both = clean.video is not None and clean.audio is not None
        sigmas = []
        noise = []
        conditioning = []
        for row, generator in enumerate(generators):
            # the order of the draws is part of what a seed means: level, noise, task, its extent
            sigma = self._draw_sigma(row, generator, time)
            sigmas.append(clean.map(lambda _, drawn: drawn, sigma))
            noise.append(_row_noise(clean, row, generator))
            task = draw_task(tasks, generator) if both and tasks != {"joint": 1.0} else "joint"
            conditioning.append(conditioning_tokens(task, positions, generator))
        sigma = sigmas[0].map(lambda *rows: torch.cat(rows), *sigmas[1:])
        eps = noise[0].map(lambda *rows: torch.stack(rows), *noise[1:])
        if eps.video is not None:
            eps = replace(eps, video=self.scheduler.share_frames(eps.video, positions.grid[0]))
        masks = clean.map(lambda x, *rows: torch.stack(rows).to(x.device), *conditioning)
        denoise_mask = masks.map(torch.logical_not)
        token_sigma = mask_sigma(sigma, denoise_mask)
        noisy = self.scheduler.add_noise(clean, eps, token_sigma)
        return Noised(noisy, eps, sigma, token_sigma, denoise_mask)

    def _draw_sigma(
        self, row: int, generator: torch.Generator, time: torch.Tensor | float | None
    ) -> Joint[torch.Tensor]:
        """Noise levels (1,) of a row; with `time` the draw is made and not used."""
        o = self.options
        drawn = self.scheduler.sample_sigmas(
            1, generator, None, o.logit_mean, o.logit_std, o.uniform_share
        )
        if time is None:
            return drawn
        base = time[row] if isinstance(time, torch.Tensor) else torch.tensor(time)
        return self.sigmas_at(base.reshape(1).to(generator.device))

    def sigmas_at(self, base: torch.Tensor) -> Joint[torch.Tensor]:
        """Noise levels (B,) of both modalities where the sampler is at base times (B,)."""
        c = self.scheduler.config
        audio = c.shift_video if c.coupling == "shared" else c.shift_audio
        return Joint(shift_time(base, c.shift_video), shift_time(base, audio))

    def guided(
        self, clean: Joint[torch.Tensor], cond: Joint[torch.Tensor], uncond: Joint[torch.Tensor]
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
        return clean.map(lambda x, c, u, s: x + s * (c.detach() - u).to(x), cond, uncond, shares)

    def row_losses(
        self, output: Joint[torch.Tensor], clean: Joint[torch.Tensor], n: Noised
    ) -> Joint[torch.Tensor]:
        """(B,) velocity loss of each row and modality in fp32, mean over the tokens of its
        `denoise_mask`; 0 where all is conditioning.
        """
        floor = self.options.loss_floor
        is_velocity = self.options.prediction_type == "velocity"

        def row_loss(
            out: torch.Tensor,
            x: torch.Tensor,
            eps: torch.Tensor,
            sigma: torch.Tensor,
            mask: torch.Tensor,
        ) -> torch.Tensor:
            target = eps - x if is_velocity else x
            square = (out.float() - target.float()).square().mean(-1)  # (B, N)
            if not is_velocity:  # an error of x counts 1 / t^2 as one of the velocity
                square = square / sigma.clamp(min=floor)[:, None].square()
            return (square * mask).sum(1) / mask.sum(1).clamp(min=1)

        return output.map(row_loss, clean, n.noise, n.sigma, n.denoise_mask)


def parts_of(losses: Joint[torch.Tensor], n: Noised) -> dict[str, torch.Tensor]:
    """For the log: loss of the rows that learned something, by modality and by noise bucket."""
    parts: dict[str, torch.Tensor] = {}
    for m, loss in losses.items():
        mask = getattr(n.denoise_mask, m)
        sigma = getattr(n.sigma, m)
        learns = mask.any(1)
        parts[m] = loss[learns]
        bucket = (sigma * BUCKETS).long().clamp(max=BUCKETS - 1)
        for k in range(BUCKETS):
            parts[f"{m}/t{k / BUCKETS:.1f}"] = loss[learns & (bucket == k)]
    return parts


def supervised(losses: Joint[torch.Tensor], n: Noised) -> dict[str, torch.Tensor]:
    """Share of each row's tokens that carry a loss (B,), by modality; 0 for one that took no
    part.
    """
    rows = len(next(loss for _, loss in losses.items()))
    absent = {f"supervised/{m}": torch.zeros(rows) for m in MODALITIES}
    shares = {
        f"supervised/{m}": getattr(n.denoise_mask, m).float().mean(1) for m, _ in losses.items()
    }
    return absent | shares


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
        self._sums: dict[str, float] = {}  # over the micro-batches of the step under way
        self._counts: dict[str, int] = {}
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

    def _norm(self, losses: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor | float]:
        if self.kind != "ema":
            return dict.fromkeys(losses, 1.0)
        inverse = {m: 1 / self.means[MODALITIES.index(m)].clamp(min=1e-6) for m in losses}
        scale = len(inverse) / sum(inverse.values())
        return {m: value * scale for m, value in inverse.items()}

    def remember(self, means: Mapping[str, torch.Tensor]) -> None:
        """Keep the mean losses of a micro-batch until `finish_step`."""
        for m, mean in means.items():
            # summed as Python numbers, that is in double precision
            self._sums[m] = self._sums.get(m, 0.0) + float(mean.detach())
            self._counts[m] = self._counts.get(m, 0) + 1

    def finish_step(self) -> None:
        """Take in what the micro-batches of this step cost on all ranks."""
        rows = [[self._sums.get(m, 0.0), self._counts.get(m, 0)] for m in MODALITIES]
        sums = torch.tensor(rows)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        means = zip(MODALITIES, sums.tolist(), strict=True)
        self.observe({m: total / count for m, (total, count) in means if count})
        self._sums.clear()
        self._counts.clear()

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
        self._load: dict[tuple[int, int], torch.Tensor] = {}

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
