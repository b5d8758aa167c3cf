"""LoRA files of LTX-2: every spelling that is about is read, the two that everybody reads are
written.

    diffusers   transformer.<diffusers' names>.lora_A.weight, rank and alpha in the file's metadata:
                diffusers and avdiff
    native      diffusion_model.<Lightricks' names>.lora_A.weight, alpha / rank folded into B, no
                alpha: ComfyUI, ltx-pipelines, ltx-trainer, diffusers

Also read: kohya's and musubi's `.alpha` tensors, `lora_down`/`lora_up`, names without a prefix,
peft's `base_model.model.` and `.default.`, and `lora_unet_` names with underscores. Lightricks'
merge knows no alpha, and diffusers refuses files with alpha tensors: so scales are folded wherever
they cannot be told.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avdiff.families.ltx2.names import branch_of, owner_of, to_diffusers, to_native
from avdiff.files import write_atomically

Format = Literal["diffusers", "native"]
FORMATS = ("diffusers", "native")
METADATA = "lora_adapter_metadata"  # diffusers' name for the key
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
CONNECTORS = "connectors."
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.")
_SUFFIXES = {  # spelling of the matrix -> which one it is
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "alpha": "alpha",
}


@dataclass(frozen=True)
class LoraLayer:
    """Update scale * up @ down of one linear layer; scale = alpha / rank.

    Args:
        down: (rank, in). up: (out, rank).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What up @ down is multiplied by."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The whole update (out, in) in fp32."""
        return self.scale * (self.up.float() @ self.down.float())

    def folded(self, rank: int | None = None) -> LoraLayer:
        """The same update with scale 1 and, filled up with zeros, with a wanted rank."""
        scaled = self.up if self.scale == 1 else (self.up.float() * self.scale).to(self.up.dtype)
        more = (rank or self.rank) - self.rank
        down = nn.functional.pad(self.down, (0, 0, 0, more))
        return LoraLayer(down, nn.functional.pad(scaled, (0, more)), float(self.rank + more))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA by diffusers' names of layers; those of the connectors begin with "connectors.".

    Args:
        told: what else the file's metadata says (base model, trigger, tasks...).
    """

    layers: Mapping[str, LoraLayer]
    source: str = "diffusers"
    told: Mapping[str, str] = field(default_factory=dict)

    def scaled(self, strengths: Mapping[str, float]) -> LoraFile:
        """Updates multiplied by the strength of their branch, or of "all".

        Raises:
            ValueError: a branch that no layer belongs to.
        """
        branches = {name: branch_of(name) for name in self.layers}
        for branch in strengths:
            if branch != "all" and branch not in branches.values():
                present = ", ".join(sorted(set(branches.values())))
                raise ValueError(f"strength of {branch!r}: this file has layers of {present}")
        layers = {}
        for name, layer in self.layers.items():
            strength = strengths.get(branches[name], 1.0) * strengths.get("all", 1.0)
            layers[name] = replace(layer, alpha=layer.alpha * strength)
        return replace(self, layers=layers)

    def ranks(self) -> Counter[int]:
        """How many layers have which rank."""
        return Counter(layer.rank for layer in self.layers.values())

    def state_dict(self) -> dict[str, Tensor]:
        """What `LTX2Pipeline.load_lora_weights` takes: scales folded, one rank for all, since it
        reads a dict without metadata as alpha = rank of the first layer.
        """
        return _matrices(self._uniform().items(), _diffusers_key)

    def _uniform(self) -> dict[str, LoraLayer]:
        rank = max(self.ranks())
        return {name: layer.folded(rank) for name, layer in self.layers.items()}


# ------------------------------------------------------------------ read
def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a file, or the one in a folder.

    Raises:
        ValueError: no such file, no safetensors, or tensors that are no LoRA of an LTX-2.
    """
    file = Path(path)
    if file.is_dir():
        found = sorted(file.glob("*.safetensors"))
        named = file / DIFFUSERS_FILE
        if not named.is_file() and len(found) != 1:
            raise ValueError(f"lora={file}: needs one .safetensors file in it, has {len(found)}")
        file = named if named.is_file() else found[0]
    if not file.is_file():
        raise ValueError(f"lora={file}: no such file")
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora={file}: is no safetensors file ({error})") from error
    try:
        return parse_lora(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"lora={file}: {error}") from error


