"""Synchformer with random weights: names, attention by the formulas, segments, planted offsets, DeSync, and files."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache, partial
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_clips import RATE
from safetensors.torch import save_file
from torch.nn import functional as F

from avdiff import cli
from avdiff.data.media import Clip, write_clip
from avdiff.evaluation import lip_backends, synchformer
from avdiff.evaluation.face_tracks import WholeSource
from avdiff.evaluation.lip_backends import SynchformerBackend, find_backend
from avdiff.evaluation.lipsync import LipSync
from avdiff.evaluation.synchformer_network import DividedAttention, Size, Synchformer
from avdiff.evaluation.syncnet import file_hash

TINY = Size(side=32, width=16, heads=2, depth=2, sync_heads=4, sync_depth=1)


@cache
def network(size: Size = TINY) -> Synchformer:
    """Every weight random, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(5)
    made = Synchformer(size)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made.eval().requires_grad_(False)


def planted(*likely: int) -> Synchformer:
    """A network whose classes have these logits whatever comes in: 5 for the first named, 4 for the second..."""
    made = Synchformer(TINY).eval().requires_grad_(False)
    made.transformer.off_head.weight.zero_()
    made.transformer.off_head.bias.zero_()
    for rank, place in enumerate(likely):
        made.transformer.off_head.bias[place] = 5 - rank
    return made


def film(seconds: float, fps: int = 25, size: tuple[int, int] = (36, 48)) -> np.ndarray:
    """Pictures that all differ: (F, H, W, 3)."""
    return np.random.default_rng(2).integers(0, 256, (round(seconds * fps), *size, 3), np.uint8)


