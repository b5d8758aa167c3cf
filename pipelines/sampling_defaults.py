"""SamplingDefaults: what a call samples with that does not say otherwise.

They belong to the weights: a distilled transformer needs few steps and no guidance. So they are
saved in the pipeline's config and in a LoRA's metadata, and ride on the transformer from one
pipeline to the next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

METADATA_KEY = "sampling_defaults"  # in the header of a LoRA's safetensors file


@dataclass(frozen=True)
class SamplingDefaults:
    """Settings of a call.

    Args:
        num_inference_steps: denoising steps, at least 1. guidance_scale, audio_guidance_scale: text
            guidance of picture and sound; 0 and 1 are none. deflicker_strength: changes of a pixel
            from frame to frame, of 255, that count as flicker; 0 leaves the frames as they are.

    Raises:
        ValueError: a value that no call takes.
    """

    num_inference_steps: int = 16
    guidance_scale: float = 2.0
    audio_guidance_scale: float = 2.0
    deflicker_strength: float = 0.0

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"num_inference_steps={steps!r}: needs a whole number of at least 1")
        for name in ("guidance_scale", "audio_guidance_scale", "deflicker_strength"):
            value = getattr(self, name)
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if not plain or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: needs a number")

    @classmethod
    def of(cls, config: Mapping[str, Any], base: SamplingDefaults | None = None) -> Any:
        """Those that a config or a command line names; what it does not name, or names as None, is
        taken from `base`.
        """
        names = [field.name for field in fields(cls)]
        named = {name: config[name] for name in names if config.get(name) is not None}
        return replace(base or cls(), **named)

    def relearned(self) -> SamplingDefaults:
        """Those of weights that were trained further: guidance that was distilled into them is
        unlearned, so it is asked for again.
        """
        usual = SamplingDefaults()
        names = ("guidance_scale", "audio_guidance_scale")
        return replace(self, **{n: getattr(usual, n) for n in names if getattr(self, n) <= 1})

    def to_json(self) -> str:
        """As a LoRA's metadata holds them."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SamplingDefaults:
        """Inverse of `to_json`.

        Raises:
            ValueError: it is no such text.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{METADATA_KEY}={text[:60]!r}: is not JSON") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or not set(content) <= known:
            raise ValueError(
                f"{METADATA_KEY}={text[:60]!r}: needs an object with some of {sorted(known)}"
            )
        return cls(**content)
