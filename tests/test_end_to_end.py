"""The whole road at tiny size: corpus, cache, training, a kill, resume, validation with sound,
export, generation.

The curve is compared with tests/golden/end_to_end.json; `python -m tests.test_end_to_end` writes it
anew.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avdiff.cli.main import main as avdiff_main
from avdiff.data.cache import cache_presenters
from avdiff.media.write import read_clip
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.train import finetune
from avdiff.train.loop.run_log import read_log
from tests.tiny import tiny_components

GOLDEN = Path(__file__).parent / "golden" / "end_to_end.json"
TOLERANCE = 0.02  # fp32 on another CPU sums in another order, and eight steps amplify it
STEPS, KILLED_AFTER = 8, 5


def make(root: Path) -> list[str]:
    """Codecs and caches; the command line of a run without its output folder."""
    AVDiffPipeline(**tiny_components()).save_pretrained(root / "codecs")
    for split, count in (("train", 16), ("val", 4)):
        cache_presenters(root / split, root / "codecs", count, None, split, seconds=1.64)
    recipe = root / "recipe.toml"
    recipe.write_text(f"""
[model]
preset = "tiny"
codecs = "{root / "codecs"}"
vocab_size = 300
[data]
train_data = ["{root / "train"}"]
validation_data = ["{root / "val"}"]
[objective]
tasks = {{ joint = 2.0, t2a = 1.0, a2v = 1.0 }}
[samples]
sample_prompts = ['a woman says "hello"']
[training]
output_dir = "unset"
max_train_steps = {STEPS}
train_batch_size = 4
gradient_accumulation_steps = 2
learning_rate = 4e-3
ema_decay = 0.8
checkpointing_steps = 2
validation_steps = {STEPS}
best_metric = "audio"
log_every = 1
""")
    return [str(recipe), "--output_dir"]


def curve(folder: Path) -> dict[str, list[float]]:
    """Losses of each step, and the validation at the end."""
    lines = read_log(folder / "log.jsonl")
    names = ("loss", "loss/video", "loss/audio", "validation/video", "validation/audio")
    return {name: [line[name] for line in lines if name in line] for name in names}


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    root = tmp_path_factory.mktemp("road")
    words = make(root)
    finetune.main([*words, str(root / "whole")])
    return root, words


def test_the_curve_is_the_golden_one(road):
    root, _ = road
    golden, found = json.loads(GOLDEN.read_text()), curve(root / "whole")
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert len(values) == (1 if name.startswith("validation") else STEPS)
        np.testing.assert_allclose(found[name], values, rtol=TOLERANCE, err_msg=name)


def test_a_killed_run_goes_on_bit_for_bit(road):
    root, words = road

    def killed_run():
        inner, done = finetune.FinetuneTask.after_step, []

        def after_step(self, phase, lr):
            inner(self, phase, lr)
            done.append(phase)
            if len(done) == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

        finetune.FinetuneTask.after_step = after_step
        finetune.main([*words, str(root / "cut")])

    pid = os.fork()
    if not pid:
        try:
            killed_run()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert {p.name for p in (root / "cut").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    finetune.main([*words, str(root / "cut"), "--resume_from_checkpoint", "latest"])
    assert curve(root / "cut") == curve(root / "whole")
    for path in (root / "whole" / f"checkpoint-{STEPS}").glob("*.safetensors"):
        theirs = load_file(root / "cut" / path.parent.name / path.name)
        assert [k for k, v in load_file(path).items() if not torch.equal(v, theirs[k])] == [], (
            path.name
        )


def test_validation_leaves_clips_to_hear_and_see(road):
    root, _ = road
    folder = root / "whole" / "samples" / f"step-{STEPS:06d}"
    clip = read_clip(folder / "00.mp4")
    assert clip.frames is not None
    assert clip.audio is not None
    page = (folder / "report.html").read_text()
    assert "<video" in page
    curves = (root / "whole" / "samples" / "index.html").read_text()
    assert f"step-{STEPS:06d}/report.html" in curves
    assert "loss/audio" in curves
    told = json.loads((folder / "report.json").read_text())["rows"][0]
    last = [line for line in read_log(root / "whole" / "log.jsonl") if "validation/audio" in line][
        -1
    ]
    for name in ("speech", "lip_sync", "mouth"):
        if f"validation/evaluator/{name}" in last:
            assert last[f"validation/evaluator/{name}"] == pytest.approx(told.get(name, 0.0))


def test_the_export_generates(road, tmp_path):
    root, _ = road
    assert (root / "whole" / "best" / "model_index.json").is_file()
    with pytest.raises(SystemExit) as ended:
        avdiff_main(
            [
                "generate",
                'a woman says "hello"',
                "--model",
                str(root / "whole" / "final"),
                "--steps",
                "2",
                "--seed",
                "1",
                "-o",
                str(tmp_path / "out.mp4"),
            ]
        )
    assert not ended.value.code
    clip = read_clip(tmp_path / "out.mp4")
    assert clip.frames.shape[1:] == (128, 128, 3)
    assert abs(clip.audio.shape[1] / clip.sample_rate - len(clip.frames) / float(clip.fps)) < 0.1


if __name__ == "__main__":
    root = Path(sys.argv[1])
    words = make(root)
    finetune.main([*words, str(root / "whole")])
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(curve(root / "whole"), indent=1) + "\n")
