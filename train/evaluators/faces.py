"""Training of the face reader: a store of drawn faces with their truth, degradations, and
`FaceReaderTask`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import sample_event
from avdiff.corpus.face import identity as looks
from avdiff.corpus.face.mouth import CANVAS, HEAD_SCALE, MOUTH, MOUTH_DEPTH, head_matrix, parallax
from avdiff.corpus.face.presenter import Identity, Pose, lip_points, render_face, sample_identity
from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.evaluators.face_reader import SIDE, FaceReader, Mouth, Place, to_pictures
from avdiff.phonetics.visemes import PARAMS, TARGETS, VISEMES, viseme_track
from avdiff.train.loop.dataloader import SeededDataset
from avdiff.train.loop.task import Loss, Task

FACE = (-26.0, -37.0, 26.0, 34.0)  # left, top, right, bottom of a face in the head's frame
MOUTH_SIDE = 52.0  # side of the square that holds any mouth, in the head's frame
UNKNOWN = (
    -1
)  # an attribute that the picture cannot show: hair colour of the bald, the colour of no hat
#: How much each mouth parameter counts when a shape is named after the nearest viseme.
NEARNESS = np.array((1.0, 0.7, 0.7, 0.4, 0.3, 0.7))
_STYLES = tuple(dict.fromkeys(style for styles in looks.HAIR_STYLES.values() for style in styles))
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gender": ("female", "male"),
    "hair_color": tuple(looks.HAIRS),
    "hair_style": _STYLES,
    "skin": tuple(looks.SKINS),
    "eye_color": tuple(looks.IRISES),
    "beard": looks.BEARDS,
    "glasses": looks.GLASSES,
    "hat": looks.HATS,
    "hat_color": tuple(looks.COLORS),
    "earrings": looks.EARRINGS,
    "lipstick": ("none", *looks.LIPSTICKS),
    "clothes": looks.CLOTHES,
    "clothes_color": tuple(looks.COLORS),
    "background": looks.BACKGROUNDS,
    "background_color": tuple(looks.BACKDROPS),
}


# ---------------------------------------------------------------------------------------- the truth
def face_box(identity: Identity, pose: Pose) -> np.ndarray:
    """Left, top, right, bottom of the face (hair not counted) in shares of the picture: (4,)."""
    left, top, right, bottom = FACE
    corners = np.array(((left, top), (right, top), (left, bottom), (right, bottom)))
    matrix = head_matrix(identity, pose)
    placed = (corners @ matrix[:, :2].T + matrix[:, 2]) / CANVAS
    return np.concatenate([placed.min(0), placed.max(0)]).astype(np.float32)


def mouth_square(identity: Identity, pose: Pose) -> np.ndarray:
    """Centre x, centre y and side of the square around the mouth, whatever it does, in shares of
    the picture: (3,).
    """
    matrix = head_matrix(identity, pose)
    centre = np.add(MOUTH, parallax(pose, MOUTH_DEPTH)) + np.array((0.0, 3.0))
    x, y = (centre @ matrix[:, :2].T + matrix[:, 2]) / CANVAS
    side = MOUTH_SIDE * HEAD_SCALE * (identity.face_width + identity.face_height) / 2 / CANVAS
    return np.array((x, y, side), np.float32)


def nearest_viseme(mouth: np.ndarray) -> int:
    """The class whose target is nearest to a mouth shape (6,): what the picture shows, whatever
    phone is meant.
    """
    targets = np.array([TARGETS[name] for name in VISEMES])
    return int(np.argmin((((targets - mouth) * NEARNESS) ** 2).sum(1)))


def attribute_ids(identity: Identity) -> np.ndarray:
    """Place of each attribute's value in `ATTRIBUTES`, `UNKNOWN` where there is nothing to see:
    (A,) int64.
    """
    told = identity.attributes()
    return np.array(
        [
            values.index(told[name]) if told[name] in values else UNKNOWN
            for name, values in ATTRIBUTES.items()
        ],
        np.int64,
    )


def draw_face(
    rng: np.random.Generator, bank: SpeechCorpus | None, identity: Identity
) -> dict[str, np.ndarray]:
    """One picture with its truth: a mouth from speech in most cases, else any shape; any pose."""
    if bank is not None and rng.random() < 0.6:
        utterance = bank[int(rng.integers(len(bank)))]
        mouth = viseme_track(utterance.phones, np.array([rng.uniform(0, utterance.duration)]))[0]
    else:
        one, two = (np.array(TARGETS[VISEMES[int(rng.integers(len(VISEMES)))]]) for _ in range(2))
        mouth = one + (two - one) * rng.beta(0.5, 0.5) + rng.normal(0, 0.1, len(PARAMS))
        mouth = np.clip(mouth if rng.random() < 0.7 else rng.random(len(PARAMS)), 0, 1)
    blink = float(rng.choice([0.0, 1.0, rng.random()], p=[0.75, 0.1, 0.15]))
    yaw, pitch, gaze_x, gaze_y, brow = np.clip(
        rng.normal(0, (0.5, 0.35, 0.4, 0.2, 0.4)), -1, 1
    ).tolist()
    tilt, dx, dy = rng.normal(0, (2.6, 1.6, 1.2)).tolist()
    pose = Pose(yaw, pitch, tilt, dx, dy, blink, gaze_x, gaze_y, brow)
    return {
        "picture": render_face(identity, mouth, pose, SIDE),
        "face": np.ones((), np.float32),
        "box": face_box(identity, pose),
        "square": mouth_square(identity, pose),
        "points": lip_points(identity, mouth, pose),
        "shape": mouth[:3].astype(np.float32),
        "viseme": np.array(nearest_viseme(mouth)),
        "attributes": attribute_ids(identity),
    }


def draw_event(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One picture without a face."""
    event = sample_event(rng, 3.0)
    return {
        "picture": render_event(event, float(rng.uniform(0, 3)), SIDE),
        "face": np.zeros((), np.float32),
        "box": np.zeros(4, np.float32),
        "square": np.array((0.5, 0.5, 0.4), np.float32),
        "points": np.full((20, 2), 0.5, np.float32),
        "shape": np.zeros(3, np.float32),
        "viseme": np.array(0),
        "attributes": np.full(len(ATTRIBUTES), UNKNOWN, np.int64),
    }


