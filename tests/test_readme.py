"""The README tells the truth: its commands and its Python run, with a tiny model in the presenter's
place.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_pipeline

import avdiff
from avdiff.cli import main as cli
from avdiff.cli.train import TRAIN_COMMANDS
from avdiff.corpus.dataset import PresenterCorpus
from avdiff.corpus.writer import write_corpus
from avdiff.media.write import probe, write_wav

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train": ["--max_train_steps", "2", "--train_batch_size", "2", "--checkpointing_steps", "0"]
}
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    return [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        for line in block.splitlines()
        if line.strip()
    ]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README's reader has: clips, a picture, a sound; and a tiny model in the place of the
    presenter's.
    """
    corpus = PresenterCorpus(
        None, "train", ["en"], 2, 3, seconds=2.1, event_share=0.0, augment_share=0.0
    )
    for folder in ("FOLDER", "clips"):
        write_corpus(corpus, tmp_path / folder)
    Image.new("RGB", (128, 128), "tan").save(tmp_path / "face.png")
    write_wav(tmp_path / "speech.wav", corpus[0]["audio"].numpy(), 24000)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(avdiff, "PRESENTER", str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run(workplace: Path) -> None:
    ran = 0
    for program, *arguments in commands():
        if program == "make":
            assert {word for word in arguments if "=" not in word} <= MAKE_TARGETS, arguments
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), arguments
        elif program == "avdiff" and "--help" not in arguments:
            arguments = [
                name
                for word in arguments
                for name in (sorted(map(str, Path().glob(word))) or [word])
            ]
            arguments += SHORT.get(arguments[0], [])
            with pytest.raises(SystemExit) as ended:
                cli.main(arguments)
            assert ended.value.code == 0, arguments
            ran += 1
        else:
            assert program == "avdiff", program
            assert arguments[0] in TRAIN_COMMANDS
    assert ran >= 3


def test_python_runs(workplace: Path) -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    info = probe(workplace / "out.mp4")
    assert info.video_seconds is not None and info.audio_seconds is not None
    assert abs(info.video_seconds - info.audio_seconds) < 0.04


def test_continuous_integration_runs_the_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert ["make", "test"] in commands()


def test_paths_it_names_exist() -> None:
    named = re.findall(r"`((?:avdiff|pipelines|train|samples|tests)/[\w/.]*)`", README)
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name
