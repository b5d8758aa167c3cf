"""Training task of the video autoencoder: clips of presenters in a store of frames ->
`VideoVAETask`.

A frame pair has 256 values, so the loss says what they are for: the mouth and edges weigh more than
the rest, and latents are disturbed by noise, because a generator never hits a latent exactly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import sample_event
from avdiff.corpus.face.presenter import lip_points, pose_track, render_face, sample_identity
from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.evaluation.metrics.video import gradient_energy, mouth_boxes, psnr
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.phonetics.visemes import viseme_track
from avdiff.pixels import to_model, to_uint8
from avdiff.train.loop.dataloader import SeededDataset
from avdiff.train.loop.muon import MuonAdam, muon_groups
from avdiff.train.loop.task import FitOptions, Loss, Task

FPS = 25


# ---------------------------------------------------------------------------------------- the clips
def speech_clip(
    bank: SpeechCorpus, seed: int, split: str, num_frames: int, size: int
) -> dict[str, np.ndarray]:
    """Frames of a presenter who says part of an utterance of the bank; a function of the seed.

    Returns:
        video uint8 (F, S, S, 3), lip_points float32 (F, K, 2).
    """
    rng = np.random.default_rng([seed, 7])
    utterance = bank[int(rng.integers(len(bank)))]
    identity = sample_identity(rng, utterance.gender, split)
    start = float(rng.uniform(0, max(utterance.duration - num_frames / FPS, 0.01)))
    times = start + np.arange(num_frames) / FPS
    if (
        rng.random() < 0.15
    ):  # mouths that no phone makes: the code should not depend on the speech model
        mouths = _wandering_mouth(rng, num_frames)
    else:
        mouths = viseme_track(utterance.phones, times)
    poses = pose_track(rng, times, utterance.phones)
    pairs = list(zip(mouths, poses, strict=True))
    return {
        "video": np.stack([render_face(identity, m, p, size) for m, p in pairs]),
        "lip_points": np.stack([lip_points(identity, m, p) for m, p in pairs]),
    }


def event_clip(seed: int, num_frames: int, size: int) -> dict[str, np.ndarray]:
    """Frames of a sounding object around one of its impacts, where it moves; the lip points are one
    point: no box.
    """
    rng = np.random.default_rng([seed, 8])
    event = sample_event(rng, float(rng.uniform(2, 4)))
    middle = (
        float(rng.choice(np.asarray(event.contacts))) + float(rng.normal(0, 0.2))
        if event.contacts
        else 1.0
    )
    times = np.maximum(middle + (np.arange(num_frames) - num_frames / 2) / FPS, 0)
    return {
        "video": np.stack([render_event(event, float(t), size) for t in times]),
        "lip_points": np.zeros((num_frames, 20, 2), np.float32),
    }


def corpus_clips(
    bank: SpeechCorpus, seed: int, split: str, num_frames: int, size: int, event_share: float = 0.12
) -> Iterator[dict[str, np.ndarray]]:
    """Endless clips of a split, presenters and, by `event_share`, sounding objects."""
    while True:
        if np.random.default_rng([seed, 9]).random() < event_share:
            yield event_clip(seed, num_frames, size)
        else:
            yield speech_clip(bank, seed, split, num_frames, size)
        seed += 1


def _wandering_mouth(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Smooth random mouth parameters in [0, 1], (F, 6)."""
    knots = rng.beta(0.6, 1.0, (frames // 3 + 3, 6))
    at = np.arange(frames) / 3
    low = at.astype(int)
    share = (at - low)[:, None]
    return (knots[low] * (1 - share) + knots[low + 1] * share).astype(np.float32)


class FrameStore(SeededDataset[dict[str, Tensor]]):
    """Clips of equal shape in one memory-mapped file, so that training does not wait for a
    renderer.

    Files: clips.u8 (N, F, H, W, 3), boxes.f32 (N, F, 4), shape.json.
    """

    def __init__(self, folder: str | os.PathLike[str], num_frames: int | None = None) -> None:
        self.folder = Path(folder)
        shape = tuple(json.loads((self.folder / "shape.json").read_text()))
        self.clips = np.memmap(self.folder / "clips.u8", np.uint8, "r", shape=shape)
        self.boxes = np.memmap(self.folder / "boxes.f32", np.float32, "r", shape=(*shape[:2], 4))
        self.num_frames = num_frames or shape[1]

    def __len__(self) -> int:
        return len(self.clips)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        """video uint8 (F, H, W, 3) and mouth boxes (F, 4) from a random moment, mirrored in half of
        the cases.
        """
        rng = torch.Generator().manual_seed(seed)
        start = int(torch.randint(self.clips.shape[1] - self.num_frames + 1, (), generator=rng))
        part = slice(start, start + self.num_frames)
        video, boxes = (
            torch.from_numpy(np.array(array[index, part])) for array in (self.clips, self.boxes)
        )
        if torch.rand((), generator=rng) < 0.5:
            video = video.flip(2)
            boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
        return {"video": video, "boxes": boxes}

    @staticmethod
    def build(
        folder: str | os.PathLike[str], clips: Iterable[dict[str, np.ndarray]], count: int
    ) -> None:
        """Write `count` clips (video, lip_points); the store appears under its name when it is
        whole.
        """
        target = Path(folder)
        temporary_path = target.with_name(f".{target.name}.{os.getpid()}")
        temporary_path.mkdir(parents=True)
        with (
            open(temporary_path / "clips.u8", "wb") as pictures,
            open(temporary_path / "boxes.f32", "wb") as boxes,
        ):
            for _, clip in zip(range(count), clips, strict=False):
                pictures.write(clip["video"].tobytes())
                boxes.write(mouth_boxes(clip["lip_points"]).tobytes())
        (temporary_path / "shape.json").write_text(json.dumps([count, *clip["video"].shape]))
        os.replace(temporary_path, target)


# ----------------------------------------------------------------------------------------- the task
class VideoVAETask(Task):
    """Reconstruction with weight on mouth and edges, a little KL, and noise on the latents.

    Args:
        model: the autoencoder. dataset, held_out: clips (see `FrameStore`). mouth_weight: extra
            weight of pixels in the
        mouth box. edge_weight: weight of the error of pixel-to-pixel steps. kl_weight: per latent
        value.
        latent_noise: largest s.d. of the noise added to latents, in units of their own s.d.
        decoder_only: keep the encoder, and so the latents, as they are.
    """

    def __init__(
        self,
        model: AVVideoVAE,
        dataset: Any,
        held_out: Any,
        mouth_weight: float = 4.0,
        edge_weight: float = 1.0,
        square_weight: float = 2.0,
        kl_weight: float = 1e-4,
        latent_noise: float = 0.3,
        decoder_only: bool = False,
    ) -> None:
        self.modules = {"vae": model}
        self.model = model.to(memory_format=torch.channels_last)
        self.dataset = dataset
        self.held_out = held_out
        self.mouth_weight = mouth_weight
        self.edge_weight = edge_weight
        self.square_weight = square_weight
        self.kl_weight = kl_weight
        self.latent_noise = latent_noise
        model.encoder.requires_grad_(not decoder_only)

    def loss(self, batch: dict[str, Tensor], phase: str, generator: torch.Generator) -> Loss:
        video = self.pairs(batch["video"])
        weight = self.weights(batch)
        size = video.shape[0]
        moments = self.model.encoder(
            encoder_view(video.flatten(0, 1), self.model).contiguous(
                memory_format=torch.channels_last
            ),
            size,
            {},
        ).float()
        mean, logvar = moments.chunk(2, dim=1)  # (B*T, 16, h, w)
        logvar = logvar.clamp(-10, 4)
        z = mean + torch.exp(0.5 * logvar) * self.disturbance(mean, size, generator, posterior=True)
        z = z + mean.std(dim=(0, 2, 3), keepdim=True) * self.disturbance(
            mean, size, generator, posterior=False
        )
        decoded = self.model.decoder(z.contiguous(memory_format=torch.channels_last), size, {})
        error = (
            decoded.view(video.shape) - video
        )  # (B, T, 6, H, W), bf16 under autocast: as exact as 8-bit pixels
        heavy = error * weight
        right = heavy[..., 1:] - heavy[..., :-1]
        down = heavy[..., 1:, :] - heavy[..., :-1, :]
        square = (heavy * error).mean(dtype=torch.float32)
        edge = _mean_size(right) + _mean_size(down)
        rec = _mean_size(heavy) + self.square_weight * square + self.edge_weight * edge
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        parts = {"rec": rec, "kl": kl, "square": square, "edge": edge}
        return Loss(
            rec + self.kl_weight * kl, {name: value.view(1) for name, value in parts.items()}
        )

    def optimizer(self, phase: str, options: FitOptions) -> torch.optim.Optimizer:
        """Muon for the kernels between pixels and latents, AdamW for those at the ends and for
        vectors.
        """
        groups = muon_groups(self.modules, ends=("conv_in", "conv_out", "down.0"))
        betas = (options.adam_beta1, options.adam_beta2)
        decay = options.adam_weight_decay
        return MuonAdam(groups, options.learning_rate, betas, decay, options.adam_epsilon)

    @staticmethod
    def pairs(video: Tensor) -> Tensor:
        """uint8 (B, F, H, W, 3) -> (B, T, 6, H, W) in [-1, 1], the first frame with itself."""
        doubled = torch.cat([video[:, :1], video], dim=1)
        return (
            rearrange(doubled, "b (t p) h w c -> b t (p c) h w", p=2)
            .to(_working_dtype(video))
            .div_(127.5)
            .sub_(1)
        )

    def weights(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, 1, H, W): 1, more in the mouth box; the lone first frame counts half, as it is
        there twice.
        """
        height, width = batch["video"].shape[2:4]
        boxes = batch["boxes"][:, ::2].to(
            torch.float32
        )  # (B, T, 4): a pair shares the box of its second frame
        x = (torch.arange(width, device=boxes.device) + 0.5) / width
        y = (torch.arange(height, device=boxes.device) + 0.5) / height
        left, top, right, bottom = boxes[..., None].unbind(2)
        inside = ((y >= top) & (y < bottom))[..., :, None] & ((x >= left) & (x < right))[
            ..., None, :
        ]
        weight = 1 + self.mouth_weight * inside.float()
        weight[:, 0] *= 0.5
        return weight.unsqueeze(2).to(_working_dtype(weight))

    def disturbance(
        self, like: Tensor, size: int, generator: torch.Generator, posterior: bool
    ) -> Tensor:
        """Unit noise, or noise whose s.d. is drawn per clip: 0 for a third, up to `latent_noise`
        for the others.
        """
        noise = torch.randn(like.shape, generator=generator, device=like.device)
        if posterior:
            return noise
        level = (torch.rand(size, 1, generator=generator, device=like.device) * 1.5 - 0.5).clamp(
            min=0
        ) * self.latent_noise
        return noise * level.expand(size, like.shape[0] // size).reshape(-1, 1, 1, 1)

    def validate(self) -> dict[str, float]:
        """PSNR, mouth PSNR and sharpness of held-out clips, and PSNR with 0.15 s.d. of noise on the
        latents.
        """
        return round_trip_metrics(self.model, self.held_out, count=min(64, len(self.held_out)))


def _working_dtype(x: Tensor) -> torch.dtype:
    """What autocast computes in on the device of `x`, or fp32."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def encoder_view(pictures: Tensor, model: AVVideoVAE) -> Tensor:
    """Pictures (..., H, W) at the decoder's size -> (..., H / scale, W / scale), as the encoder
    reads them: means of squares, which is how a smaller drawing looks.
    """
    scale = model.config.decoder_scale
    if scale == 1:
        return pictures
    small = F.avg_pool2d(pictures.reshape(-1, *pictures.shape[-3:]), scale)
    return small.view(*pictures.shape[:-2], *small.shape[-2:])


def _mean_size(x: Tensor) -> Tensor:
    """Mean absolute value, summed in fp32."""
    return torch.linalg.vector_norm(x, ord=1, dtype=torch.float32) / x.numel()


def decode_uint8(frames: Tensor) -> np.ndarray:
    """(B, 3, F, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3)."""
    return rearrange(to_uint8(frames), "b c f h w -> b f h w c").cpu().numpy()


def round_trip_metrics(
    model: AVVideoVAE, store: Any, count: int, noise: float = 0.15
) -> dict[str, float]:
    """Mean over `count` clips of the store."""
    rows: list[dict[str, float]] = []
    for index in range(count):
        video = np.array(store.clips[index])
        boxes = np.array(store.boxes[index])
        x = rearrange(to_model(video), "f h w c -> 1 c f h w").to(model.device)
        with torch.autocast(x.device.type, torch.bfloat16):
            z = model.encode(encoder_view(x, model)).latent_dist.mode().float()
            spread = z.std(dim=(0, 2, 3, 4), keepdim=True)
            noisy = z + noise * spread * torch.randn(
                z.shape, generator=torch.Generator().manual_seed(index)
            ).to(z)
            clean, rough = (decode_uint8(model.decode(latent).sample)[0] for latent in (z, noisy))
        row = {"psnr": psnr(video, clean), "noisy_psnr": psnr(video, rough)}
        if (boxes[:, 2] > boxes[:, 0]).all():  # a presenter, not an object
            row |= {
                "mouth_psnr": psnr(video, clean, boxes),
                "noisy_mouth_psnr": psnr(video, rough, boxes),
            }
            row["mouth_gradient"] = gradient_energy(clean, boxes) / gradient_energy(video, boxes)
        rows.append(row)
    names = sorted({name for row in rows for name in row})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
