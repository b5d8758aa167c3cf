"""The command line, with a real tiny pipeline saved to a folder: files come out, errors are one
line, exit code 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from avdiff.cli import main as cli
from avdiff.cli.train import TRAIN_COMMANDS
from avdiff.media.write import probe, read_clip, write_clip, write_wav

FAST = ["--steps", "1", "--seconds", "0.2", "--height", "64", "--width", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return int(ended.value.code or 0)


def generate(model: str, *arguments: str) -> int:
    return run("generate", "--model", model, *FAST, *arguments)


def test_help_is_quick_and_lists_the_commands() -> None:
    before = os.times()
    found = subprocess.run(
        [sys.executable, "-m", "avdiff", "--help"], capture_output=True, text=True, check=True
    )
    after = (
        os.times()
    )  # CPU time: the clock on the wall also measures the other work of a busy machine
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < 1
    )
    for command in ("generate", "info", "doctor", *TRAIN_COMMANDS):
        assert f"  {command} " in found.stdout


@pytest.mark.parametrize("command", TRAIN_COMMANDS)
def test_help_of_a_training_command_is_that_of_its_recipe(command: str, capsys) -> None:
    assert run(command, "--help") == 0
    said = capsys.readouterr().out
    for option in ("output_dir", "max_train_steps", "learning_rate"):
        # The networks of text to phonemes are two recipes, so the first page names those.
        assert f"--{option}" in said or command == "train-g2p"
    assert len(said.splitlines()) > 5


def test_generate_writes_a_clip_that_says_how_it_was_made(
    model: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "x.mp4"
    assert (
        generate(model, "a green bird", "-o", path, "--seed", "7", "--fps", "29.97", "--json") == 0
    )
    said = json.loads(capsys.readouterr().out)
    info = probe(path)
    assert (said["output"], said["seed"], said["frames"]) == (str(path), 7, info.num_frames)
    assert (info.height, info.width, str(info.fps)) == (64, 64, "30000/1001")
    assert info.metadata["seed"] == 7 and info.metadata["prompt"] == "a green bird"
    assert info.metadata["comment"].startswith("AI-generated")
    assert info.video_seconds is not None and info.audio_seconds is not None
    assert abs(info.video_seconds - info.audio_seconds) < 1 / 24000


def test_same_seed_same_file(model: str, tmp_path: Path, capsys) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert generate(model, "a bird", "-o", tmp_path / name, "--seed", "3") == 0
    assert generate(model, "a bird", "-o", tmp_path / "c.mp4") == 0
    seed = capsys.readouterr().out.splitlines()[-1].split("seed ")[1].split(",")[0]
    assert generate(model, "a bird", "-o", tmp_path / "d.mp4", "--seed", seed) == 0
    a, b, c, d = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abcd")
    assert a == b and c == d and a != c


def test_one_modality(model: str, tmp_path: Path) -> None:
    assert generate(model, "a bell", "-o", tmp_path / "x.wav") == 0
    assert generate(model, "a bird", "-o", tmp_path / "x.mp4", "--no-audio") == 0
    assert probe(tmp_path / "x.wav").video_codec is None
    assert probe(tmp_path / "x.mp4").audio_codec is None


def test_given_parts(model: str, tmp_path: Path) -> None:
    Image.fromarray(np.full((90, 120, 3), 200, np.uint8)).save(tmp_path / "face.png")
    rng = np.random.default_rng(0)
    write_wav(tmp_path / "voice.wav", rng.uniform(-0.5, 0.5, (1, 10_000)), 16000)  # 0.625 s
    write_clip(tmp_path / "mute.mp4", rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8), 25)
    size = ["--steps", "1", "--height", "64", "--width", "64", "--model", model]
    for option, name, seconds in (
        ("--image", "face.png", 0.2),
        ("--audio", "voice.wav", 0.68),
        ("--video", "mute.mp4", 0.44),
    ):
        length = ["--seconds", "0.2"] if option == "--image" else []
        assert (
            run(
                "generate",
                "a bird",
                *size,
                *length,
                option,
                tmp_path / name,
                "-o",
                tmp_path / "y.mp4",
            )
            == 0
        )
        clip = read_clip(tmp_path / "y.mp4")
        assert clip.frames is not None and clip.audio is not None
        assert len(clip.frames) / 25 == pytest.approx(seconds)
        assert clip.audio.shape[1] == round(seconds * 24000)
        if option == "--video":  # the film itself is in the file, not what a codec made of it
            film = read_clip(tmp_path / name).frames
            assert film is not None
            assert np.abs(clip.frames.astype(int) - film[: len(clip.frames)]).mean() < 20
        if option == "--audio":
            voice = read_clip(tmp_path / name, sample_rate=24000).audio
            assert voice is not None
            assert np.corrcoef(clip.audio[0, : voice.shape[1]], voice[0])[0, 1] > 0.95


def test_a_file_of_prompts(model: str, tmp_path: Path, capsys) -> None:
    lines = [
        {"prompt": "a bird", "seed": 1},
        {"prompt": "a bell", "output": "bell.wav", "seconds": 0.3},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert (
        generate(
            model,
            "--prompts",
            tmp_path / "p.jsonl",
            "-o",
            tmp_path / "out",
            "--json",
            "--seed",
            "9",
        )
        == 0
    )
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0001.mp4", "bell.wav"]
    assert [s["seed"] for s in said] == [1, 9]


BAD = {
    "nothing": ([], "either a prompt or --prompts"),
    "both": (["a", "--prompts", "p.jsonl"], "either a prompt or --prompts"),
    "empty": (["  "], "prompt: is empty"),
    "suffix": (["a", "-o", "x.avi"], "needs a name that ends in"),
    "folder": (["a", "-o", "none/x.mp4"], "a folder that exists"),
    "seconds": (["a", "--seconds", "nan"], "seconds=nan: needs"),
    "too long": (["a", "--seconds", "1e9"], "needs a duration"),
    "fps": (["a", "--fps", "0"], "fps=0: needs"),
    "steps": (["a", "--steps", "0"], "num_inference_steps=0"),
    "size": (["a", "--height", "100"], "height=100: needs a multiple"),
    "seed": (["a", "--seed", "-1"], "seed=-1: needs"),
    "word for number": (["a", "--steps", "many"], "Invalid value for '--steps'"),
    "unknown option": (["a", "--colour", "red"], "No such option"),
    "no file": (["a", "--image", "none.png"], "image=none.png: no such file"),
    "no picture": (["a", "--image", "words.txt"], "image=words.txt: cannot be read"),
    "no sound": (["a", "--audio", "words.txt"], "path=words.txt: cannot be read"),
    "two given": (["a", "--audio", "words.txt", "--video", "words.txt"], "nothing is left"),
    "prompts missing": (["--prompts", "none.jsonl"], "no such file"),
    "prompts broken": (["--prompts", "words.txt"], "words.txt, line 1: is not JSON"),
    "prompts key": (
        ["--prompts", "key.jsonl"],
        "key.jsonl, line 2: needs an object with keys among",
    ),
    "device": (["a", "--device", "abacus"], "device=abacus: is not usable"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line(model: str, tmp_path: Path, monkeypatch, capsys, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("neither picture nor sound")
    Path("key.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "colour": "red"}\n')
    before = sorted(tmp_path.iterdir())
    arguments, message = BAD[case]
    assert generate(model, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1, said
    assert sorted(tmp_path.iterdir()) == before  # no partial file


def test_a_name_with_markup_is_only_a_name(model: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "[/x] [bold]"
    # A slash parts folders, so `[/x].mp4` lies in the folder `[`.
    (folder / "[").mkdir(parents=True)
    assert generate(model, "a [/red] bird", "-o", tmp_path / "[/b].mp4") == 0
    assert str(tmp_path / "[/b].mp4") in capsys.readouterr().out
    assert run("data", "corpus", folder, "--count", 1, "--size", 64, "--languages", "en") == 0
    (folder / "000000.mp4").rename(folder / "[/x].mp4")
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace("000000.mp4", "[/x].mp4"))
    assert run("data", "check", folder, "--codec", "none") == 0
    assert "1 good, 0 refused" in capsys.readouterr().out


def in_terminal(words: list[str | bytes], **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command as a process of its own, in an environment that a test describes."""
    command = [sys.executable, "-m", "avdiff", *words]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment})