def noise(seconds: float, rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.random.default_rng(3).normal(size=round(seconds * rate))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- names
def expected(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes as upstream's modules make them, written down from its source.

    v-iashin/Synchformer: model/sync_model.py; feat_extractors/visual/motionformer.py with motionformer_src;
    feat_extractors/audio/ast.py with hf_src/modeling_ast.py; modules/transformer.py; configs/sync.yaml; and
    facebookresearch/Motionformer: configs/SSV2/divided_224_16x4.yaml.
    """
    d, places = size.width, (size.side // 16) ** 2
    names: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int = d) -> None:
        names[f"{name}.weight"], names[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(*places: str) -> None:
        for name in places:
            names[f"{name}.weight"] = names[f"{name}.bias"] = (d,)

    def encoder_layer(name: str) -> None:  # torch.nn.TransformerEncoderLayer with a class token
        names[f"{name}.cls_token"] = (1, 1, d)
        names[f"{name}.self_attn.in_proj_weight"], names[f"{name}.self_attn.in_proj_bias"] = (3 * d, d), (3 * d,)
        linear(f"{name}.self_attn.out_proj", d)
        linear(f"{name}.linear1", 4 * d)
        linear(f"{name}.linear2", d, 4 * d)
        norm(f"{name}.norm1", f"{name}.norm2")

    v, a, t = "vfeat_extractor", "afeat_extractor", "transformer"
    names |= {f"{v}.cls_token": (1, 1, d), f"{v}.pos_embed": (1, places + 1, d), f"{v}.temp_embed": (1, 8, d),
              f"{v}.patch_embed.proj.weight": (d, 3, 16, 16), f"{v}.patch_embed.proj.bias": (d,),
              f"{v}.patch_embed_3d.proj.weight": (d, 3, 2, 16, 16), f"{v}.patch_embed_3d.proj.bias": (d,)}
    for i in range(size.depth):
        block = f"{v}.blocks.{i}"
        norm(*(f"{block}.norm{k}" for k in (1, 2, 3)))
        for attention in ("attn", "timeattn"):
            linear(f"{block}.{attention}.qkv", 3 * d)
            linear(f"{block}.{attention}.proj", d)
        linear(f"{block}.mlp.fc1", 4 * d)
        linear(f"{block}.mlp.fc2", d, 4 * d)
    norm(f"{v}.norm", f"{a}.ast.layernorm")
    encoder_layer(f"{v}.spatial_attn_agg")

    inner = f"{a}.ast.embeddings"
    names |= {f"{inner}.cls_token": (1, 1, d), f"{inner}.distillation_token": (1, 1, d),
              f"{inner}.position_embeddings": (1, 74, d), f"{inner}.patch_embeddings.projection.weight": (d, 1, 16, 16),
              f"{inner}.patch_embeddings.projection.bias": (d,)}
    for i in range(size.depth):
        layer = f"{a}.ast.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.attention.{name}", d)
        linear(f"{layer}.attention.output.dense", d)
        linear(f"{layer}.intermediate.dense", 4 * d)
        linear(f"{layer}.output.dense", d, 4 * d)
        norm(f"{layer}.layernorm_before", f"{layer}.layernorm_after")
    encoder_layer(f"{a}.freq_attn_agg")

    linear("vproj", d)
    linear("aproj", d)
    names |= {f"{t}.OFF_tok": (1, 1, d), f"{t}.MOD_tok": (1, 1, d), f"{t}.pos_emb_cfg.pos_emb": (1, 198, d)}
    norm(f"{t}.vis_in_lnorm", f"{t}.aud_in_lnorm", f"{t}.ln_f")
    for i in range(size.sync_depth):
        block = f"{t}.blocks.{i}"
        norm(f"{block}.ln1", f"{block}.ln2")
        for name in ("key", "query", "value", "proj"):
            linear(f"{block}.attn.{name}", d)
        linear(f"{block}.mlp.0", 4 * d)
        linear(f"{block}.mlp.2", d, 4 * d)
    linear(f"{t}.off_head", 21)
    return names


@pytest.mark.parametrize("size", [TINY, Size()])
def test_names_and_shapes_are_upstream_s(size: Size) -> None:
    with torch.device("meta"):
        made = Synchformer(size)
    found = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert found == {k: s for k, s in expected(size).items() if not k.startswith("vfeat_extractor.patch_embed.")}


def test_released_file_has_this_many_numbers() -> None:
    """The file that MMAudio publishes is of 950 MB, `907M` in its docs/MODELS.md (rounded up), all in single precision.

    Neither paper nor repository states a count of parameters.
    """
    size = 4 * sum(map(prod, expected(Size()).values()))
    assert size == 4 * 237_460_245
    assert 949.5e6 < size < 950.5e6 and 905 < size / 2**20 < 907


# ------------------------------------------------------------------------------------------------------------ attention
def slow_attention(layer: DividedAttention, x: torch.Tensor, over_time: bool) -> torch.Tensor:
    """Token by token and head by head: the class token sees all, another its group and the class token."""
    d = x.shape[1]
    head = d // layer.heads
    q, k, v = (x @ layer.qkv.weight[i * d : (i + 1) * d].T + layer.qkv.bias[i * d : (i + 1) * d] for i in range(3))
    places = (len(x) - 1) // 8
    rows = []
    for i in range(len(x)):
        instant, place = divmod(i - 1, places)
        same = [j for j in range(1, len(x)) if (j - 1) % places == place] if over_time else [
            j for j in range(1, len(x)) if (j - 1) // places == instant]
        group = list(range(len(x))) if i == 0 else [0, *same]
        heads = []
        for h in range(layer.heads):
            part = slice(h * head, (h + 1) * head)
            weights = torch.stack([torch.exp(q[i, part] @ k[j, part] / head**0.5) for j in group])
            heads.append(sum(w * v[j, part] for w, j in zip(weights / weights.sum(), group, strict=True)))
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("over_time", [True, False])
def test_divided_attention_token_by_token(over_time: bool) -> None:
    layer = network().vfeat_extractor.blocks[0].attn
    assert isinstance(layer, DividedAttention)
    x = torch.randn(2, 1 + 8 * 3, 16)
    found = layer(x, DividedAttention.OVER_TIME if over_time else DividedAttention.OVER_SPACE)
    slow = torch.stack([slow_attention(layer, row, over_time) for row in x])
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-5)


def normed(x: torch.Tensor, layer: torch.nn.Module, eps: float = 1e-6) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * layer.weight + (
        layer.bias)


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax attention of (N, D) by the formula, a head at a time."""
    return torch.cat([torch.softmax(a @ b.T / a.shape[1] ** 0.5, dim=1) @ c for a, b, c in zip(
        q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)], dim=1)


def slow_gather(layer: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Pre-norm encoder layer over class token and tokens (N, D) -> what stands at the class token (D,)."""
    x = torch.cat([layer.cls_token[0], tokens])
    inner = normed(x, layer.norm1)
    q, k, v = (inner @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(3, dim=1)
    x = x + layer.self_attn.out_proj(full_attention(q, k, v, 2))
    return (x + layer.linear2(F.gelu(layer.linear1(normed(x, layer.norm2)))))[0]


def test_pictures_by_the_formulas() -> None:
    extractor = network().vfeat_extractor
    pictures = torch.randn(2, 3, 16, 32, 32)
    found = network().see(pictures)
    assert found.shape == (2, 8, 16)
    rows = [extractor.cls_token[0, 0] + extractor.pos_embed[0, 0]]
    kernel, bias = extractor.patch_embed_3d.proj.weight, extractor.patch_embed_3d.proj.bias
    for t in range(8):
        for y in range(2):
            for x in range(2):
                tube = pictures[1, :, 2 * t : 2 * t + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
                rows.append((kernel * tube).sum(dim=(1, 2, 3, 4)) + bias + extractor.temp_embed[0, t]
                            + extractor.pos_embed[0, 1 + 2 * y + x])
    tokens = torch.stack(rows)
    for block in extractor.blocks:
        tokens = tokens + slow_attention(block.timeattn, normed(tokens, block.norm3), True)
        tokens = tokens + slow_attention(block.attn, normed(tokens, block.norm1), False)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(normed(tokens, block.norm2))))
    tokens = normed(tokens[1:], extractor.norm)
    slow = torch.stack([slow_gather(extractor.spatial_attn_agg, tokens[4 * t : 4 * t + 4]) for t in range(8)])
    torch.testing.assert_close(found[1], slow, rtol=1e-3, atol=1e-4)


def test_sound_by_the_formulas() -> None:
    extractor = network().afeat_extractor
    mel = torch.randn(2, 128, 66)
    found = network().hear(mel)
    assert found.shape == (2, 6, 16)
    inner, rows = extractor.ast.embeddings, []
    kernel, bias = inner.patch_embeddings.projection.weight[:, 0], inner.patch_embeddings.projection.bias
    for band in range(12):
        for t in range(6):
            patch = mel[1, 10 * band : 10 * band + 16, 10 * t : 10 * t + 16]
            rows.append((kernel * patch).sum(dim=(1, 2)) + bias)
    x = torch.cat([inner.cls_token[0], inner.distillation_token[0], torch.stack(rows)]) + inner.position_embeddings[0]
    for block in extractor.ast.encoder.layer:
        before = normed(x, block.layernorm_before, 1e-12)
        three = block.attention.attention
        mixed = full_attention(three.query(before), three.key(before), three.value(before), 2)
        x = x + block.attention.output.dense(mixed)
        x = x + block.output.dense(F.gelu(block.intermediate.dense(normed(x, block.layernorm_after, 1e-12))))
    patches = normed(x, extractor.ast.layernorm, 1e-12)[2:]
    slow = torch.stack([slow_gather(extractor.freq_attn_agg, patches[t::6]) for t in range(6)])
    torch.testing.assert_close(found[1], slow, rtol=1e-3, atol=1e-4)


def test_comparison_by_the_formulas() -> None:
    own = network()
    t = own.transformer
    seen, heard = torch.randn(2, 14, 8, 16), torch.randn(2, 14, 6, 16)
    found = own.compare(seen, heard)
    v, a = own.vproj(seen[1]).reshape(112, 16), own.aproj(heard[1]).reshape(84, 16)
    x = torch.cat([t.OFF_tok[0], normed(v, t.vis_in_lnorm, 1e-5), t.MOD_tok[0], normed(a, t.aud_in_lnorm, 1e-5)])
    x = x + t.pos_emb_cfg["pos_emb"][0]
    for block in t.blocks:
        inner = normed(x, block.ln1, 1e-5)
        q, k, w = block.attn.query(inner), block.attn.key(inner), block.attn.value(inner)
        x = x + block.attn.proj(full_attention(q, k, w, 4))
        x = x + block.mlp[2](F.gelu(block.mlp[0](normed(x, block.ln2, 1e-5))))
    torch.testing.assert_close(found[1], t.off_head(normed(x[0], t.ln_f, 1e-5)), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- what comes in
def test_spectrogram_by_the_formula() -> None:
    wave = torch.from_numpy(noise(0.64))
    found = synchformer.spectrogram(wave[None])[0].numpy()
    x = np.pad(wave.numpy().astype(np.float64), 512, mode="reflect")
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), 312)
    power = np.abs(np.fft.rfft([x[i : i + 1024] * window for i in range(0, len(x) - 1023, 160)])) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)
    bins = np.linspace(0, 8000, 513)
    filters = [np.clip(np.minimum((bins - a) / (b - a), (c - bins) / (c - b)), 0, None)
               for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)]
    slow = (np.log(power @ np.array(filters).T + 1e-6).T + 4.2677393) / (2 * 4.5689974)
    assert found.shape == (128, 66) and slow.shape == (128, 65)
    np.testing.assert_allclose(found[:, :65], slow, atol=2e-3)
    np.testing.assert_allclose(found[:, 65], 4.2677393 / (2 * 4.5689974), rtol=1e-5)  # zero log-mel, then normalised


@pytest.mark.parametrize("shape", [(36, 48), (80, 40), (32, 32)])
def test_pictures_are_resized_and_cut_at_the_centre(shape: tuple[int, int]) -> None:
    picture = film(0.04, size=shape)[0]
    found = (synchformer.prepare_picture(picture, 32) + 1) * 127.5
    height, width = (32 * length // min(shape) for length in shape)
    rows = torch.from_numpy(picture).permute(2, 0, 1)[None]  # bytes, as torchvision has torch resize them
    sized = F.interpolate(rows, (height, width), mode="bicubic", antialias=True)[0]
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    wanted = sized[:, top : top + 32, left : left + 32]
    assert found.shape == (3, 32, 32)
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1.01)


def test_segments_are_those_of_the_papers() -> None:
    for pictures in (0, 15, 16, 23, 24, 119, 120, 200):
        sliding = len([i for i in range(0, pictures, 8) if i + 16 <= pictures])
        assert max(0, synchformer.segment_count(pictures, 10**6)) == sliding
        assert max(0, synchformer.segment_count(10**6, pictures * 640)) == sliding
    assert synchformer.segment_count(120, 76_800) == 14 and synchformer.segment_count(120, 76_799) == 13
    assert synchformer.WINDOW == 4.8 and synchformer.segment_count(200, 128_000) == 24  # 8 s, as MMAudio's clips
    assert synchformer.window_starts(24) == [0, 10] and synchformer.window_starts(14) == [0]

    clip, wave = film(1.6, size=(32, 32)), noise(1.6)
    found = synchformer.see_segments(network(), enumerate(clip), {0, 3})
    heard = synchformer.hear_segments(network(), torch.from_numpy(wave), {0, 3})
    assert set(found) == set(heard) == {0, 3}
    cut = torch.from_numpy(clip[24:40]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    torch.testing.assert_close(found[3], network().see(cut)[0], rtol=1e-4, atol=1e-5)
    mel = synchformer.spectrogram(torch.from_numpy(wave[None, 15_360:25_600]))
    torch.testing.assert_close(heard[3], network().hear(mel)[0], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- offsets
def test_desync_of_planted_classes() -> None:
    logits = torch.zeros(2, 21)
    logits[0, 18], logits[1, 9] = 5.0, 4.0  # upstream: sound 1.6 s early, and 0.2 s late
    whole, first = synchformer.offset_curve(logits), synchformer.offset_curve(logits[:1])
    assert first.offset == pytest.approx(-1.6) and first.desync == pytest.approx(1.6)
    assert synchformer.offset_curve(logits[1:]).offset == pytest.approx(0.2)
    assert whole.desync == pytest.approx((1.6 + 0.2) / 2) and whole.offset == pytest.approx(-1.6)
    assert whole.scores.sum() == pytest.approx(1) and whole.overlap == pytest.approx(9.6)
    np.testing.assert_allclose(first.scores[2], np.exp(5) / (np.exp(5) + 20))
    assert whole.lags[10] == 0 and synchformer.offset_curve(torch.eye(21)[10:11]).desync == 0


def saved(made: Synchformer, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(("place", "late"), [(10, 0.0), (0, 2000.0), (13, -600.0)])
def test_planted_offset_of_a_clip(tmp_path: Path, place: int, late: float) -> None:
    backend = SynchformerBackend(saved(planted(place, 10), tmp_path / "w.safetensors"), TINY)
    judge = LipSync(backend=backend)
    row = judge.measure(Clip(film(5.6), noise(5.6)[None], Fraction(25), 16_000)).row
    assert row["status"] == "ok", row["error"]
    assert row["offset_ms"] == pytest.approx(late) and row["offset_frames"] == pytest.approx(late / 40)
    assert row["desync"] == pytest.approx(abs(late) / 1000)
    assert row["window_starts"] == [0, 0.64] and row["windows"] == 2 and len(row["curve"]) == 21
    assert row["score"] >= row["score_at_zero"] > 0 and row["tracks"][0]["desync"] == row["desync"]


def test_whole_protocol_against_its_parts(tmp_path: Path) -> None:
    backend = SynchformerBackend(saved(network(), tmp_path / "w.safetensors"), TINY)
    judge = LipSync(backend=backend)
    header = judge.header()
    assert isinstance(judge.faces, WholeSource) and header["weights"] == file_hash(tmp_path / "w.safetensors")
    assert header["backend"] == "synchformer" and header["version"] and "audio late" in header["offset"]
    frames, audio = film(6.2), noise(6.2)
    measured = judge.measure(Clip(frames, audio[None], Fraction(25), 16_000))
    pictures = torch.stack([synchformer.prepare_picture(frame, 32) for frame in frames], dim=1)  # (3, F, 32, 32)
    logits = []
    for start in (0, 4):  # 155 pictures: 18 segments
        segments = range(start, start + 14)
        seen = torch.stack([network().see(pictures[None, :, 8 * i : 8 * i + 16])[0] for i in segments])
        waves = torch.from_numpy(np.stack([audio[5120 * i : 5120 * i + 10_240] for i in segments]))
        logits.append(network().compare(seen[None], network().hear(synchformer.spectrogram(waves))[None])[0])
    chance = torch.stack(logits).softmax(dim=1)
    np.testing.assert_allclose(measured.row["curve"], chance.mean(dim=0).flip(0).numpy(), atol=2e-5)
    grid = np.linspace(-2, 2, 21)
    assert measured.row["desync"] == pytest.approx(np.mean([abs(grid[int(one.argmax())]) for one in chance]))
    assert set(measured.seen.features) == set(range(18))
    shorter = backend.curves(measured.seen, audio[: 5 * 16_000], 16_000)  # 14 segments: one window
    assert shorter.starts == [0] and len(shorter.parts) == 1


def test_a_clip_at_another_rate_is_seen_at_25_fps(tmp_path: Path) -> None:
    backend = SynchformerBackend(saved(network(), tmp_path / "w.safetensors"), TINY)
    frames = film(4.8, 50)
    track = WholeSource().follow(((i + 0.5) / 50, frame) for i, frame in enumerate(frames)).tracks[0]
    seen = backend.look(lambda: iter(((i + 0.5) / 50, frame) for i, frame in enumerate(frames)), track)
    assert seen.pictures == 120
    assert len(backend.curves(seen, noise(4.8, 24_000), 24_000).parts) == 1


@pytest.mark.parametrize(("seconds", "loudness", "status", "words"), [
    (4.76, 1.0, "too_short", "for 4.76 s: Synchformer needs at least 4.8 s"), (5.0, 0.0, "no_speech", "silent"),
    (1.0, 1.0, "too_short", "at least 1.3 s"), (5.0, None, "no_speech", "has no sound track")])
def test_clips_that_cannot_be_measured_have_a_status(tmp_path: Path, seconds: float, loudness: float | None,
                                                     status: str, words: str) -> None:
    judge = LipSync(backend=SynchformerBackend(saved(planted(10), tmp_path / "w.safetensors"), TINY))
    audio = None if loudness is None else loudness * noise(seconds)[None]
    row = judge.measure(Clip(film(seconds), audio, Fraction(25), 16_000)).row
    assert row["status"] == status and words in row["error"]


def test_command_writes_rows_and_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lip_backends, "SynchformerBackend", partial(SynchformerBackend, size=TINY))
    weights = saved(planted(13), tmp_path / "w.safetensors")
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mp4", film(5.0, size=(64, 64)), 25, noise(5.0, RATE)[None], RATE)
    write_clip(tmp_path / "clips" / "b.mp4", film(2.0, size=(64, 64)), 25, noise(2.0, RATE)[None], RATE)
    files = [str(item) for kind in ("json", "csv", "html") for item in (f"--{kind}", tmp_path / f"r.{kind}")]
    words = ["eval", "lipsync", str(tmp_path / "clips"), "--backend", "synchformer", "--weights", str(weights), *files]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    assert "DeSync" in said.out and "1 ok, 1 too_short" in said.out and "reader of drawn" not in said.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["header"]["backend"] == "synchformer" and report["header"]["weights"] == file_hash(weights)
    assert report["summary"]["numbers"]["desync"]["mean"] == pytest.approx(0.6)


# ---------------------------------------------------------------------------------------------------------------- files
def test_weights_are_read_as_tensors_alone(tmp_path: Path) -> None:
    state = network().state_dict() | {name: torch.zeros(shape) for name, shape in expected(TINY).items()
                                      if name.startswith("vfeat_extractor.patch_embed.")}
    assert set(state) == set(expected(TINY))
    torch.save(state, tmp_path / "synchformer_state_dict.pth")
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "half.safetensors")
    for name, near in (("synchformer_state_dict.pth", 0.0), ("half.safetensors", 1e-3)):
        loaded = synchformer.load_synchformer(tmp_path / name, TINY)
        assert not loaded.training
        for key, value in network().state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=near, atol=near)

    torch.save({"model": state, "args": Fraction(1)}, tmp_path / "upstream.pt")  # options are no tensors
    torch.save({"model": state}, tmp_path / "nested.pt")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("upstream.pt", "nested.pt", "other.safetensors"):
        with pytest.raises(ValueError, match=r"no weights of Synchformer.*must be converted first"):
            synchformer.load_synchformer(tmp_path / name, TINY)
    with pytest.raises(ValueError, match="no such file"):
        synchformer.load_synchformer(tmp_path / "nothing", TINY)
    with pytest.raises(ValueError, match=r"no weights of Synchformer.*size mismatch for vfeat_extractor.cls_token"):
        synchformer.load_synchformer(tmp_path / "half.safetensors", Size(side=32, width=32, depth=2, sync_depth=1))
    for options in ({}, {"weights": "w", "quirks": True}, {"weights": "w", "cropped": True}):
        with pytest.raises(ValueError, match="needs --weights PATH"):
            find_backend("synchformer", **options)
