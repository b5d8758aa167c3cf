"""Engram: hash, tables and gate against slow twins, and training by gathered rows against a dense
table.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import distributed

from avdiff.core.engram import Engram, MemoryRead, NgramHash, compress_vocabulary
from avdiff.core.memory_table import MappedRows, MemoryTable, memory_tables
from avdiff.train.loop.sparse_optim import (
    RowAdagrad,
    RowAdam,
    RowOptimizer,
    clip_with_rows,
    gather_rows,
)

SMALL = NgramHash(vocab_size=50, table_size=101, max_order=4, heads=3, layer=1, layers=(0, 1))


def slow_rows(
    hashing: NgramHash, ids: list[int], segments: list[int] | None = None
) -> list[list[int]]:
    """Python integers and loops: one n-gram at a time, look-back by look-back."""
    out = []
    for t in range(len(ids)):
        window, open_ = [ids[t]], ids[t] != hashing.pad_id
        for back in range(1, hashing.max_order):
            u = t - back
            open_ = open_ and u >= 0 and ids[u] != hashing.pad_id
            open_ = open_ and (segments is None or segments[u] == segments[u + 1])
            window.append(ids[u] if open_ else hashing.pad_id)
        rows, offset = [], 0
        for n in range(2, hashing.max_order + 1):
            mix = 0
            for i in range(n):
                mix ^= window[i] * int(hashing.multipliers[i])
            assert 0 <= mix < 2**63
            for prime in hashing.primes[n - 2].tolist():
                rows.append(mix % prime + offset)
                offset += prime
        out.append(rows)
    return out


def test_published_table_sizes() -> None:
    layers = [
        NgramHash(100_000, 16_000_000, 4, 8, layer=layer, layers=(1, 14)) for layer in (1, 14)
    ]
    assert [h.num_rows for h in layers] == [384_006_168, 384_016_682]
    primes = np.concatenate([h.primes.reshape(-1) for h in layers])
    assert primes.min() == 16_000_057 and len(set(primes.tolist())) == 48


@pytest.mark.parametrize("vocab_size", [50, 2**31 - 1])
def test_hash_equals_loops_in_numpy_and_torch(vocab_size: int) -> None:
    hashing = NgramHash(vocab_size, 101, 4, 3, layer=1, seed=3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, vocab_size, 40)
        ids[rng.random(40) < 0.2] = 0
        ids[:3] = vocab_size - 1  # the largest product there can be
        segments = rng.integers(0, 4, 8).repeat(5)
        for seg in (None, segments):
            expected = slow_rows(hashing, ids.tolist(), None if seg is None else seg.tolist())
            torch_rows = hashing(torch.tensor(ids), None if seg is None else torch.tensor(seg))
            assert hashing(ids, seg).tolist() == expected == torch_rows.tolist()
            assert torch_rows.dtype == torch.int64
    assert (hashing.multipliers % 2 == 1).all() and int(hashing.multipliers.max()) * (
        vocab_size - 1
    ) < 2**63


def test_boundaries_order_and_batch() -> None:
    ids = torch.tensor([[5, 6, 7, 0, 8, 9], [8, 9, 5, 6, 7, 0]])
    rows = SMALL(ids)
    assert torch.equal(
        rows[0, :3], SMALL(ids[:, 2:5])[1]
    )  # what was before a start does not matter, nor padding after
    assert torch.equal(rows[0, 4:], rows[1, :2])  # a pad forgets
    joined = SMALL(torch.tensor([[8, 9, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]]))
    assert torch.equal(joined[0, 2:], rows[0, :3]) and not torch.equal(rows[1, 2:5], rows[0, :3])
    assert not torch.equal(SMALL(torch.tensor([[5, 6]]))[0, 1], SMALL(torch.tensor([[6, 5]]))[0, 1])
    # Within the limits of each table, all heads and orders together.
    flat, ends = rows.reshape(-1, 9), torch.from_numpy(SMALL.offsets + SMALL.primes).reshape(-1)
    assert (flat < ends).all() and (flat >= torch.from_numpy(SMALL.offsets).reshape(-1)).all()


def test_other_layers_and_vocabularies_are_other_hashes() -> None:
    ids = torch.randint(1, 50, (1, 64), generator=torch.Generator().manual_seed(0))
    for change in ({"layer": 0}, {"vocab_size": 51}, {"seed": 1}):
        other = NgramHash(
            **(
                {
                    "vocab_size": 50,
                    "table_size": 101,
                    "max_order": 4,
                    "heads": 3,
                    "layer": 1,
                    "layers": (0, 1),
                }
                | change
            )
        )
        assert not torch.equal(SMALL(ids), other(ids))


def test_compressed_vocabulary() -> None:
    words = [
        "<pad>",
        "Café",
        "cafe",
        " cafe",
        "CAFÉ",
        " ",
        "\t \n",
        "",
        "\ufffd",
        "\ufffd",
        "ﬁ",
        "fi",
    ]

    class Tokens:
        def __len__(self) -> int:
            return len(words)

        def decode(self, ids: list[int], **options: object) -> str:
            return words[ids[0]]

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"<0x{token}>"

    table, size = compress_vocabulary(Tokens())
    assert table.tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 6] and size == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mapped_equals_ram_warm_and_cold(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = MemoryTable(3001, 12, dtype)
    table.save(tmp_path / "t.safetensors")
    mapped = MemoryTable.from_file(tmp_path / "t.safetensors")
    assert "rows" not in mapped.state_dict() and mapped.mapped is not None
    rows = torch.randint(0, 3001, (2, 100, 3))
    rows[0, 0, 0], rows[0, 0, 1] = 0, 3000
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for read in (
        mapped(rows),
        torch.from_numpy(mapped.mapped._read_cold(rows.numpy())).view(dtype),
        copy.deepcopy(mapped)(rows),
    ):
        assert read.dtype == dtype and torch.equal(read.view(bits), table(rows).view(bits))
    assert mapped(rows[:0]).shape == (0, 100, 3, 12)
    mapped.mapped.release()
    mapped.mapped.prefetch()
    assert torch.equal(mapped(rows), table(rows))


def test_two_processes_share_a_mapping(tmp_path: Path) -> None:
    table = MemoryTable(1000, 8)
    table.save(tmp_path / "t.safetensors")
    mapped = MappedRows(tmp_path / "t.safetensors")
    rows = torch.arange(0, 1000, 7)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sums = pool.map(_sum_rows, [(mapped, rows)] * 2)
    assert sums == [float(table(rows).double().sum())] * 2


def _sum_rows(job: tuple[MappedRows, torch.Tensor]) -> float:
    return float(job[0].read(job[1]).double().sum())


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    MemoryTable(100, 8).save(good)
    data = good.read_bytes()
    bad = {
        "empty": b"",
        "text": b"hello world, this is no table",
        "cut": data[:-9],
        "length": b"\xff" * 8 + data[8:],
        "shape": data.replace(b"[100,8]", b"[900,8]"),
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            MappedRows(tmp_path / name)
    with pytest.raises(ValueError, match=r"'other'.*holds \['rows'\]"):
        MappedRows(good, "other")
    with pytest.raises(ValueError, match=r"needs \(90, 8\)"):
        MemoryTable(90, 8, mapped=MappedRows(good))


def engram(**options: object) -> Engram:
    torch.manual_seed(1)
    return Engram(16, SMALL, 4, **options)  # type: ignore[arg-type]


def test_fresh_memory_is_the_identity_and_gate_follows_the_formula() -> None:
    memory, h = engram(), torch.randn(2, 7, 16)
    ids = torch.randint(0, 50, (2, 7))
    ids[0, 3] = 0
    assert not memory(h, memory.lookup(ids)).any()
    torch.nn.init.normal_(memory.to_v.weight)
    torch.nn.init.normal_(memory.norm_q.weight)
    read = memory.lookup(ids)
    update = memory(h, read)
    assert memory.table.rows is not None
    for b, t in ((0, 0), (1, 6), (0, 4), (0, 3)):
        e = torch.cat(
            [memory.table.rows[row] for row in slow_rows(SMALL, ids[b].tolist())[t]]
        ).double()
        key, value = (
            memory.to_k.weight.detach().double() @ e,
            memory.to_v.weight.detach().double() @ e,
        )
        query, key = (x / (x.pow(2).mean() + 1e-6).sqrt() for x in (h[b, t].double(), key))
        s = float((query * memory.norm_q.weight.detach() * key).sum()) / 4
        alpha = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(s), 1e-6)), s)))
        assert torch.allclose(update[b, t].double(), alpha * value * (ids[b, t] != 0), atol=1e-5)
    index = torch.tensor([[0, 0, 6, 2], [1, 2, 2, 3]])
    ticks = torch.randn(2, 4, 16)
    expected = torch.stack(
        [
            memory(
                ticks[b : b + 1],
                MemoryRead(read.keys[b : b + 1, index[b]], read.values[b : b + 1, index[b]]),
            )[0]
            for b in range(2)
        ]
    )
    assert torch.equal(memory(ticks, read, index), expected)
    assert torch.equal(memory(ticks, read.at(index)), expected)
    assert not memory(h, read.silenced()).any()


def test_batch_of_two_equals_two_singles_and_constant_gate() -> None:
    memory, h, ids = engram(), torch.randn(2, 9, 16), torch.randint(1, 50, (2, 9))
    torch.nn.init.normal_(memory.to_v.weight)
    both = memory(h, memory.lookup(ids))
    singles = [memory.lookup(ids[i : i + 1]) for i in range(2)]
    assert torch.allclose(
        both, torch.cat([memory(h[i : i + 1], singles[i]) for i in range(2)]), atol=1e-6
    )
    assert torch.allclose(both, memory(h, MemoryRead.cat(singles)), atol=1e-6)
    memory.constant_gate = 0.25
    assert torch.equal(memory(h, memory.lookup(ids)), 0.25 * memory.lookup(ids).values)


def test_table_of_another_hash_is_refused_at_load() -> None:
    other = Engram(16, NgramHash(51, 101, 4, 3, layer=1, layers=(0, 1)), 4)
    with pytest.raises(ValueError, match=r"vocab_size=51.*vocab_size=50"):
        other.load_state_dict(engram().state_dict())
    with pytest.raises(ValueError, match=r"needs 0\.\.50"):
        Engram(16, NgramHash(51, 101), 4).lookup(torch.tensor([[3, 51]]))
    engram().load_state_dict(engram().state_dict())


def test_mapped_memory_equals_memory_in_ram(tmp_path: Path) -> None:
    memory = engram()
    torch.nn.init.normal_(memory.to_v.weight)
    memory.table.save(tmp_path / "t.safetensors")
    mapped = engram(table_file=tmp_path / "t.safetensors")
    mapped.load_state_dict({k: v for k, v in memory.state_dict().items() if k != "table.rows"})
    h, ids = torch.randn(1, 9, 16), torch.randint(0, 50, (1, 9))
    assert torch.equal(mapped(h, mapped.lookup(ids)), memory(h, memory.lookup(ids)))


class Remembers(ModelMixin, ConfigMixin):
    """The smallest saved model with a memory."""

    @register_to_config
    def __init__(self, vocab_size: int = 50) -> None:
        super().__init__()
        self.memory = Engram(16, NgramHash(vocab_size, 101), 4)


def test_memory_is_saved_with_its_model(tmp_path: Path) -> None:
    model = Remembers()
    model.save_pretrained(tmp_path)
    loaded = Remembers.from_pretrained(tmp_path)
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    half = Remembers.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).memory
    assert (
        half.lookup(torch.tensor([[1, 2]])).values.dtype == torch.bfloat16 == half.table.rows.dtype
    )
    # One table inside the checkpoint can be mapped where it lies.
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert torch.equal(
        MappedRows(file, "memory.table.rows").read(torch.tensor([7])), model.memory.table.rows[7:8]
    )
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 50', '"vocab_size": 49'))
    with pytest.raises(ValueError, match="vocab_size=49"):
        Remembers.from_pretrained(tmp_path).memory.lookup(torch.tensor([[1, 2]]))


class DenseTwin(torch.nn.Module):
    """The same memory with its table as an ordinary parameter."""

    def __init__(self, memory: Engram) -> None:
        super().__init__()
        self.memory = copy.deepcopy(memory)
        assert memory.table.rows is not None
        self.weight = torch.nn.Parameter(memory.table.rows.clone())

    def loss(self, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        m = self.memory
        e = torch.nn.functional.embedding(m.hashing(ids), self.weight).flatten(-2)
        read = MemoryRead(m.norm_k(m.to_k(e)), m.to_v(e) * (ids != 0)[..., None])
        return (h + m(h, read) - 1).square().mean()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [
        (torch.randn(2, 6, 16, generator=g), torch.randint(0, 12, (2, 6), generator=g))
        for _ in range(count)
    ]


def test_row_adagrad_equals_dense_and_touches_nothing_else() -> None:
    memory = engram().train()
    torch.nn.init.normal_(memory.to_v.weight, std=0.3)
    twin, start = DenseTwin(memory), copy.deepcopy(memory.table.rows)
    rows = RowAdagrad([t for _, t in memory_tables(memory)], lr=0.1)
    total = torch.zeros(len(twin.weight))
    steps = batches(8)
    for i in range(0, 8, 2):  # two micro-batches a step
        for h, ids in steps[i : i + 2]:
            (h + memory(h, memory.lookup(ids)) - 1).square().mean().backward()
            twin.loss(h, ids).backward()
        norm = clip_with_rows(memory.parameters(), rows, 0.05)
        dense = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        assert torch.allclose(norm, dense, rtol=1e-5) and dense > 0.05
        assert twin.weight.grad is not None
        assert torch.allclose(memory.to_k.weight.grad, twin.memory.to_k.weight.grad, atol=1e-7)  # type: ignore[arg-type]
        rows.step()
        with torch.no_grad():
            total += twin.weight.grad.square().mean(1)
            twin.weight -= 0.1 * twin.weight.grad / (total.sqrt() + 1e-8)[:, None]
        rows.zero_grad()
        memory.zero_grad()
        twin.zero_grad()
    assert torch.allclose(memory.table.rows, twin.weight, atol=1e-6)  # type: ignore[arg-type]
    touched = (memory.table.rows != start).any(1)  # type: ignore[union-attr]
    assert 20 < touched.sum() < len(touched) / 2 and not touched[total == 0].any()
    assert memory.table.rows.grad is None and not memory.table.rows.requires_grad  # type: ignore[union-attr]


def test_row_adam_equals_dense_adam_where_all_rows_are_touched() -> None:
    table = MemoryTable(5, 1).train()  # one channel: the row's second moment is the value's own
    weight = torch.nn.Parameter(table.rows.clone())  # type: ignore[union-attr]
    rows, dense = RowAdam([table], 1e-2), torch.optim.Adam([weight], 1e-2, (0.9, 0.99))
    for i in range(10):
        target = torch.randn(5, 1, generator=torch.Generator().manual_seed(i))
        (table(torch.arange(5)) - target).square().sum().backward()
        (weight - target).square().sum().backward()
        for optimizer in (rows, dense):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(table.rows, weight, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
def test_resume_is_exact_and_bf16_keeps_small_updates(kind: type[RowOptimizer]) -> None:
    def train(table: MemoryTable, optimizer: RowOptimizer, steps: range) -> None:
        for i in steps:
            (table(torch.arange(i % 3, 40)) * 1.5).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    table = MemoryTable(40, 32, torch.bfloat16).train()
    table.rows.fill_(1.0)  # type: ignore[union-attr]
    optimizer = kind([table], lr=1e-3)  # type: ignore[call-arg]
    train(table, optimizer, range(6))
    resumed = copy.deepcopy(table)
    again = kind([resumed], lr=1e-3)  # type: ignore[call-arg]
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(table, optimizer, range(6, 12))
    train(resumed, again, range(6, 12))
    assert torch.equal(table.rows, resumed.rows)  # type: ignore[arg-type]
    # Each update is below half a bf16 step at 1.0 and would be rounded away; on average it must
    # arrive.
    exact = MemoryTable(40, 32).train()
    exact.rows.fill_(1.0)  # type: ignore[union-attr]
    train(exact, kind([exact], lr=1e-3), range(12))  # type: ignore[call-arg]
    moved, expected = (1 - t.rows[2:].float().mean() for t in (table, exact))  # type: ignore[index]
    assert expected > 2e-3 and abs(moved / expected - 1) < 0.1


def test_only_a_training_step_collects() -> None:
    memory, (h, ids) = engram().train(), batches(1)[0]
    memory(h, memory.lookup(ids)).sum().backward()
    assert not memory.table.pending  # nobody trains this table
    rows = RowAdagrad([memory.table])
    with torch.no_grad():
        memory.lookup(ids)
    memory.eval().lookup(ids)
    assert not memory.table.pending
    memory.train().lookup(ids)  # a forward without a backward, as in gradient checkpointing
    before = memory.table.rows.clone()  # type: ignore[union-attr]
    rows.step()
    assert torch.equal(memory.table.rows, before) and rows.grad_norm() == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        RowAdagrad([MemoryTable(4, 4, torch.float16)])


def test_ranks_agree_on_row_gradients(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(
            _gather, [(rank, str(tmp_path / "meet")) for rank in range(2)], chunksize=1
        )
    assert results[0] == results[1] == ([1, 3, 7], [[0.5, 0.5], [1.5, 1.5], [1.0, 1.0]])


def _gather(job: tuple[int, str]) -> tuple[list[int], list[list[float]]]:
    rank, meet = job
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    mine = [
        (torch.tensor([1, 3]), torch.ones(2, 2)),
        (torch.tensor([3, 7]), torch.full((2, 2), 2.0)),
    ][rank]
    merged = gather_rows(mine, 2, None)
    empty = gather_rows(None, 2, None)
    distributed.destroy_process_group()
    assert merged is not None and empty is None
    return merged[0].tolist(), merged[1].tolist()
