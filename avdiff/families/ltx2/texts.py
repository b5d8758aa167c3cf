"""What LTX-2's branches read of a prompt: Gemma's hidden states through the folder's connectors.

Shape legend: B prompts, L text tokens (1024), D_v and D_a widths of the two branches' text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avdiff.families.ltx2.codec import weights_hash

if TYPE_CHECKING:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 1024  # text tokens, what the models were trained with


@dataclass(frozen=True)
class LTX2Text:
    """Output of the connectors.

    Args:
        video: (B, L, D_v). audio: (B, L, D_a). mask: (B, L), 1 where a token may be read; all of it
            where the connectors fill up with registers.
    """

    video: Tensor
    audio: Tensor
    mask: Tensor

    def rows(self, index: slice) -> LTX2Text:
        """Some of the prompts."""
        return LTX2Text(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LTX2Text:
        """Move; only the features take on `dtype`."""
        return LTX2Text(
            self.video.to(device, dtype), self.audio.to(device, dtype), self.mask.to(device)
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a cache."""
        return {f"text_{f.name}": getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> LTX2Text:
        """Inverse of `tensors`."""
        return LTX2Text(*(tensors[f"text_{f.name}"] for f in fields(LTX2Text)))

    @staticmethod
    def cat(parts: Sequence[LTX2Text]) -> LTX2Text:
        """Stack along the batch."""
        return LTX2Text(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(LTX2Text)))


class LTX2Texts:
    """Tokenizer, text encoder and connectors, all frozen."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        connectors: LTX2TextConnectors,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.connectors = connectors

    def ids(self, prompts: Sequence[str], length: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, L), padded on the left as Gemma expects it.

        Raises:
            ValueError: `length` does not fit the connectors' registers.
        """
        registers = self.connectors.config.video_connector_num_learnable_registers
        if registers and length % registers:
            raise ValueError(
                f"max_sequence_length={length}: needs a multiple of the connectors' {registers} "
                f"registers; nearest are {length // registers * registers or registers} and "
                f"{(length // registers + 1) * registers}"
            )
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        stripped = [p.strip() for p in prompts]
        told = self.tokenizer(
            stripped, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return told["input_ids"], told["attention_mask"]

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], length: int = MAX_LENGTH, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gemma's states of all layers, packed (B, L, layers * width), and the mask (B, L)."""
        ids, mask = self.ids(prompts, length)
        device = device or self.text_encoder.device
        ids, mask = ids.to(device), mask.to(device)
        out = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states = torch.stack(out.hidden_states, dim=-1).flatten(2, 3)
        return states.to(self.text_encoder.dtype), mask

    @torch.no_grad()
    def connect(self, states: Tensor, mask: Tensor) -> LTX2Text:
        """Gemma's states to what both branches read."""
        return LTX2Text(*self.connectors(states, mask, padding_side="left"))

    def __call__(
        self, prompts: Sequence[str], length: int = MAX_LENGTH, device: torch.device | None = None
    ) -> LTX2Text:
        """Prompts to what both branches read."""
        return self.connect(*self.encode(prompts, length, device))

    def fingerprint(self) -> str:
        """Hash of text encoder and connectors, and of the vocabulary."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
        parts = (weights_hash(self.text_encoder), weights_hash(self.connectors))
        return "-".join((*parts, hashlib.sha256(vocabulary).hexdigest()[:8]))
