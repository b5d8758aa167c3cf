"""Forward time of AVTransformer against LTX-2's transformer at equal width, depth and tokens.

    python samples/bench/transformer.py [--quick]

Both run by turns in one process on one thread, so that a busy machine slows both; each round gives
one ratio, and the median is printed with the quartiles. Ours is the dense layout without a shared
stream (`shared_rate=0`), in two builds: "equal work" has text attention in every block and a SwiGLU
as wide as makes both feed-forwards equal (8/3 of the width against 4); "as preset" has text in
every second block and the SwiGLU of our larger presets (2.4 of the width). Conditions that do not
change from step to step are prepared once, as the pipeline does. "video alone" and "audio alone"
are ours with one branch against ours with both: what is left out should cost nothing, so both
shares together stay below 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from avdiff.clip import ClipSpec
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer

SIZES = {  # heads of 64 channels in video and audio, blocks, clip
    "tiny": (4, 4, 8, ClipSpec(num_frames=101)),  # 204 + 101 tokens
    "100M": (12, 8, 10, ClipSpec(num_frames=51, height=256, width=256)),  # 416 + 51 tokens
}
PAIRS = (
    ("equal work", "theirs"),
    ("as preset", "theirs"),
    ("video alone", "equal work"),
    ("audio alone", "equal work"),
)
TEXT = 32  # caption tokens
TEXT_DIM = 256
CHANNELS = (64, 48)
HEAD = 64


def ours(
    size: str, dtype: torch.dtype, text_every: int = 1, hidden: float = 8 / 3
) -> AVTransformer:
    """Dense AVTransformer without shared stream and script; `hidden` is the SwiGLU's width over the
    branch's.
    """
    video, audio, layers, _ = SIZES[size]
    model = AVTransformer(
        *CHANNELS,
        text_dim=TEXT_DIM,
        video_dim=video * HEAD,
        audio_dim=audio * HEAD,
        video_heads=video,
        audio_heads=audio,
        dim_head=HEAD,
        num_layers=layers,
        text_every=text_every,
        video_hidden=round(video * HEAD * hidden / 16) * 16,
        audio_hidden=round(audio * HEAD * hidden / 16) * 16,
        shared_rate=0,
        shared_layers=(),
        num_phonemes=0,
        memory_layers=(),
    )
    return model.to(dtype).eval()


def theirs(size: str, dtype: torch.dtype) -> torch.nn.Module:
    """LTX2VideoTransformer3DModel of the same widths and depth."""
    from diffusers import LTX2VideoTransformer3DModel

    video, audio, layers, _ = SIZES[size]
    model = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS[0],
        out_channels=CHANNELS[0],
        num_attention_heads=video,
        attention_head_dim=HEAD,
        cross_attention_dim=video * HEAD,
        audio_in_channels=CHANNELS[1],
        audio_out_channels=CHANNELS[1],
        audio_num_attention_heads=audio,
        audio_attention_head_dim=HEAD,
        audio_cross_attention_dim=audio * HEAD,
        num_layers=layers,
        caption_channels=TEXT_DIM,
    )
    return model.to(dtype).eval()


def calls(size: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """What is timed, by name, and the number of parameters."""
    torch.manual_seed(0)
    a, light, b = ours(size, dtype), ours(size, dtype, 2, 2.4), theirs(size, dtype)
    clip = SIZES[size][3]
    text = torch.randn(1, TEXT, TEXT_DIM).to(dtype)
    given = Positions.of(clip)
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    conditions, lighter = (m.prepare(text, mask, given) for m in (a, light))
    video, audio = (
        torch.randn(1, clip.video_tokens, CHANNELS[0]),
        torch.randn(1, clip.audio_tokens, CHANNELS[1]),
    )
    level = torch.full((1,), 0.5)
    frames, rows, columns = clip.video_grid
    theirs_inputs = dict(
        hidden_states=video.to(dtype),
        audio_hidden_states=audio.to(dtype),
        encoder_hidden_states=text,
        audio_encoder_hidden_states=text,
        timestep=level * 1000,
        num_frames=frames,
        height=rows,
        width=columns,
        fps=float(clip.fps),
        audio_num_frames=clip.audio_tokens,
        return_dict=False,
    )
    parameters = {
        name: sum(p.numel() for p in m.parameters()) for name, m in (("ours", a), ("theirs", b))
    }
    return {
        "equal work": lambda: a(
            video, audio, level, level, conditions=conditions, return_dict=False
        ),
        "as preset": lambda: light(
            video, audio, level, level, conditions=lighter, return_dict=False
        ),
        "theirs": lambda: b(**theirs_inputs),
        "video alone": lambda: a(
            video, None, level, None, conditions=conditions, return_dict=False
        ),
        "audio alone": lambda: a(
            None, audio, None, level, conditions=conditions, return_dict=False
        ),
    }, parameters


@torch.inference_mode()
def measure(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, in turn; the process's own CPU time, not
    the wall's.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return times


def compare(times: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and quartiles of the round-by-round ratio of two functions."""
    ratios = [x / y for x, y in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "spread": high - low, "seconds": statistics.median(times[name])}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """All rows: name, ratio (median), spread (between the quartiles), seconds, against,
    parameters.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        for size in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                functions, parameters = calls(size, dtype)
                times = measure(
                    functions, (5 if quick else 21) if size == "tiny" else (3 if quick else 9)
                )
                label = f"transformer {size} {str(dtype).removeprefix('torch.')}"
                for name, base in PAIRS:
                    rows.append(
                        {
                            "name": f"{label}: {name}",
                            "against": base,
                            **compare(times, name, base),
                            "parameters": parameters["ours"],
                            "parameters_theirs": parameters["theirs"],
                        }
                    )
    finally:
        torch.set_num_threads(threads)
    return rows


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    for row in run(parser.parse_args().quick):
        print(
            f"{row['name']:<42} {row['ratio']:.3f}x of {row['against']:<11} (quartiles "
            f"{row['spread']:.3f} apart; "
            f"{row['seconds'] * 1e3:.1f} ms; {row['parameters'] / 1e6:.1f} M against "
            f"{row['parameters_theirs'] / 1e6:.1f} M)"
        )


if __name__ == "__main__":
    main()
