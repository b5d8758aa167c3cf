"""`avdiff data ...`: draw the presenter corpus, check and show clips, turn them into latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import avdiff
from avdiff.cli.terminal import progress

if TYPE_CHECKING:
    from rich.table import Table

    from avdiff.data.check import ClipReport

WIDE_TERMINAL = 110  # characters that all columns of the check need
SHORTEST_NAME = 26  # characters of a clip's name before it is broken

app = typer.Typer(
    help="Look at training data and prepare it.", no_args_is_help=True, rich_markup_mode=None
)

Bank = Annotated[
    str | None, typer.Option(help="Speech bank folder; default $AVDIFF_BANK, else the mini-bank.")
]
Split = Annotated[str, typer.Option(help="train, val, test or test_voices.")]
Languages = Annotated[
    str | None, typer.Option(help="Codes joined by commas; default all of the bank.")
]
AudioTrack = Annotated[
    int | None,
    typer.Option(min=1, help="Sound track of the files, from 1; default the one players play."),
]
AudioChannel = Annotated[
    int | None, typer.Option(min=1, help="One channel of the sound, from 1; default all, mixed.")
]


@app.command()
def corpus(
    folder: Annotated[Path, typer.Argument(help="Where the clips are written.")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Number of clips.")] = 8,
    bank: Bank = None,
    split: Split = "train",
    languages: Languages = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another corpus.")] = 0,
    size: Annotated[int, typer.Option(min=64, max=1024, help="Pixels on a side.")] = 128,
) -> None:
    """Write clips of the presenter corpus: mp4 files and metadata.jsonl; a second call goes on
    where one stopped.
    """
    from avdiff.corpus.dataset import PresenterCorpus
    from avdiff.corpus.writer import write_corpus

    presenters = PresenterCorpus(bank, split, _codes(languages), length=count, seed=seed, size=size)
    written = 0
    for index in progress("writing")(range(count)):
        written = write_corpus(presenters, folder, [index])
    print(
        f"{folder}: {written} clips and metadata.jsonl; to look at them: avdiff data show {folder}"
    )


@app.command()
def show(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of clips; default presenters.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("clips.html"),
    count: Annotated[int, typer.Option(min=1, max=1000, help="At most so many clips.")] = 8,
    bank: Bank = None,
    split: Split = "train",
    languages: Languages = None,
) -> None:
    """One HTML page of clips as training sees them: pictures, spectrogram, mouth and phonemes,
    captions.
    """
    from avdiff.data.gallery import folder_items, write_gallery

    if folder is None:
        from avdiff.corpus.dataset import PresenterCorpus

        clips = PresenterCorpus(bank, split, _codes(languages), length=count)
        items: Iterable[Any] = (clips[i] for i in range(count))
    else:
        items = folder_items(folder, count)
    refused: dict[str, str] = {}

    def named(clips: Iterable[Any]) -> Iterator[Any]:
        """The clips; what cannot be shown is also said on the terminal."""
        for clip in clips:
            if clip.get("refused"):
                refused[clip["name"]] = clip["refused"]
            yield clip

    drawn = named(progress("drawing", count)(items))
    shown = write_gallery(drawn, output, str(folder or "Presenters"))
    for name, reason in refused.items():
        print(f"{name}: refused: {reason}")
    print(f"{output}: {shown} clips, {len(refused)} of them refused")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of clips with captions.")],
    allow_silent: Annotated[
        bool, typer.Option("--allow-silent", help="Silent clips are told of, not refused.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write all that was measured to this JSON file.")
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            help="Model folder whose vae/ each clip goes through and back; 'none' leaves that out."
        ),
    ] = avdiff.PRESENTER,
    audio_track: AudioTrack = None,
    audio_channel: AudioChannel = None,
) -> None:
    """Decode every clip of a folder and name what is wrong. Exit code 1: some refused; 2: none is
    good.
    """
    from rich.console import Console

    from avdiff.data.check import check_folder, save_report

    vae = None
    if codec != "none":
        if not (Path(codec) / "vae" / "config.json").is_file():
            raise ValueError(f"codec={codec}: needs a folder with vae/ in it, or none")
        from avdiff.models.codecs.video_vae import AVVideoVAE

        vae = AVVideoVAE.from_pretrained(Path(codec) / "vae").eval()
    found = check_folder(
        folder,
        allow_silent,
        vae,
        progress=progress("checking"),
        audio_track=audio_track,
        audio_channel=audio_channel,
    )
    console = Console()
    console.print(_check_table(found.clips, console.width))
    for clip in found.clips:
        for kind, texts in (("refused", clip.problems), ("warning", clip.warnings)):
            if texts:
                print(f"{clip.name}: {kind}: {'; '.join(texts)}")
    _print_left_out(found.left_out)
    print(f"{len(found.good)} good, {len(found.refused)} refused")
    if report is not None:
        save_report(found, report)
    raise typer.Exit(found.exit_code)


def _print_left_out(left_out: dict[str, str]) -> None:
    """Files that are no clips, each with its reason."""
    for name, why in sorted(left_out.items()):
        print(f"{name}: left out: {why}")


def _check_table(clips: list[ClipReport], width: int) -> Table:
    """One row a clip: what it is, how picture and sound lie to each other, how it sounds, what the
    codec keeps. A narrow terminal gets fewer columns, so that names stay whole.
    """
    from rich.table import Table
    from rich.text import Text

    columns = {
        "seconds": "video_seconds",
        "silent": "silence",
        "LUFS": "loudness",
        "codec dB": "round_trip_psnr",
    }
    if width >= WIDE_TERMINAL:
        columns |= {
            "fps": "fps",
            "sound s": "audio_seconds",
            "start gap s": "start_gap",
            "offset s": "offset",
        }
    table = Table()
    table.add_column("clip", overflow="fold", min_width=SHORTEST_NAME)
    for title in (*columns, "verdict"):
        table.add_column(title, no_wrap=True)
    for clip in clips:
        values = (getattr(clip, name) for name in columns.values())
        cells = ("" if v is None else f"{v:.2f}" for v in values)
        table.add_row(Text(clip.name), *cells, "good" if clip.good else "refused")
    return table


@app.command()
def cache(
    folder: Annotated[
        Path,
        typer.Argument(help="Where the latents are kept; a second call goes on where one stopped."),
    ],
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of presenters, or of clips for --decode.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of real clips; default the presenter corpus.")
    ] = None,
    codecs: Annotated[
        str | None, typer.Option(help="Folder with vae/ and audio_vae/; default the embedded ones.")
    ] = None,
    decode: Annotated[
        Path | None, typer.Option(help="Write what the cache holds to files in this folder.")
    ] = None,
    bank: Bank = None,
    split: Split = "train",
    languages: Languages = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another corpus.")] = 0,
    seconds: Annotated[float, typer.Option(help="Length of each presenter clip.")] = 2.52,
    stills: Annotated[
        bool,
        typer.Option(
            "--stills", help="One picture of each presenter clip, without sound: many faces soon."
        ),
    ] = False,
    events: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Presenters: share of clips with sounding objects instead."
        ),
    ] = 0.2,
    full_captions: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Presenters: share of captions that tell most of what is seen."
        ),
    ] = 0.0,
    attribute_lists: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Presenters: share of captions with a list of all that is seen."
        ),
    ] = 0.0,
    names: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Presenters: share of clips with a named member of the cast."
        ),
    ] = 0.0,
    buckets: Annotated[str, typer.Option(help="Real clips: WxHxF joined by ';'.")] = "128x128x51",
    allow_silent: Annotated[
        bool, typer.Option("--allow-silent", help="Keep clips without sound.")
    ] = False,
    no_words: Annotated[
        bool,
        typer.Option(
            "--no-words", help="Real clips: do not look for the quoted words in the sound."
        ),
    ] = False,
    audio_track: AudioTrack = None,
    audio_channel: AudioChannel = None,
    text: Annotated[
        bool, typer.Option("--text", help="Captions too, for training that freezes the encoder.")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="Number of this process, from 0.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
) -> None:
    """Encode presenters or real clips once, so that training reads latents instead of pictures and
    sound.
    """
    import avdiff

    _check_rank(rank, ranks)
    model = codecs or avdiff.PRESENTER
    if decode is not None:
        from avdiff.data.cache_clips import decode_cache

        for path in decode_cache(folder, model, decode, count or 8):
            print(path)
        return
    from avdiff.data.cache import cache_presenters, load_codecs

    if data is not None:
        from avdiff.data.cache_clips import cache_clips
        from avdiff.data.clips import ClipOptions
        from avdiff.families.ltx2.cache import load_makers

        makers = load_makers(model, text)  # None where the folder is no LTX-2
        settings: dict[str, Any] = {"words": not no_words}
        if makers is not None:
            settings = makers.clip_settings()
        options = ClipOptions(
            buckets=buckets,
            allow_silent=allow_silent,
            audio_track=audio_track,
            audio_channel=audio_channel,
            **settings,
        )
        loaded: Any = load_codecs(model, text) if makers is None else makers
        cached = cache_clips(folder, data, loaded, options, rank, ranks, progress("encoding"))
        for name, reason in cached.refused.items():
            print(f"{name}: refused: {reason}")
        _print_left_out(cached.left_out)
        print(f"{folder}: {len(cached.names)} clips, {len(cached.refused)} files refused")
        return
    if count is None:
        raise ValueError("needs --count N presenters, or --data FOLDER of real clips")
    made = cache_presenters(
        folder,
        load_codecs(model, text),
        count,
        bank,
        split,
        seed,
        seconds,
        _codes(languages),
        events,
        stills,
        full_captions,
        rank,
        ranks,
        progress("encoding"),
        attribute_lists,
        names,
    )
    print(f"{made}: {count} clips")


@app.command()
def bank(
    folder: Annotated[
        Path,
        typer.Argument(help="Where the bank is kept; a second call goes on where one stopped."),
    ],
    voices: Annotated[
        Path, typer.Option(help="What `npm pack kokoro-js` wrote, or that package unpacked.")
    ],
    count: Annotated[int, typer.Option(min=1, help="Utterances for each language.")] = 1000,
    languages: Languages = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Another seed gives other sentences and voices.")
    ] = 0,
    rank: Annotated[int, typer.Option(min=0, help="Number of this process, from 0.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
) -> None:
    """Build a speech bank with phone times: a neural voice speaks sentences (pip install
    'avdiff[bank]').
    """
    from avdiff.corpus.speech.build import SURE, build_bank, certify
    from avdiff.corpus.speech.synthesis import Synthesizer, Voices

    _check_rank(rank, ranks)
    codes = _codes(languages)
    held = build_bank(
        folder, Synthesizer(Voices(voices)), count, codes, seed, rank, ranks, progress("speaking")
    )
    print(f"{folder}: {held} utterances")
    if not any(folder.glob("*.tar")):
        return
    for language, shift in certify(folder).items():
        doubt = "" if abs(shift) <= SURE else ": more than 10 ms, so do not rely on these times"
        print(f"{language}: phone times {1000 * shift:+.1f} ms against the sound{doubt}")


@app.command()
def report(
    count: Annotated[int, typer.Option(min=1, help="Clips to draw and measure.")] = 300,
    bank: Bank = None,
    split: Split = "train",
    languages: Languages = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another corpus.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file.")
    ] = None,
) -> None:
    """Measure the presenter corpus: mouths in the pixels, onsets, phone times against the sound,
    speed.
    """
    from avdiff.corpus.speech.read import SpeechCorpus
    from avdiff.evaluation.corpus_report import measure_corpus, print_report, save_report

    measured = measure_corpus(
        SpeechCorpus(bank, decoded=True), count, split, seed, _codes(languages)
    )
    print_report(measured)
    if json_file is not None:
        save_report(measured, json_file)


def _check_rank(rank: int, ranks: int) -> None:
    if rank >= ranks:
        raise ValueError(f"rank={rank}: needs 0 to {ranks - 1} with ranks={ranks}")


def _codes(languages: str | None) -> list[str] | None:
    return None if languages is None else [code.strip() for code in languages.split(",")]
