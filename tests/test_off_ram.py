"""Engram off RAM: a model with mapped tables equals one in RAM, processes share pages, residency is
known.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import fill_zeros

from avdiff.clip import ClipSpec
from avdiff.core.memory_table import MappedRows, MemoryTable, memory_tables
from avdiff.models import presets
from avdiff.models.conditions import Positions
from avdiff.models.mmap_loading import load_off_ram
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack


def test_model_off_ram_is_bit_equal(tmp_path: Path) -> None:
    model = fill_zeros(AVTransformer(**presets.tiny())).eval()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    clip = ClipSpec(num_frames=5, height=64, width=64)
    track = PhonemeTrack(
        torch.tensor([[1, 2, 3]]),
        torch.zeros(1, 3, dtype=torch.long),
        torch.arange(clip.mel_frames)[None] % 3,
        torch.ones(1, dtype=torch.bool),
    )
    video, audio, level = (
        torch.randn(1, clip.video_tokens, 64),
        torch.randn(1, clip.audio_tokens, 48),
        torch.ones(1),
    )

    def out(network: AVTransformer) -> torch.Tensor:
        given = network.prepare(None, None, Positions.of(clip), track, 1)
        result = network(video, audio, level, level, conditions=given)
        return torch.cat([result.video.flatten(), result.audio.flatten()])

    with torch.no_grad():
        wanted = out(AVTransformer.from_pretrained(tmp_path / "one"))
        for folder in ("one", "many"):
            mapped = load_off_ram(AVTransformer, tmp_path / folder)
            assert not any(key.endswith("table.rows") for key in mapped.state_dict())
            torch.testing.assert_close(out(mapped), wanted, rtol=0, atol=1e-5)
            for name, table in memory_tables(mapped):
                rows = torch.arange(table.num_rows)
                assert torch.equal(table(rows), dict(memory_tables(model))[name](rows))
    (tmp_path / "one" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no readable"):
        load_off_ram(AVTransformer, tmp_path / "one")


def test_processes_share_the_pages(tmp_path: Path) -> None:
    """What each of two processes has for itself (private pages) is far less than the table that
    both read.
    """
    table = MemoryTable(400_000, 16)  # 25.6 MB
    table.save(tmp_path / "t.safetensors")
    meet = multiprocessing.get_context("fork").Barrier(2)
    with multiprocessing.get_context("fork").Pool(2, _keep, (meet,)) as pool:
        seen = pool.map(_own_pages, [tmp_path / "t.safetensors"] * 2, chunksize=1)
    for shared, private in seen:
        assert shared > 20_000 and private < 2_000  # KiB


def _keep(meet: object) -> None:
    globals()["MEET"] = meet


def _own_pages(path: Path) -> tuple[int, int]:
    """KiB of the mapping that other processes map too, and KiB that are this process's alone."""
    mapped = MappedRows(path)
    mapped.read(torch.arange(mapped.shape[0]))
    MEET.wait(60)  # type: ignore[name-defined]  # noqa: F821  (both have read)
    counts = {"Shared": 0, "Private": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(path.name)
        elif inside and line.split("_")[0] in counts:
            counts[line.split("_")[0]] += int(line.split()[1])
    MEET.wait(60)  # type: ignore[name-defined]  # noqa: F821
    return counts["Shared"], counts["Private"]


def test_many_reads_do_not_bring_the_table_in(tmp_path: Path) -> None:
    """A table of 256 MB that is all in the page cache: reading everywhere in it maps a part at a
    time.
    """
    table = MemoryTable(2**22, 16)
    table.save(tmp_path / "t.safetensors")
    del table
    mapped, draw = MappedRows(tmp_path / "t.safetensors"), torch.Generator().manual_seed(0)

    def kib(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1])

    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(10):
        mapped.read(torch.randint(0, 2**22, (400,), generator=draw))
    assert kib("VmHWM") - before < 150_000


def test_residency_is_known(tmp_path: Path) -> None:
    MemoryTable(200_000, 16).save(tmp_path / "t.safetensors")
    mapped, rows = MappedRows(tmp_path / "t.safetensors"), np.arange(0, 200_000, 997)
    file = os.open(tmp_path / "t.safetensors", os.O_RDONLY)
    os.fsync(file)
    os.close(file)
    mapped.release()
    if mapped.resident(rows):
        pytest.skip("this file system keeps its files in memory")
    mapped.read(torch.from_numpy(rows))
    assert mapped.resident(rows)
