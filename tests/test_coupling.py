"""Arms with links cut, the suite on files, the metrics, generation in batches and the command line:
tiny real parts.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from avdiff.cli import evaluate_all as cli_eval_all
from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.data.heldout import Prompt, load_prompts
from avdiff.evaluation import coupling, suite
from avdiff.evaluation import oracle as oracle
from avdiff.evaluation.metrics import table as metrics
from avdiff.evaluation.report.report import read_report
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.media.write import Clip, read_clip, write_clip
from avdiff.models.evaluators.contact_detector import ContactDetector
from avdiff.models.evaluators.face_reader import FaceReader
from avdiff.models.evaluators.lip_network import LipNetwork
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import inventory
from avdiff.pipelines import generate_prompts as batch

SAMPLES = Path(__file__).parents[1] / "samples"


@cache
def evaluators() -> suite.Evaluators:
    torch.manual_seed(1)
    reader = FaceReader({"glasses": ("none", "round glasses")}).eval()
    torch.nn.init.constant_(
        reader.is_face.bias, 5.0
    )  # this untrained reader sees a face everywhere
    return suite.Evaluators(
        PhoneRecognizer(inventory()[0], width=32, expansion=2, kernel=5, layers=1).eval(),
        reader,
        LipNetwork(width=16, layers=1, embedding=8).eval(),
        ContactDetector((8, 8, 8), 16, 1).eval(),
    )


@cache
def judge_folder() -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    for name in ("recognizer", "face_reader", "lip_network", "contact_detector"):
        getattr(evaluators(), name).save_pretrained(folder / name)
    return folder


def wishes(bank: SpeechCorpus) -> list[Prompt]:
    """Two sentences that the mini-bank holds, and an event."""
    found = []
    for number, one in enumerate([u for u in bank if u.duration < 2][:2]):
        look = load_prompts(kinds=["digits"])[number]
        found.append(
            Prompt(
                f"en-sentence-{number:02d}",
                "sentence",
                "en",
                f'A woman says "{one.text}"',
                one.text,
                one.duration,
                ["a"],
                look.attributes,
                look.told,
                look.gender,
                [one.id],
                5 + number,
            )
        )
    return [*found, load_prompts(kinds=["event"])[1]]


def noise_clip(seed: int, frames: int = 41) -> Clip:
    rng = np.random.default_rng(seed)
    sound = rng.normal(0, 0.05, (1, frames * 960)).astype(np.float32)
    from fractions import Fraction

    return Clip(
        rng.integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8), sound, Fraction(25), 24000
    )


def test_swapped_clips_have_the_next_one_s_sound_at_their_own_length() -> None:
    one, two = noise_clip(0, 41), noise_clip(1, 31)
    first, second = coupling.swapped([one, two])
    assert first.frames is one.frames and second.frames is two.frames
    assert (
        first.audio is not None
        and second.audio is not None
        and one.audio is not None
        and two.audio is not None
    )
    assert first.audio.shape == one.audio.shape and second.audio.shape == two.audio.shape
    assert (
        np.array_equal(first.audio[:, : 31 * 960], two.audio)
        and not first.audio[:, 31 * 960 :].any()
    )
    assert np.array_equal(second.audio, one.audio[:, : 31 * 960])
    with pytest.raises(ValueError, match="at least two"):
        coupling.swapped([one])


def test_arms_are_paired_with_the_whole() -> None:
    rng = np.random.default_rng(0)
    whole = [{"id": str(i), "mouth_r": 0.8 + 0.05 * rng.normal()} for i in range(20)]
    cut = [{"id": row["id"], "mouth_r": row["mouth_r"] - 0.5} for row in whole]
    found = {one.arm: one for one in coupling.couplings({"whole": whole, "cut": cut})}
    assert found["whole"].difference is None
    assert found["cut"].difference is not None
    assert found["cut"].difference.difference.mean == pytest.approx(-0.5)
    assert found["cut"].difference.clear
    coupling.print_couplings(list(found.values()))
    with pytest.raises(ValueError, match="one called whole"):
        coupling.couplings({"cut": cut})
    with pytest.raises(ValueError, match="in none of its"):
        coupling.couplings({"whole": whole, "cut": [{"id": "0", "status": "error"}]})


def test_scale_0_cuts_the_links_of_a_real_pipeline() -> None:
    """The isolated arm: another sound's noise leaves the picture as it is; with the links it does
    not.
    """
    pipe = tiny_pipeline()
    prompt, frames = "A woman with red hair", 9

    def picture(guidance: Guidance, seed: int) -> torch.Tensor:
        sound = torch.randn(
            1,
            9,
            pipe.transformer.config.audio_channels,
            generator=torch.Generator().manual_seed(seed),
        )
        out = pipe(
            prompt,
            num_frames=frames,
            num_inference_steps=2,
            guidance=guidance,
            audio_latents=sound,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        return out.frames

    cut = Guidance(cross=Joint(0.0, 0.0))
    assert torch.allclose(picture(cut, 1), picture(cut, 2), atol=1e-5)
    assert not torch.allclose(picture(Guidance(), 1), picture(Guidance(), 2), atol=1e-3)


def test_batches_hold_every_prompt_once_and_like_lengths() -> None:
    prompts = load_prompts(languages=["en", "zh"])
    seen: list[str] = []
    for seconds, part in batch.batches(prompts, 8):
        lengths = [batch.natural_seconds(prompt) for prompt in part]
        assert len(part) <= 8 and seconds == max(lengths) <= min(lengths) * batch.SPREAD
        assert len({prompt.language for prompt in part if prompt.text}) <= 1
        seen += [prompt.id for prompt in part]
    assert sorted(seen) == sorted(prompt.id for prompt in prompts)


def test_prompts_become_files_once(tmp_path: Path) -> None:
    pipe, prompts = tiny_pipeline(), wishes(SpeechCorpus(REPO_BANK, languages=["en"]))
    ticks: list[int] = []
    made = batch.generate_prompts(
        pipe, prompts, tmp_path, 2, 2, ticks.append, num_inference_steps=1
    )
    assert sorted(path.name for path, _ in made) == sorted(
        f"{p.id}-s{s}.mp4" for p in prompts for s in (0, 1)
    )
    assert sum(ticks) == 6
    first = made[0][0]
    clip = read_clip(first)
    assert clip.frames is not None and len(clip.frames) / 25 >= batch.natural_seconds(made[0][1])
    assert clip.metadata["id"] == made[0][1].id
    before = {path: path.stat().st_mtime_ns for path, _ in made}
    first.unlink()
    batch.generate_prompts(pipe, prompts, tmp_path, 2, 2, num_inference_steps=1)
    assert read_clip(first).frames.shape == clip.frames.shape  # type: ignore[union-attr]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path != first)
    assert suite.find_prompt(first, prompts) == made[0][1]
    assert suite.find_prompt("other.mp4", prompts) is None


def test_oracle_clips_are_the_corpus_and_survive_the_codecs() -> None:
    bank = SpeechCorpus(REPO_BANK, languages=["en"])
    speaking, _, event = wishes(bank)
    clip = oracle.truth_clip(speaking, bank)
    assert clip is not None and clip.frames is not None and clip.audio is not None
    assert clip.frames.shape[1:] == (128, 128, 3) and len(clip.frames) % 2 == 1
    assert clip.audio.shape[-1] == round(len(clip.frames) / 25 * 24000)
    told = oracle.presenter_of(speaking).attributes()
    assert {k: told[k] for k in speaking.attributes} == speaking.attributes
    scene = oracle.event_of(event)
    assert len(scene.contacts) == event.contacts and scene.kind == event.attributes["event"]
    assert oracle.truth_clip(load_prompts(kinds=["digits"])[0], bank) is None
    coded = batch.round_trip(tiny_pipeline(), clip)
    assert (
        coded.frames is not None
        and coded.frames.shape == clip.frames.shape
        and coded.frames.dtype == np.uint8
    )
    assert coded.audio is not None and coded.audio.shape == clip.audio.shape


def test_every_clip_gets_a_row_and_a_status(tmp_path: Path) -> None:
    bank = SpeechCorpus(REPO_BANK, languages=["en"])
    speaking, _, event = wishes(bank)
    clip, scene = oracle.truth_clip(speaking, bank), oracle.truth_clip(event, bank)
    assert clip is not None and scene is not None
    row = suite.measure_clip(clip, speaking, evaluators())
    assert row["status"] == "ok" or row["status"] == "no_speech"
    assert {"phones", "phone_errors", "attributes_stated", "peak", "background_difference"} <= set(
        row
    )
    heard = suite.measure_clip(scene, event, evaluators())
    assert {"event_onsets", "event_hits", "count_sound_right"} <= set(heard)
    assert (
        suite.measure_clip(Clip(None, clip.audio, None, 24000), speaking, evaluators())["status"]
        == "no_picture"
    )
    assert (
        suite.measure_clip(Clip(clip.frames, None, clip.fps, None), speaking, evaluators())[
            "status"
        ]
        == "no_sound"
    )
    assert suite.measure_clip(Clip(None, None, None, None), None, evaluators())["status"] == "error"
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    broken = suite.measure_file(tmp_path / "bad.mp4", None, evaluators())
    assert broken["status"] == "error" and broken["error"]
    for prompt, made in ((speaking, clip), (event, scene)):
        assert 0 <= suite.score(made, prompt, evaluators()) <= 1


def test_marks_stand_side_by_side() -> None:
    corpus = [
        {
            "id": f"en-a-{i}-s0",
            "kind": "sentence",
            "language": "en",
            "status": "ok",
            "mouth_r": 0.8,
            "phones": 10,
            "phone_errors": 1,
            "offset_frames": 0.2,
            "looks_hat": True,
        }
        for i in range(6)
    ]
    model = [
        {
            **row,
            "mouth_r": 0.4,
            "phone_errors": 5,
            "offset_frames": float("nan"),
            "looks_hat": i < 3,
        }
        for i, row in enumerate(corpus)
    ]
    table = metrics.metrics_table({"model": model, "corpus": corpus})
    assert table.metrics["  as a share of the corpus's"]["model"].mean == pytest.approx(0.5)
    assert table.metrics["phone errors, en"]["model"].mean == 0.5
    assert table.metrics["hat right"]["model"].mean == 0.5
    assert table.metrics["lip offset within 1 frame"]["corpus"].mean == 1
    assert "model" not in table.metrics["lip offset within 1 frame"]  # nothing was measured there
    assert json.loads(json.dumps(table.record()))["hat right"]["corpus"]["mean"] == 1
    head, rows = table.cells()
    assert head == ["metric", "model", "corpus", "best"] and all(len(row) == 4 for row in rows)
    metrics.print_metrics(table)


def test_commands_measure_files(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(3):
        clip = noise_clip(i)
        write_clip(folder / f"{i}.mp4", clip.frames, 25, clip.audio, 24000)
    (folder / "cut short.mp4").write_bytes((folder / "0.mp4").read_bytes()[:500])
    report, own = tmp_path / "a.json", ["--evaluators", str(judge_folder())]
    cli_eval_all.main(
        ["all", str(folder), "--json", str(report), "--html", str(tmp_path / "a.html"), *own]
    )
    rows = read_report(report)
    assert len(rows) == 4 and [row["status"] for row in rows].count("error") == 1
    assert (
        cli_eval_all.main(["compare", str(report), str(report), "--json", str(tmp_path / "d.json")])
        == 0
    )
    assert all(
        one["difference"]["mean"] == 0 for one in json.loads((tmp_path / "d.json").read_text())
    )
    assert (
        cli_eval_all.main(["fidelity", str(folder), str(folder), *own]) == 1
    )  # too few clips: says so, measures none
    with pytest.raises(ValueError, match="needs one of all, compare"):
        cli_eval_all.main(["none"])
    with pytest.raises(ValueError, match="no such file"):
        cli_eval_all.main(["all", str(tmp_path / "gone"), *own])
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        cli_eval_all.main(["coupling", "whole", *own])


def test_evaluation_script_ends_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SAMPLES))
    import evaluate

    monkeypatch.setitem(sys.modules, "evaluate", evaluate)
    pipe, bank = tiny_pipeline(), SpeechCorpus(REPO_BANK, languages=["en"])
    pipe.save_pretrained(tmp_path / "model")
    from dataclasses import asdict

    chosen = wishes(bank)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in chosen))
    words = [
        "--model",
        str(tmp_path / "model"),
        "--folder",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--bank",
        str(REPO_BANK),
        "--evaluators",
        str(judge_folder()),
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
    ]
    table = evaluate.main(words)
    assert set(table["peak"]) == {"model", "codec", "corpus"}
    assert table["peak"]["corpus"]["n"] == 3
    for name in ("report.html", "table.json", "model.json", "codec.csv", "corpus.json"):
        assert (tmp_path / "run" / name).is_file()
    lines = (tmp_path / "run" / "rows-model.jsonl").read_text().splitlines()
    assert evaluate.main(words) == table  # everything was there
    assert (tmp_path / "run" / "rows-model.jsonl").read_text().splitlines() == lines
