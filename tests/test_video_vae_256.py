"""A decoder for larger pictures from the same latents: shapes, copies, tiles."""

import pytest
import torch

from avdiff.models.codecs.video_vae import AVVideoVAE, enlarge_decoder

SMALL = {
    "encoder_channels": (8, 8, 8),
    "encoder_layers": (1, 1, 1),
    "decoder_channels": (8, 8, 8, 8),
    "decoder_layers": (1, 1, 1, 1),
}


@pytest.fixture
def vae() -> AVVideoVAE:
    torch.manual_seed(0)
    return AVVideoVAE(**SMALL).eval()


def test_latents_stay_and_pictures_grow(vae: AVVideoVAE) -> None:
    large = enlarge_decoder(vae).eval()
    video = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    z = vae.encode(video).latent_dist.mode()
    assert torch.equal(large.encode(video).latent_dist.mode(), z)
    assert vae.decode(z).sample.shape == (1, 3, 5, 64, 64)
    assert large.decode(z).sample.shape == (1, 3, 5, 128, 128)
    assert large.config.decoder_scale == 2
    shared = {n for n, p in vae.decoder.named_parameters() if n.startswith("levels")}
    copied = dict(large.decoder.named_parameters())
    assert all(torch.equal(copied[n], dict(vae.decoder.named_parameters())[n]) for n in shared)


def test_saved_folder_remembers_its_scale(vae: AVVideoVAE, tmp_path) -> None:
    large = enlarge_decoder(vae, 4).eval()
    large.save_pretrained(tmp_path)
    z = torch.randn(1, 16, 2, 2, 2)
    again = AVVideoVAE.from_pretrained(tmp_path).eval()
    assert torch.equal(again.decode(z).sample, large.decode(z).sample)
    assert again.decode(z).sample.shape[-1] == 256


def test_tiles_of_a_large_picture_agree_with_the_whole(vae: AVVideoVAE) -> None:
    large = enlarge_decoder(vae).eval()
    z = torch.randn(1, 16, 2, 6, 6)
    whole = large.decode(z).sample
    large.enable_tiling(128, 96)
    tiled = large.decode(z).sample
    assert tiled.shape == whole.shape == (1, 3, 3, 384, 384)
    assert (tiled - whole).abs().mean() < 0.1 * whole.abs().mean()


def test_other_scales_are_refused(vae: AVVideoVAE) -> None:
    with pytest.raises(ValueError, match="scale=3: needs 2 or 4"):
        enlarge_decoder(vae, 3)
    with pytest.raises(ValueError, match="head_patch=4: 4 levels and a ratio of 64 need 8"):
        AVVideoVAE(**SMALL, decoder_scale=2)
