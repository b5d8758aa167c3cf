"""The gallery: every clip with its pictures, curve and captions, safely written."""

from __future__ import annotations

import re

from bad_clips import RATE, make_folder, pictures, tone

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.corpus.speech.read import REPO_BANK
from avdiff.data.clips import ClipOptions, RealClips
from avdiff.data.gallery import folder_items, write_gallery
from avdiff.media.write import write_clip


def test_gallery_of_corpus_and_real_clips(tmp_path):
    write_clip(tmp_path / "a.mp4", pictures(), 25, tone(), RATE)
    (tmp_path / "a.txt").write_text('A man says <b>"hi"</b> & leaves', encoding="utf8")
    spoken, struck = (
        PresenterCorpus(REPO_BANK, size=32, length=3, seconds=2.0, event_share=share)[0]
        for share in (0.0, 1.0)
    )
    real = RealClips(tmp_path, ClipOptions(buckets="64x64x25", words=False))[0]
    assert write_gallery([spoken, struck, real], tmp_path / "page.html", "Clips & more") == 3
    page = (tmp_path / "page.html").read_text(encoding="utf8")
    assert page.count("<section>") == 3 and page.count("data:image/webp") == 6
    assert "&lt;b&gt;" in page and "<b>" not in page and "<script" not in page
    curve = re.search(r'<polyline points="([^"]+)"', page)
    assert curve and len(curve[1].split()) == len(spoken["mouth"])
    assert page.count('stroke="#36c"') == len(struck["contacts"])
    assert sum(p.symbol != "sil" for p in spoken["phones"]) == page.count('text-anchor="middle"')


def test_a_folder_is_shown_as_it_is(tmp_path):
    good, bad = make_folder(tmp_path / "data")
    page = tmp_path / "page.html"
    shown = write_gallery(folder_items(tmp_path / "data", 100), page)
    assert shown >= len(good) + len(bad)
    text = page.read_text(encoding="utf8")
    assert all(f"<h2>{name}</h2>" in text for name in good)
    assert text.count("cannot be used: ") >= 5
