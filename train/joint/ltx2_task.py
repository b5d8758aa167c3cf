"""Fine-tuning LTX-2: ltx-trainer's objective under avdiff's own loop.

z = (1 - sigma) x + sigma eps, target eps - x, levels of the two modalities drawn independently by
the number of their tokens. What a task gives has level 0 and costs nothing; each modality's loss
is the mean square over its other tokens, and the two are added.

Shape legend: B rows, N tokens of a modality, C values per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import LTX2VideoTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from avdiff.clip import ClipSpec
from avdiff.data.cache import LatentCache
from avdiff.families.ltx2.cache import unpack_text
from avdiff.families.ltx2.denoiser import LTX2Behavior, LTX2Denoiser
from avdiff.families.ltx2.layout import LTX2Layout
from avdiff.families.ltx2.levels import training_levels
from avdiff.families.ltx2.names import branch_of, owner_of
from avdiff.families.ltx2.texts import LTX2Text
from avdiff.latents import MODALITIES, Joint, per_token
from avdiff.train.joint.lora import adapter_state, load_adapter_state, lora_layers
from avdiff.train.joint.ltx2_recipe import LTX2AdapterOptions, LTX2Recipe
from avdiff.train.joint.monitor import LearningMonitor
from avdiff.train.loop.dataloader import hash_seed
from avdiff.train.loop.fit import Loss, Task, row_generators

CLEAN_SHARE = (0.15, 0.75)  # of a clip that "extend" gives
HELD_OUT_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class LTX2Row:
    """One cached clip: tokens (N, C) by modality and the features of its caption."""

    clip: ClipSpec
    tokens: Joint[Tensor]
    text: Tensor


@dataclass(frozen=True)
class LTX2Batch:
    """Rows of one size: tokens (B, N, C), features (B, L, D)."""

    clip: ClipSpec
    tokens: Joint[Tensor]
    text: Tensor

    def to(self, device: torch.device) -> LTX2Batch:
        """Move to a device (accelerate asks for it)."""
        tokens = self.tokens.map(lambda x: x.to(device))
        return LTX2Batch(self.clip, tokens, self.text.to(device))

    def __len__(self) -> int:
        return len(self.text)


class LTX2Clips:
    """Rows of a cache; where a clip has several captions one is drawn by the row's seed."""

    def __init__(self, cache: LatentCache) -> None:
        if cache.text_encoder is None:
            raise ValueError(
                "train_data: holds no features of captions; make the cache with --text"
            )
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def groups(self) -> list[tuple[object, ...]]:
        """Size and modalities of each clip: rows of one micro-batch share them."""
        count = len(self.cache)
        return [(self.cache.clip(i), *self.cache.modalities(i)) for i in range(count)]

    def __getitem__(self, index: int) -> LTX2Row:
        return self.sample(index, index)

    def sample(self, index: int, seed: int) -> LTX2Row:
        """Clip `index` with one of its captions."""
        item = self.cache[index]
        captions = item["text"]
        generator = torch.Generator().manual_seed(seed)
        chosen = int(torch.randint(len(captions), (), generator=generator))
        tokens = Joint(item.get("video"), item.get("audio"))
        return LTX2Row(self.cache.clip(index), tokens, captions[chosen])


def collate(rows: Sequence[LTX2Row]) -> LTX2Batch:
    """Stack rows of one size."""
    tokens = {}
    for modality in MODALITIES:
        values = [getattr(row.tokens, modality) for row in rows]
        tokens[modality] = None if values[0] is None else torch.stack(values)
    return LTX2Batch(rows[0].clip, Joint(**tokens), torch.stack([row.text for row in rows]))


def given_tokens(
    task: str, edges: Joint[Tensor], tokens: Joint[int], generator: torch.Generator
) -> Joint[Tensor]:
    """Bool masks (N_v,), (N_a,) of what a task gives of a clip; all False for "joint"."""
    none = edges.map(lambda bounds: torch.zeros(len(bounds), dtype=torch.bool))
    share, place, kind = torch.rand(3, generator=generator, device=generator.device).tolist()
    if task == "a2v":
        return Joint(none.video, ~none.audio)
    if task == "v2a":
        return Joint(~none.video, none.audio)
    if task == "image":
        return Joint(edges.video[:, 0] == 0, none.audio)
    length = float(edges.video[-1, 1])
    if task == "extend":
        low, high = CLEAN_SHARE
        cut = (low + (high - low) * share) * length
        return edges.map(lambda bounds: bounds[:, 1] <= cut)
    if task == "retake":
        span = (0.2 + 0.4 * share) * length
        start = place * (length - span)
        kept = edges.map(lambda b: (b[:, 0] >= start + span) | (b[:, 1] <= start))
        choices = (kept, Joint(kept.video, ~none.audio), Joint(~none.video, kept.audio))
        return choices[int(3 * kind)]
    return none


