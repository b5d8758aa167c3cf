"""Tiny random LTX-2 pipelines out of the real diffusers classes.

Geometry is the real one (8 x 32 x 32 pixels a token, 64 mels, 16 kHz, hop 160), so that counts,
positions and edges are those of the 19-22 B checkpoints; only widths and depths are small. Three
generations:

         transformer                             connectors               vocoder           text
         encoder
    2.0  use_prompt_embeddings, no gates         one projection           LTX2Vocoder 24 k  Gemma 3
    2.3  gated_attn, cross_attn_mod, perturbed   projection per modality  WithBWE 48 k      Gemma 3
    2.5  2.3 + ff_bias=False + keyframe marks    as 2.3                   WithBWE 48 k      Gemma 4
    unified
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from avdiff.pipelines.pipeline_ltx2 import LTX2JointPipeline

VERSIONS = ("2.0", "2.3", "2.5")
VIDEO_CHANNELS, AUDIO_CHANNELS, MEL_BINS = (
    16,
    2,
    64,
)  # latents: 16 values a video token, 2 x 16 = 32 an audio token
AUDIO_WIDTH = AUDIO_CHANNELS * MEL_BINS // 4
HIDDEN, LAYERS = 16, 2  # of the text encoder
HEADS, DIM, AUDIO_DIM = 2, 16, 8  # heads, and values a head of the video and the audio branch


def tokenizer():
    """Gemma's tokenizer with bytes only: 5 special tokens, a space mark and 256 bytes."""
    from transformers import GemmaTokenizer

    vocab = {name: i for i, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    vocab["▁"] = len(vocab)
    return GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True, model_max_length=1024)


def text_encoder(version: str, vocab: int):
    """Two layers of Gemma 3 (2.0, 2.3) or Gemma 4 unified (2.5), width 16."""
    torch.manual_seed(0)
    common = dict(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        sliding_window=1024,
    )
    if version != "2.5":
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        vision = dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = Gemma3Config(
            text_config=common | dict(query_pre_attn_scalar=8),
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=vocab - 1,
        )
        return Gemma3ForConditionalGeneration(config).eval()
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    text = common | dict(global_head_dim=8, layer_types=["sliding_attention", "full_attention"])
    config = Gemma4UnifiedConfig(
        text_config=text,
        vision_config=dict(mm_embed_dim=HIDDEN, mm_posemb_size=8, output_proj_dims=HIDDEN),
        audio_config=dict(audio_embed_dim=16),
    )
    return Gemma4UnifiedForConditionalGeneration(config).eval()


def transformer_config(version: str, layers: int = 2) -> dict:
    """Arguments of LTX2VideoTransformer3DModel."""
    newer = version != "2.0"
    config = dict(
        in_channels=VIDEO_CHANNELS,
        out_channels=VIDEO_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        cross_attention_dim=HEADS * DIM,
        audio_in_channels=AUDIO_WIDTH,
        audio_out_channels=AUDIO_WIDTH,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=AUDIO_DIM,
        audio_cross_attention_dim=HEADS * AUDIO_DIM,
        num_layers=layers,
        caption_channels=HIDDEN,
        rope_type="split",
        rope_double_precision=True,
        gated_attn=newer,
        audio_gated_attn=newer,
        cross_attn_mod=newer,
        audio_cross_attn_mod=newer,
        use_prompt_embeddings=not newer,
        perturbed_attn=newer,
    )
    return config | (
        dict(ff_bias=False, use_keyframes_abs_pos_embedding=True) if version == "2.5" else {}
    )


def connectors_config(version: str, registers: int | None = 8) -> dict:
    """Arguments of LTX2TextConnectors; the real ones have 128 registers, and texts of 1024
    tokens.
    """
    shared = dict(
        caption_channels=HIDDEN,
        text_proj_in_factor=LAYERS + 1,
        rope_type="split",
        rope_double_precision=True,
        video_connector_num_layers=1,
        audio_connector_num_layers=1,
        connector_rope_base_seq_len=4096,
        video_connector_num_learnable_registers=registers,
        audio_connector_num_learnable_registers=registers,
    )
    if version == "2.0":  # both connectors are as wide as the text encoder
        return shared | dict(
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=HIDDEN // 2,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=HIDDEN // 2,
        )
    return shared | dict(
        video_connector_num_attention_heads=HEADS,
        video_connector_attention_head_dim=DIM,
        video_gated_attn=True,
        audio_connector_num_attention_heads=HEADS,
        audio_connector_attention_head_dim=AUDIO_DIM,
        audio_gated_attn=True,
        per_modality_projections=True,
        video_hidden_dim=HEADS * DIM,
        audio_hidden_dim=HEADS * AUDIO_DIM,
        proj_bias=True,
    )


