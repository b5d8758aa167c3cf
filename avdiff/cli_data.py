"""`avdiff data ...`: look at the presenter corpus and turn it into latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Look at training data and prepare it.", no_args_is_help=True, rich_markup_mode=None)

Bank = Annotated[str | None, typer.Option(help="Speech bank folder; default $AVDIFF_BANK, else the mini-bank.")]
Split = Annotated[str, typer.Option(help="train, val, test or test_voices.")]
Languages = Annotated[str | None, typer.Option(help="Codes joined by commas; default all of the bank.")]


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Where the clips are written.")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Number of clips.")] = 8,
    bank: Bank = None,
    split: Split = "train",
    languages: Languages = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another corpus.")] = 0,
    size: Annotated[int, typer.Option(min=64, max=1024, help="Pixels on a side.")] = 128,
) -> None:
    """Write clips of the presenter corpus: mp4 files, a contact sheet each, and metadata.jsonl."""
    from avdiff.data.corpus.dataset import PresenterCorpus
    from avdiff.data.media import contact_sheet, write_clip

    corpus = PresenterCorpus(bank, split, _codes(languages), length=count, seed=seed, size=size)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        clip = corpus[index]
        name = f"{index:04}.mp4"
        frames = clip["video"].numpy()
        write_clip(folder / name, frames, clip["fps"], clip["audio"], clip["sample_rate"])
        contact_sheet(frames, fps=clip["fps"]).save(folder / f"{index:04}.png")
        said = {key: clip[key] for key in ("kind", "language", "text", "split")}
        lines.append({"file_name": name, "caption": clip["caption"], **said})
        print(f"{folder / name}: {clip['caption']}")
    _write_lines(folder / "metadata.jsonl", lines)


@app.command()
def cache(
    folder: Annotated[
        Path, typer.Argument(help="Where the latents are kept; a second call goes on where one stopped.")
    ],
    count: Annotated[int, typer.Option(min=1, help="Number of clips.")],
    codecs: Annotated[
        str | None, typer.Option(help="Folder with vae/ and audio_vae/; default the embedded ones.")
    ] = None,
    bank: Bank = None,
    split: Split = "train",
    languages: Languages = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another corpus.")] = 0,
    seconds: Annotated[float, typer.Option(help="Length of each clip.")] = 2.52,
) -> None:
    """Encode clips of the presenter corpus once, so that training reads latents instead of pictures and sound."""
    from rich.console import Console
    from rich.progress import track

    import avdiff
    from avdiff.data.cache import cache_presenters

    made = cache_presenters(
        folder,
        codecs or avdiff.PRESENTER,
        count,
        bank,
        split,
        seed,
        seconds,
        _codes(languages),
        progress=lambda shards: track(shards, "encoding", console=Console(stderr=True)),
    )
    print(f"{made}: {count} clips")


def _codes(languages: str | None) -> list[str] | None:
    return None if languages is None else [code.strip() for code in languages.split(",")]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)
