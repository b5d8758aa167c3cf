"""How much memory training an LTX-2 takes, told before anything is loaded: all tensors are on meta.

Activations are what autograd keeps for one loss, measured on one and on two blocks and continued
in a straight line to all of them. Attention is replaced by a function that keeps what a fused
kernel keeps: queries, keys, values, output and the logarithms of its sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor, nn

from avdiff.clip import ClipSpec, Clock
from avdiff.data.cache import LatentCache
from avdiff.families.ltx2.denoiser import LTX2Denoiser
from avdiff.families.ltx2.layout import LTX2Layout
from avdiff.families.ltx2.names import branch_of
from avdiff.families.ltx2.quantize import KEPT
from avdiff.families.ltx2.texts import LTX2Text
from avdiff.latents import Joint
from avdiff.train.joint.ltx2_recipe import LTX2Recipe
from avdiff.train.joint.ltx2_task import choose_weights, text_widths

GIB = 2**30
CARDS = (24, 32, 48, 80)  # GB of common cards
IN_FLIGHT = 1.35  # gradients of activations and the allocator's losses, measured on CPU
CLOCK = Clock(8, 32, 1, 640, 160)
BYTES = {
    "none": None,
    "int8": 1.0,
    "fp8": 1.0,
    "nf4": 0.5625,
}  # of a quantized weight and its scale
DEFAULT_CLIPS = ((49, 480, 832), (121, 512, 768))  # frames, height, width where there is no cache
TEXT_TOKENS = 1024


@dataclass(frozen=True)
class Memory:
    """Bytes of a run. weights: frozen and trained. training: gradients, moments, average.
    activations: kept for the backward pass of a micro-batch.
    """

    weights: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.weights + self.training + round(IN_FLIGHT * self.activations)


def meta_transformer(config: Mapping[str, Any], layers: int | None = None):
    """The transformer of a config without a byte of weights."""
    changed = {key: value for key, value in config.items() if not key.startswith("_")}
    if layers is not None:
        changed["num_layers"] = layers
    with torch.device("meta"):
        return LTX2VideoTransformer3DModel(**changed)


def weight_bytes(transformer: nn.Module, recipe: LTX2Recipe) -> tuple[int, int]:
    """Bytes of all weights as they are loaded, and of what training adds to the trained ones."""
    frozen_size = 4 if recipe.model.dtype == "float32" else 2
    quantized = BYTES[recipe.model.quantization]
    copies = 3 + bool(recipe.training.ema_decay)  # gradient, two moments, average
    weights = training = 0.0
    for name, parameter in transformer.named_parameters():
        count = parameter.numel()
        if parameter.requires_grad:
            weights += 4 * count
            training += 4 * copies * count
        elif quantized and parameter.ndim == 2 and not any(part in name for part in KEPT):
            weights += quantized * count
        else:
            weights += frozen_size * count
    return round(weights), round(training)


def activation_bytes(recipe: LTX2Recipe, config: Mapping[str, Any], clip: ClipSpec) -> int:
    """Bytes that a micro-batch of `clip` keeps for its backward pass."""
    one, two = (_kept_on_meta(recipe, config, clip, layers) for layers in (1, 2))
    return one + (int(config["num_layers"]) - 1) * (two - one)


def _kept_on_meta(
    recipe: LTX2Recipe, config: Mapping[str, Any], clip: ClipSpec, layers: int
) -> int:
    transformer = meta_transformer(config, layers)
    if recipe.adapter.rank:
        transformer.to(getattr(torch, recipe.model.dtype))
    choose_weights(transformer, recipe.adapter, recipe.objective.modalities)
    if recipe.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    with fused_attention():
        return kept_bytes(transformer, clip, recipe.training.train_batch_size, "meta")


def kept_bytes(
    transformer: LTX2VideoTransformer3DModel, clip: ClipSpec, batch: int, device: str
) -> int:
    """Bytes that autograd keeps after one forward pass and loss, weights left out."""
    config = transformer.config
    layout = LTX2Layout(clip, Joint(config.in_channels, config.audio_in_channels // 16), 16)
    dtype = transformer.proj_in.weight.dtype
    counts, widths = layout.tokens(), layout.widths()
    tokens = counts.map(lambda n, c: torch.zeros(batch, n, c, device=device), widths)
    sigma = counts.map(lambda _: torch.full((batch,), 0.5, device=device))
    video, audio = text_widths(transformer)
    ones = torch.ones(batch, TEXT_TOKENS, device=device)
    text = LTX2Text(
        torch.zeros(batch, TEXT_TOKENS, video, device=device, dtype=dtype),
        torch.zeros(batch, TEXT_TOKENS, audio, device=device, dtype=dtype),
        ones,
    )
    parts = (*transformer.parameters(), *transformer.buffers())
    known = {part.untyped_storage()._cdata for part in parts}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:  # pointers are all 0 on meta; the storage itself is not
            kept[storage._cdata] = storage
        return tensor

    transformer.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = LTX2Denoiser(transformer)(tokens, sigma, text, layout)
        loss = out.video.square().mean() + out.audio.square().mean()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss, out
    return total


class _Fused(torch.autograd.Function):
    """Attention that computes nothing and keeps what a fused kernel would."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("a plan has no backward pass")


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within, scaled_dot_product_attention keeps what a fused kernel keeps."""
    own = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own  # type: ignore[assignment]


def plan_memory(recipe: LTX2Recipe, config: Mapping[str, Any], clip: ClipSpec) -> Memory:
    """Memory of a run on clips of one size."""
    transformer = meta_transformer(config)
    choose_weights(transformer, recipe.adapter, recipe.objective.modalities)
    weights, training = weight_bytes(transformer, recipe)
    return Memory(weights, training, activation_bytes(recipe, config, clip))


def describe_plan(recipe: LTX2Recipe, config: Mapping[str, Any]) -> str:
    """Lines for `--dry-run`: weights by branch, memory by clip size, cards that hold it."""
    transformer = meta_transformer(config)
    choose_weights(transformer, recipe.adapter, recipe.objective.modalities)
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in transformer.named_parameters():
        counts = trained if parameter.requires_grad else frozen
        branch = branch_of(name)
        counts[branch] = counts.get(branch, 0) + parameter.numel()
    lines = [f"{'branch':10}{'trained':>16}{'frozen':>18}"]
    for branch in sorted(trained | frozen):
        lines.append(f"{branch:10}{trained.get(branch, 0):16,}{frozen.get(branch, 0):18,}")
    lines.append("")
    for clip in planned_clips(recipe):
        memory = plan_memory(recipe, config, clip)
        lines.append(_memory_line(clip, memory))
        if not recipe.model.gradient_checkpointing and memory.total > CARDS[0] * GIB:
            leaner = replace(recipe, model=replace(recipe.model, gradient_checkpointing=True))
            less = plan_memory(leaner, config, clip)
            lines.append(f"  with gradient_checkpointing=true: {less.total / GIB:.1f} GiB")
    lines.append("(the peak is an estimate from CPU measurements; not measured on a GPU)")
    return "\n".join(lines)


def planned_clips(recipe: LTX2Recipe) -> list[ClipSpec]:
    """Sizes of the cached clips, or common ones where there is no cache yet."""
    if recipe.data.train_data:
        recipe.check_data()
        cache = LatentCache(recipe.data.train_data)
        sizes = {cache.clip(i) for i in range(len(cache))}
        return sorted(sizes, key=lambda clip: clip.video_tokens)
    return [ClipSpec(f, 24, h, w, 16000, CLOCK) for f, h, w in DEFAULT_CLIPS]


def _memory_line(clip: ClipSpec, memory: Memory) -> str:
    fitting = [f"{card}" for card in CARDS if memory.total <= 0.95 * card * 1e9]
    where = f"fits cards of {', '.join(fitting)} GB" if fitting else "fits no single card of 80 GB"
    return (
        f"{clip.width}x{clip.height}x{clip.num_frames}: {memory.total / GIB:.1f} GiB "
        f"({memory.weights / GIB:.1f} weights, {memory.training / GIB:.1f} gradients and moments, "
        f"{memory.activations / GIB:.2f} activations): {where}"
    )
