"""Hostile inputs to pipeline, command line and loaders: one clear sentence each, and nothing left
behind.

The tables are in `hostile_cases.py`; what breaks a model's folder or a memory table is here.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_cases import CALLS, COMMANDS, LINES, NAN, RECORDS, edit_json, make_files
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from avdiff.cli import generate as cli_generate
from avdiff.cli import main as cli
from avdiff.core.memory_table import MappedRows
from avdiff.media.write import probe, read_clip, write_clip
from avdiff.pipelines.pipeline_av import AVDiffPipeline

FAST = ["--steps", "1", "--seconds", "0.2", "--height", "64", "--width", "64"]


@pytest.fixture(scope="module")
def pipe() -> AVDiffPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def model(pipe: AVDiffPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the broken files; the command runs inside it."""
    folder = tmp_path_factory.mktemp("shelf")
    make_files(folder)
    return folder


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command loads its model anew at each call; here the first load serves all."""
    monkeypatch.setattr(cli_generate, "load_pipeline", LOAD)


LOAD = functools.cache(cli_generate.load_pipeline)


def one_sentence(text: str) -> None:
    assert text.strip() and len(text.strip().splitlines()) == 1 and len(text) < 700, text


def fails(arguments: list[Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with code 2 and one line on stderr that holds `said`."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and said in err, err
    assert "a fault of avdiff" not in err and not out
    one_sentence(err)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_there_are_enough() -> None:
    assert (
        len(CALLS)
        + len(RECORDS)
        + len(COMMANDS)
        + len(LINES)
        + len(DAMAGE)
        + len(FILES)
        + len(WRITES)
        >= 250
    )


@pytest.mark.parametrize("case", CALLS)
def test_calls(pipe: AVDiffPipeline, case: str) -> None:
    changes, said = CALLS[case]
    options = dict(
        prompt="a green bird",
        num_inference_steps=1,
        seconds=0.2,
        height=64,
        width=64,
        output_type="latent",
    )
    with pytest.raises(ValueError, match=said) as caught:
        pipe(**{**options, **changes})
    one_sentence(str(caught.value))


@pytest.mark.parametrize("case", RECORDS)
def test_records(case: str) -> None:
    make, said = RECORDS[case]
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(model: str, shelf: Path, loaded_once, monkeypatch, capsys, case: str) -> None:
    monkeypatch.chdir(shelf)
    before = names(shelf)
    arguments, said = COMMANDS[case]
    fails(["generate", "--model", model, *FAST, *arguments], said, capsys)
    assert names(shelf) == before


@pytest.mark.parametrize("case", LINES)
def test_prompts_files(
    model: str, tmp_path: Path, loaded_once, monkeypatch, capsys, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines, said = LINES[case]
    Path("p.jsonl").write_text(lines)
    fails(["generate", "--model", model, *FAST, "--prompts", "p.jsonl", "-o", "out"], said, capsys)
    assert names(tmp_path) in (["p.jsonl"], ["out", "p.jsonl"])


def weights(folder: Path, part: str = "transformer") -> Path:
    return folder / part / "diffusion_pytorch_model.safetensors"


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(edit(load_file(path)), path)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(iter(tensors))


def rename_header(path: Path) -> None:
    """The header says that a tensor lies beyond the end of the file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = next(k for k in header if k != "__metadata__")
    header[key]["data_offsets"] = [0, 10**12]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def pickled(folder: Path) -> None:
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    torch.save(tensors, folder / "transformer" / "diffusion_pytorch_model.bin")


