"""Sound of events: modal synthesis. A struck body is a sum of decaying sines at its natural
frequencies (van den Doel & Pai 1998, "The sounds of physical shapes"), with a short burst of noise
for the contact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.signal import lfilter

from avdiff.corpus.events.scene import Event


class Body(NamedTuple):
    """A struck body: lowest frequency (Hz), ratios of the modes, decay of the lowest mode (s), and
    its contact: loudness of the burst, its length (s) and its brightness (0 dull to 1 bright).
    """

    base: float
    ratios: tuple[float, ...]
    decay: float
    burst: float
    length: float
    bright: float


# Ratios: free bar 1 2.76 5.40 8.93, circular membrane 1 1.59 2.14 2.30 2.65 2.92, bell hum to
# nominal, wine glass 1 2.32 4.25 6.63 (Fletcher & Rossing, "The Physics of Musical Instruments").
# Bases and decays are
# set by ear.
BODIES: dict[str, Body] = {
    "rubber": Body(170, (1, 1.94, 2.9), 0.050, 0.5, 0.012, 0.15),
    "plastic": Body(1150, (1, 1.62, 2.41, 3.3), 0.022, 0.6, 0.005, 0.7),
    "wood": Body(430, (1, 2.57, 4.3, 6.2), 0.055, 0.6, 0.006, 0.5),
    "metal": Body(1250, (1, 1.71, 2.76, 4.1, 5.4), 0.26, 0.4, 0.003, 0.9),
    "glass": Body(2300, (1, 1.93, 2.87, 4.2), 0.14, 0.4, 0.002, 1.0),
    "wooden floor": Body(118, (1, 1.7, 2.9, 4.7, 7.1), 0.060, 0.3, 0.008, 0.3),
    "stone floor": Body(320, (1, 2.3, 4.8), 0.016, 0.5, 0.004, 0.6),
    "metal floor": Body(245, (1, 1.68, 2.83, 4.62, 7.7), 0.38, 0.3, 0.003, 0.8),
    "drum": Body(150, (1, 1.59, 2.14, 2.30, 2.65, 2.92, 3.5), 0.22, 0.7, 0.020, 0.5),
    "brass bell": Body(620, (0.5, 1, 1.2, 1.5, 2, 2.67, 3, 4.2), 1.3, 0.45, 0.004, 0.9),
    "silver bell": Body(1350, (1, 1.18, 2.0, 2.74, 3.76, 5.1), 0.9, 0.4, 0.003, 1.0),
    "wine glass": Body(980, (1, 2.32, 4.25, 6.63, 9.38), 0.75, 0.4, 0.003, 1.0),
    "hands": Body(900, (1, 1.45), 0.006, 1.0, 0.011, 0.55),
    "wood door": Body(135, (1, 1.8, 2.7, 3.9, 5.8, 8.1), 0.048, 0.7, 0.006, 0.4),
    "metal door": Body(190, (1, 1.6, 2.4, 3.7, 5.2, 7.4), 0.30, 0.5, 0.004, 0.7),
}
TAIL = 5.0  # decays rung out: e^-5 is -43 dB
MOST_SECONDS = 1.6
PEAK = (0.35, 0.85)
DAMPED = 0.25  # what the touch of a new strike leaves of the earlier ringing
SOFT = 0.25  # hardness of the softer of the two strikes that are mixed


def bodies_of(event: Event) -> list[tuple[Body, float]]:
    """The bodies that ring, each with its share."""
    if event.kind == "ball":
        return [(BODIES[event.material], 0.65), (BODIES[f"{event.floor} floor"], 0.35)]
    name = {
        "drum": "drum",
        "bell": f"{event.material} bell",
        "glass": "wine glass",
        "clap": "hands",
        "knock": f"{event.material} door",
    }[event.kind]
    return [(BODIES[name], 1.0)]


def ring(
    body: Body, rng: np.random.Generator, pitch: float, hardness: float, rate: int
) -> np.ndarray:
    """Response to one strike at sample 0: (n,) float64. A harder strike excites the higher modes
    more.
    """
    length = round(
        min(MOST_SECONDS, max(TAIL * body.decay / np.sqrt(min(1.0, body.ratios[0])), 0.06)) * rate
    )
    times = np.arange(length) / rate
    ratios = np.array(body.ratios)
    hertz = body.base * pitch * ratios * (1 + rng.uniform(-0.012, 0.012, len(ratios)))
    audible = hertz < 0.45 * rate
    decays = body.decay / np.sqrt(ratios) * rng.uniform(0.85, 1.15, len(ratios))
    heights = ratios ** (-1.3 + 0.8 * hardness) * rng.uniform(0.6, 1.0, len(ratios))
    waves = np.sin(2 * np.pi * hertz[audible, None] * times) * np.exp(
        -times / decays[audible, None]
    )
    sound = (heights[audible, None] * waves).sum(0) / heights[audible].sum()
    noise = rng.standard_normal(length) * np.exp(-times / body.length)
    dull = 1 - (0.25 + 0.7 * body.bright * (0.6 + 0.4 * hardness))
    noise = lfilter([1 - dull], [1, -dull], noise)
    return sound + body.burst * (0.5 + 0.5 * hardness) * noise / (np.abs(noise).max() + 1e-9)


def event_audio(event: Event, samples: int, rate: int = 24000) -> np.ndarray:
    """Sound of an event: (samples,) float32, peak in `PEAK`; each impact starts at its time, to a
    sample.
    """
    rng = np.random.default_rng(event.seed)
    pitch = rng.uniform(0.92, 1.08) / event.scale ** (
        1.0 if event.kind in ("clap", "knock") else 1.3
    )
    if event.kind == "glass":
        pitch *= 1 - 0.35 * event.fill**2  # water lowers the pitch (French 1983)
    track = np.zeros(samples)
    sounds = [
        (ring(body, rng, pitch if i == 0 else 1.0, hardness, rate) * share, hardness)
        for i, (body, share) in enumerate(bodies_of(event))
        for hardness in (SOFT, 1.0)
    ]
    damping = np.geomspace(1.0, DAMPED, round(0.001 * rate))
    for time, speed in zip(event.contacts, event.speeds, strict=True):
        first = round(time * rate)
        contact = track[first : first + len(damping)]
        contact *= damping[: len(contact)]
        track[first + len(damping) :] *= DAMPED
        hard = max(0.0, (speed - SOFT) / (1 - SOFT))
        for sound, hardness in sounds:  # between a soft and a hard strike
            part = sound[: max(0, samples - first)]
            track[first : first + len(part)] += (
                part * speed * (hard if hardness == 1.0 else 1 - hard)
            )
    peak = np.abs(track).max() + 1e-9
    return (track * rng.uniform(*PEAK) / peak).astype(np.float32)
