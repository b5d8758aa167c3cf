"""Train AVTransformer: pre-training, full fine-tuning and LoRA from cached latents.

    avdiff train recipe.toml --learning_rate 3e-4
    accelerate launch -m avdiff.train.finetune recipe.toml

Read it from the bottom: main -> setup -> fit -> FinetuneTask.loss, validate, save.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avdiff.core.memory_table import memory_tables
from avdiff.corpus.captions import parse_prompt
from avdiff.data.cache import CaptionFeatures, LatentCache
from avdiff.files import RECIPES
from avdiff.latents import MODALITIES, Joint
from avdiff.models.conditions import Positions
from avdiff.models.prompt_domain import PromptDomain
from avdiff.models.text_encoder import CaptionEncoder, train_caption_tokenizer
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack
from avdiff.pipelines.pipeline_av import RECOMMENDED, AVDiffPipeline
from avdiff.train.joint import lora as adapters
from avdiff.train.joint.aux_heads import Heads
from avdiff.train.joint.dataset import (
    Collate,
    TrainingClips,
    caption_features,
    positions_of,
    same_shape,
    to_device,
)
from avdiff.train.joint.dry_run import describe_plan
from avdiff.train.joint.export import export, push
from avdiff.train.joint.model_init import from_folder, from_preset, refuse_early, with_path
from avdiff.train.joint.monitor import LearningMonitor
from avdiff.train.joint.objective import (
    BUCKETS,
    LossBalance,
    Noised,
    Objective,
    RouterBalance,
    draw_structure,
    parts_of,
    supervised,
)
from avdiff.train.joint.teacher import tapped
from avdiff.train.joint.validation_clips import Samples, available_evaluators
from avdiff.train.loop.config import help_text, list_recipes, load_options, to_toml
from avdiff.train.loop.dataloader import mix
from avdiff.train.loop.fit import FitOptions, FitSummary, Loss, Task, fit, row_generators
from avdiff.train.loop.muon import MuonAdam, inner_matrices, muon_split
from avdiff.train.loop.optim import eight_bit
from avdiff.train.loop.sparse_optim import RowAdagrad
from avdiff.train.recipe import Recipe, taught


class FinetuneTask(Task):
    """AVTransformer and its caption encoder on cached latents.

    Args:
        recipe: checked. transformer, text_encoder, tokenizer: what is trained, and what writes
            captions as ids.
        train, held_out: `LatentCache`s; `held_out` may be None.
    """

    groups: list[tuple[Any, ...]]
    collate: Collate
    prompt_domain: PromptDomain | None = None  # of the exported pipeline

    def __init__(
        self,
        recipe: Recipe,
        transformer: AVTransformer,
        text_encoder: CaptionEncoder,
        tokenizer: Any,
        train: Any,
        held_out: Any = None,
    ) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.objective = Objective(recipe.objective)
        self.balance = LossBalance(recipe.objective.loss_balance, recipe.objective.loss_weights)
        self.router = RouterBalance()
        self.transformer = transformer
        self.text_encoder = text_encoder
        if recipe.model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.modules: dict[str, nn.Module] = {
            "transformer": transformer,
            "text_encoder": text_encoder,
            "balance": self.balance,
        }
        o = recipe.objective
        self.heads = (
            Heads(transformer, o.phoneme_head, o.viseme_head)
            if o.phoneme_head or o.viseme_head
            else None
        )
        if self.heads is not None:
            self.modules["heads"] = self.heads
        self.ema_modules = ("transformer", "text_encoder")
        self.dataset = clips = TrainingClips(train, recipe.data, transformer.config.onset_track)
        self.groups = clips.groups()
        self.held_out = (
            None if held_out is None else TrainingClips(held_out, None, clips.onset_track)
        )
        self._choose_weights()
        kept = not any(p.requires_grad for p in text_encoder.parameters())
        held = caption_features(
            kept, CaptionFeatures(text_encoder, tokenizer), clips.cache, held_out
        )
        self.collate = Collate(tokenizer, text_encoder.config.max_length, held)
        self.rows = self._row_optimizer()
        trained = {adapters.branch_of(n) for n, p in self._named() if p.requires_grad} - {"other"}
        unlearned = {m for m in MODALITIES if m not in taught(recipe.objective)}
        self.watch = LearningMonitor(taught(recipe.objective), sorted(trained - unlearned))
        prompts = recipe.samples.sample_prompts
        self.samples = (
            Samples(Path(recipe.training.output_dir), prompts, available_evaluators())
            if prompts
            else None
        )
        self._seen: dict[str, list[float]] = {}
        self.last_metrics: dict[str, float] = {}

    # ------------------------------------------------------------------------------------- the loss
    def loss(self, batch: Any, phase: str, generator: torch.Generator) -> Loss:
        """Velocity loss of each modality that takes part, plus the experts' balance."""
        tasks = self.recipe.objective.tasks
        side = torch.Generator().manual_seed(
            self.common_seed
        )  # ranks must agree: they add up their experts' load
        clean, structure = self._structure(batch, side)
        positions = positions_of(batch["clip"], str(self.device))
        first = next(x for _, x in clean.items())
        rows = row_generators(generator, len(first))
        noised = self.objective.noised(clean, positions, rows, tasks)
        alone = clean.audio is None or structure == "isolated"
        track = self._script(batch["track"], alone, self.recipe.data.video_phonemes, side)
        with tapped(self._read_blocks()) as seen:
            output, routing = self.predict(
                batch, noised, positions, track, structure == "isolated", self._unread(rows)
            )
        target = clean
        if self.recipe.objective.learned_guidance:
            with torch.no_grad():
                uncond, _ = self.predict(
                    batch, noised, positions, track, structure == "isolated", told=False
                )
            target = self.objective.guided(clean, output, uncond)
        losses = self.objective.row_losses(output, target, noised)
        only = self.recipe.objective.modalities
        learned: dict[str, torch.Tensor] = {m: loss for m, loss in losses.items() if m in only}
        means = {m: loss.mean() for m, loss in learned.items()}
        self._remember(means)
        total = self.balance(means)
        balance, load = self.router(routing)
        if balance is not None:
            total = total + self.recipe.objective.router_balance * balance
        trained = Joint(learned.get("video"), learned.get("audio"))
        parts = parts_of(losses, noised)
        if (
            self.heads is not None
            and seen
            and (named := self.heads(*seen[0], batch["track"], positions))
        ):
            total = total + self.heads.total(named)
            parts = parts | named
        return Loss(total, parts, supervised(trained, noised) | load)

    def _read_blocks(self) -> list[nn.Module]:
        return [] if self.heads is None else [self.transformer.transformer_blocks[self.heads.layer]]

    def _unread(self, rows: Sequence[torch.Generator]) -> Joint[torch.Tensor] | None:
        """(B,) rows whose picture or sound alone does not read the caption."""
        d = self.recipe.data
        if not (d.video_caption_dropout or d.audio_caption_dropout):
            return None
        drawn = torch.stack([torch.rand(2, generator=g, device=g.device) for g in rows])
        return Joint(drawn[:, 0] < d.video_caption_dropout, drawn[:, 1] < d.audio_caption_dropout)

    def predict(
        self,
        batch: Mapping[str, Any],
        n: Noised,
        positions: Positions,
        track: PhonemeTrack | None,
        isolated: bool = False,
        unread: Joint[torch.Tensor] | None = None,
        told: bool = True,
    ) -> tuple[Joint[torch.Tensor], list[torch.Tensor] | None]:
        """The network's answer (B, N, C) for each modality in `n`, and routing statistics; no text
        if not `told`.
        """
        text = self.text_of(batch)
        mask = batch["attention_mask"].bool()
        if not told:
            mask = torch.zeros_like(mask)
            track = None if track is None else track.without()
        conditions = self.transformer.prepare(text, mask, positions, track, len(text))
        out = self.transformer(
            hidden_states=n.noisy.video,
            audio_hidden_states=n.noisy.audio,
            timestep=n.sigmas.video,
            audio_timestep=n.sigmas.audio,
            isolated=isolated,
            conditions=conditions if unread is None else conditions.unread(unread),
        )
        return Joint(out.video, out.audio), out.routing

    def text_of(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Features of the captions (B, L, D), from the cache where it holds them."""
        return (
            batch["text"]
            if "text" in batch
            else self.text_encoder(batch["input_ids"], batch["attention_mask"])
        )

    def _structure(
        self, batch: Mapping[str, Any], side: torch.Generator
    ) -> tuple[Joint[torch.Tensor], str]:
        """Clean tokens that take part, and whether they see each other; what the data lacks decides
        before the draw.
        """
        clean = Joint(batch.get("video"), batch.get("audio"))
        if clean.audio is None or clean.video is None:
            return clean, "t2v" if clean.audio is None else "t2a"
        structure = draw_structure(self.recipe.objective.tasks, side)
        return {"t2v": Joint(clean.video, None), "t2a": Joint(None, clean.audio)}.get(
            structure, clean
        ), structure

    def _script(
        self, track: PhonemeTrack, alone: bool, warped: float, side: torch.Generator
    ) -> PhonemeTrack | None:
        """Words on the clock. The video branch reads them straight only when it hears nothing
        (`alone`), else warped in a share of the micro-batches: lips follow sound, not script.
        """
        if self.transformer.config.num_phonemes == 0:
            return None
        if alone:
            return replace(track, video_frame_to_phone=track.frames)
        return (
            track
            if float(torch.rand((), generator=side)) < warped
            else replace(track, video_frame_to_phone=None)
        )

    # ------------------------------------------------------------------------------ what is trained
    def parameters(self, phase: str) -> Iterable[Any]:
        """One group per branch, with its own learning rate where the recipe gives one."""
        rates = self.recipe.rates.branch_learning_rate
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._named():
            if parameter.requires_grad:
                groups.setdefault(adapters.branch_of(name), []).append(parameter)
        return [
            {"params": params, **({"lr": rates[branch]} if branch in rates else {})}
            for branch, params in groups.items()
        ]

    def optimizer(self, phase: str, options: FitOptions) -> torch.optim.Optimizer | None:
        """Muon where the recipe asks for it; None lets `fit` build AdamW."""
        if self.recipe.rates.optimizer == "adamw8bit":
            return eight_bit(self.parameters(phase), options)
        if self.recipe.rates.optimizer != "muon":
            return None
        inner = inner_matrices(self._named())
        groups = [part for entry in self.parameters(phase) for part in muon_split(inner, entry)]
        betas = (options.adam_beta1, options.adam_beta2)
        decay = options.adam_weight_decay
        return MuonAdam(groups, options.learning_rate, betas, decay, options.adam_epsilon)

    def _named(self) -> Iterable[tuple[str, nn.Parameter]]:
        return (
            (f"{m}.{n}", p)
            for m, module in self.modules.items()
            for n, p in module.named_parameters()
        )

    def _choose_weights(self) -> None:
        """Freeze what the recipe leaves alone; with one modality, all that the other one reads
        too.
        """
        recipe = self.recipe
        only = self.recipe.objective.modalities
        if recipe.adapter.rank:
            adapters.add_lora(self.transformer, recipe.adapter)
            self.text_encoder.requires_grad_(False)
        for name, parameter in self._named():
            frozen = recipe.rates.branch_learning_rate.get(adapters.branch_of(name), 1.0) == 0
            other = (
                len(only) == 1
                and not name.startswith("balance")
                and adapters.owner_of(name) != only[0]
            )
            if frozen or other:
                parameter.requires_grad_(False)

    def _row_optimizer(self) -> RowAdagrad | None:
        """Memory tables learn by gathered rows, unless an adapter or a single modality leaves them
        alone.
        """
        tables = [t for _, t in memory_tables(self.transformer) if t.rows is not None]
        rate = self.recipe.rates.memory_table_learning_rate
        whole = len(self.recipe.objective.modalities) == 2
        if not tables or not rate or not whole or self.recipe.adapter.rank:
            return None
        return RowAdagrad(tables, rate)

    def row_optimizer(self, phase: str) -> RowAdagrad | None:
        """Memory tables, whose row gradients are clipped with the rest."""
        return self.rows

    def after_step(self, phase: str, lr: float) -> None:
        """Memory tables, then the running means of the losses."""
        if self.rows is not None:
            share = lr / (self.recipe.training.learning_rate or 1.0)
            self.rows.param_groups[0]["lr"] = self.recipe.rates.memory_table_learning_rate * share
            self.rows.step()
            self.rows.zero_grad()
        sums = torch.tensor([[*self._seen.get(m, (0.0, 0.0))] for m in MODALITIES])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        means = zip(MODALITIES, sums.tolist(), strict=True)
        self.balance.observe({m: total / count for m, (total, count) in means if count})
        self._seen = {}
        self.router.forget()

    def _remember(self, means: Mapping[str, torch.Tensor]) -> None:
        for m, mean in means.items():
            entry = self._seen.setdefault(m, [0.0, 0.0])
            entry[0] += float(mean.detach())
            entry[1] += 1

    # ----------------------------------------------------------------------------- what is measured
    def norm_group(self, name: str) -> str:
        """Gradient norms by branch."""
        return adapters.branch_of(name)

    def report(self) -> dict[str, float]:
        """Norm of the adapter's update by branch."""
        deltas = adapters.delta_norms(self.transformer) if self.recipe.adapter.rank else {}
        return {f"adapter_norm/{branch}": norm for branch, norm in deltas.items()}

    def warnings(self, values: Mapping[str, float]) -> Iterable[str]:
        """What the log line says about modalities and branches that should learn."""
        return self.watch.read(values)

    def validate(self) -> dict[str, float]:
        """Held-out losses, then sample clips and what the evaluators say of them."""
        judged = {} if self.samples is None else self.samples.make(self)
        self.last_metrics = self.held_out_losses() | judged
        return self.last_metrics

    def held_out_losses(self) -> dict[str, float]:
        """By modality and noise level: always the same clips, noise and levels, joint
        generation.
        """
        if self.held_out is None or not len(self.held_out):
            return {}
        sums: dict[str, list[float]] = {}
        size = self.recipe.training.train_batch_size
        for indices in same_shape(self.held_out, self.recipe.data.validation_items, size):
            batch = to_device(self.collate([self.held_out[i] for i in indices]), self.device)
            clean = Joint(batch.get("video"), batch.get("audio"))
            positions = positions_of(batch["clip"], str(self.device))
            track = self._script(batch["track"], clean.audio is None, 0.0, torch.Generator())
            for bucket in range(BUCKETS):
                time = (bucket + 0.5) / BUCKETS
                generators = [
                    torch.Generator(self.device).manual_seed(mix(i, bucket)) for i in indices
                ]
                noised = self.objective.noised(clean, positions, generators, time=time)
                output, _ = self.predict(batch, noised, positions, track)
                for m, loss in self.objective.row_losses(output, clean, noised).items():
                    for key in (m, f"{m}/t{time:.1f}"):
                        entry = sums.setdefault(key, [0.0, 0.0])
                        entry[0] += float(loss.detach().sum())
                        entry[1] += len(loss)
        return {key: total / count for key, (total, count) in sorted(sums.items())}

    # -------------------------------------------------------------------------------- what is saved
    def settings(self) -> dict[str, Any]:
        """Model, data and objective: none of them may change on resume."""
        r = self.recipe
        parts = {
            "model": asdict(r.model),
            "data": asdict(r.data),
            "objective": asdict(r.objective),
            "rates": asdict(r.rates),
            "adapter": asdict(r.adapter),
        }
        if r.distillation.teacher is not None:
            parts["distillation"] = asdict(r.distillation)
        flat = {f"{section}.{k}": v for section, table in parts.items() for k, v in table.items()}
        return {**super().settings(), **flat}

    def module_state(self, name: str) -> dict[str, torch.Tensor]:
        """An adapter is saved without its frozen base."""
        if name == "transformer" and self.recipe.adapter.rank:
            return adapters.adapter_state(self.transformer)
        return super().module_state(name)

    def load_module_state(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `module_state`."""
        if name == "transformer" and self.recipe.adapter.rank:
            adapters.load_adapter_state(self.transformer, state)
        else:
            super().load_module_state(name, state)

    def extra_state_dict(self) -> dict[str, torch.Tensor]:
        """State of the memory tables' optimizer; the tables themselves are buffers of the
        transformer.
        """
        return {} if self.rows is None else self.rows.flat_state()

    def load_extra_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `extra_state_dict`."""
        if self.rows is not None:
            self.rows.load_flat_state(state)

    def recommended(self) -> dict[str, Any]:
        """Steps and guidance that the exported pipeline uses by default: those of the pipeline it
        started from; but plain training unlearns guidance that was in the weights, so it is asked
        for again.
        """
        base = self.recipe.model.pretrained_model_name_or_path
        config = {} if base is None else AVDiffPipeline.load_config(base)
        told = {k: config[k] for k in RECOMMENDED if k in config}
        again = {k: RECOMMENDED[k] for k in told if "guidance" in k and told[k] <= 1}
        return told | (
            dict.fromkeys(again, 1.0) if self.recipe.objective.learned_guidance else again
        )

    def save(self, directory: Path) -> None:
        """A folder that loads: the whole pipeline where codecs are known, an adapter, or the
        trained parts.
        """
        export(self, directory)


def setup(recipe: Recipe) -> FinetuneTask:
    """Caches, model, tokenizer: everything that a recipe names.

    Raises:
        ValueError: something it names does not exist or does not fit.
    """
    recipe.check()
    recipe = with_path(recipe)
    train = LatentCache(recipe.data.train_data)
    held_out = LatentCache(recipe.data.validation_data) if recipe.data.validation_data else None
    refuse_early(recipe, [train] if held_out is None else [train, held_out])
    torch.manual_seed(recipe.training.seed)
    if recipe.distillation.teacher is not None:
        from avdiff.train.distill import setup_distillation  # it builds on this module

        return setup_distillation(recipe, train, held_out)
    if recipe.model.pretrained_model_name_or_path is None:
        transformer = from_preset(recipe)
        captions = [
            c
            for _, record in train.items
            for c in record.get("captions") or [record.get("caption", "")]
        ]
        tokenizer = train_caption_tokenizer(
            (parse_prompt(c)[0] for c in captions), recipe.model.vocab_size
        )
        text_encoder = CaptionEncoder(recipe.model.vocab_size, transformer.config.text_dim)
    else:
        transformer, text_encoder, tokenizer = from_folder(
            recipe.model.pretrained_model_name_or_path
        )
    return FinetuneTask(recipe, transformer, text_encoder, tokenizer, train, held_out)


def main(arguments: Sequence[str] | None = None) -> FitSummary | None:
    """Command line: RECIPE.toml [--option value]... | --list-recipes | --help; --dry-run plans
    without training.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"{main.__doc__}\n\n{help_text(Recipe)}")
        return None
    if "--list-recipes" in words:
        for name, about in list_recipes(RECIPES):
            print(f"{name:24} {about}")
        return None
    dry = "--dry-run" in words
    words = [w for w in words if w != "--dry-run"]
    path = None if words and words[0].startswith("--") else words.pop(0)
    if path is not None and not Path(path).exists() and (RECIPES / path).exists():
        path = str(RECIPES / path)
    recipe = load_options(Recipe, path, words)
    recipe.check()
    if dry:
        print(to_toml(recipe))
        print(describe_plan(setup(recipe)))
        return None
    summary = fit(setup(recipe), recipe.training)
    if recipe.export.push_to_hub and summary.reason == "finished":
        print(push(Path(recipe.training.output_dir) / "final", recipe.export))
    print(
        f"{summary.reason} at step {summary.step} after {summary.seconds:.0f} s: "
        f"{recipe.training.output_dir}"
    )
    return summary


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