@dataclass(frozen=True)
class Noised:
    """A micro-batch on its way into the network.

    Args:
        noisy: (B, N, C). target: eps - x. sigma: (B,), or (B, N) where some tokens are given.
            wanted: (B, N) bool, what is to be learned.
    """

    noisy: Joint[Tensor]
    target: Joint[Tensor]
    sigma: Joint[Tensor]
    wanted: Joint[Tensor]


def noised(
    clean: Joint[Tensor],
    layout: LTX2Layout,
    tasks: Mapping[str, float],
    generators: Sequence[torch.Generator],
    level: float | None = None,
) -> Noised:
    """Draw task, levels and noise of each row from the row's own generator.

    Args:
        level: one noise level for all, for measurements on held-out clips.
    """
    edges, counts = layout.edges(), layout.tokens()
    both = clean.video is not None and clean.audio is not None
    names = [name for name, share in tasks.items() if share > 0]
    shares = torch.tensor([tasks[name] for name in names])
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"video": [], "audio": []}
    for index, generator in enumerate(generators):
        device = generator.device
        chosen = torch.multinomial(shares.to(device), 1, generator=generator)
        task = names[int(chosen)] if both else "joint"
        given = given_tokens(task, edges, counts, generator)
        for modality, tokens in clean.items():
            count = getattr(counts, modality)
            drawn = training_levels(1, count, generator, device)
            sigma = drawn if level is None else torch.full_like(drawn, level)
            noise = torch.randn(tokens[index].shape, generator=generator, device=device)
            rows[modality].append((sigma, noise, getattr(given, modality).to(device)))

    def build(tokens: Tensor, modality: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigmas, noises, masks = zip(*rows[modality], strict=True)
        known = torch.stack(masks)
        eps = torch.stack(noises)
        sigma = torch.cat(sigmas)
        if bool((known == known[:, :1]).all()):  # whole rows: one level each, far cheaper
            sigma = sigma.masked_fill(known[:, 0], 0.0)
        else:
            sigma = sigma[:, None].masked_fill(known, 0.0)
        share = per_token(sigma, tokens)
        return (1 - share) * tokens + share * eps, eps - tokens, sigma, ~known

    made = clean.map(build, Joint("video", "audio"))
    return Noised(*(made.map(lambda parts, i=i: parts[i]) for i in range(4)))


def row_losses(output: Joint[Tensor], n: Noised) -> Joint[Tensor]:
    """(B,) mean square of each row's wanted tokens in fp32; 0 where all is given."""

    def one(out: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
        square = (out.float() - target.float()).square().mean(-1)
        return (square * wanted).sum(1) / wanted.sum(1).clamp(min=1)

    return output.map(one, n.target, n.wanted)


class LTX2Task(Task[LTX2Batch]):
    """The transformer of an LTX-2 on cached latents and text features.

    Args:
        transformer: its adapter and frozen weights are chosen here. folder: of the base model.
    """

    def __init__(
        self,
        recipe: LTX2Recipe,
        transformer: LTX2VideoTransformer3DModel,
        train: LatentCache,
        held_out: LatentCache | None = None,
    ) -> None:
        self.recipe = recipe
        self.transformer = transformer
        choose_weights(transformer, recipe.adapter, recipe.objective.modalities)
        if recipe.model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        behavior = LTX2Behavior(mark_first_frame=recipe.model.mark_first_frame)
        self.denoiser = LTX2Denoiser(transformer, behavior)
        self.modules = {"transformer": transformer}
        self.dataset = LTX2Clips(train)
        self.groups = self.dataset.groups()
        self.collate = collate
        self.held_out = None if held_out is None else LTX2Clips(held_out)
        trained = [n for n, p in transformer.named_parameters() if p.requires_grad]
        branches = sorted({branch_of(name) for name in trained})
        self.watch = LearningMonitor(recipe.objective.modalities, branches)
        self.metrics: dict[str, float] = {}

    # ------------------------------------------------------------------------------------ the loss
    def predict(self, batch: LTX2Batch, n: Noised) -> Joint[Tensor]:
        """The network's velocity."""
        return self.denoiser(n.noisy, n.sigma, self.text(batch), self.layout(batch.clip))

    def text(self, batch: LTX2Batch) -> LTX2Text:
        """What the branches read; its type is the one that the network computes in."""
        width = text_widths(self.transformer)[0]
        dtype = self.transformer.proj_in.weight.dtype
        return unpack_text(batch.text.to(dtype), width)

    def layout(self, clip: ClipSpec) -> LTX2Layout:
        """Counts of a clip; widths are the transformer's."""
        config = self.transformer.config
        return LTX2Layout(clip, Joint(config.in_channels, config.audio_in_channels // 16), 16)

    def loss(self, batch: LTX2Batch, phase: str, generator: torch.Generator) -> Loss:
        """Sum of the trained modalities' losses, each a mean over the rows that learn from it."""
        o = self.recipe.objective
        rows = row_generators(generator, len(batch))
        n = noised(batch.tokens, self.layout(batch.clip), o.tasks, rows)
        losses = row_losses(self.predict(batch, n), n)
        total = torch.zeros((), device=self.device)
        parts = {}
        metrics = {}
        for modality, values in losses.items():
            wanted = getattr(n.wanted, modality)
            metrics[f"supervised/{modality}"] = wanted.float().mean(1)
            learns = wanted.any(1)
            parts[modality] = values[learns]
            if modality in o.modalities and bool(learns.any()):
                total = total + o.loss_weights.get(modality, 1.0) * values[learns].mean()
        if not total.requires_grad:  # nothing to learn from in this micro-batch
            total = total + 0.0 * sum(values.sum() for _, values in losses.items())
        return Loss(total, parts, metrics)

    def validate(self) -> dict[str, float]:
        """Held-out losses by modality: the same clips, noise and levels each time."""
        if self.held_out is None:
            return {}
        sums: dict[str, list[float]] = {}
        for index in range(min(self.recipe.data.validation_items, len(self.held_out))):
            batch = collate([self.held_out[index]]).to(self.device)
            layout = self.layout(batch.clip)
            for level in HELD_OUT_LEVELS:
                seed = hash_seed(index, round(1000 * level))
                rows = [torch.Generator(self.device).manual_seed(seed)]
                n = noised(batch.tokens, layout, {"joint": 1.0}, rows, level)
                for modality, values in row_losses(self.predict(batch, n), n).items():
                    sums.setdefault(modality, []).append(float(values.mean()))
        self.metrics = {name: sum(values) / len(values) for name, values in sums.items()}
        return self.metrics

    # ---------------------------------------------------------------------------- what is watched
    def norm_group(self, name: str) -> str:
        """Gradient norms by branch."""
        return branch_of(name)

    def report(self) -> dict[str, float]:
        """Norm of the adapter's update by branch."""
        squares: dict[str, float] = {}
        for name, layer in lora_layers(self.transformer).items():
            branch = branch_of(name)
            for adapter in layer.active_adapters:
                down = layer.lora_A[adapter].weight.detach().float()
                up = layer.lora_B[adapter].weight.detach().float()
                square = float(((up.T @ up) * (down @ down.T)).sum()) * layer.scaling[adapter] ** 2
                squares[branch] = squares.get(branch, 0.0) + square
        return {f"adapter_norm/{b}": max(0.0, square) ** 0.5 for b, square in squares.items()}

    def warnings(self, values: Mapping[str, float]) -> list[str]:
        """A modality whose adapter does not move is told of while it can still be helped."""
        return self.watch.read(values)

    # ------------------------------------------------------------------------------- what is saved
    def settings(self) -> dict[str, object]:
        """Model, data and objective: none of them may change on resume."""
        return {**super().settings(), **self.recipe.settings()}

    def module_state(self, name: str) -> dict[str, Tensor]:
        """An adapter is saved without its frozen base."""
        if self.recipe.adapter.rank:
            return adapter_state(self.transformer)
        return super().module_state(name)

    def load_module_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Inverse of `module_state`."""
        if self.recipe.adapter.rank:
            load_adapter_state(self.transformer, state)
        else:
            super().load_module_state(name, state)

    def save(self, directory: Path) -> None:
        """Two LoRA files, or a whole LTX-2 folder."""
        from avdiff.train.joint.ltx2_export import export

        export(self.transformer, self.recipe, directory)


def text_widths(transformer: LTX2VideoTransformer3DModel) -> tuple[int, int]:
    """Widths of the features that the branches read: D_v, D_a."""
    config = transformer.config
    if config.use_prompt_embeddings:
        return config.caption_channels, config.caption_channels
    video = config.num_attention_heads * config.attention_head_dim
    return video, config.audio_num_attention_heads * config.audio_attention_head_dim


def choose_weights(
    transformer: nn.Module, options: LTX2AdapterOptions, modalities: Sequence[str]
) -> None:
    """Freeze what is not trained and, with a rank, put a LoRA on the layers that are asked for.

    Raises:
        ValueError: no layer is left to train.
    """
    if not options.rank:
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(owner_of(name) in modalities)
        return
    targets = lora_target_names(transformer, options, modalities)
    if not targets:
        raise ValueError(
            f"lora_targets={list(options.lora_targets)}, lora_layers={list(options.lora_layers)}: "
            f"match no layer that belongs to {' or '.join(modalities)}"
        )
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.lora_alpha is None else options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
    )
    transformer.add_adapter(config)  # type: ignore[operator]
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_target_names(
    transformer: nn.Module, options: LTX2AdapterOptions, modalities: Sequence[str]
) -> list[str]:
    """Linear layers of the blocks by branch, owner and end of the name."""
    branches = options.lora_targets
    found = []
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear) or "transformer_blocks." not in name:
            continue
        if name.endswith("to_gate_logits"):
            continue
        ends = not options.lora_layers or name.endswith(tuple(options.lora_layers))
        branch = "all" in branches or branch_of(name) in branches
        if ends and branch and owner_of(name) in modalities:
            found.append(name)
    return found