def parse_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> LoraFile:
    """Layers of a state dict in any of the spellings above.

    Raises:
        ValueError: a tensor that belongs to no LoRA of an LTX-2, or half a layer.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    source = "bare"
    for key, tensor in tensors.items():
        name, kind, spelling = _split(key)
        source = spelling if spelling != "bare" else source
        parts.setdefault(name, {})[kind] = tensor
    if not parts:
        raise ValueError("holds no tensor")
    config = _adapter_config(metadata or {})
    layers = {}
    for name, part in sorted(parts.items()):
        if not {"down", "up"} <= part.keys():
            raise ValueError(f"{name} has no {'up' if 'down' in part else 'down'} matrix")
        down, up = part["down"], part["up"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise ValueError(f"{name} has matrices {shapes}: needs (rank, in) and (out, rank)")
        alpha = float(part["alpha"]) if "alpha" in part else config.alpha(name, down.shape[0])
        layers[name] = LoraLayer(down, up, alpha)
    kept = {
        key: value for key, value in (metadata or {}).items() if key not in (METADATA, "format")
    }
    return LoraFile(layers, source, kept)


@dataclass(frozen=True)
class _AdapterConfig:
    """The entries of peft's config that scale an update."""

    lora_alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)

    def alpha(self, name: str, rank: int) -> float:
        """Alpha of a layer; its rank where the file says nothing."""
        bare = name.removeprefix(CONNECTORS)
        for pattern, value in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", bare):
                return float(value)
        return float(rank) if self.lora_alpha is None else self.lora_alpha


def _adapter_config(metadata: Mapping[str, str]) -> _AdapterConfig:
    if METADATA not in metadata:
        return _AdapterConfig()
    try:
        told = json.loads(metadata[METADATA])
    except ValueError as error:
        raise ValueError(f"its metadata {METADATA} is no JSON") from error
    flat = {key.removeprefix("transformer."): value for key, value in told.items()}
    alpha = flat.get("lora_alpha")
    return _AdapterConfig(None if alpha is None else float(alpha), flat.get("alpha_pattern") or {})


def _split(key: str) -> tuple[str, str, str]:
    """Key -> (diffusers' name of the layer, "down", "up" or "alpha", how it was spelled)."""
    suffix = next((s for s in _SUFFIXES if key.endswith(f".{s}")), None)
    if suffix is None:
        raise ValueError(f"{key!r} is no matrix of a LoRA")
    name = key[: -len(suffix) - 1]
    kind = _SUFFIXES[suffix]
    spelling = "kohya" if suffix == "alpha" or "down" in suffix or "up" in suffix else "bare"
    if name.startswith("lora_unet_"):
        return _from_underscores(name.removeprefix("lora_unet_")), kind, "kohya"
    if name.startswith("text_embedding_projection."):
        inner = name.removeprefix("text_embedding_projection.")
        return CONNECTORS + inner.replace("aggregate_embed", "text_proj_in"), kind, "native"
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            told = {"diffusion_model.": "native", "transformer.": "diffusers"}
            spelling = told.get(prefix, spelling)
    if not name.startswith(CONNECTORS):
        name = to_diffusers(name)
    if not name.startswith(CONNECTORS) and re.sub(r"\d+", "0", name, count=1) not in _layers():
        raise ValueError(f"{key!r} names no linear layer of an LTX-2")
    return name, kind, spelling


@lru_cache
def _layers() -> frozenset[str]:
    """Linear layers of all generations, block numbers as 0."""
    from diffusers import LTX2VideoTransformer3DModel

    names: set[str] = set()
    for newer in (False, True):
        flags = dict.fromkeys(
            ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), newer
        )
        with torch.device("meta"):
            model = LTX2VideoTransformer3DModel(
                num_layers=1, use_prompt_embeddings=not newer, **flags
            )
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                names.add(name)
    # Only the first number of a name is a block's: a second one stays, as in `to_out.0`.
    return frozenset(re.sub(r"\d+", "0", name, count=1) for name in names)


def _from_underscores(flat: str) -> str:
    """`transformer_blocks_3_attn1_to_out_0` -> `transformer_blocks.3.attn1.to_out.0`."""
    numbered = re.match(r"transformer_blocks_(\d+)_", flat)
    wanted = re.sub(r"_\d+_", "_0_", flat, count=1) if numbered else flat
    for name in _layers():
        if wanted in (name.replace(".", "_"), to_native(name).replace(".", "_")):
            return name.replace(".0.", f".{numbered[1]}.", 1) if numbered else name
    raise ValueError(f"'lora_unet_{flat}' names no linear layer of an LTX-2")


