"""`TrainedModel`: what a run trains, as its dry run, its validation clips and its export see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from avdiff.core.memory_table import memory_tables
from avdiff.models.prompt_domain import PromptDomain
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import RECOMMENDED, AVDiffPipeline
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler
from avdiff.train.joint import lora
from avdiff.train.loop.muon import MuonAdam, inner_matrices, muon_split
from avdiff.train.loop.optim import eight_bit
from avdiff.train.loop.sparse_optim import RowAdagrad
from avdiff.train.loop.task import FitOptions, ParameterGroup
from avdiff.train.recipe import Recipe


@dataclass
class TrainedModel:
    """The networks of a run and what belongs to them.

    Args:
        recipe: checked. transformer, text_encoder: as they are now. tokenizer: of captions.
        scheduler: how the exported pipeline walks from noise to data.
        modules: name -> module of all that is trained or saved, helpers of the loss included.
        prompt_domain: of the exported pipeline. sampling: steps and guidance that it uses by
            default. rows: optimizer of the memory tables, None where they are left alone.
    """

    recipe: Recipe
    transformer: AVTransformer
    text_encoder: CaptionEncoder
    tokenizer: PreTrainedTokenizerBase
    scheduler: JointFlowMatchScheduler
    modules: dict[str, nn.Module] = field(default_factory=dict)
    prompt_domain: PromptDomain | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    rows: RowAdagrad | None = None

    def __post_init__(self) -> None:
        self.modules = {
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
            **self.modules,
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("module.path.to.weight", parameter) of all modules."""
        for module_name, module in self.modules.items():
            for name, parameter in module.named_parameters():
                yield f"{module_name}.{name}", parameter

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def trained_branches(self) -> set[str]:
        """Branches with at least one trainable weight."""
        found = {lora.branch_of(n) for n, p in self.named_parameters() if p.requires_grad}
        return found - {"other"}

    def choose_weights(self) -> None:
        """Add the adapter, and freeze what the recipe leaves alone; with one modality, all that the
        other one reads too.
        """
        recipe = self.recipe
        only = recipe.objective.modalities
        if recipe.adapter.rank:
            lora.add_lora(self.transformer, recipe.adapter, only)
            self.text_encoder.requires_grad_(False)
        rates = recipe.rates.branch_learning_rate
        for name, parameter in self.named_parameters():
            frozen = rates.get(lora.branch_of(name), 1.0) == 0
            foreign = (
                len(only) == 1 and not name.startswith("balance") and lora.owner_of(name) != only[0]
            )
            if frozen or foreign:
                parameter.requires_grad_(False)
        self.rows = self._row_optimizer()

    def _row_optimizer(self) -> RowAdagrad | None:
        """Memory tables learn by gathered rows, unless an adapter or a single modality leaves them
        alone.
        """
        recipe = self.recipe
        tables = [table for _, table in memory_tables(self.transformer) if table.rows is not None]
        rate = recipe.rates.memory_table_learning_rate
        whole = len(recipe.objective.modalities) == 2
        if not tables or not rate or not whole or recipe.adapter.rank:
            return None
        return RowAdagrad(tables, rate)

    def parameter_groups(self) -> list[ParameterGroup]:
        """One group per branch, with its own learning rate where the recipe gives one."""
        rates = self.recipe.rates.branch_learning_rate
        groups: dict[str, ParameterGroup] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                branch = lora.branch_of(name)
                group = groups.setdefault(branch, {"params": []})
                group["params"].append(parameter)
                if branch in rates:
                    group["lr"] = rates[branch]
        return list(groups.values())

    def optimizer(self, options: FitOptions) -> torch.optim.Optimizer | None:
        """Muon or eight-bit AdamW where the recipe asks for it; None lets `fit` build AdamW."""
        kind = self.recipe.rates.optimizer
        if kind == "adamw8bit":
            return eight_bit(self.parameter_groups(), options)
        if kind != "muon":
            return None
        inner = inner_matrices(self.named_parameters())
        groups = [part for group in self.parameter_groups() for part in muon_split(inner, group)]
        betas = (options.adam_beta1, options.adam_beta2)
        decay = options.adam_weight_decay
        return MuonAdam(groups, options.learning_rate, betas, decay, options.adam_epsilon)


def base_sampling(recipe: Recipe) -> dict[str, float]:
    """Steps and guidance that the exported pipeline uses by default: those of the pipeline it
    started from; but plain training unlearns guidance that was in the weights, so it is asked for
    again.
    """
    base = recipe.model.pretrained_model_name_or_path
    if base is None:
        return {}
    try:
        config = AVDiffPipeline.load_config(base)
    except OSError:
        return {}  # networks without a pipeline around them
    defaults = {name: config[name] for name in RECOMMENDED if name in config}
    unlearned = {
        name: RECOMMENDED[name]
        for name, value in defaults.items()
        if "guidance" in name and value <= 1
    }
    if recipe.objective.learned_guidance:
        return defaults | dict.fromkeys(unlearned, 1.0)
    return defaults | unlearned
