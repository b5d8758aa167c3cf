"""Convert a folder (model, LoRA, checkpoint) of before the renaming of weights and config keys:
python -m avdiff.models.convert_names FOLDER.

Only headers and JSON are rewritten; the bytes of the tensors, their order and their alignment stay.
Loading a folder of before refuses it in one sentence that names this command.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from avdiff.files import write_atomically, write_text

WEIGHTS = {
    "hears.": "cross_gate_proj.",
    "tick_start": "shared_init",
    "tick_time.": "shared_time_proj.",
    "script_encoder.mark.": "phoneme_encoder.stress_tone.",
    "script_encoder.to_ticks.": "phoneme_encoder.to_shared.",
    "script_encoder.": "phoneme_encoder.",
}
CONFIG_KEYS = {
    "num_marks": "num_stress_tones",
    "event_script": "onset_track",
    "script_dim": "phoneme_dim",
    "steadiness": "deflicker_strength",
    "world": "prompt_domain",
    "impacts": "contacts",
}
CLASSES = {
    "PromptWorld": "PromptDomain",
    "ImpactReader": "ContactDetector",
    "PronunciationReader": "Pronouncer",
    "PhoneTimer": "DurationPredictor",
    "PhoneRecogniser": "PhoneRecognizer",
}
ALIGNMENT = 64  # bytes: tensors keep their place within a cache line, so that sums keep their order


# what a LoRA or a checkpoint puts in front of a weight's name
PREFIX = re.compile(r"(?:transformer\.|base_model\.model\.|diffusion_model\.|text_encoder\.)*")
OLD_WEIGHT = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, WEIGHTS))})")


def new_weight_name(name: str) -> str:
    """Today's name of a weight; a name that did not change comes back as it is."""
    prefix = PREFIX.match(name)
    assert prefix is not None  # it may be empty
    own = name[prefix.end() :]
    for old, new in WEIGHTS.items():
        if own.startswith(old):
            return prefix[0] + new + own.removeprefix(old)
    return name


def new_metadata(values: dict[str, str]) -> dict[str, str]:
    """Metadata of a safetensors file, such as the modules of a LoRA, with today's names."""

    def renamed(found: re.Match[str]) -> str:
        return WEIGHTS[found[0]]

    return {key: OLD_WEIGHT.sub(renamed, text) for key, text in values.items()}


def check_names(names: Iterable[str], where: str | Path) -> None:
    """Refuse weights or config keys of before.

    Raises:
        ValueError: one of `names` is an old one; the sentence names it and the way out.
    """
    for name in names:
        if name in CONFIG_KEYS or new_weight_name(name) != name:
            raise ValueError(
                f"{where}: {name!r} is a name of before the renaming; convert the folder once with "
                f"`python -m avdiff.models.convert_names {where}`"
            )


def check_folder(folder: Path) -> None:
    """Refuse a model's folder of before, by its configs and the headers of its weights.

    Raises:
        ValueError: see `check_names`.
    """
    for path in _configs(folder):
        old: set[str] = set()
        with suppress(OSError, ValueError, RecursionError):  # its reader says what is wrong with it
            config = json.loads(path.read_text(encoding="utf-8"))
            old = config.keys() & CONFIG_KEYS.keys() if isinstance(config, dict) else old
        check_names(old, folder)
    for path in sorted(folder.rglob("*.safetensors")):
        names: list[str] = []
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
        check_names(names, folder)


def convert_weights(path: Path) -> bool:
    """Rename the tensors of a safetensors file; returns whether there was one to rename."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        renamed = {new_weight_name(name): entry for name, entry in header.items()}
        if "__metadata__" in renamed:
            renamed["__metadata__"] = new_metadata(renamed["__metadata__"])
        if renamed == header:
            return False
        text = json.dumps(renamed, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * ((length - len(text)) % ALIGNMENT)
        with write_atomically(path) as temporary_path, open(temporary_path, "wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            while piece := file.read(1 << 24):
                target.write(piece)
    return True


def convert_config(path: Path) -> bool:
    """Rename keys and class names of a config; returns whether there was one to rename."""
    before = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(before, dict):
        return False
    after = {}
    for key, value in before.items():
        if isinstance(value, str):
            value = CLASSES.get(value, value)
        elif isinstance(value, list):
            value = [CLASSES.get(v, v) if isinstance(v, str) else v for v in value]
        after[CONFIG_KEYS.get(key, key)] = value
    if after == before:
        return False
    write_text(path, json.dumps(after, indent=2, sort_keys=True) + "\n")
    return True


def convert_folder(folder: Path) -> list[Path]:
    """Convert every config and weight file under a folder.

    Returns:
        Files that were changed; a folder of today gives none.
    """
    changed = [path for path in sorted(folder.rglob("*.safetensors")) if convert_weights(path)]
    changed += [path for path in _configs(folder) if convert_config(path)]
    for old, new in (("world", "prompt_domain"), ("impact_reader", "contact_detector")):
        if (folder / old).is_dir() and not (folder / new).exists():
            (folder / old).rename(folder / new)
    config = folder / "prompt_domain" / "world_config.json"
    if config.is_file():
        config.rename(config.with_name("prompt_domain_config.json"))
    return changed


def _configs(folder: Path) -> list[Path]:
    """Configs of a model's parts. Other JSON files (a tokenizer's words, say) hold no keys of
    ours.
    """
    named = [folder.rglob(name) for name in ("config.json", "model_index.json", "*_config.json")]
    found = {path for paths in named for path in paths}
    return sorted(path for path in found if not path.name.startswith("tokenizer"))


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: python -m avdiff.models.convert_names FOLDER (that of a model)")
    changed = convert_folder(Path(sys.argv[1]))
    print(f"{len(changed)} files converted" if changed else "nothing to convert")


if __name__ == "__main__":
    main()