# ------------------------------------------------------------------ write
def write_lora(
    lora: LoraFile,
    path: str | os.PathLike[str],
    kind: Format = "diffusers",
    told: Mapping[str, str] | None = None,
) -> Path:
    """Write a file as a whole or not at all.

    Args:
        told: base_model, trigger, tasks...: added to the metadata.

    Raises:
        ValueError: an unknown format.
    """
    if kind not in FORMATS:
        raise ValueError(f"format={kind!r}: needs {' or '.join(FORMATS)}")
    metadata = {"format": "pt", **lora.told, **(told or {})}
    if kind == "diffusers":
        tensors = _matrices(lora.layers.items(), _diffusers_key)
        metadata[METADATA] = json.dumps(_metadata(lora), sort_keys=True)
    else:
        tensors = _matrices(lora._uniform().items(), _native_key)
        rank = max(lora.ranks())
        metadata |= {"rank": str(rank), "alpha": str(rank), "scale": "folded into lora_B"}
    target = Path(path)
    with write_atomically(target) as temporary_path:
        save_file(tensors, temporary_path, metadata=metadata)
    return target


def _matrices(
    layers: Iterable[tuple[str, LoraLayer]], key: Callable[[str], str]
) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers:
        tensors[f"{key(name)}.lora_A.weight"] = layer.down.contiguous()
        tensors[f"{key(name)}.lora_B.weight"] = layer.up.contiguous()
    return tensors


def _diffusers_key(name: str) -> str:
    return name if name.startswith(CONNECTORS) else f"transformer.{name}"


def _native_key(name: str) -> str:
    if name.startswith(CONNECTORS):
        inner = name.removeprefix(CONNECTORS).replace("text_proj_in", "aggregate_embed")
        return f"text_embedding_projection.{inner}"
    return f"diffusion_model.{to_native(name)}"


def _metadata(lora: LoraFile) -> dict[str, object]:
    """peft's config as diffusers packs it into a file."""
    rank = lora.ranks().most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in lora.layers.values()).most_common(1)[0][0]
    names = [name for name in lora.layers if not name.startswith(CONNECTORS)]
    odd = {name: lora.layers[name] for name in names}
    ranks = {f"^{re.escape(n)}": x.rank for n, x in odd.items() if x.rank != rank}
    alphas = {f"^{re.escape(n)}": x.alpha for n, x in odd.items() if x.alpha != alpha}
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": names,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return {f"transformer.{key}": value for key, value in config.items()}


# ------------------------------------------------------------------ use and describe
@torch.no_grad()
def merge_lora(transformer: nn.Module, lora: LoraFile, strength: float = 1.0) -> int:
    """Add the updates to the weights for good; returns the number of layers.

    Raises:
        ValueError: a layer that this transformer does not have, or one of another size.
    """
    for name, layer in lora.layers.items():
        if name.startswith(CONNECTORS):
            continue
        try:
            weight = transformer.get_submodule(name).weight
        except AttributeError as error:
            raise ValueError(f"lora: {name} is no layer of this model") from error
        delta = layer.delta()
        if delta.shape != weight.shape:
            raise ValueError(
                f"lora: {name} has an update of {tuple(delta.shape)}, this model needs "
                f"{tuple(weight.shape)}"
            )
        weight.copy_((weight.float() + strength * delta.to(weight.device)).to(weight.dtype))
    return len(lora.layers)


@dataclass(frozen=True)
class BranchSummary:
    """Layers of one branch: their number, parameters and the norm of their update."""

    layers: int
    parameters: int
    norm: float


def summarize(lora: LoraFile) -> dict[str, BranchSummary]:
    """By branch; a norm of 0 says that nothing was learned there."""
    found: dict[str, list[LoraLayer]] = {}
    for name, layer in lora.layers.items():
        found.setdefault(branch_of(name), []).append(layer)
    summary = {}
    for branch, layers in sorted(found.items()):
        parameters = sum(x.down.numel() + x.up.numel() for x in layers)
        squares = [_square_norm(x) for x in layers]
        summary[branch] = BranchSummary(len(layers), parameters, max(0.0, sum(squares)) ** 0.5)
    return summary


def _square_norm(layer: LoraLayer) -> float:
    """|scale B A|^2 = scale^2 sum((B'B) * (AA')), without the full matrix."""
    up, down = layer.up.float(), layer.down.float()
    return float(((up.T @ up) * (down @ down.T)).sum()) * layer.scale**2


def still_modalities(lora: LoraFile) -> list[str]:
    """Modalities whose layers are there and did not move: what other trainers say nothing about."""
    norms: dict[str, float] = {}
    for name, layer in lora.layers.items():
        owner = owner_of(name)
        norms[owner] = norms.get(owner, 0.0) + _square_norm(layer)
    return [owner for owner, norm in sorted(norms.items()) if norm == 0]