class FaceStore(SeededDataset[dict[str, Tensor]]):
    """Drawn pictures in one memory-mapped file: pictures.u8 (N, 128, 128, 3), truth.safetensors,
    shape.json.
    """

    def __init__(self, folder: str | os.PathLike[str], jpeg_share: float = 0.3) -> None:
        self.folder = Path(folder)
        self.jpeg_share = jpeg_share
        count = json.loads((self.folder / "shape.json").read_text())
        self.pictures = np.memmap(
            self.folder / "pictures.u8", np.uint8, "r", shape=(count, SIDE, SIDE, 3)
        )
        self.truth = load_file(self.folder / "truth.safetensors")

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        """`picture` uint8 (S, S, 3), in `jpeg_share` of the cases through JPEG, and its truth."""
        picture = np.array(self.pictures[index])
        rng = torch.Generator().manual_seed(seed)
        if float(torch.rand((), generator=rng)) < self.jpeg_share:
            quality = int(torch.randint(12, 70, (), generator=rng))
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=quality)
            picture = np.array(Image.open(file))
        truth = {
            name: torch.from_numpy(np.array(values[index])) for name, values in self.truth.items()
        }
        return {"picture": torch.from_numpy(picture), **truth}

    @staticmethod
    def build(
        folder: str | os.PathLike[str],
        count: int,
        split: str,
        bank: SpeechCorpus | None,
        seed: int,
        event_share: float = 0.06,
        faces_each: int = 3,
    ) -> None:
        """Draw `count` pictures, `faces_each` of every presenter; the store appears under its name
        when it is whole.
        """
        target = Path(folder)
        temporary_path = target.with_name(f".{target.name}.{os.getpid()}")
        temporary_path.mkdir(parents=True)
        rng = np.random.default_rng([seed, looks.SPLITS.index(split)])
        rows: list[dict[str, np.ndarray]] = []
        with open(temporary_path / "pictures.u8", "wb") as pictures:
            for index in range(count):
                if index % faces_each == 0:
                    identity = sample_identity(rng, split=split)
                row = (
                    draw_event(rng)
                    if rng.random() < event_share
                    else draw_face(rng, bank, identity)
                )
                pictures.write(row.pop("picture").tobytes())
                rows.append(row)
        save_file(
            {name: np.stack([row[name] for row in rows]) for name in rows[0]},
            temporary_path / "truth.safetensors",
        )
        (temporary_path / "shape.json").write_text(json.dumps(count))
        os.replace(temporary_path, target)


