"""Real components at tiny size, for tests."""

from __future__ import annotations

import torch

from avdiff.models import presets
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.models.text_encoder import CaptionEncoder, train_caption_tokenizer
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler

CAPTIONS = [
    "A woman with red hair and glasses says something.",
    "A man speaks Spanish.",
    "a ball bounces three times",
] * 4


def fill_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialised parameters values, so that an untrained model reacts to all of its
    inputs.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def tiny_vae() -> AVVideoVAE:
    """Video VAE of a few thousand parameters with the presenter's strides."""
    return AVVideoVAE(
        encoder_channels=(16, 16, 16),
        encoder_layers=(1, 1, 1),
        decoder_channels=(16, 16, 16, 16),
        decoder_layers=(1, 1, 1, 1),
    )


def tiny_audio_vae() -> AVAudioVAE:
    """Audio VAE with the presenter's clock."""
    return AVAudioVAE(width=32, encoder_layers=1, decoder_layers=1, fine_width=16, fine_layers=1)


def tiny_components() -> dict:
    """Everything that `AVDiffPipeline` takes."""
    torch.manual_seed(0)
    tokenizer = train_caption_tokenizer(CAPTIONS, 300)
    return dict(
        transformer=fill_zeros(AVTransformer(**presets.tiny())).eval(),
        scheduler=JointFlowMatchScheduler(),
        vae=tiny_vae().eval(),
        audio_vae=tiny_audio_vae().eval(),
        vocoder=AVVocoder(width=32, layers=1, pitch_width=16, pitch_layers=1).eval(),
        text_encoder=CaptionEncoder(
            len(tokenizer), dim=32, num_layers=1, num_heads=2, hidden=32, max_length=24
        ).eval(),
        tokenizer=tokenizer,
    )


def tiny_pipeline() -> AVDiffPipeline:
    """A pipeline that runs every task in well under a second."""
    pipe = AVDiffPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe
