"""One scheduler object that steps a whole joint run: both modalities, a time shift for each.

Flow convention (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003): z_t = (1-t) x + t
eps, sigma = t, t = 1 is noise, t = 0 is data, velocity v = eps - x, so that x = z - t v. Sampling
integrates dz = v dt from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from avdiff.latents import Joint, JointLatents, per_token

Coupling = Literal["shared", "independent", "paired"]
COUPLINGS = ("shared", "independent", "paired")
SOLVERS = ("euler", "ab2")
PREDICTIONS = ("x0", "velocity")


def shift_time(time: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards noise, the ends stay: s t / (1 + (s-1) t), arXiv 2403.03206 eq.
    23.
    """
    return shift * time / (1 + (shift - 1) * time)


class JointFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Flow-matching scheduler for `JointLatents`.

    Args:
        shift_video, shift_audio: time shift of each modality, above 0. With video above audio the
            audio is the cleaner of the two at every step, and the lips can follow the sound.
        coupling: how the noise levels of the two modalities belong together.
            "shared": one level for both, drawn once and shifted by `shift_video`.
            "paired": one base time for both, each through its own shift: the path that sampling
            takes, sigma_audio is a function of sigma_video.
            "independent": own base time, own shift: all pairs of levels occur, as sound-to-picture
            and picture-to-sound need them.
            Sampling walks the path of "shared" if the coupling is "shared", that of "paired"
            otherwise.
        solver: "euler", or "ab2": Adams-Bashforth with two steps, second order, one network call a
            step.
        prediction_type: what `step` receives, the "x0" or the "velocity" estimate.
        sigma_min: floor for sigma in (0, 1] where it divides (x0 to velocity) and of training
            levels.
        frame_correlation: correlation of the video noise of any two frames of a clip, in [0, 1);
            see `share_frames`.
    """

    order = 1  # network calls for each step, in diffusers' sense; true of both solvers
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        shift_video: float = 3.0,
        shift_audio: float = 1.0,
        coupling: Coupling = "paired",
        solver: Literal["euler", "ab2"] = "euler",
        prediction_type: Literal["x0", "velocity"] = "x0",
        sigma_min: float = 1e-3,
        frame_correlation: float = 0.0,
    ) -> None:
        for name, shift in (("shift_video", shift_video), ("shift_audio", shift_audio)):
            if not shift > 0:
                raise ValueError(f"{name}={shift}: must be above 0")
        for name, value, choices in (
            ("coupling", coupling, COUPLINGS),
            ("solver", solver, SOLVERS),
            ("prediction_type", prediction_type, PREDICTIONS),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")
        if not 0 < sigma_min <= 1:
            raise ValueError(f"sigma_min={sigma_min}: must lie in (0, 1]")
        if not 0 <= frame_correlation < 1:
            raise ValueError(f"frame_correlation={frame_correlation}: must lie in [0, 1)")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None  # (n,) base times, before the shifts
        self.sigmas: Joint[Tensor] = Joint()  # (n+1,) fp32 each, the last is 0
        self._past: tuple[int, Joint[Tensor]] | None = (
            None  # index and velocity of the last step, for ab2
        )

    def _shifts(self, coupling: str) -> Joint[float]:
        video = self.config.shift_video
        audio = self.config.shift_audio
        return Joint(video, video if coupling == "shared" else audio)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | Joint[Tensor] | None = None,
    ) -> None:
        """Lay out the path from noise to data and forget the last run.

        Args:
            num_inference_steps: n >= 1; may be left out when `sigmas` is given.
            sigmas: n falling values in (0, 1] without the final 0. A plain sequence holds base
                times and is shifted for each modality; a `Joint` holds the levels themselves. None:
                even base times 1 .. 1/n.

        Raises:
            ValueError: `sigmas` do not fall, leave (0, 1] or do not fit `num_inference_steps`.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps}: needs a whole number of at least 1"
                )
            sigmas = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)[:-1]
        if isinstance(sigmas, Joint):
            levels = sigmas.map(lambda s: torch.as_tensor(s, dtype=torch.float64))
            base = levels.audio if levels.video is None else levels.video
            if base is None:
                raise ValueError(
                    "sigmas=Joint(None, None): needs the levels of at least one modality"
                )
        else:
            base = torch.as_tensor(sigmas, dtype=torch.float64)
            levels = self._shifts(self.config.coupling).map(lambda shift: shift_time(base, shift))
        count = base.numel() if num_inference_steps is None else num_inference_steps
        for modality, values in levels.items():
            _check_path(f"sigmas of {modality}", values, count)
        self.num_inference_steps = count
        self.timesteps = base.float().to(device)
        self.sigmas = levels.map(lambda s: torch.cat([s, s.new_zeros(1)]).float().to(device))
        self._past = None

    def step(
        self,
        output: Joint[Tensor],
        index: int,
        state: JointLatents,
        given: Joint[Tensor] | None = None,
    ) -> JointLatents:
        """Go from noise level `index` to `index + 1` in both modalities at once, in fp32.

        Args:
            output: estimate (`prediction_type`) for each modality, (B, N, C); a modality that is
                None here, or in the state, passes through.
            index: 0 .. n-1, of `set_timesteps`. state: tokens at level `index`.
            given: bool masks (B,) or (B, N): what is True there is known, keeps its value and stays
                at sigma 0.

        Returns:
            the state at level `index + 1`, tokens in their old dtype, sigmas (B,) or, with a mask
            by token, (B, N).

        Raises:
            ValueError: `index` is outside the path, or `set_timesteps` was not called.
        """
        if self.num_inference_steps is None:
            raise ValueError("step: call set_timesteps first")
        if not 0 <= index < self.num_inference_steps:
            raise ValueError(
                f"index={index}: must lie between 0 and {self.num_inference_steps - 1}"
            )
        velocity = self._velocity(output, index, state.latents)
        past = self._past[1] if self._past is not None and self._past[0] == index - 1 else Joint()
        self._past = (index, velocity) if self.config.solver == "ab2" else None
        moved = {}
        levels = {}
        for modality, tokens in state.latents.items():
            v = getattr(velocity, modality)
            mask = getattr(given or Joint(), modality)
            if v is None:
                moved[modality], levels[modality] = tokens, getattr(state.sigmas, modality)
                continue
            sigmas: Tensor = getattr(self.sigmas, modality)
            increment = self._increment(v, getattr(past, modality), sigmas, index)
            new = (tokens.to(v.dtype) + increment).to(tokens.dtype)
            level = (
                sigmas[index + 1]
                .to(tokens.device)
                .expand(tokens.shape[0] if mask is None else mask.shape)
            )
            if mask is not None:
                new = torch.where(per_token(mask, tokens), tokens, new)
                level = level.masked_fill(mask, 0.0)
            moved[modality], levels[modality] = new, level
        return state.with_latents(Joint(**moved), Joint(**levels))

    def _velocity(self, output: Joint[Tensor], index: int, latents: Joint[Tensor]) -> Joint[Tensor]:
        """Velocity in at least fp32 of the modalities that are in both the state and the output."""

        def one(sigma: Tensor, out: Tensor | None, tokens: Tensor | None) -> Tensor | None:
            if out is None or tokens is None:
                return None
            out = out.to(torch.promote_types(out.dtype, torch.float32))
            if self.config.prediction_type == "velocity":
                return out
            return (tokens.to(out.dtype) - out) / sigma[index].clamp(min=self.config.sigma_min).to(
                out
            )

        return self.sigmas.map(one, output, latents)

    @staticmethod
    def _increment(v: Tensor, past: Tensor | None, sigmas: Tensor, index: int) -> Tensor:
        """Integral of the velocity over the step: Euler, or Adams-Bashforth 2 with unequal steps
        where a past is known.

        The line through the last two velocities, integrated over h = s_{i+1} - s_i: h ((1 + r/2)
        v_i - r/2 v_{i-1}) with r = h / (s_i - s_{i-1}); Hairer, Norsett, Wanner, Solving ODEs I,
        III.5.
        """
        step = sigmas[index + 1] - sigmas[index]
        if past is None or past.shape != v.shape:
            return step.to(v) * v
        ratio = (step / (sigmas[index] - sigmas[index - 1])).to(v)
        return step.to(v) * ((1 + ratio / 2) * v - ratio / 2 * past)

    def share_frames(self, white: Tensor, frames: int) -> Tensor:
        """White noise (..., N, C), frame by frame, -> noise of unit variance that correlates
        between frames.

        Independent noise averages out over the frames of a clip, so what stands still (who it is,
        what is behind) is settled near pure noise, long before what moves, and what is left of it
        flickers. Noise that the frames have in part in common keeps the two together (mixed noise,
        Ge et al., arXiv 2305.10474). With the mean m over frames: sqrt(1-c) (w - m) + sqrt(1-c+cF)
        m, the root of the covariance (1-c) I + c 11^T; one frame stays as it is.
        """
        c = self.config.frame_correlation
        if not c or frames == 1:
            return white
        w = white.unflatten(-2, (frames, -1))
        mean = w.mean(-3, keepdim=True)
        return ((1 - c) ** 0.5 * (w - mean) + (1 - c + c * frames) ** 0.5 * mean).flatten(-3, -2)

    def add_noise(
        self, clean: Joint[Tensor], noise: Joint[Tensor], sigmas: Joint[Tensor]
    ) -> Joint[Tensor]:
        """z = (1 - sigma) x + sigma eps; tokens (B, N, C), sigmas (B,) or (B, N)."""
        return clean.map(lambda x, eps, s: torch.lerp(x, eps, per_token(s, x).to(x)), noise, sigmas)

    def velocity_from_x0(
        self, x0: Joint[Tensor], noisy: Joint[Tensor], sigmas: Joint[Tensor]
    ) -> Joint[Tensor]:
        """v = (z - x0) / sigma with sigma floored at `sigma_min`; tokens (B, N, C), sigmas (B,) or
        (B, N).
        """
        floor = self.config.sigma_min
        return x0.map(
            lambda x, z, s: (z - x) / per_token(s, x).clamp(min=floor).to(x), noisy, sigmas
        )

    def x0_from_velocity(
        self, velocity: Joint[Tensor], noisy: Joint[Tensor], sigmas: Joint[Tensor]
    ) -> Joint[Tensor]:
        """x0 = z - sigma v; tokens (B, N, C), sigmas (B,) or (B, N)."""
        return velocity.map(lambda v, z, s: z - per_token(s, v).to(v) * v, noisy, sigmas)

    def sample_sigmas(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        coupling: Coupling | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        uniform_share: float = 0.1,
    ) -> Joint[Tensor]:
        """Draw noise levels for training: base times logit-normal (arXiv 2403.03206) or, for a
        share of the samples, uniform, so that both ends of the path are seen; then coupled and
        shifted as the class describes.

        Args:
            coupling: overrides the configured one. uniform_share: in [0, 1].

        Returns:
            (batch,) fp32 on the generator's device for each modality, in [sigma_min, 1].
        """
        coupling = coupling or self.config.coupling
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling={coupling!r}: must be one of {', '.join(COUPLINGS)}")
        if not 0 <= uniform_share <= 1:
            raise ValueError(f"uniform_share={uniform_share}: must lie in [0, 1]")
        device = None if generator is None else generator.device
        # Both modalities are always drawn, so that a seed gives the video the same levels under
        # every coupling.
        shape = (2, batch)
        peaked = (
            logit_mean + logit_std * torch.randn(shape, generator=generator, device=device)
        ).sigmoid()
        flat = torch.rand(shape, generator=generator, device=device)
        use_flat = torch.rand(shape, generator=generator, device=device) < uniform_share
        video, audio = torch.where(use_flat, flat, peaked)
        base = Joint(video, audio if coupling == "independent" else video)
        shifted = base.map(shift_time, self._shifts(coupling))
        return shifted.map(lambda s: s.clamp(min=self.config.sigma_min))


def _check_path(name: str, values: Tensor, count: int) -> None:
    if values.ndim != 1 or len(values) != count or count < 1:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}: needs {max(count, 1)} values, the final 0 "
            "left out"
        )
    if not bool(((values > 0) & (values <= 1)).all() and (values.diff() < 0).all()):
        raise ValueError(
            f"{name}={[round(v, 4) for v in values.tolist()]}: must fall strictly and lie in (0, 1]"
        )