def test_words_that_are_no_utf8_are_one_line() -> None:
    ended = in_terminal(["generate", b"a \xff bird", "-o", "x.mp4"])
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert b"is not UTF-8 text" in ended.stderr


def test_a_terminal_that_is_no_utf8_shows_what_it_can(tmp_path: Path) -> None:
    path = tmp_path / "あ.mp4"
    write_clip(path, np.zeros((1, 64, 64, 3), np.uint8), 25)
    ended = in_terminal(["info", str(path)], PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and b"\\u3042.mp4" in ended.stdout, ended.stderr


def test_a_prompt_of_a_file_that_is_no_text(model: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud800 bird"}\n{"prompt": 1}\n')
    assert generate(model, "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "line 1: prompt=" in said and "is not UTF-8 text" in said
    assert not (tmp_path / "out").exists()


def test_an_error_stands_alone(model: str, tmp_path: Path, capfd) -> None:
    """Weights under other names: no bar, no warning of a library, no page of names beside it."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({f"x.{name}": value for name, value in load_file(weights).items()}, weights)
    assert generate(str(folder), "a bird", "-o", tmp_path / "x.mp4") == 2
    out, err = capfd.readouterr()
    assert not out and len(err.splitlines()) == 1 and len(err) < 700, err


@pytest.mark.parametrize("damage", ["missing", "no index", "pickle", "header", "class", "text"])
def test_broken_models_are_one_line(model: str, tmp_path: Path, capsys, damage: str) -> None:
    import shutil

    folder = tmp_path / "model"
    if damage != "missing":
        shutil.copytree(model, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "no index":
        (folder / "model_index.json").unlink()
    elif damage == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif damage == "header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif damage == "class":
        index = folder / "model_index.json"
        index.write_text(index.read_text().replace("AVTransformer", "AVTransmogrifier"))
    elif damage == "text":
        (folder / "model_index.json").write_text("{")
    assert generate(str(folder), "a bird", "-o", tmp_path / "x.mp4") == 2
    said = capsys.readouterr().err
    assert f"model={folder}: " in said
    assert len(said.splitlines()) == 1, said
    assert not (tmp_path / "x.mp4").exists()


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="either a prompt"):
        cli.main(["generate", "--debug"])


def test_info_lists_presets_with_their_sizes(capsys) -> None:
    assert run("info", "--presets", "--json") == 0
    sizes = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(sizes) == {"tiny", "presenter", "base", "large"}
    assert 0.8e9 < sizes["base"]["network"] < 1.3e9
    assert 8e9 < sizes["large"]["network"] + sizes["large"]["memory"] < 13e9
    assert all(0 < row["active"] <= row["network"] for row in sizes.values())


def test_info_tells_what_is_in_the_package(capsys) -> None:
    import torch

    from avdiff import PRESENTER
    from avdiff.models.codecs.vocoder import AVVocoder

    assert run("info", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    rows = {row["network"]: row for row in said["bundled"]}
    vocoder = AVVocoder.from_pretrained(PRESENTER, subfolder="vocoder", torch_dtype=torch.float32)
    assert rows["vocoder"]["values"] == sum(v.numel() for v in vocoder.state_dict().values())
    assert "Apache-2.0" in said["licence"] and said["data"] and said["limits"]
    assert run("info") == 0
    assert "g2p/pronouncer" in capsys.readouterr().out


def test_active_parameters_match_what_one_token_touches() -> None:
    """Slow twin: run one token through an MoE layer and count the experts whose weights got a
    gradient.
    """
    import torch

    from avdiff.cli.info import count_parameters
    from avdiff.core.moe import MoE

    layer = MoE(dim=16, hidden=16, num_experts=6, top_k=2)
    layer(torch.randn(1, 1, 16))[0].sum().backward()
    touched = sum(
        int((p.grad.flatten(1).abs().sum(1) > 0).sum()) * p[0].numel()
        for p in layer.experts.parameters()
    )
    assert count_parameters(layer)["active"] == touched + sum(
        p.numel() for p in layer.router.parameters()
    )


def test_info_of_a_file(tmp_path: Path, capsys) -> None:
    write_clip(
        tmp_path / "x.mp4",
        np.zeros((5, 64, 64, 3), np.uint8),
        "23.976",
        np.zeros((1, 5005)),
        24000,
        {"seed": 1},
    )
    assert run("info", str(tmp_path / "x.mp4")) == 0
    said = capsys.readouterr().out
    assert "64 x 64, 5 frames at 24000/1001 a second" in said
    assert "AI-generated" in said


def test_data_commands(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "clips"
    assert run("data", "corpus", folder, "--count", 2, "--size", 64, "--languages", "en") == 0
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["000000.mp4", "000001.mp4"]
    for line in lines:
        info = probe(folder / line["file_name"])
        assert info.height == 64 and info.video_seconds and info.audio_seconds and line["caption"]
        assert "comment" not in info.metadata  # drawn, not generated
        assert abs(info.video_seconds - info.audio_seconds) < 1 / 24000
    tiny_pipeline().save_pretrained(tmp_path / "model")
    options = ["--count", 2, "--codecs", tmp_path / "model", "--seconds", 2, "--languages", "en"]
    assert run("data", "cache", tmp_path / "latents", *options) == 0
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 1
    (folder / "0002.mp4").write_bytes(b"broken")
    (folder / "metadata.jsonl").open("a").write('{"file_name": "0002.mp4", "caption": "nothing"}\n')
    assert run("data", "check", folder, "--report", tmp_path / "report.json") == 1
    assert "0002.mp4: refused: " in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["good"] == 2
    assert run("data", "show", "-o", tmp_path / "p.html", "--count", 1, "--languages", "en") == 0
    assert "<svg" in (tmp_path / "p.html").read_text()
    capsys.readouterr()
    assert run("data", "corpus", folder, "--languages", "xx") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_doctor_reports(capsys, tmp_path: Path) -> None:
    from avdiff.cli.doctor import weights

    code = run("doctor", "--json")
    said = json.loads(capsys.readouterr().out)
    assert code == (1 if said["problems"] else 0)
    assert said["codecs"]["libx264"] and said["torch"]
    assert all("not installed: pip install" in v or v[0].isdigit() for v in said["extras"].values())
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    assert (
        "ba7816bf8f01cfea" in weights(tmp_path)["a.safetensors"]
    )  # SHA-256 of "abc" (FIPS 180-4, appendix)


def test_film_is_continued_and_changed(model: str, tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    film, mask = (
        rng.integers(0, 255, (11, 64, 128, 3), dtype=np.uint8),
        np.zeros((64, 128), np.uint8),
    )
    mask[:, :64] = 255
    write_clip(tmp_path / "film.mp4", film, 25, rng.uniform(-0.3, 0.3, (1, 10_560)), 24000)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(film[0]).save(tmp_path / "last.png")
    common = [
        "--model",
        model,
        "--steps",
        "1",
        "--height",
        "64",
        "--width",
        "128",
        "--video",
        tmp_path / "film.mp4",
        "-o",
        tmp_path / "y.mp4",
    ]
    for options, frames in (
        (["--extend", "0.4"], 21),
        (["--retake", "0.1:0.2"], 11),
        (["--mask", tmp_path / "mask.png"], 11),
    ):
        assert run("generate", "a bird", *common, *options) == 0
        clip, info = read_clip(tmp_path / "y.mp4"), probe(tmp_path / "y.mp4")
        assert (
            clip.frames is not None
            and len(clip.frames) == frames
            and info.audio_seconds == info.video_seconds
        )
        if "--mask" not in options:  # what was given is what it was, but for another round of mp4
            before = read_clip(tmp_path / "film.mp4").frames
            assert before is not None and np.abs(clip.frames[0].astype(int) - before[0]).mean() < 20
    image = ["--last-image", tmp_path / "last.png", "--height", "64", "--width", "128"]
    assert generate(model, "a bird", *image, "-o", tmp_path / "z.mp4") == 0
    capsys.readouterr()
    for options, said in (
        (["--retake", "2"], "retake=2: needs START:END"),
        (["--extend", "1", "--mask", tmp_path / "mask.png"], "extend and mask are both given"),
    ):
        assert run("generate", "a bird", *common, *options) == 2
        assert said in capsys.readouterr().err
    assert generate(model, "a bird", "--extend", "1", "-o", tmp_path / "z.mp4") == 2
    assert "extend=1.0: needs --video" in capsys.readouterr().err
