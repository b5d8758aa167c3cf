"""Sparse mixture of experts: token-choice, dropless top-k routing with a balance loss per modality.

Every token picks its `top_k` experts on its own, none is dropped and no expert has a capacity: the
output of a token never depends on the other tokens of the batch, so a batch of two equals two
singles. Nothing about routing is stored on the module: the statistics come back as one tensor next
to the output, which keeps gradient checkpointing right.

Shape legend: B batch, N tokens, D width, H hidden width of one expert, E experts, K experts per
token, M modalities, T = B*N tokens in all, S = T*K (token, expert) slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avdiff.core.feedforward import SwiGLU

IMPLEMENTATIONS = ("auto", "grouped", "loop", "cast_loop")


@dataclass(frozen=True)
class RoutingStats:
    """Reading of the statistics tensor that `MoE` returns.

    Args:
        data: (..., M, 2E+1) fp32 (fp64 for fp64 inputs): for each modality the slots sent to each
            expert (no gradient), the summed router probability of each expert (carries the
            gradient) and the number of tokens. Leading dimensions are free: stack layers there.
    """

    data: Tensor

    @classmethod
    def stack(cls, layers: Sequence[Tensor]) -> RoutingStats:
        """Statistics of several layers, each (M, 2E+1), as one record (L, M, 2E+1): a collapsed
        layer stays visible.
        """
        return cls(torch.stack(list(layers)))

    @property
    def num_experts(self) -> int:
        return (self.data.shape[-1] - 1) // 2

    @property
    def counts(self) -> Tensor:
        """Slots sent to each expert, (..., M, E)."""
        return self.data[..., : self.num_experts]

    @property
    def prob_sums(self) -> Tensor:
        """Router probabilities summed over tokens, (..., M, E)."""
        return self.data[..., self.num_experts : -1]

    @property
    def tokens(self) -> Tensor:
        """Tokens routed, (..., M)."""
        return self.data[..., -1]

    def __add__(self, other: RoutingStats) -> RoutingStats:
        """Sum over micro-batches; exact, because only sums are kept."""
        return RoutingStats(self.data + other.data)

    def detach(self) -> RoutingStats:
        """The same numbers without a gradient, to be kept over micro-batches."""
        return RoutingStats(self.data.detach())

    def all_reduce(self) -> RoutingStats:
        """Sum over data-parallel ranks, without gradient; the record itself when torch.distributed
        is not running.
        """
        data = self.data.detach().clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(data)
        return RoutingStats(data)


def balance_loss(stats: RoutingStats, load: RoutingStats | None = None) -> Tensor:
    """Load-balance loss of each layer and modality, (..., M): L = E * sum_i f_i * P_i; 1 at
    balance, at most E.

    f_i is the share of slots that expert i received and P_i its mean router probability (Switch
    Transformer, arXiv 2101.03961 eq. 4-6, with f over all K slots). A modality without tokens gives
    0.

    Args:
        stats: what this micro-batch returned; its probabilities carry the gradient.
        load: where f comes from instead, e.g. the sum over all micro-batches and ranks (arXiv
            2501.11873: a balance that is asked of every micro-batch stops experts from
            specialising). f has no gradient, so the mean of the losses of equal micro-batches is
            then exactly the loss of the whole batch, and so is its gradient.
    """
    counts = (stats if load is None else load).counts.detach()
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    mean_prob = stats.prob_sums / stats.tokens.unsqueeze(-1).clamp(min=1)
    return stats.num_experts * (share * mean_prob).sum(-1)


@dataclass(frozen=True)
class LoadReport:
    """How evenly the experts work, for each layer and modality.

    Args:
        share: (..., M, E) share of the slots, sums to 1 (all 0 where a modality had no tokens).
        max_over_mean: (..., M) load of the busiest expert over the mean load: 1 at balance, E/K if
            all tokens agree.
        dead: (..., M) number of experts that received less than `dead_below` of the fair share.
    """

    share: Tensor
    max_over_mean: Tensor
    dead: Tensor


def load_report(stats: RoutingStats, dead_below: float = 0.01) -> LoadReport:
    """Read the load of each expert from (accumulated, reduced) statistics; `dead_below` is a share
    of the fair load.
    """
    counts = stats.counts.detach()
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    seen = stats.tokens > 0
    relative = share * stats.num_experts
    dead = (relative < dead_below).sum(-1) * seen
    return LoadReport(share, relative.amax(-1), dead)


class Router(nn.Module):
    """Linear router: fp32 softmax over experts, top-k, weights of the chosen renormalised to sum 1
    (Qwen3-MoE).

    Args:
        dim: D. num_experts: E. top_k: K, 1..E. modalities: M, number of balance groups.
        selection_bias: add a bias (M, E) to the probabilities when choosing, never when weighting
            (auxiliary-loss-free balancing, DeepSeek-V3, arXiv 2412.19437 eq. 16); `update_bias`
            moves it after each optimiser step. It is a
            buffer: saved, not trained, and to be kept in fp32.
    """

    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        modalities: int = 1,
        selection_bias: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: must lie between 1 and num_experts={num_experts}")
        if modalities < 1:
            raise ValueError(f"modalities={modalities}: needs at least 1")
        self.top_k = top_k
        self.num_experts = num_experts
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer(
            "bias", torch.zeros(modalities, num_experts) if selection_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small weights: the start is close to uniform, so every expert learns from the first
        step.
        """
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, modality: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            x: (T, D), any float dtype; the arithmetic is fp32 (fp64 for fp64) even under autocast.
            modality: (T,) integers in [0, M), or -1 for padding (routed, but not counted); None
                means all 0.

        Returns:
            experts (T, K) int64, weights (T, K), statistics (M, 2E+1) as `RoutingStats` reads them.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.to(dtype), self.weight.to(dtype)).softmax(-1)  # (T, E)
            scores = probs.detach()
            if self.bias is not None:
                group = 0 if modality is None else modality.clamp(min=0)
                scores = scores + self.bias[group].to(dtype)
            experts = scores.topk(self.top_k, dim=-1).indices  # (T, K)
            weights = probs.gather(-1, experts)
            weights = weights / weights.sum(-1, keepdim=True)
            return experts, weights, self._statistics(experts, probs, modality)

    def _statistics(self, experts: Tensor, probs: Tensor, modality: Tensor | None) -> Tensor:
        chosen = torch.zeros_like(probs).scatter_(-1, experts, 1.0)  # (T, E)
        ones = torch.ones_like(probs[:, :1])
        per_token = torch.cat([chosen, probs, ones], dim=-1)  # (T, 2E+1)
        if modality is None:
            return F.pad(per_token.sum(0, keepdim=True), (0, 0, 0, self.modalities - 1))
        member = (
            modality == torch.arange(self.modalities, device=modality.device)[:, None]
        )  # (M, T)
        return member.to(probs.dtype) @ per_token

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """Raise the bias of experts below the mean load by `rate` and lower it above.

        Call it once per optimiser step, outside forward, with counts (M, E) (or (E,) for M = 1)
        summed over micro-batches and ranks, so that every rank takes the same step. A modality
        without tokens keeps its bias.
        """
        if self.bias is None:
            raise ValueError("update_bias: this router was built with selection_bias=False")
        counts = counts.to(self.bias).reshape(self.bias.shape)
        self.bias += rate * torch.sign(counts.mean(-1, keepdim=True) - counts)


