"""The phone recognizer and what all evaluators share: error rates, alignment, loading, the entry
for training.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.evaluators import load as evaluators
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import SILENCE, encode_phones, inventory
from avdiff.train.evaluators import train_evaluator as training
from avdiff.train.evaluators.phones import (
    Heard,
    RecognizerTask,
    SpokenSegments,
    frame_labels,
    measure_recogniser,
    sequence,
)

RATE = 24000


@cache
def bank() -> SpeechCorpus:
    return SpeechCorpus(REPO_BANK, languages=["en", "it"])


def tiny_recogniser() -> PhoneRecognizer:
    return PhoneRecognizer(inventory()[0], width=48, expansion=2, kernel=5, layers=1, dropout=0.0)


def slow_edit_distance(one: list[int], two: list[int]) -> int:
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i in range(len(one) + 1):
        for j in range(len(two) + 1):
            if not i or not j:
                table[i][j] = i + j
            else:
                table[i][j] = min(
                    table[i - 1][j] + 1,
                    table[i][j - 1] + 1,
                    table[i - 1][j - 1] + (one[i - 1] != two[j - 1]),
                )
    return table[-1][-1]


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 4), max_size=12))
def test_edit_distance_is_the_table_s(one: list[int], two: list[int]) -> None:
    assert (
        evaluators.edit_distance(one, two)
        == slow_edit_distance(one, two)
        == evaluators.edit_distance(two, one)
    )


def test_phone_error_rate_counts_edits_over_reference_phones() -> None:
    assert evaluators.phone_error_rate([("abc", "abc"), ("abcde", "axcdef")]) == pytest.approx(
        2 / 8
    )
    assert evaluators.phone_error_rate([(["a"], [])]) == 1.0
    with pytest.raises(ValueError, match="at least one reference phone"):
        evaluators.phone_error_rate([([], ["a"])])


def slow_alignment(found: np.ndarray, phones: list[int]) -> float:
    """Best log probability over CTC paths, by recursion on (frame, state); states alternate blank
    and phone.
    """
    states = [0] + [x for phone in phones for x in (phone, 0)]

    @cache
    def best(frame: int, state: int) -> float:
        if state < 0:
            return -np.inf
        if frame < 0:
            return 0.0 if state == 0 else -np.inf  # before the first frame: at the first blank
        ways = [best(frame - 1, state), best(frame - 1, state - 1)]
        if state >= 2 and states[state] and states[state] != states[state - 2]:
            ways.append(best(frame - 1, state - 2))
        return max(ways) + found[frame, states[state]]

    last = len(found) - 1
    return max(best(last, len(states) - 1), best(last, len(states) - 2))


@pytest.mark.parametrize("phones", [[1], [2, 2, 1], [1, 2, 3, 1], [3, 3, 3], [1, 2, 1, 2, 3, 3]])
def test_alignment_is_the_best_ctc_path(phones: list[int]) -> None:
    found = (
        torch.randn(14, 4, generator=torch.Generator().manual_seed(len(phones)))
        .mul(2)
        .log_softmax(-1)
    )
    spans = evaluators.align(found, phones)
    path = np.zeros(14, int)
    for phone, (first, last) in zip(phones, spans, strict=True):
        path[first:last] = phone
    assert sequence(path.tolist()) == phones
    assert found.numpy()[np.arange(14), path].sum() == pytest.approx(
        slow_alignment(found.numpy(), phones), abs=1e-4
    )


def test_alignment_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="need 5 frames, the audio has 4"):
        evaluators.align(torch.zeros(4, 3), [1, 1, 2, 1])
    assert evaluators.align(torch.zeros(4, 3), []) == []


def test_frame_labels_spell_the_utterance() -> None:
    for utterance in [bank()[k] for k in range(0, len(bank()), max(1, len(bank()) // 12))]:
        wanted = [i for i in encode_phones(utterance.phones)[0].tolist() if i]
        for factor in (1.0, 1.1):
            labels = frame_labels(utterance, round(utterance.duration / factor * 50), factor)
            assert evaluators.edit_distance(wanted, sequence(labels.tolist())) <= 0.04 * len(
                wanted
            )  # 20 ms may hide one


def test_segments_hold_what_their_labels_say() -> None:
    segments = SpokenSegments(bank(), seconds=2.0)
    rows = [segments.sample(0, seed=3) for _ in range(2)]
    torch.testing.assert_close(rows[0].sound, rows[1].sound)
    assert rows[0].sound.shape == (48000,) and rows[0].phones.shape == (100,)
    rows = [segments.sample(k, seed=9 + k) for k in range(6)]
    power = torch.stack([row.sound.view(100, 480).square().mean(1) for row in rows])
    spoken = torch.stack([row.phones for row in rows]) > 0
    assert power[spoken].mean() > 5 * power[~spoken].mean()


def test_recogniser_shapes_errors_and_copy(tmp_path: Path) -> None:
    model = tiny_recogniser().eval()
    wave = torch.randn(2, 24000, generator=torch.Generator().manual_seed(1)) * 0.1
    found = model(model.mel(wave))
    assert found.shape == (2, 50, len(inventory()[0])) and model.frame_rate == 50
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 50))
    assert model.listen(wave[0, :1000]).shape[0] == 3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        evaluators.load("recognizer", tmp_path).listen(wave[0]), model.listen(wave[0])
    )
    assert evaluators.weight_hash("recognizer", tmp_path) == evaluators.weight_hash(
        "recognizer", tmp_path
    )
    with pytest.raises(ValueError, match="a multiple of 4 frames"):
        model(torch.zeros(1, 6, 100))
    with pytest.raises(ValueError, match=r"needs \(batch, samples\)"):
        model.mel(torch.zeros(100))
    with pytest.raises(ValueError, match="needs one of recognizer"):
        evaluators.load("ear")
    with pytest.raises(ValueError, match="no weights in"):
        evaluators.load("lip_network", tmp_path / "nowhere")


def test_other_rates_become_the_judge_s() -> None:
    times = np.arange(48000) / 48000
    wave = evaluators.as_waveform(np.stack([np.sin(2 * np.pi * 440 * times)] * 2), 48000, RATE)
    np.testing.assert_allclose(
        wave[500:-500], np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)[500:-500], atol=5e-3
    )
    with pytest.raises(ValueError, match="a sample rate in Hz"):
        evaluators.as_waveform(np.zeros(10), 0, RATE)


def test_recogniser_moves_with_the_sound() -> None:
    model = tiny_recogniser().eval()
    wave = torch.randn(1, 48000, generator=torch.Generator().manual_seed(2)) * 0.1
    late = torch.nn.functional.pad(wave, (2 * 960, 0))[:, :48000]
    with torch.no_grad():
        one, two = model(model.mel(wave)), model(model.mel(late))
    torch.testing.assert_close(one[:, 30:60], two[:, 34:64], atol=1e-4, rtol=1e-4)


def test_recogniser_learns_a_sentence_and_its_times() -> None:
    utterance = min((u for u in bank() if u.lang == "en"), key=lambda u: abs(u.duration - 1.6))
    frames = 2 * int(utterance.duration * 25)
    sound = torch.from_numpy(bank().audio(utterance)[: frames * 480])
    batch = Heard(sound[None], torch.from_numpy(frame_labels(utterance, frames))[None])
    task = RecognizerTask(tiny_recogniser(), SpokenSegments(bank()), bank(), mask=(0, 0))
    optimizer = torch.optim.AdamW(task.recognizer.parameters(), 8e-3)
    for step in range(70):
        loss = task.loss(batch, "main", torch.Generator().manual_seed(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.recognizer.eval()
    wanted = evaluators.spoken_symbols(utterance.phones)
    audio = sound.numpy()
    assert (
        evaluators.phone_error_rate([(wanted, evaluators.recognise(audio, RATE, task.recognizer))])
        < 0.1
    )
    assert measure_recogniser(task.recognizer, [utterance])["per_en"] < 0.1
    timed = evaluators.phone_times(audio, RATE, wanted, task.recognizer)
    assert timed[0].start == 0 and timed[-1].end == pytest.approx(len(audio) / RATE)
    assert all(a.end == b.start for a, b in pairwise(timed))
    starts = np.array([p.start for p in timed if p.symbol != SILENCE])
    true = np.array([p.start for p in utterance.phones if p.symbol != SILENCE])
    assert len(starts) == len(true) and np.median(np.abs(starts - true)) < 0.03
    assert evaluators.recognise(
        np.stack([audio, audio]), RATE, task.recognizer
    ) == evaluators.recognise(audio, RATE, task.recognizer)
    with pytest.raises(ValueError, match="not in the recognizer's inventory"):
        evaluators.phone_times(audio, RATE, ["@"], task.recognizer)


def test_entry_trains_exports_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bank"
    folder.mkdir()
    (folder / "it-000.tar").symlink_to(REPO_BANK / "it-000.tar")
    monkeypatch.setenv("HOME", str(tmp_path))  # the decoded bank is cached there
    words = [
        "--evaluator",
        "lip_network",
        "--bank",
        str(folder),
        "--output_dir",
        str(tmp_path / "run"),
        "--held_out",
        "2",
    ]
    summary = training.main(
        [*words, "--max_train_steps", "2", "--train_batch_size", "2", "--log_every", "1"]
    )
    assert summary is not None and summary.step == 2 and np.isfinite(summary.losses["loss"])
    exported = next(tmp_path.rglob("lip_network/config.json")).parent
    assert evaluators.load("lip_network", exported).config.embedding == 64
    with pytest.raises(ValueError, match="codec_share=2"):
        training.main([*words, "--codec_share", "2"])
    assert training.main([]) is None and "--evaluator" in capsys.readouterr().out
