"""Audio VAE, mel front end, vocoder, their training tasks and the metrics that measure them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.evaluation.metrics import audio as audio_metrics
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.mel import LogMel
from avdiff.models.codecs.pitch import BINS, bin_hertz, hertz_bin, smooth_path
from avdiff.models.codecs.vocoder import AVVocoder, Pitch
from avdiff.train.codecs.audio_tasks import (
    AudioVAETask,
    SoundSegments,
    VocoderTask,
    VoicedSegments,
    held_out,
    measure_latents,
)
from avdiff.train.codecs.pitch import track
from avdiff.train.codecs.spectral_loss import SpectralLoss
from avdiff.train.loop.fit import FitOptions, fit

RATE = 24000
TINY_VAE = {
    "width": 32,
    "fine_width": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "fine_layers": 1,
}
TINY_VOCODER = {"width": 32, "layers": 1, "pitch_width": 16, "pitch_layers": 1, "refine_steps": 2}


def tone(hertz: float, seconds: float = 1.0, harmonics: int = 8, level: float = 0.05) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return sum(level * np.cos(2 * np.pi * k * hertz * t) for k in range(1, harmonics + 1)).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def vae() -> AVAudioVAE:
    torch.manual_seed(0)
    return AVAudioVAE(**TINY_VAE).eval()


@pytest.fixture(scope="module")
def vocoder() -> AVVocoder:
    torch.manual_seed(0)
    return AVVocoder(**TINY_VOCODER).eval()


# ---------------------------------------------------------------------------------------------- mel
def test_mel_frame_is_the_windowed_spectrum_at_its_centre() -> None:
    front, wave = LogMel(), torch.randn(4800, generator=torch.Generator().manual_seed(0)) * 0.1
    frame = 9  # centred on sample 9.5 * 240
    piece = wave[9 * 240 + 120 - 480 : 9 * 240 + 120 + 480] * torch.hann_window(960)
    turn = torch.exp(-2j * math.pi * torch.arange(481)[:, None] * torch.arange(960) / 960)
    slow = (piece * turn).sum(dim=1).abs()
    expected = front.normalize((slow * 4 / 960) @ front.bank)
    torch.testing.assert_close(front(wave)[frame], expected, atol=2e-3, rtol=0)


def test_mel_of_a_full_scale_sine_reads_one_and_inverts() -> None:
    front = LogMel()
    wave = torch.cos(2 * math.pi * 1000 * torch.arange(9600) / RATE)
    assert front.magnitude(wave)[20].max().item() == pytest.approx(1.0, abs=1e-3)
    mel = front.magnitude(wave) @ front.bank
    torch.testing.assert_close(front.amplitude(front.normalize(mel)), mel, atol=1e-5, rtol=1e-4)


def test_mel_refuses_a_broken_frame() -> None:
    with pytest.raises(ValueError, match="multiple of 240"):
        LogMel()(torch.zeros(1000))


# ---------------------------------------------------------------------------------------------- VAE
@pytest.mark.parametrize(
    ("samples", "tokens"), [(1, 2), (960 * 3, 3), (960 * 3 + 1, 4), (960 * 61, 61)]
)
def test_waveform_to_tokens_and_back(vae: AVAudioVAE, samples: int, tokens: int) -> None:
    mel = vae.mel(torch.zeros(2, 1, samples))
    z = vae.encode(mel).latent_dist.mode()
    assert mel.shape == (2, 1, 4 * tokens, 100)
    assert z.shape == (2, 48, tokens, 1)
    assert vae.decode(z).sample.shape == mel.shape


def test_stereo_by_config() -> None:
    vae = AVAudioVAE(**TINY_VAE, audio_channels=2)
    wave = torch.randn(1, 2, 9600, generator=torch.Generator().manual_seed(1)) * 0.1
    mel = vae.mel(wave)
    assert vae(mel).sample.shape == (1, 2, 40, 100)
    torch.testing.assert_close(mel[:, 1], vae.mel_frontend(wave[:, 1]))


def test_far_sound_changes_no_token(vae: AVAudioVAE) -> None:
    mel = torch.randn(1, 1, 4 * 60, 100, generator=torch.Generator().manual_seed(2))
    other = mel.clone()
    other[:, :, 4 * 50 :] = 3.0
    first, second = vae(mel).sample, vae(other).sample
    safe = 4 * (50 - vae.receptive_tokens)
    torch.testing.assert_close(first[:, :, :safe], second[:, :, :safe])
    assert not torch.allclose(first[:, :, safe:200], second[:, :, safe:200])


def test_row_of_a_batch_is_the_row_alone(vae: AVAudioVAE) -> None:
    mel = torch.randn(3, 1, 40, 100, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(vae(mel).sample[1:2], vae(mel[1:2]).sample, atol=1e-5, rtol=1e-5)


def test_vae_saves_statistics(vae: AVAudioVAE, tmp_path) -> None:
    vae.latents_mean.copy_(torch.arange(48.0))
    vae.latents_std.copy_(torch.arange(1.0, 49.0))
    vae.save_pretrained(tmp_path)
    again = AVAudioVAE.from_pretrained(tmp_path)
    z = torch.randn(1, 48, 5, 1)
    torch.testing.assert_close(again.denormalise(again.normalize(z)), z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.latents_std, vae.latents_std)


@pytest.mark.parametrize("shape", [(1, 2, 9600), (1, 9600), (1, 1, 0)])
def test_vae_refuses_wrong_sound(vae: AVAudioVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="waveform has shape"):
        vae.mel(torch.zeros(shape))


def test_vae_refuses_wrong_mel(vae: AVAudioVAE) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        vae.encode(torch.zeros(1, 1, 6, 100))
    with pytest.raises(ValueError, match="frames, 100"):
        vae.encode(torch.zeros(1, 1, 8, 80))


# ------------------------------------------------------------------------------------------ vocoder
def test_overlap_add_inverts_the_spectrum(vocoder: AVVocoder) -> None:
    wave = torch.randn(2, 7200, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(vocoder.overlap_add(vocoder.spectrum(wave)), wave, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        vocoder.spectrum(wave).abs(), vocoder.frames.magnitude(wave), atol=1e-6, rtol=1e-4
    )


def test_pulse_train_is_the_sum_of_its_harmonics(vocoder: AVVocoder) -> None:
    hertz = torch.full((1, 30), 200.0)
    phase = torch.arange(30, dtype=torch.float64)[None] * (2 * math.pi * 200 / 100) + 0.3
    fast = vocoder.pulse_train(Pitch(phase, hertz, hertz))[0]
    at = (
        0.3 + 2 * math.pi * 200 * (torch.arange(7200, dtype=torch.float64) - 119.5) / RATE
    )  # frame 0 sits at 119.5
    slow = sum(torch.cos(k * at) for k in range(1, int(0.48 * RATE / 200) + 1)) * math.sqrt(
        200 / 150
    )
    torch.testing.assert_close(fast, slow.float(), atol=2e-3, rtol=0)


def test_noise_has_unit_spectrum(vocoder: AVVocoder) -> None:
    noise = vocoder.spectrum(vocoder.white(torch.zeros(2, 200, 100), None))
    assert noise.abs().square().mean().item() == pytest.approx(1.0, abs=0.03)


def test_vocoder_shape_repeatability_and_length(vocoder: AVVocoder) -> None:
    mel = torch.randn(2, 1, 24, 100, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wave = vocoder(mel)
        assert wave.shape == (2, 1, 24 * 240)
        assert torch.equal(wave, vocoder(mel))
        assert not torch.equal(wave, vocoder(mel, generator=torch.Generator().manual_seed(9)))
    assert wave.isfinite().all()


def test_refinement_keeps_a_consistent_spectrum(vocoder: AVVocoder) -> None:
    spectrum = vocoder.spectrum(torch.randn(1, 7200, generator=torch.Generator().manual_seed(6)))
    refined = vocoder.refine(spectrum, spectrum.abs(), steps=3)
    torch.testing.assert_close(
        vocoder.overlap_add(refined), vocoder.overlap_add(spectrum), atol=1e-3, rtol=0
    )


def test_refinement_comes_closer_to_the_magnitudes(vocoder: AVVocoder) -> None:
    generator = torch.Generator().manual_seed(7)
    heard = vocoder.spectrum(torch.randn(1, 7200, generator=generator)).abs()
    start = vocoder.spectrum(torch.randn(1, 7200, generator=generator))

    def gap(steps: int) -> float:
        wave = vocoder.overlap_add(vocoder.refine(start, heard, steps))
        return (vocoder.spectrum(wave).abs() - heard).abs().mean().item()

    assert gap(8) < gap(1) < 0.9 * (start.abs() - heard).abs().mean().item()


def test_vocoder_saves_and_stays_fp32(vocoder: AVVocoder, tmp_path) -> None:
    vocoder.save_pretrained(tmp_path)
    again = AVVocoder.from_pretrained(tmp_path, torch_dtype=torch.float16).eval()
    assert {n for n, p in again.named_parameters() if p.dtype != torch.float32} == {
        "heads.0.weight",
        "heads.0.bias",
    }
    mel = torch.randn(1, 1, 12, 100, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(again(mel), vocoder(mel))


def test_vocoder_refuses_wrong_mel(vocoder: AVVocoder) -> None:
    for shape in ((1, 24, 100), (1, 1, 24, 80), (1, 1, 2, 100)):
        with pytest.raises(ValueError, match="mel has shape"):
            vocoder(torch.zeros(shape))


# -------------------------------------------------------------------------------------------- pitch
def test_smooth_path_is_the_best_of_all_paths() -> None:
    score = torch.full((1, 3, BINS), -100.0)
    score[0, :, 50:53] = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    glide = 59.0  # one per bin
    best = max(
        (
            sum(score[0, t, 50 + b[t]].item() for t in range(3))
            - abs(b[1] - b[0])
            - abs(b[2] - b[1]),
            b,
        )
        for b in [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]
    )
    assert tuple((smooth_path(score, 4, glide)[0] - 50).tolist()) == best[1]


def test_axis_and_its_inverse() -> None:
    places = torch.tensor([0.0, 10.5, 100.0])
    torch.testing.assert_close(hertz_bin(bin_hertz(places)), places, atol=1e-3, rtol=0)


@pytest.mark.parametrize("hertz", [82.0, 123.0, 217.0, 330.0])
def test_tracking_finds_pitch_phase_and_silence(hertz: float) -> None:
    sound = np.concatenate([tone(hertz), np.zeros(12000, np.float32)])
    found = track([sound])[0]
    assert np.abs(found.hertz[10:90] / hertz - 1).max() < 0.005
    assert found.voiced[10:90].min() > 0.9
    assert found.voiced[110:].max() < 0.1
    true = (
        2 * np.pi * hertz * (np.arange(150) * 240 + 119.5) / RATE
    )  # phase of the first harmonic at frame centres
    off = np.angle(np.exp(1j * (found.phase - true)))[10:90]
    assert np.abs(off).max() < 0.1


# -------------------------------------------------------------------------------------------- tasks
def small_bank(count: int = 4) -> SpeechCorpus:
    bank = SpeechCorpus(REPO_BANK)
    bank.utterances = bank.utterances[:count]
    return bank


def click(rng: np.random.Generator, samples: int) -> np.ndarray:
    sound = np.zeros(samples, np.float32)
    sound[int(rng.integers(samples))] = 0.5
    return sound


def test_segments_repeat_under_a_seed_and_hold_events() -> None:
    segments = SoundSegments(small_bank(), 9600, click, event_share=0.5)
    first = [segments.sample(k, seed=k) for k in range(12)]
    torch.manual_seed(3)  # global generators have no say
    second = [segments.sample(k, seed=k) for k in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {tuple(x.shape) for x in first} == {(1, 9600)}
    assert max(x.abs().max().item() for x in first) <= 1.0
    assert any((x.abs() > 0.01).sum() == 1 for x in first)  # a click
    assert any((x.abs() > 0.01).sum() > 500 for x in first)  # speech


def test_voiced_segments_are_cut_in_phase_with_their_sound() -> None:
    bank = small_bank()
    tracks = {u.id: track([bank.audio(u)])[0] for u in bank}
    segments = VoicedSegments(SoundSegments(bank, 24000), tracks)
    torch.manual_seed(0)
    inside = slice(8, 92)  # at the ends tracking sees other neighbours
    checked = 0
    for k in range(6):
        item = segments[k]
        again = track([item.sound[0].numpy()])[0]
        sure = (item.voiced.numpy()[inside] > 0.95) & (again.voiced[inside] > 0.95)
        turn = np.exp(1j * (item.phase.numpy() - again.phase))[inside][sure]
        checked += len(turn)
        assert len(turn) < 10 or np.abs(np.median(np.angle(turn))) < 0.05
    assert checked > 100


def test_vae_task_learns_and_can_spare_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bank = small_bank()
    vae = AVAudioVAE(**TINY_VAE)
    segments, held = SoundSegments(bank, 9600, size=64), held_out(bank, 9600, 4)
    before = AudioVAETask(vae, segments, held).validate()["l1_noise_0.0"]
    options = {"train_batch_size": 8, "learning_rate": 3e-3, "log_every": 100}
    fit(
        AudioVAETask(vae, segments, held),
        FitOptions(str(tmp_path / "a"), max_train_steps=40, **options),
    )
    after = AudioVAETask(vae, segments, held).validate()["l1_noise_0.0"]
    assert after < 0.7 * before
    encoder = {n: p.clone() for n, p in vae.named_parameters() if n.startswith("encoder")}
    decoder = vae.decoder_in.weight.clone()
    fit(
        AudioVAETask(vae, segments, held, decoder_only=True),
        FitOptions(str(tmp_path / "b"), max_train_steps=2, **options),
    )
    assert all(torch.equal(p, encoder[n]) for n, p in vae.named_parameters() if n in encoder)
    assert not torch.equal(vae.decoder_in.weight, decoder)


def test_latent_statistics_make_unit_variance() -> None:
    torch.manual_seed(1)
    vae, segments = AVAudioVAE(**TINY_VAE), list(held_out(small_bank(), 19200, 4))
    measure_latents(vae, segments, 4, batch=3)
    z = vae.normalize(vae.encode(vae.mel(torch.stack(segments))).latent_dist.mode())
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(48), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        z.std(dim=(0, 2, 3), correction=0), torch.ones(48), atol=1e-3, rtol=0
    )


def test_vocoder_task_learns(tmp_path: Path, vae: AVAudioVAE) -> None:
    torch.manual_seed(0)
    bank = small_bank()
    tracks = {u.id: track([bank.audio(u)])[0] for u in bank}
    vocoder = AVVocoder(**TINY_VOCODER)
    voiced = VoicedSegments(SoundSegments(bank, 9600, size=32), tracks)
    task = VocoderTask(vocoder, voiced, held_out(bank, 19200, 2), vae, decoded_share=0.25)
    before = task.validate()
    fit(
        task,
        FitOptions(
            str(tmp_path), max_train_steps=12, train_batch_size=4, learning_rate=3e-3, log_every=100
        ),
    )
    after = task.validate()
    assert after["true_log"] < before["true_log"]
    assert after["true_mel"] < before["true_mel"]


# ------------------------------------------------------------------------------- losses and metrics
def test_spectral_loss_knows_phase_only_where_asked() -> None:
    loss = SpectralLoss((256, 512), aligned_size=512)
    first = torch.from_numpy(tone(200.0))[None]
    flipped = loss(-first, first)
    assert flipped["log"].item() < 3e-3
    assert flipped["aligned"].item() == pytest.approx(2.0, abs=0.1)
    assert loss(first, first)["aligned"].item() < 0.01


def test_spectral_distance_of_a_gain_is_the_gain() -> None:
    noise = torch.randn(2, 24000, generator=torch.Generator().manual_seed(0))
    distance = audio_metrics.spectral_distance(noise, noise / 2)
    torch.testing.assert_close(distance, torch.full((2,), 6.02), atol=0.05, rtol=0)


def test_griffin_lim_rebuilds_a_voice_like_tone() -> None:
    front, wave = LogMel(), torch.from_numpy(tone(220.0))[None]
    wave[:, :6000] = 0
    rebuilt = audio_metrics.griffin_lim(front(wave), front)
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0)) * wave.std()
    assert rebuilt.shape == wave.shape
    assert (front(rebuilt) - front(wave)).abs().mean() < 0.25 * (
        front(noise) - front(wave)
    ).abs().mean()


def test_onset_is_found_within_two_milliseconds() -> None:
    sound = np.zeros(24000, np.float32)
    sound[7200:] = (
        0.5 * np.random.default_rng(0).standard_normal(16800) * np.exp(-np.arange(16800) / 1200)
    )
    assert audio_metrics.onset_seconds(sound, near=0.32) == pytest.approx(0.300, abs=0.002)


def test_word_errors_counts_edits() -> None:
    assert audio_metrics.word_errors(["one", "two", "three"], ["one", "three", "four", "five"]) == 3
    assert audio_metrics.word_errors(["zero"], ["oh"]) == 0
    assert audio_metrics.word_errors([], ["one"]) == 1