class Experts(nn.Module):
    """E SwiGLU networks without biases, W_down(silu(W_gate x) * W_up x), packed into two 3-D
    parameters.

    Args:
        dim: D. hidden: H, width of one expert. num_experts: E.
        implementation: "grouped" runs `F.grouped_mm`; it needs bf16, fp16 or fp32, and D and H at
            multiples of 16 bytes. "loop" runs a matmul per expert, everywhere (fp64, forward-mode
            AD). "cast_loop" does so with a hand-written backward, for autocast on a CPU. "auto"
            takes the fastest that can run.
    """

    def __init__(
        self, dim: int, hidden: int, num_experts: int, implementation: str = "auto"
    ) -> None:
        super().__init__()
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
            )
        self.implementation = implementation
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The law of nn.Linear for each expert: uniform within 1/sqrt(fan in)."""
        for weight in (self.gate_up, self.down):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply expert e to its rows.

        Args:
            x: (S, D), rows sorted by expert. counts: (E,) integers, rows of each expert; they sum
                to S.

        Returns:
            (S, D) in the dtype of the matmuls (the autocast dtype under autocast).
        """
        dtype = self.dtype_for(x)
        path = (
            self._choose(x.device.type, dtype)
            if self.implementation == "auto"
            else self.implementation
        )
        if path == "cast_loop":
            return _CastLoop.apply(x.to(dtype), self.gate_up, self.down, counts.tolist())
        x = x.to(dtype)
        gate_up = self.gate_up.to(dtype)
        down = self.down.to(dtype)
        if path == "loop":
            return _loop(x, gate_up, down, counts.tolist())
        offsets = counts.cumsum(0).to(
            torch.int32
        )  # rows after offsets[-1] would be uninitialised: there are none
        gate, up = F.grouped_mm(x, gate_up, offs=offsets).chunk(2, dim=-1)  # (S, H) each
        return F.grouped_mm(F.silu(gate) * up, down, offs=offsets)

    def dtype_for(self, x: Tensor) -> torch.dtype:
        """Type of the matmuls on x: autocast's where it is on (grouped_mm is not on its list), else
        the wider one.
        """
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return torch.promote_types(x.dtype, self.gate_up.dtype)

    def _choose(self, device: str, dtype: torch.dtype) -> str:
        if device == "cpu" and dtype != self.gate_up.dtype:
            return "cast_loop"
        _, hidden, dim = self.down.shape
        aligned = all(size * dtype.itemsize % 16 == 0 for size in (dim, hidden))
        supported = dtype in (torch.bfloat16, torch.float16, torch.float32) and hasattr(
            F, "grouped_mm"
        )
        return "grouped" if aligned and supported else "loop"


