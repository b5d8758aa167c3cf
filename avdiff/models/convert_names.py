"""Convert a model folder of before the renaming of weights and config keys: python -m
avdiff.models.convert_names FOLDER.

Only headers and JSON are rewritten; the bytes of the tensors, their order and their alignment stay.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

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


def new_weight_name(name: str) -> str:
    """Today's name of a weight; a name that did not change comes back as it is."""
    for old, new in WEIGHTS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def convert_weights(path: Path) -> bool:
    """Rename the tensors of a safetensors file; returns whether there was one to rename."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        renamed = {new_weight_name(name): entry for name, entry in header.items()}
        if renamed.keys() == header.keys():
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
    changed += [path for path in sorted(folder.rglob("*.json")) if convert_config(path)]
    for old, new in (("world", "prompt_domain"), ("impact_reader", "contact_detector")):
        if (folder / old).is_dir() and not (folder / new).exists():
            (folder / old).rename(folder / new)
    config = folder / "prompt_domain" / "world_config.json"
    if config.is_file():
        config.rename(config.with_name("prompt_domain_config.json"))
    return changed


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: python -m avdiff.models.convert_names FOLDER (that of a model)")
    changed = convert_folder(Path(sys.argv[1]))
    print(f"{len(changed)} files converted" if changed else "nothing to convert")


if __name__ == "__main__":
    main()