def video_vae_config(version: str) -> dict:
    """8 x 32 x 32 as the real one: patch 4, then spatial, temporal and twice both."""
    newer = version != "2.0"
    config = dict(
        latent_channels=VIDEO_CHANNELS,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=(1, 1, 1, 1, 1),
        downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        patch_size=4,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    if not newer:
        return config | dict(
            decoder_block_out_channels=(8, 16, 32),
            decoder_layers_per_block=(1, 1, 1, 1),
            decoder_spatial_padding_mode="reflect",
        )
    return config | dict(
        decoder_block_out_channels=(8, 16, 16, 32),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        decoder_spatio_temporal_scaling=(True,) * 4,
        decoder_inject_noise=(False,) * 5,
        upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        upsample_residual=(False,) * 4,
        upsample_factor=(2, 2, 1, 2),
        decoder_spatial_padding_mode="zeros",
    )


def audio_vae_config() -> dict:
    """Mel to mel, 4 x 4. latents_mean and latents_std have `base_channels` values and must fit the
    packed latents.
    """
    return dict(
        base_channels=AUDIO_WIDTH,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=AUDIO_CHANNELS,
        mel_bins=MEL_BINS,
        mid_block_add_attention=False,
        resolution=64,
    )


def vocoder(version: str):
    """2.0: 24 kHz out of mels at 100 Hz. Newer: 16 kHz, then bandwidth extension to 48 kHz."""
    from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE

    torch.manual_seed(0)
    one = dict(resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]])
    if version == "2.0":
        return LTX2Vocoder(
            in_channels=2 * MEL_BINS,
            hidden_channels=32,
            upsample_kernel_sizes=[16, 15, 8, 4, 4],
            upsample_factors=[6, 5, 2, 2, 2],
            output_sampling_rate=24000,
            **one,
        ).eval()
    bwe = {f"bwe_{name}": value for name, value in one.items()}
    made = LTX2VocoderWithBWE(
        in_channels=2 * MEL_BINS, hidden_channels=64, bwe_hidden_channels=32, **one, **bwe
    ).eval()
    # Its DFT and mel bases are buffers that come with a checkpoint and start as zeros.
    import torchaudio

    stft, n = made.mel_stft.stft_fn, 512
    window = torch.hann_window(n)
    angle = 2 * torch.pi * torch.arange(n // 2 + 1)[:, None] * torch.arange(n)[None] / n
    stft.forward_basis.copy_((torch.cat([angle.cos(), -angle.sin()]) * window)[:, None])
    stft.inverse_basis.copy_(stft.forward_basis)
    banks = torchaudio.functional.melscale_fbanks(
        n // 2 + 1, 0.0, 8000.0, MEL_BINS, 16000, norm="slaney", mel_scale="slaney"
    )
    made.mel_stft.mel_basis.copy_(banks.T)
    return made


def randomise(module: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    """Statistics of latents that are not 0 and 1, so that a forgotten normalisation shows."""
    generator = torch.Generator().manual_seed(7)
    module.latents_mean.copy_(0.3 * torch.randn(module.latents_mean.shape, generator=generator))
    module.latents_std.copy_(0.5 + torch.rand(module.latents_std.shape, generator=generator))
    return module


def components(
    version: str = "2.3", layers: int = 2, distilled: bool = False, registers: int | None = 8
) -> dict:
    """All parts of an LTX2Pipeline by name, with random weights that depend on nothing but the
    version.
    """
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2DurationHead, LTX2TextConnectors

    assert version in VERSIONS, version
    words = tokenizer()
    parts: dict = {"tokenizer": words, "text_encoder": text_encoder(version, max(len(words), 264))}
    for name, make in (
        ("transformer", lambda: LTX2VideoTransformer3DModel(**transformer_config(version, layers))),
        ("connectors", lambda: LTX2TextConnectors(**connectors_config(version, registers))),
        ("vae", lambda: randomise(AutoencoderKLLTX2Video(**video_vae_config(version)))),
        ("audio_vae", lambda: randomise(AutoencoderKLLTX2Audio(**audio_vae_config()))),
    ):
        torch.manual_seed(0)
        parts[name] = make().eval()
    if (
        version == "2.5"
    ):  # zero in the reference's fresh models; not zero here, so that a forgotten mask shows
        torch.manual_seed(3)
        parts["transformer"].keyframes_abs_pos_embedding.data.normal_(std=0.1)
    parts["vocoder"] = vocoder(version)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=not distilled,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=None if distilled else 0.1,
    )
    torch.manual_seed(0)
    wide = (HIDDEN, HIDDEN) if version == "2.0" else (HEADS * DIM, HEADS * AUDIO_DIM)
    parts["duration_head"] = (
        LTX2DurationHead(
            *wide, pooler_hidden_dim=8, num_queries=1, num_pooler_heads=2, mlp_hidden_dim=8
        ).eval()
        if version == "2.5"
        else None
    )
    return parts | {"processor": None, "prompt_enhancer": None}


def pipeline(version: str = "2.3", **kwargs):
    from diffusers import LTX2Pipeline

    pipe = LTX2Pipeline(**components(version, **kwargs))
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = dict(
    prompt="A woman says hello",
    negative_prompt="bad",
    height=64,
    width=96,
    num_frames=17,
    frame_rate=24.0,
    num_inference_steps=3,
    guidance_scale=3.0,
    audio_guidance_scale=7.0,
    stg_scale=1.0,
    audio_stg_scale=1.0,
    modality_scale=3.0,
    audio_modality_scale=3.0,
    guidance_rescale=0.7,
    audio_guidance_rescale=0.7,
    spatio_temporal_guidance_blocks=[1],
    max_sequence_length=32,
)


def save(folder: Path, version: str, **kwargs) -> Path:
    """Write a pipeline folder."""
    pipeline(version, **kwargs).save_pretrained(folder)
    return folder


@lru_cache
def folder(version: str = "2.3") -> Path:
    """A saved pipeline, made once for all tests of a process."""
    root = Path(tempfile.mkdtemp(prefix="tiny-ltx2-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return save(root / version, version)


@lru_cache
def loaded(version: str = "2.3") -> LTX2JointPipeline:
    """Ours, loaded from `folder`: not to be changed by a test."""
    pipe = LTX2JointPipeline.from_pretrained(folder(version))
    pipe.set_progress_bar_config(disable=True)
    return pipe