# What is done to a model's folder. All but the first must be told by `--model`.
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "removed": shutil.rmtree,
    "no index": lambda f: (f / "model_index.json").unlink(),
    "index cut": lambda f: (f / "model_index.json").write_text("{"),
    "index list": lambda f: (f / "model_index.json").write_text("[]"),
    "index binary": lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\0"),
    "index folder": lambda f: ((f / "model_index.json").unlink(), (f / "model_index.json").mkdir()),
    "other pipeline": lambda f: edit_json(f / "model_index.json", _class_name="NoSuchPipeline"),
    "other class": lambda f: edit_json(
        f / "model_index.json", transformer=["avdiff", "AVTransmogrifier"]
    ),
    "other library": lambda f: edit_json(f / "model_index.json", transformer=["os", "system"]),
    "class as text": lambda f: edit_json(f / "model_index.json", transformer="AVTransformer"),
    "missing part": lambda f: shutil.rmtree(f / "vocoder"),
    "missing in the index": lambda f: edit_json(f / "model_index.json", vae=[None, None]),
    "pickle": pickled,
    "header length": lambda f: weights(f).write_bytes(b"\xff" * 8 + weights(f).read_bytes()[8:]),
    "header offsets": lambda f: rename_header(weights(f)),
    "header noise": lambda f: weights(f).write_bytes((64).to_bytes(8, "little") + os.urandom(64)),
    "cut": lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-1000]),
    "weights empty": lambda f: weights(f).write_bytes(b""),
    "weights folder": lambda f: (weights(f).unlink(), weights(f).mkdir()),
    "weights loop": lambda f: (weights(f).unlink(), weights(f).symlink_to(weights(f).name)),
    "tensor missing": lambda f: change(
        weights(f), lambda t: {k: v for k, v in t.items() if k != first(t)}
    ),
    "tensor shape": lambda f: change(weights(f), lambda t: t | {first(t): torch.zeros(3)}),
    "tensor unknown": lambda f: change(weights(f), lambda t: t | {"extra.weight": torch.zeros(3)}),
    "tensors NaN": lambda f: change(
        weights(f), lambda t: {k: v * NAN if v.is_floating_point() else v for k, v in t.items()}
    ),
    "config cut": lambda f: (f / "transformer" / "config.json").write_text("{"),
    "config missing": lambda f: (f / "transformer" / "config.json").unlink(),
    "option unknown": lambda f: edit_json(f / "transformer" / "config.json", warp_drive=True),
    "option type": lambda f: edit_json(f / "transformer" / "config.json", num_layers="two"),
    "option negative": lambda f: edit_json(f / "transformer" / "config.json", video_dim=-4),
    "option other": lambda f: edit_json(f / "transformer" / "config.json", video_dim=64),
    "option huge": lambda f: edit_json(f / "transformer" / "config.json", memory_rows=10**15),
    "layers": lambda f: edit_json(f / "transformer" / "config.json", shared_layers=[99]),
    "hash": lambda f: edit_json(f / "transformer" / "config.json", num_stress_tones=7),
    "stride zero": lambda f: edit_json(f / "audio_vae" / "config.json", mel_hop_length=0),
    "scheduler option": lambda f: edit_json(f / "scheduler" / "scheduler_config.json", warp=1),
    "tokenizer": lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_broken_models(model: str, tmp_path: Path, capsys, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    DAMAGE[case](folder)
    before = names(tmp_path)
    fails(["generate", "a bird", "--model", folder, *FAST, "-o", tmp_path / "x.mp4"], "", capsys)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["words.txt", "none", "loop", "empty", "folder.mp4", "a/b/c/d", "", "x" * 5000]
)
def test_models_that_are_none(shelf: Path, monkeypatch, capsys, name: str) -> None:
    monkeypatch.chdir(shelf)
    fails(["generate", "a", "--model", name, "-o", "x.mp4"], "model=", capsys)


def test_python_refuses_pickled_weights_too(model: str, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    pickled(tmp_path / "m")
    with pytest.raises(OSError, match="safetensors"):
        AVDiffPipeline.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="pickled weights"):
        AVDiffPipeline.from_pretrained(model, use_safetensors=False)


# Files of `make_files` that nothing can be read from: reader -> names.
FILES = [
    (read, name)
    for read in (probe, read_clip, MappedRows)
    for name in (
        "words.txt",
        "empty",
        "folder.mp4",
        "loop",
        "none",
        "noise.mp4",
        "head.mp4",
        "list.m3u8",
        "x\0y",
    )
]


