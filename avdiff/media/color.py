"""Wide and high dynamic range pictures as what ordinary screens show: sRGB with BT.709 primaries.

Diffuse white lies at 203 cd/m2 (ITU-R BT.2408) and becomes 1.0; what is brighter is rolled off.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# FFmpeg's AVColorTransferCharacteristic and AVColorPrimaries (ITU-T H.273)
PQ = 16
HLG = 18
BT2020 = 9
DISPLAY_P3 = (11, 12)
DIFFUSE_WHITE = 203.0  # cd/m2
HLG_PEAK = 1000.0  # cd/m2 of the nominal display, for which the system gamma is 1.2
HLG_GAMMA = 1.2
KNEE = 0.9  # of white: what is darker is kept exactly
# Linear light to BT.709 primaries, both with white D65 (ITU-R BT.2087; SMPTE EG 432-1).
FROM_BT2020 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
FROM_P3 = np.array(
    [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]], np.float32
)
LUMINANCE_BT2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


def conversion_note(transfer: int, primaries: int) -> str | None:
    """One sentence about the conversion that pictures so tagged need; None if they need none."""
    names = {PQ: "HDR (PQ)", HLG: "HDR (HLG)"}
    if transfer in names:
        return f"is {names[transfer]}; converted to SDR, BT.709"
    if primaries == BT2020:
        return "has wide colors (BT.2020); converted to BT.709"
    if primaries in DISPLAY_P3:
        return "has wide colors (P3); converted to BT.709"
    return None


def to_sdr(picture: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """(H, W, 3) uint16 RGB as coded, full range -> (H, W, 3) uint8 sRGB."""
    light = _linear_table(transfer)[picture]
    if transfer == HLG:  # scene light to the nominal display's (ITU-R BT.2100, table 5)
        luminance = np.maximum(light @ LUMINANCE_BT2020, 1e-6)
        light = light * (luminance ** (HLG_GAMMA - 1))[..., None] * (HLG_PEAK / DIFFUSE_WHITE)
    if primaries == BT2020 or transfer in (PQ, HLG):
        light = light @ FROM_BT2020.T
    elif primaries in DISPLAY_P3:
        light = light @ FROM_P3.T
    light = _roll_off(np.maximum(light, 0))
    coded = np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-6) ** (1 / 2.4) - 0.055
    )
    return np.rint(np.clip(coded, 0, 1) * 255).astype(np.uint8)


def _roll_off(light: np.ndarray) -> np.ndarray:
    """Bring all below 1 without a change of hue: the largest channel bends, the others follow."""
    largest = light.max(axis=-1, keepdims=True)
    bent = KNEE + (1 - KNEE) * (1 - np.exp((KNEE - largest) / (1 - KNEE)))
    scale = np.where(largest > KNEE, bent / np.maximum(largest, KNEE), 1)
    return light * scale


@cache
def _linear_table(transfer: int) -> np.ndarray:
    """Linear light of each of the 65,536 code values."""
    code = np.linspace(0, 1, 65536)
    if transfer == PQ:  # SMPTE ST 2084, inverse of equation 4.1
        root = code ** (32 / 2523)
        above = np.maximum(root - 107 / 128, 0)
        light = 10_000 * (above / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        light = light / DIFFUSE_WHITE
    elif transfer == HLG:  # ITU-R BT.2100, table 5
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)
