"""CaptionEncoder: the small text encoder of the embedded default, trained together with the
transformer.

Large models use a transformers text encoder in its place; the pipeline only needs
`(ids, mask) -> (B, L, dim)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from avdiff.core.attention import Attention
from avdiff.core.feedforward import SwiGLU
from avdiff.core.modulation import rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class CaptionEncoder(ModelMixin, ConfigMixin):
    """Bidirectional transformer over caption tokens.

    Args:
        vocab_size: of the tokenizer saved beside it. dim: width of the features. max_length:
            longest caption in tokens.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        dim: int = 192,
        num_layers: int = 3,
        num_heads: int = 4,
        hidden: int = 512,
        max_length: int = 96,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim)
        self.attns = nn.ModuleList(
            Attention(dim, num_heads, dim // num_heads) for _ in range(num_layers)
        )
        self.ffs = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(num_layers))
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.position.weight, std=0.3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """ids (B, L) and mask (B, L), 1 for real tokens -> features (B, L, dim); masked places hold
        no meaning.
        """
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.position(
            places
        )  # called, not indexed: its weight may be stored elsewhere
        mask = attention_mask.bool()
        # A caption of padding alone would leave nothing to attend to: let it see its first place.
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)[:, None, None]
        for attn, ff in zip(self.attns, self.ffs, strict=True):
            x = x + attn(rms_norm(x), attention_mask=mask)
            x = x + ff(rms_norm(x))
        return rms_norm(x)


def train_caption_tokenizer(
    captions: Iterable[str], vocab_size: int = 4096
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lower-cased captions: any script can be written, and padding is id 0."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", padding_side="right"
    )
