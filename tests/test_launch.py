"""How a training starts: recipes by name from anywhere, launchers that do what they were asked."""

import importlib.util
import runpy
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from avdiff.clip import ClipSpec
from avdiff.files import RECIPES
from avdiff.train import finetune
from avdiff.train.codecs.train_codec import CodecRecipe
from avdiff.train.evaluators.train_evaluator import EvaluatorRecipe
from avdiff.train.g2p import train_g2p
from avdiff.train.joint.ltx2_recipe import LTX2Recipe
from avdiff.train.loop.accelerator import make_accelerator, refuse_launch
from avdiff.train.loop.command import find_recipe, load_recipe, recipes_for
from avdiff.train.loop.fit import FitOptions
from avdiff.train.recipe import Recipe
from tests.test_finetune import CLIP, run, write_clips

CLASSES = (
    Recipe,
    LTX2Recipe,
    CodecRecipe,
    EvaluatorRecipe,
    train_g2p.WordRecipe,
    train_g2p.TimeRecipe,
)


def launched(*words: str, multi: bool = False) -> dict[str, str]:
    """The environment that accelerate's launcher gives to a process."""
    args = launch_command_parser().parse_args([*words, "-m", "avdiff.train.finetune"])
    args, _, _ = _validate_launch_command(args)
    return prepare_multi_gpu_env(args) if multi else prepare_simple_launcher_cmd_env(args)[1]


def test_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("lora.toml") == find_recipe("lora") == RECIPES / "lora.toml"
    Path("lora.toml").write_text("")
    assert find_recipe("lora.toml") == Path("lora.toml")  # a file of one's own goes first
    with pytest.raises(ValueError, match=r"recipe lra.toml: .*did you mean lora.toml\?"):
        find_recipe("lra.toml")
    finetune.main(["--list-recipes"])
    said = capsys.readouterr().out
    assert "lora.toml" in said and "video_vae.toml" not in said  # those of this command
    assert f"fsdp2.yaml, multi_gpu.yaml in {RECIPES}" in said


def test_every_shipped_recipe_is_read_by_its_training():
    readers = {path.name: [] for path in RECIPES.glob("*.toml")}
    for recipe_class in CLASSES:
        for name, first_line in recipes_for(recipe_class):
            readers[name].append(recipe_class.__name__)
            assert first_line
    assert [name for name, classes in readers.items() if not classes] == []
    words = load_recipe(train_g2p.WordRecipe, ["pronouncer.toml", "--memory", "off"])
    assert (words.data.memory, words.training.max_train_steps) == ("off", 9000)


def test_the_rebuilding_of_all_weights_names_what_is_there(tmp_path):
    weights = runpy.run_path(str(Path(__file__).parents[1] / "samples" / "weights.py"))
    for stage in weights["stages"](tmp_path, "bank"):
        if "-m" in stage.command:
            module = stage.command[stage.command.index("-m") + 1]
            spec = importlib.util.find_spec(module)
            assert spec is not None, module
            runs = spec.submodule_search_locations is None or importlib.util.find_spec(
                f"{module}.__main__"
            )
            assert runs, f"{module} is a package without __main__"
        for word in stage.command:
            assert not word.endswith(".toml") or Path(word).is_file(), word


def test_one_process_in_place_of_two_is_refused():
    """Without mpirun accelerate starts a single process on the CPU and says nothing."""
    one = launched("--cpu", "--num_processes", "1")
    refuse_launch(one)
    two = launched("--cpu", "--num_processes", "2")
    with pytest.raises(ValueError, match=r"num_processes: .*started one.*torchrun"):
        refuse_launch(two)
    refuse_launch({**two, "WORLD_SIZE": "2"})  # torchrun or MPI told the process its group
    with pytest.raises(ValueError, match=r"distributed_type=DEEPSPEED: .*fsdp2.yaml"):
        refuse_launch({"ACCELERATE_USE_DEEPSPEED": "true"})


def test_the_recipe_decides_about_precision_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = make_accelerator(FitOptions(str(tmp_path)))
    assert accelerator.mixed_precision == "no"
    assert "launched with bf16, the recipe says no; the recipe decides" in capsys.readouterr().out


def test_the_file_for_several_gpus_is_one_that_accelerate_reads():
    config = str(RECIPES / "multi_gpu.yaml")
    environment = launched("--config_file", config, "--num_processes", "2", multi=True)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_USE_FSDP" not in environment
    refuse_launch(environment)


def test_small_buckets_are_told_in_the_run_too(tmp_path, capsys):
    longer = ClipSpec(17, CLIP.fps, 64, 128)
    held = write_clips(tmp_path / "mixed", 10, clips=(CLIP, CLIP, CLIP, CLIP, longer))
    run((held, held), tmp_path / "out", max_train_steps="1", checkpointing_steps="0")
    said = " ".join(capsys.readouterr().out.split())
    assert "bucket 17 frames, 128x64" in said
    assert "2 clips (fewer than a batch of 4: never used)" in said


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["sing"], "command 'sing': needs words, times, ship, forms or score"),
        (["ship", "--words", "a"], "times: is required"),
        (["words", "--memory", "of"], "memory='of': needs one of trained, off, frozen, shuffled"),
    ],
)
def test_wrong_words_for_g2p_are_refused_in_one_sentence(words, answer):
    with pytest.raises(ValueError, match=answer):
        train_g2p.main(words)