@pytest.mark.parametrize(("read", "name"), FILES)
def test_files(shelf: Path, read: Callable[[Path], Any], name: str) -> None:
    with pytest.raises(ValueError, match=r"path=") as caught:
        read(shelf / name)
    one_sentence(str(caught.value))


@pytest.mark.parametrize("name", ["words.txt", "folder.mp4", "loop", "none", "noise.mp4"])
def test_info_of_files(shelf: Path, monkeypatch, capsys, name: str) -> None:
    monkeypatch.chdir(shelf)
    fails(["info", name], name, capsys)


FRAMES, SOUND = np.zeros((5, 64, 64, 3), np.uint8), np.zeros((1, 4800))
WRITES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"frames": None, "audio": None}, "nothing to write"),
    "no rate": ({"fps": None}, "need a frame rate"),
    "fps": ({"fps": -1}, "fps=-1"),
    "no frame": ({"frames": FRAMES[:0]}, "at least one picture"),
    "grey": ({"frames": FRAMES[..., :1]}, r"needs \(height, width, 3\)"),
    "flat": ({"frames": FRAMES[0]}, "needs"),
    "no pixel": ({"frames": FRAMES[:, :0]}, "has shape"),
    "NaN": ({"frames": np.full((5, 64, 64, 3), NAN)}, "holds NaN"),
    "whole": ({"frames": FRAMES.astype(int)}, "needs uint8"),
    "sizes differ": ({"frames": [FRAMES[0], FRAMES[0, :32]]}, "picture 1"),
    "words": ({"frames": ["a"]}, "picture 0"),
    "sound NaN": ({"audio": SOUND + NAN}, "NaN"),
    "sound empty": ({"audio": SOUND[:, :0]}, "needs float"),
    "sound of six": ({"audio": np.zeros((6, 4800))}, "1 or 2 channels"),
    "sound whole": ({"audio": SOUND.astype(np.int16)}, "needs float"),
    "rate none": ({"sample_rate": None}, "sample_rate=None"),
    "rate": ({"sample_rate": 24001}, "AAC needs one of"),
    "rate text": ({"sample_rate": "24000"}, "sample_rate='24000'"),
    "tag": ({"metadata": {"x": object()}}, "metadata"),
    "suffix": ({"path": "x.avi"}, "ends in"),
    "folder": ({"path": "folder.mp4"}, "is a folder"),
    "no folder": ({"path": "none/x.mp4"}, "does not exist"),
    "loop": ({"path": "loop/x.mp4"}, "does not exist"),
    "unwritable": ({"path": "/proc/x.mp4"}, "cannot be written"),
    "NUL": ({"path": "x\0.mp4"}, "NUL"),
    "pictures into sound": ({"path": "x.wav"}, "ends in"),
}


@pytest.mark.parametrize("case", WRITES)
def test_writing(shelf: Path, monkeypatch, case: str) -> None:
    monkeypatch.chdir(shelf)
    before = names(shelf)
    changes, said = WRITES[case]
    with pytest.raises(ValueError, match=said) as caught:
        write_clip(
            **{
                "path": "x.mp4",
                "frames": FRAMES,
                "fps": 25,
                "audio": SOUND,
                "sample_rate": 24000,
                **changes,
            }
        )
    one_sentence(str(caught.value))
    assert names(shelf) == before


def test_full_disk(tmp_path: Path, model: str, loaded_once, capsys) -> None:
    """A file may grow to 2 KB and no further."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        fails(
            ["generate", "a bird", "--model", model, *FAST, "-o", tmp_path / "x.mp4"],
            "cannot be written",
            capsys,
        )
        fails(
            ["generate", "a bird", "--model", model, *FAST, "-o", tmp_path / "x.wav"],
            "cannot be written",
            capsys,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not names(tmp_path)


def test_exit_code_of_the_program(tmp_path: Path) -> None:
    """The real program, from a shell."""
    done = subprocess.run(
        [sys.executable, "-m", "avdiff", "generate", "a", "-o", tmp_path / "x.avi"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout and not names(tmp_path)
    one_sentence(done.stderr)
