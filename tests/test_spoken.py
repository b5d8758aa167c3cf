"""Words of real clips on the clock: as the corpus knows them, also past the clip's end; words not
said are refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.corpus.writer import write_corpus
from avdiff.data.clips import ClipOptions, RealClips
from avdiff.media.container import MediaError
from avdiff.media.write import write_clip
from avdiff.phonetics.phone import SILENCE

LANGUAGES = ("en", "es", "ja")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """One clip in each of three languages, and one whose caption quotes the words of another."""
    root, truth, lines = tmp_path_factory.mktemp("spoken"), {}, []
    for language in LANGUAGES:
        corpus = PresenterCorpus(
            None,
            "train",
            [language],
            20,
            3,
            seconds=(2.0, 5.0),
            max_sentences=1,
            size=64,
            event_share=0.0,
            augment_share=0.0,
        )
        clip = next(c for c in corpus if c["video"].shape[0] >= 51)
        name = f"{language}.mp4"
        write_clip(root / name, clip["video"].numpy(), clip["fps"], clip["audio"].numpy(), 24000)
        lines.append(
            {"file_name": name, "caption": f'A person says "{clip["text"]}"', "language": language}
        )
        truth[name] = clip
    write_clip(
        root / "other.mp4",
        truth["en.mp4"]["video"].numpy(),
        25,
        truth["en.mp4"]["audio"].numpy(),
        24000,
    )
    caption = 'A person says "Ich bin gar nicht da und sage überhaupt nichts"'
    lines.append({"file_name": "other.mp4", "caption": caption})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root, truth


def test_words_are_found_where_they_are_said(spoken: tuple[Path, dict[str, dict]]) -> None:
    root, truth = spoken
    clips = RealClips(root)
    names = [entry.name for entry in clips.entries]
    for name, clip in truth.items():
        item = clips[names.index(name)]
        assert item["text"] == clip["text"]
        ends = [p.end for p in item["phones"]]
        assert item["phones"][0].start == 0 and ends[-1] == pytest.approx(
            float(clips.specs[0].seconds)
        )
        assert ends == [p.start for p in item["phones"][1:]] + ends[-1:]  # they tile the clip
        found = [p for p in item["phones"] if p.symbol != SILENCE]
        known = [p for p in clip["phones"] if p.symbol != SILENCE][: len(found)]
        same = [(a, b) for a, b in zip(found, known, strict=False) if a.symbol == b.symbol]
        assert len(same) > 0.8 * len(found) > 8
        assert np.median([abs(a.start - b.start) for a, b in same]) < 0.03
        assert np.mean([a.stress_tone == b.stress_tone for a, b in same]) > 0.9


def test_words_that_are_not_said_are_refused(spoken: tuple[Path, dict[str, dict]]) -> None:
    root, _ = spoken
    clips = RealClips(root)
    index = [entry.name for entry in clips.entries].index("other.mp4")
    with pytest.raises(MediaError, match=r"other.mp4: the words .* are not what is heard"):
        clips[index]
    quiet = RealClips(root, ClipOptions(words=False))
    assert quiet[index]["phones"] == () and "audio" in quiet[index]


def test_phones_that_the_corpus_wrote_are_taken_as_they_are(tmp_path: Path) -> None:
    corpus = PresenterCorpus(
        None, "train", ["en"], 3, 3, seconds=2.04, size=64, event_share=0.0, audio=True
    )
    write_corpus(corpus, tmp_path / "c")
    clips = RealClips(tmp_path / "c")
    for index in range(len(clips)):
        wanted = corpus[index]["phones"]
        found = clips[index]["phones"]
        assert [p.symbol for p in found] == [p.symbol for p in wanted][: len(found)] and len(
            found
        ) > 3
        assert [p.start for p in found] == pytest.approx(
            [p.start for p in wanted][: len(found)], abs=1e-6
        )
    lines = (tmp_path / "c" / "metadata.jsonl").read_text().splitlines()
    broken = json.loads(lines[0]) | {"phones": [["a", "soon"]]}
    (tmp_path / "c" / "metadata.jsonl").write_text("\n".join([json.dumps(broken), *lines[1:]]))
    refused = RealClips(tmp_path / "c").refused[broken["file_name"]]
    assert "phones holds ['a', 'soon']: needs [symbol, start, end]" in refused