# -------------------------------------------------------------------------------------- degradation
_OUTER = np.arange(12)
_INNER = np.arange(8)
MIRROR = torch.from_numpy(
    np.concatenate([(6 - _OUTER) % 12, 12 + (4 - _INNER) % 8])
)  # lip points of the mirror image


def mirrored(batch: Mapping[str, Tensor], flip: Tensor) -> dict[str, Tensor]:
    """The rows where `flip` (B,) is set as in a mirror, pictures float (B, 3, S, S)."""
    out = dict(batch)
    chosen = flip.nonzero()[:, 0]
    for name in ("picture", "box", "square", "points"):
        out[name] = batch[name].clone()
    out["picture"][chosen] = batch["picture"][chosen].flip(-1)
    left, top, right, bottom = batch["box"][chosen].unbind(-1)
    out["box"][chosen] = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
    out["square"][chosen, 0] = 1 - batch["square"][chosen, 0]
    points = batch["points"][chosen][:, MIRROR.to(flip.device)]
    out["points"][chosen] = torch.stack([1 - points[..., 0], points[..., 1]], dim=-1)
    return out


def moved(batch: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Pictures and truth enlarged by `scale` (B,) about the middle, then shifted by `shift` (B, 2)
    in shares.
    """
    out = dict(batch)
    theta = torch.zeros(len(scale), 2, 3, device=scale.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -2 * shift / scale[:, None]
    grid = F.affine_grid(theta, list(batch["picture"].shape), align_corners=False)
    out["picture"] = F.grid_sample(
        batch["picture"], grid, padding_mode="reflection", align_corners=False
    )

    def place(points: Tensor) -> Tensor:
        by = scale.view(-1, *[1] * (points.ndim - 1))
        return (points - 0.5) * by + 0.5 + shift.view(-1, *[1] * (points.ndim - 2), 2)

    out["box"] = place(batch["box"].view(-1, 2, 2)).flatten(1)
    out["points"] = place(batch["points"])
    centre = place(batch["square"][:, None, :2])[:, 0]
    out["square"] = torch.cat([centre, batch["square"][:, 2:] * scale[:, None]], dim=1)
    return out


def degraded(pictures: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Blur (a third of the rows), light, colour cast and noise (half of them) on (B, 3, S, S) in
    [-1, 1].
    """
    batch = len(pictures)
    size = pictures.shape[-1]

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=pictures.device)

    x = pictures.clone()
    for rows in torch.arange(batch, device=x.device).split(8):
        if float(draw(1)) < 0.35 * strength:
            small = (
                size
                if strength == 0
                else int(size * (1 - (0.2 + 0.45 * float(draw(1))) * min(strength, 1.4)))
            )
            shrunk = F.interpolate(x[rows], size=(small, small), mode="area")
            x[rows] = F.interpolate(shrunk, size=(size, size), mode="bilinear")
    gain = 1 + (draw(batch, 1, 1, 1) - 0.5) * 0.14 * strength
    lift = (draw(batch, 1, 1, 1) - 0.5) * 0.08 * strength + (
        draw(batch, 3, 1, 1) - 0.5
    ) * 0.03 * strength
    level = (draw(batch, 1, 1, 1) * 2 - 1).clamp_min(0) * 0.14 * strength
    white = torch.randn(x.shape, generator=generator, device=x.device)
    return (x * gain + lift + level * white).clamp(-1, 1)


