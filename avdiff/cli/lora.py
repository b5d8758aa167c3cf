"""`avdiff lora convert | info | merge | scale`: LoRA files of an LTX-2, in every spelling that is
about.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="LoRA files of an LTX-2: convert, describe, merge and scale.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Lora = Annotated[Path, typer.Argument(help="A .safetensors file, or a folder with one in it.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where the result goes.")]


@app.command()
def convert(
    lora: Lora,
    output: Output,
    to: Annotated[
        str, typer.Option(help="diffusers, or native: ComfyUI, ltx-pipelines, ltx-trainer.")
    ] = "native",
) -> None:
    """Write a LoRA in another spelling."""
    from avdiff.families.ltx2.lora import read_lora, write_lora

    source = read_lora(lora)
    write_lora(source, _file(output), to)  # type: ignore[arg-type]
    print(f"{output}: {len(source.layers)} layers, {source.source} -> {to}")


@app.command()
def info(
    lora: Lora, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Spelling, ranks, and what each branch learned."""
    from avdiff.families.ltx2.lora import read_lora, still_modalities, summarize

    source = read_lora(lora)
    branches = {branch: asdict(entry) for branch, entry in summarize(source).items()}
    alphas = sorted({layer.alpha for layer in source.layers.values()})
    facts = {
        "format": source.source,
        "layers": len(source.layers),
        "ranks": sorted(source.ranks()),
        "alphas": alphas,
        "branches": branches,
        "metadata": dict(source.told),
        "unmoved": still_modalities(source),
    }
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    ranks = ", ".join(str(rank) for rank in sorted(source.ranks()))
    shown = ", ".join(f"{alpha:g}" for alpha in alphas)
    print(f"{lora}: {source.source}, {len(source.layers)} layers, rank {ranks}, alpha {shown}")
    for branch, entry in branches.items():
        millions = entry["parameters"] / 1e6
        print(
            f"  {branch:6} {entry['layers']:5} layers {millions:9.3f} M  norm {entry['norm']:.4g}"
        )
    for modality in facts["unmoved"]:
        print(f"  nothing was learned for {modality}: all of its updates are 0")


@app.command()
def merge(
    lora: Lora,
    model: Annotated[Path, typer.Option(help="Folder of the LTX-2 that it belongs to.")],
    output: Output,
    strength: Annotated[float, typer.Option(help="Multiplies the update.")] = 1.0,
) -> None:
    """Add a LoRA to the weights of a folder and save it as an LTX-2 folder."""
    from avdiff.families import load
    from avdiff.families.ltx2.lora import merge_lora, read_lora

    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise ValueError(f"output={output}: exists already; needs a new folder")
    source = read_lora(lora)
    pipe = load(model, torch_dtype="auto")
    count = merge_lora(pipe.transformer, source, strength)
    pipe.save_pretrained(output)
    print(f"{output}: {model} with {count} layers changed")


@app.command()
def scale(
    lora: Lora,
    output: Output,
    strength: Annotated[
        list[str], typer.Option(help="0.8, or BRANCH=0.8: video, audio, text, cross. Repeatable.")
    ],
    to: Annotated[str, typer.Option(help="diffusers or native.")] = "diffusers",
) -> None:
    """Multiply a LoRA's updates, all of them or those of a branch."""
    from avdiff.families.ltx2.lora import read_lora, write_lora

    strengths: dict[str, float] = {}
    for word in strength:
        branch, _, value = word.rpartition("=")
        try:
            strengths[branch or "all"] = float(value)
        except ValueError as error:
            raise ValueError(f"strength={word}: needs a number, or BRANCH=NUMBER") from error
    source = read_lora(lora).scaled(strengths)
    write_lora(source, _file(output), to)  # type: ignore[arg-type]
    print(f"{output}: {len(source.layers)} layers scaled by {' '.join(strength)}")


def _file(output: Path) -> Path:
    if output.suffix != ".safetensors" or not output.absolute().parent.is_dir():
        raise ValueError(f"output={output}: needs a name.safetensors in a folder that exists")
    return output
