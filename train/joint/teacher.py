"""The teacher of a distillation: a finished pipeline whose guided estimates a student learns.

Shape legend: B rows, N tokens of a modality, C values per token, D width of a branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.models.conditions import Conditions, Positions
from avdiff.models.prompt_domain import PromptDomain
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack
from avdiff.pipelines.pipeline_av import RECOMMENDED, AVDiffPipeline
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler
from avdiff.train.joint.dataset import Batch
from avdiff.train.recipe import Recipe

Features = Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]


@dataclass(frozen=True)
class TeacherConditions:
    """What the teacher reads of a micro-batch, the same at all its steps.

    Args:
        conditions: of the rows and, below them, of the same rows without text where guidance needs
            them. isolated: the modalities do not see each other. doubled: whether there are rows
            without text.
    """

    conditions: Conditions
    isolated: bool
    doubled: bool


class Teacher:
    """A frozen model that estimates clean latents with guidance, in one batched pass.

    Args:
        transformer, text_encoder, tokenizer, scheduler: of its pipeline. guidance: text scales of
            each modality.
        recommended: steps and guidance that its pipeline uses by default. prompt_domain: what its
            pipeline can make.
    """

    def __init__(
        self,
        transformer: AVTransformer,
        text_encoder: CaptionEncoder,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: JointFlowMatchScheduler,
        guidance: Guidance,
        recommended: Mapping[str, float],
        prompt_domain: PromptDomain | None = None,
    ) -> None:
        self.transformer = transformer.requires_grad_(False).eval()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.guidance = guidance
        self.recommended = {**RECOMMENDED, **recommended}
        self.prompt_domain = prompt_domain

    @classmethod
    def load(cls, recipe: Recipe) -> Teacher:
        """The teacher that a recipe names, with its guidance.

        Raises:
            ValueError: it cannot be loaded.
        """
        from transformers import AutoTokenizer

        d = recipe.distillation
        name = str(recipe.distillation.teacher)
        try:
            config = AVDiffPipeline.load_config(name)
            parts = (
                AVTransformer.from_pretrained(name, subfolder="transformer"),
                CaptionEncoder.from_pretrained(name, subfolder="text_encoder"),
                AutoTokenizer.from_pretrained(name, subfolder="tokenizer", trust_remote_code=False),
                JointFlowMatchScheduler.from_pretrained(name, subfolder="scheduler"),
            )
            named = (config.get("prompt_domain") or [None])[0]
            prompt_domain = (
                PromptDomain.from_pretrained(name, subfolder="prompt_domain") if named else None
            )
        except OSError as error:
            raise ValueError(
                f"teacher={name}: needs the folder or hub name of a whole pipeline "
                f"({' '.join(str(error).split())})"
            ) from error
        recommended = {**RECOMMENDED, **{k: config[k] for k in RECOMMENDED if k in config}}
        requested = (d.teacher_guidance_scale, d.teacher_audio_guidance_scale)
        usual = (
            [1.0, 1.0]
            if d.distill == "size"
            else [recommended[k] for k in RECOMMENDED if "guidance" in k]
        )
        scales = [u if r is None else r for r, u in zip(requested, usual, strict=True)]
        return cls(
            *parts,
            guidance=Guidance(text=Joint(*scales)),
            recommended=recommended,
            prompt_domain=prompt_domain,
        )

    @property
    def guided(self) -> bool:
        """Whether an estimate needs the pass without text."""
        return len(self.guidance.passes()) > 1

    def to(self, device: torch.device) -> Teacher:
        """Move the networks."""
        self.transformer.to(device)
        self.text_encoder.to(device)
        return self

    @torch.no_grad()
    def conditions(
        self,
        batch: Batch,
        positions: Positions,
        track: PhonemeTrack | None,
        isolated: bool = False,
        guided: bool = True,
    ) -> TeacherConditions:
        """Conditions of a micro-batch (see `Collate`); what does not change between steps is
        computed here.
        """
        doubled = guided and self.guided
        mask = batch.attention_mask.bool()
        text = self.text_encoder(batch.input_ids, batch.attention_mask)
        rows = len(text)
        if doubled:
            text = torch.cat([text, text])
            mask = torch.cat([mask, torch.zeros_like(mask)])
            track = None if track is None else PhonemeTrack.cat([track, track.without()])
        conditions = self.transformer.prepare(text, mask, positions, track, rows * (1 + doubled))
        return TeacherConditions(conditions, isolated, doubled)

    @torch.no_grad()
    def estimate(
        self,
        known: TeacherConditions,
        noisy: Joint[torch.Tensor],
        token_sigma: Joint[torch.Tensor],
    ) -> Joint[torch.Tensor]:
        """Guided estimate of the clean tokens (B, N, C), fp32; token_sigma (B,) or (B, N)."""
        if known.doubled:
            noisy = noisy.map(_twice)
            token_sigma = token_sigma.map(_twice)
        x0 = estimate(
            self.transformer,
            self.scheduler.config.prediction_type,
            known.conditions,
            noisy,
            token_sigma,
            known.isolated,
        )
        if not known.doubled:
            return x0
        cond = x0.map(lambda rows: rows.chunk(2)[0])
        uncond = x0.map(lambda rows: rows.chunk(2)[1])
        return self.guidance.combine({"cond": cond, "no_text": uncond})


def _twice(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows])


def estimate(
    transformer: AVTransformer,
    prediction: str,
    conditions: Conditions,
    noisy: Joint[torch.Tensor],
    token_sigma: Joint[torch.Tensor],
    isolated: bool = False,
) -> Joint[torch.Tensor]:
    """Clean tokens (B, N, C) as a network sees them, fp32, whatever it predicts."""
    out = transformer(
        hidden_states=noisy.video,
        audio_hidden_states=noisy.audio,
        timestep=token_sigma.video,
        audio_timestep=token_sigma.audio,
        conditions=conditions,
        isolated=isolated,
    )
    return as_clean(Joint(out.video, out.audio), prediction, noisy, token_sigma)


def as_clean(
    output: Joint[torch.Tensor],
    prediction: str,
    noisy: Joint[torch.Tensor],
    token_sigma: Joint[torch.Tensor],
) -> Joint[torch.Tensor]:
    """A network's answer as an estimate of the clean tokens, fp32: x0 = z - t v."""
    output = output.map(lambda x: x.float())
    if prediction == "x0":
        return output
    return JointFlowMatchScheduler().x0_from_velocity(output, noisy, token_sigma)