# ----------------------------------------------------------------------------------------- the task
class FaceReaderTask(Task):
    """Trains `FaceReader` on degraded pictures.

    Args:
        reader: model. dataset, held_out: stores. vae: frozen video VAE that a share of rows goes
            through, or None.
        codec_share: that share.
    """

    def __init__(
        self,
        reader: FaceReader,
        dataset: FaceStore,
        held_out: FaceStore,
        vae: AVVideoVAE | None = None,
        codec_share: float = 0.3,
    ) -> None:
        self.reader = reader
        self.dataset = dataset
        self.held_out = held_out
        self.vae = vae
        self.codec_share = codec_share if vae is not None else 0.0
        self.modules = {"face_reader": reader.to(memory_format=torch.channels_last)}
        if vae is not None:
            vae.requires_grad_(False).eval()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "codec_share": self.codec_share}

    def prepare(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """uint8 pictures and truth -> the same mirrored, moved, degraded and in part through the
        codec.
        """
        rows = {**batch, "picture": to_pictures(batch["picture"])}
        count = len(rows["picture"])
        device = rows["picture"].device
        draw = torch.rand(count, 4, generator=generator, device=device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            rows = mirrored(rows, draw[:, 0] < 0.5)
            rows = moved(rows, 1 + (draw[:, 1] - 0.55) * 0.55, (draw[:, 2:] - 0.5) * 0.2)
            through = round(self.codec_share * count)  # rows come in random order
            if through and self.vae is not None:
                coded = self.vae(rows["picture"][:through, :, None]).sample[:, :, 0]
                rows["picture"] = torch.cat([coded.clamp(-1, 1), rows["picture"][through:]])
            rows["picture"] = degraded(rows["picture"], generator).contiguous(
                memory_format=torch.channels_last
            )
        return rows

    def loss(self, batch: Mapping[str, Tensor], phase: str, generator: torch.Generator) -> Loss:
        rows = self.prepare(batch, generator)
        place = self.reader.find(rows["picture"])
        jitter = (
            torch.rand(len(rows["picture"]), 3, generator=generator, device=place.box.device) - 0.5
        ) * 0.2
        square = rows["square"].clone()  # where the first network may put it
        square[:, :2] += jitter[:, :2] * square[:, 2:]
        square[:, 2] *= 1 + jitter[:, 2]
        parts = face_losses(place, self.reader.read_mouth(rows["picture"], square), rows)
        return Loss(sum(parts.values(), start=torch.zeros((), device=place.box.device)), parts)

    def validate(self) -> dict[str, float]:
        """Measures on held-out presenters, clean and degraded (see `measure_reader`)."""
        count = min(512, len(self.held_out))
        pictures = torch.from_numpy(np.array(self.held_out.pictures[:count]))
        report: dict[str, float] = {}
        for name, strength in (("clean", 0.0), ("degraded", 1.0)):
            generator = torch.Generator().manual_seed(0)
            x = degraded(to_pictures(pictures), generator, strength)
            measured = measure_reader(self.reader, x.to(self.device), self.held_out.truth)
            report |= {f"{name}_{key}": value for key, value in measured.items()}
        return report


def face_losses(place: Place, mouth: Mouth, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weighted losses, each a scalar: mean over the rows that show what is asked."""
    face = truth["face"]
    weight = face / face.sum().clamp_min(1)
    side = truth["square"][:, 2:]
    box = (place.box - truth["box"]).abs().mean(dim=1)
    square = (
        torch.cat(
            [
                (place.mouth[:, :2] - truth["square"][:, :2]) / side,
                (place.mouth[:, 2:] / side).log(),
            ],
            dim=1,
        )
        .abs()
        .mean(dim=1)
    )
    points = F.smooth_l1_loss(
        mouth.points / side[:, None], truth["points"] / side[:, None], beta=0.02, reduction="none"
    ).mean(dim=(1, 2))
    shape = F.smooth_l1_loss(mouth.shape, truth["shape"], beta=0.1, reduction="none").mean(dim=1)
    viseme = F.cross_entropy(mouth.viseme, truth["viseme"], reduction="none", label_smoothing=0.05)
    told = [
        F.cross_entropy(
            place.attributes[name],
            truth["attributes"][:, i],
            ignore_index=UNKNOWN,
            reduction="sum",
            label_smoothing=0.02,
        )
        / (truth["attributes"][:, i] >= 0).sum().clamp_min(1)
        for i, name in enumerate(ATTRIBUTES)
    ]
    return {
        "face": F.binary_cross_entropy_with_logits(place.face, face),
        "box": 8 * (box * weight).sum(),
        "square": 3 * (square * weight).sum(),
        "points": 30 * (points * weight).sum(),
        "shape": 10 * (shape * weight).sum(),
        "viseme": 0.3 * (viseme * weight).sum(),
        "attributes": torch.stack(told).mean(),
    }


@torch.no_grad()
def measure_reader(
    reader: FaceReader, pictures: Tensor, truth: Mapping[str, np.ndarray], batch: int = 64
) -> dict[str, float]:
    """How well held-out pictures (N, 3, 128, 128) are read, end to end (the mouth is found, not
    given).

    Returns:
        r and mean error of jaw, width and round; point_error (share of the mouth's square);
        box_iou; viseme; face; `attribute_NAME` accuracies and their mean over hair, skin, beard,
        glasses and background, `attributes`.
    """
    parts = [reader(x) for x in pictures.split(batch)]
    join = [
        torch.cat([getattr(place, name) for place, _ in parts]).cpu().numpy()
        for name in ("face", "box")
    ]
    points, shape, viseme = (
        torch.cat([getattr(mouth, name) for _, mouth in parts]).cpu().numpy()
        for name in ("points", "shape", "viseme")
    )
    face, box = join
    is_face = truth["face"][: len(face)] > 0
    report = {"face": float(((face > 0) == is_face).mean())}
    known = {name: values[: len(face)][is_face] for name, values in truth.items()}
    for i, name in enumerate(("jaw", "width", "round")):
        one = shape[is_face, i]
        two = known["shape"][:, i]
        report[f"{name}_r"] = float(np.corrcoef(one, two)[0, 1])
        report[f"{name}_error"] = float(np.abs(one - two).mean())
    report["point_error"] = float(
        (
            np.linalg.norm(points[is_face] - known["points"], axis=-1).mean(1)
            / known["square"][:, 2]
        ).mean()
    )
    report["box_iou"] = float(box_iou(box[is_face], known["box"]).mean())
    report["viseme"] = float((viseme[is_face].argmax(1) == known["viseme"]).mean())
    for i, name in enumerate(ATTRIBUTES):
        logits = torch.cat([place.attributes[name] for place, _ in parts]).cpu().numpy()[is_face]
        asked = known["attributes"][:, i] >= 0
        if asked.any():
            report[f"attribute_{name}"] = float(
                (logits.argmax(1) == known["attributes"][:, i])[asked].mean()
            )
    named = (
        "hair_color",
        "hair_style",
        "skin",
        "beard",
        "glasses",
        "background",
        "background_color",
    )
    report["attributes"] = float(np.mean([report[f"attribute_{name}"] for name in named]))
    return report


def box_iou(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4), left top right bottom: (N,)."""
    low = np.maximum(one[:, :2], two[:, :2])
    high = np.minimum(one[:, 2:], two[:, 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=1)
    areas: Sequence[np.ndarray] = [np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (one, two)]
    return both / (areas[0] + areas[1] - both)