def _loop(x: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """The experts one by one: the slow twin of the other two ways. x (S, D) sorted by expert -> (S,
    D).
    """
    outputs = []
    # unbind, not W[e]: the backward of an index allocates a gradient of all experts for each expert
    for rows, wide, narrow in zip(x.split(counts), gate_up.unbind(0), down.unbind(0), strict=True):
        gate, up = (rows @ wide).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ narrow)
    return torch.cat(outputs)


class _CastLoop(torch.autograd.Function):
    """The loop for weights of another dtype than x, as under autocast.

    To cast the fp32 weights of all experts, and their gradients back, takes as long as the matmuls
    of a few tokens. Here an expert is cast when its turn comes, so that it is still in cache when
    it is used; its gradient goes straight to its place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        """x (S, D) sorted by expert, gate_up (E, D, 2H), down (E, H, D) -> (S, D) in the dtype of
        x.
        """
        y, hidden = (
            torch.empty_like(x),
            x.new_empty(x.shape[0], gate_up.shape[-1]),
        )  # (S, D), (S, 2H)
        wides: list[Tensor] = []
        narrows: list[Tensor] = []
        parts = (x.split(counts), hidden.split(counts), y.split(counts), gate_up, down)
        for rows, both, out, wide, narrow in zip(*parts, strict=True):
            wides.append(wide.to(x.dtype))
            narrows.append(narrow.to(x.dtype))
            torch.mm(rows, wides[-1], out=both)
            gate, up = both.chunk(2, dim=-1)
            torch.mm(F.silu(gate) * up, narrows[-1], out=out)
        ctx.save_for_backward(x, hidden, *wides, *narrows)
        ctx.counts = counts
        ctx.dtypes = (gate_up.dtype, down.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gate_up and down; those of the weights only where asked for."""
        x, hidden, *weights = ctx.saved_tensors
        wides = weights[: len(ctx.counts)]
        narrows = weights[len(ctx.counts) :]
        _, needs_wide, needs_narrow, _ = ctx.needs_input_grad
        d_wide = (
            x.new_empty((len(wides), *wides[0].shape), dtype=ctx.dtypes[0]) if needs_wide else None
        )
        d_narrow = (
            x.new_empty((len(narrows), *narrows[0].shape), dtype=ctx.dtypes[1])
            if needs_narrow
            else None
        )
        dx = torch.empty_like(x)
        rows_of = [t.split(ctx.counts) for t in (x, hidden, dy, dx)]
        for e, (rows, both, d_out, d_rows) in enumerate(zip(*rows_of, strict=True)):
            gate, up = both.chunk(2, dim=-1)
            act = F.silu(gate)
            if d_narrow is not None:
                d_narrow[e] = (act * up).T @ d_out
            d_act = d_out @ narrows[e].T
            d_both = torch.cat(
                [torch.ops.aten.silu_backward(d_act * up, gate), d_act * act], dim=-1
            )
            if d_wide is not None:
                d_wide[e] = rows.T @ d_both
            torch.mm(d_both, wides[e].T, out=d_rows)
        return dx, d_wide, d_narrow, None


class MoE(nn.Module):
    """Feed-forward layer of E experts of which each token uses K, with an optional shared expert
    that all tokens use.

    y = shared(x) + sum_{i in top-k} g_i * expert_i(x), g = softmax(W_r x) renormalised over the
    chosen experts.

    Args:
        dim: D. hidden: H of one routed expert. num_experts: E. top_k: K.
        shared_expert_hidden: H of the shared expert, 0 for none. modalities: M groups that are
            balanced one by one.
        selection_bias: see `Router`. implementation: see `Experts`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        shared_expert_hidden: int = 0,
        modalities: int = 1,
        selection_bias: bool = False,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.router = Router(dim, num_experts, top_k, modalities, selection_bias)
        self.experts = Experts(dim, hidden, num_experts, implementation)
        self.shared = SwiGLU(dim, shared_expert_hidden) if shared_expert_hidden else None

    def forward(self, x: Tensor, modality: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route and transform tokens.

        Args:
            x: (B, N, D). modality: (N,) or (B, N) integers in [0, M), -1 for padding that must not
                be counted; None means that all tokens belong to modality 0.

        Returns:
            y (B, N, D) in the dtype of x, and statistics (M, 2E+1): wrap them in `RoutingStats`.
        """
        tokens = x.flatten(0, 1)  # (T, D)
        groups = None if modality is None else modality.expand(x.shape[:2]).flatten()  # (T,)
        experts, weights, stats = self.router(tokens, groups)
        slots = experts.flatten()  # (S,)
        order = slots.argsort(stable=True)  # slot at each sorted row
        counts = torch.bincount(slots, minlength=self.router.num_experts)  # (E,)
        owner = order // self.router.top_k  # token of each sorted row
        rows = self.experts(
            tokens.to(self.experts.dtype_for(tokens)).index_select(0, owner), counts
        )  # (S, D)
        rows = rows * weights.flatten().index_select(0, order).unsqueeze(-1).to(rows.dtype)
        y = rows.new_zeros(tokens.shape).index_add(0, owner, rows)  # (T, D)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.to(x.dtype).view_as(x), stats