@contextmanager
def tapped(
    blocks: Sequence[nn.Module],
) -> Iterator[list[tuple[torch.Tensor | None, torch.Tensor | None]]]:
    """Outputs (video, audio with the shared tokens behind it) of these blocks in the order in which
    they run.
    """
    seen: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
    handles = [
        b.register_forward_hook(lambda _, __, out: seen.append(tuple(out[:2]))) for b in blocks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def matching_blocks(student: AVTransformer, teacher: AVTransformer) -> list[int]:
    """For each block of the student the block of the teacher it corresponds to: the nearest in
    relative depth among those that have all of its kinds of layers (text attention, shared stream).
    """

    def kinds(block: nn.Module) -> set[str]:
        return {
            name.split(".")[1] if name.startswith(("video", "audio")) else name.split(".")[0]
            for name, _ in block.named_parameters()
        } - {"memory"}

    theirs = [kinds(b) for b in teacher.transformer_blocks]
    blocks = list(student.transformer_blocks)
    last = len(theirs) - 1

    def nearest(i: int) -> int:
        needed = kinds(blocks[i])
        depth = i * last / max(1, len(blocks) - 1)
        return min(range(len(theirs)), key=lambda j: (len(needed - theirs[j]), abs(j - depth)))

    return [nearest(i) for i in range(len(blocks))]


@torch.no_grad()
def inherit(student: AVTransformer, teacher: AVTransformer) -> int:
    """Copy into a student what fits of its teacher's tensors; returns how many. A memory keeps the
    block it is in, since the block's number is part of its hash.
    """
    pairs = matching_blocks(student, teacher)
    theirs = teacher.state_dict()
    copied = 0
    for name, tensor in student.state_dict().items():
        source = name
        if name.startswith("transformer_blocks.") and ".memory." not in name:
            _, i, rest = name.split(".", 2)
            source = f"transformer_blocks.{pairs[int(i)]}.{rest}"
        if source in theirs and theirs[source].shape == tensor.shape:
            tensor.copy_(theirs[source])
            copied += 1
    return copied
