"""Train AVTransformer: pre-training, full fine-tuning and LoRA from cached latents.

    avdiff train recipe.toml --learning_rate 3e-4
    accelerate launch -m avdiff.train.finetune recipe.toml

Read it from the bottom: main -> setup -> fit -> FinetuneTask.loss, validate, save.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from avdiff.corpus.captions import parse_prompt
from avdiff.data.cache import CaptionFeatures, LatentCache
from avdiff.latents import MODALITIES, Joint
from avdiff.models.conditions import Positions
from avdiff.models.text_encoder import CaptionEncoder, train_caption_tokenizer
from avdiff.phonetics.track import PhonemeTrack
from avdiff.train.joint import lora
from avdiff.train.joint.aux_heads import Heads
from avdiff.train.joint.dataset import (
    Batch,
    BucketKey,
    Collate,
    TrainingClips,
    caption_features,
    captions_of,
    positions_of,
    same_shape,
)
from avdiff.train.joint.dry_run import Plan, describe_bucket
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
from avdiff.train.joint.trained_model import TrainedModel, base_sampling
from avdiff.train.joint.validation_clips import ValidationClips, available_evaluators
from avdiff.train.loop.command import run_training
from avdiff.train.loop.dataloader import hash_seed
from avdiff.train.loop.fit import FitOptions, FitSummary, Loss, Task, row_generators
from avdiff.train.loop.sparse_optim import RowAdagrad
from avdiff.train.loop.task import ParameterGroup
from avdiff.train.recipe import Recipe, taught


class FinetuneTask(Task[Batch]):
    """AVTransformer and its caption encoder on cached latents.

    Args:
        model: what is trained, on what recipe; its weights are chosen here (adapter, freezing).
        train, held_out: `LatentCache`s; `held_out` may be None.
    """

    def __init__(
        self, model: TrainedModel, train: LatentCache, held_out: LatentCache | None = None
    ) -> None:
        recipe = model.recipe
        o = recipe.objective
        self.model = model
        self.recipe = recipe
        self.transformer = model.transformer
        self.text_encoder = model.text_encoder
        self.objective = Objective(o)
        model.sampling = model.sampling or base_sampling(recipe)
        self.balance = LossBalance(o.loss_balance, o.loss_weights)
        self.router = RouterBalance()
        if recipe.model.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        model.modules["balance"] = self.balance
        self.heads: Heads | None = None
        if o.phoneme_head or o.viseme_head:
            self.heads = Heads(model.transformer, o.phoneme_head, o.viseme_head)
            model.modules["heads"] = self.heads
        model.choose_weights()
        self.modules = model.modules
        self.ema_modules = ("transformer", "text_encoder")

        onset_track = model.transformer.config.onset_track
        self.clips = TrainingClips(train, recipe.data, onset_track)
        self.dataset = self.clips
        self.groups = self.clips.groups()
        self.held_out = None if held_out is None else TrainingClips(held_out, None, onset_track)
        self.collate = self._collate(train, held_out)
        learning = taught(o)
        unlearned = {m for m in MODALITIES if m not in learning}
        branches = sorted(model.trained_branches() - unlearned)
        self.watch = LearningMonitor(learning, branches, self._without_adapter(learning))
        self.samples: ValidationClips | None = None
        if recipe.samples.sample_prompts:
            folder = Path(recipe.training.output_dir)
            prompts = recipe.samples.sample_prompts
            self.samples = ValidationClips(folder, prompts, available_evaluators())
        self.last_metrics: dict[str, float] = {}

    def _without_adapter(self, learning: Iterable[str]) -> list[str]:
        """Streams that the loss trains and that no layer of the adapter belongs to."""
        if not self.recipe.adapter.rank:
            return []
        layers = lora.lora_layers(self.transformer)
        owners = {lora.owner_of(f"{name}.weight") for name in layers}
        return [m for m in learning if not owners & {m, "both"}]

    def _collate(self, *caches: LatentCache | None) -> Callable[[Sequence[object]], Batch]:
        """Rows -> batch; captions come as features where the encoder rests and the caches hold
        them.
        """
        encoder = self.text_encoder
        frozen = not any(p.requires_grad for p in encoder.parameters())
        features = CaptionFeatures(encoder, self.model.tokenizer)
        # features are of the captions as they were cached, without a list behind them
        completed = self.recipe.data.attribute_lists > 0
        cached = caption_features(frozen and not completed, features, *caches)
        return Collate(self.model.tokenizer, encoder.config.max_length, cached)

    # ------------------------------------------------------------------------------------- the loss
    def loss(self, batch: Batch, phase: str, generator: torch.Generator) -> Loss:
        """Velocity loss of each modality that takes part, plus the experts' balance."""
        o = self.recipe.objective
        # what a micro-batch does as a whole is drawn alike on all ranks: they add up their experts'
        # load
        common = torch.Generator().manual_seed(self.common_seed)
        clean, structure = self.structure(batch, common)
        isolated = structure == "isolated"
        positions = positions_of(batch.clip, str(self.device))
        rows = row_generators(generator, len(batch))
        noised = self.objective.noised(clean, positions, rows, o.tasks)
        alone = clean.audio is None or isolated
        track = self.visible_track(batch.track, alone, self.recipe.data.video_phonemes, common)
        with tapped(self._head_blocks()) as block_outputs:
            output, routing = self.predict(
                batch, noised, positions, track, isolated, self._unread(rows)
            )
        target = clean
        if o.learned_guidance:
            with torch.no_grad():
                uncond, _ = self.predict(batch, noised, positions, track, isolated, with_text=False)
            target = self.objective.guided(clean, output, uncond)
        losses = self.objective.row_losses(output, target, noised)
        total, metrics = self.weighted(losses, noised, routing)
        parts = parts_of(losses, noised)
        if self.heads is not None and block_outputs:
            named = self.heads(*block_outputs[0], batch.track, positions)
            if named:
                total = total + self.heads.total(named)
                parts = parts | named
        return Loss(total, parts, metrics)

    def weighted(
        self, losses: Joint[torch.Tensor], noised: Noised, routing: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar to differentiate out of row losses (B,) by modality, and metrics for the log:
        share of supervised tokens, load of the experts.
        """
        o = self.recipe.objective
        learned = {m: loss for m, loss in losses.items() if m in o.modalities}
        means = {m: loss.mean() for m, loss in learned.items()}
        self.balance.remember(means)
        total = self.balance(means)
        balance, load = self.router(routing)
        if balance is not None:
            total = total + o.router_balance * balance
        trained = Joint(learned.get("video"), learned.get("audio"))
        return total, supervised(trained, noised) | load

    def _head_blocks(self) -> list[nn.Module]:
        return [] if self.heads is None else [self.transformer.transformer_blocks[self.heads.layer]]

    def _unread(self, rows: Sequence[torch.Generator]) -> Joint[torch.Tensor] | None:
        """(B,) rows whose picture or sound alone does not read the caption."""
        data = self.recipe.data
        if not (data.video_caption_dropout or data.audio_caption_dropout):
            return None
        drawn = torch.stack([torch.rand(2, generator=g, device=g.device) for g in rows])
        video = drawn[:, 0] < data.video_caption_dropout
        audio = drawn[:, 1] < data.audio_caption_dropout
        return Joint(video, audio)

    def predict(
        self,
        batch: Batch,
        noised: Noised,
        positions: Positions,
        track: PhonemeTrack | None,
        isolated: bool = False,
        unread: Joint[torch.Tensor] | None = None,
        with_text: bool = True,
    ) -> tuple[Joint[torch.Tensor], list[torch.Tensor] | None]:
        """The network's answer (B, N, C) for each modality in `noised`, and routing statistics."""
        text = self.text_of(batch)
        mask = batch.attention_mask.bool()
        if not with_text:
            mask = torch.zeros_like(mask)
            track = None if track is None else track.without()
        conditions = self.transformer.prepare(text, mask, positions, track, len(text))
        out = self.transformer(
            hidden_states=noised.noisy.video,
            audio_hidden_states=noised.noisy.audio,
            timestep=noised.token_sigma.video,
            audio_timestep=noised.token_sigma.audio,
            isolated=isolated,
            conditions=conditions if unread is None else conditions.unread(unread),
        )
        return Joint(out.video, out.audio), out.routing

    def text_of(self, batch: Batch) -> torch.Tensor:
        """Features of the captions (B, L, D), from the cache where it holds them."""
        if batch.text is not None:
            return batch.text
        features: torch.Tensor = self.text_encoder(batch.input_ids, batch.attention_mask)
        return features

    def structure(self, batch: Batch, common: torch.Generator) -> tuple[Joint[torch.Tensor], str]:
        """Clean tokens that take part, and whether they see each other; what the data lacks decides
        before the draw.
        """
        clean = batch.tokens
        if clean.audio is None or clean.video is None:
            return clean, "t2v" if clean.audio is None else "t2a"
        structure = draw_structure(self.recipe.objective.tasks, common)
        single = {"t2v": Joint(clean.video, None), "t2a": Joint(None, clean.audio)}
        return single.get(structure, clean), structure

    def visible_track(
        self, track: PhonemeTrack, alone: bool, warped: float, common: torch.Generator
    ) -> PhonemeTrack | None:
        """Words on the clock. The video branch reads them straight only when it hears nothing
        (`alone`), else warped in a share of the micro-batches: lips follow sound, not script.
        """
        if self.transformer.config.num_phonemes == 0:
            return None
        if alone:
            return replace(track, video_frame_to_phone=track.frame_to_phone)
        if float(torch.rand((), generator=common)) < warped:
            return track
        return replace(track, video_frame_to_phone=None)

    # ------------------------------------------------------------------------------ what is trained
    def parameters(self, phase: str) -> Iterable[ParameterGroup]:
        """One group per branch, with its own learning rate where the recipe gives one."""
        return self.model.parameter_groups()

    def optimizer(self, phase: str, options: FitOptions) -> torch.optim.Optimizer | None:
        """Muon where the recipe asks for it; None lets `fit` build AdamW."""
        return self.model.optimizer(options)

    def row_optimizer(self, phase: str) -> RowAdagrad | None:
        """Memory tables, whose row gradients are clipped with the rest."""
        return self.model.rows

    def after_step(self, phase: str, lr: float) -> None:
        """Memory tables, then the running means of the losses."""
        rows = self.model.rows
        if rows is not None:
            share = lr / (self.recipe.training.learning_rate or 1.0)
            rows.param_groups[0]["lr"] = self.recipe.rates.memory_table_learning_rate * share
            rows.step()
            rows.zero_grad()
        self.balance.finish_step()
        self.router.forget()

    # ----------------------------------------------------------------------------- what is measured
    def norm_group(self, name: str) -> str:
        """Gradient norms by branch."""
        return lora.branch_of(name)

    def describe_group(self, key: BucketKey) -> str:
        """A bucket in words, as the dry run says it."""
        return describe_bucket(key)

    def report(self) -> dict[str, float]:
        """Norm of the adapter's update by branch, and by the stream that alone it changes."""
        if not self.recipe.adapter.rank:
            return {}
        branches = lora.delta_norms(self.transformer)
        streams = lora.delta_norms(self.transformer, lora.owner_of)
        by_branch = {f"adapter_norm/{branch}": norm for branch, norm in branches.items()}
        return by_branch | {f"update_norm/{stream}": norm for stream, norm in streams.items()}

    def warnings(self, values: Mapping[str, float]) -> Iterable[str]:
        """What the log line says about modalities and branches that should learn."""
        return self.watch.read(values)

    def validate(self) -> dict[str, float]:
        """Held-out losses, then sample clips and what the evaluators say of them."""
        judged = {} if self.samples is None else self.samples.make(self.model, self.step)
        self.last_metrics = self.held_out_losses() | judged
        return self.last_metrics

    def held_out_batches(self) -> Iterator[tuple[list[int], Batch]]:
        """(clip numbers, batch) of the held-out clips that a validation measures, on the device."""
        if self.held_out is None:
            return
        size = self.recipe.training.train_batch_size
        for indices in same_shape(self.held_out, self.recipe.data.validation_items, size):
            yield indices, self.collate([self.held_out[i] for i in indices]).to(self.device)

    def held_out_losses(self) -> dict[str, float]:
        """By modality and noise level: always the same clips, noise and levels, joint
        generation.
        """
        sums: dict[str, list[float]] = {}
        for indices, batch in self.held_out_batches():
            clean = batch.tokens
            positions = positions_of(batch.clip, str(self.device))
            track = self.visible_track(batch.track, clean.audio is None, 0.0, torch.Generator())
            for bucket in range(BUCKETS):
                time = (bucket + 0.5) / BUCKETS
                seeds = [hash_seed(i, bucket) for i in indices]
                rows = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
                noised = self.objective.noised(clean, positions, rows, time=time)
                output, _ = self.predict(batch, noised, positions, track)
                for m, loss in self.objective.row_losses(output, clean, noised).items():
                    for key in (m, f"{m}/t{time:.1f}"):
                        entry = sums.setdefault(key, [0.0, 0.0])
                        entry[0] += float(loss.detach().sum())
                        entry[1] += len(loss)
        return {key: total / count for key, (total, count) in sorted(sums.items())}

    # -------------------------------------------------------------------------------- what is saved
    def settings(self) -> dict[str, object]:
        """Model, data and objective: none of them may change on resume."""
        return {**super().settings(), **self.recipe.settings()}

    def module_state(self, name: str) -> dict[str, torch.Tensor]:
        """An adapter is saved without its frozen base."""
        if name == "transformer" and self.recipe.adapter.rank:
            return lora.adapter_state(self.transformer)
        return super().module_state(name)

    def load_module_state(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `module_state`."""
        if name == "transformer" and self.recipe.adapter.rank:
            lora.load_adapter_state(self.transformer, state)
        else:
            super().load_module_state(name, state)

    def extra_state_dict(self) -> dict[str, torch.Tensor]:
        """State of the memory tables' optimizer; the tables themselves are buffers of the
        transformer.
        """
        return {} if self.model.rows is None else self.model.rows.flat_state()

    def load_extra_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `extra_state_dict`."""
        if self.model.rows is not None:
            self.model.rows.load_flat_state(dict(state))

    def save(self, directory: Path) -> None:
        """A folder that loads: the whole pipeline where codecs are known, an adapter, or the
        trained parts.
        """
        export(self.model, directory, len(self.clips), self.last_metrics)


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
    base = recipe.model.pretrained_model_name_or_path
    if base is None:
        transformer = from_preset(recipe)
        captions = (c for _, record in train.items for c in captions_of(record))
        tokenizer = train_caption_tokenizer(
            (parse_prompt(caption)[0] for caption in captions), recipe.model.vocab_size
        )
        text_encoder = CaptionEncoder(recipe.model.vocab_size, transformer.config.text_dim)
    else:
        transformer, text_encoder, tokenizer = from_folder(base)
    scheduler = Objective(recipe.objective).scheduler
    model = TrainedModel(recipe, transformer, text_encoder, tokenizer, scheduler)
    return FinetuneTask(model, train, held_out)


def _plan(recipe: Recipe) -> str:
    """What `--dry-run` prints below the resolved recipe."""
    task = setup(recipe)
    return Plan(task.model, task.clips, task.collate, task.loss, task.device).describe()


def _push(recipe: Recipe, summary: FitSummary) -> None:
    """Upload a finished run where the recipe asks for it."""
    if recipe.export.push_to_hub and summary.reason == "finished":
        print(push(Path(recipe.training.output_dir) / "final", recipe.export))


def main(argv: Sequence[str] | None = None) -> FitSummary | None:
    """Command line: RECIPE.toml [--option value]... | --list-recipes | --help; --dry-run plans
    without training.
    """
    from avdiff.train.joint import ltx2_train  # needs diffusers' LTX-2 classes

    words = list(sys.argv[1:] if argv is None else argv)
    if ltx2_train.is_for_ltx2(words):
        return ltx2_train.main(words)
    return run_training(Recipe, setup, words, str(main.__doc__), plan=_plan, finish=_push)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
