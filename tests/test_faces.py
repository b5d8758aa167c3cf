"""Drawn presenters: the picture, the motion, and the truth about both."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from avdiff.corpus.face import identity as who
from avdiff.corpus.face.presenter import (
    Identity,
    Pose,
    identity_key,
    identity_split,
    lip_points,
    mouth_opening,
    mouth_opening_from_pixels,
    pose_track,
    render_face,
    sample_identity,
)
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.visemes import TARGETS, viseme_track

WORDS = "mˈaməpapə bˈɪɡbɛɹ ˈoʊpɛnmaʊθ suːnfuːd vɛɹiθɪn mˈiːmbaːp"


def talk(seed: int) -> tuple[Phone, ...]:
    """Some speech-like phones."""
    rng = np.random.default_rng(seed)
    phones, now = [Phone("sil", 0.0, 0.2)], 0.2
    for letter in rng.permutation(list(WORDS.replace("ˈ", "").replace("ː", ""))):
        length = float(rng.uniform(0.05, 0.11))
        phones.append(Phone(str(letter), now, now + length, int(rng.integers(2))))
        now += length
    return (*phones, Phone("sil", now, now + 0.3))


def clip(
    seed: int, size: int = 128
) -> tuple[Identity, np.ndarray, np.ndarray, list[Pose], np.ndarray]:
    """(identity, times, mouth, poses, frames) of one talking presenter at 25 fps."""
    rng = np.random.default_rng(seed)
    identity, phones = sample_identity(rng), talk(seed)
    times = (np.arange(int(phones[-1].end * 25)) + 0.5) / 25
    mouth, poses = viseme_track(phones, times), pose_track(rng, times, phones)
    frames = np.stack(
        [render_face(identity, m, p, size) for m, p in zip(mouth, poses, strict=True)]
    )
    return identity, times, mouth, poses, frames


def seen(
    identity: Identity, mouth: np.ndarray, poses: list[Pose], frames: np.ndarray
) -> np.ndarray:
    """Openings measured in the pixels."""
    return np.array(
        [
            mouth_opening_from_pixels(f, identity, lip_points(identity, m, p))
            for f, m, p in zip(frames, mouth, poses, strict=True)
        ]
    )


def test_pixels_follow_the_truth_without_lag_and_bilabials_close():
    close, scores = [], []
    for seed in range(12):
        identity, times, mouth, poses, frames = clip(seed)
        pixels, truth = seen(identity, mouth, poses, frames), mouth_opening(identity, mouth)
        by_lag = [
            np.corrcoef(pixels[3:-3], np.roll(truth, lag)[3:-3])[0, 1] for lag in range(-3, 4)
        ]
        assert int(np.argmax(by_lag)) == 3
        scores.append(np.corrcoef(pixels, truth)[0, 1])
        for phone in talk(seed):
            if phone.symbol in "pbm":
                close.append(
                    pixels[np.abs(times - (phone.start + phone.end) / 2).argmin()] < 1.5 / 128
                )
    assert np.mean(scores) >= 0.985
    assert min(scores) >= 0.96
    assert np.mean(close) >= 0.98


def test_background_never_moves():
    identity, _, _, _, frames = clip(3)
    same = (frames == frames[0]).all(axis=(0, 3))
    assert same[:90, :12].all()
    assert same[:90, -12:].all()
    assert not same[60:110, 40:88].all()
    assert identity.background in who.BACKGROUNDS


def test_same_picture_at_any_size():
    identity = sample_identity(np.random.default_rng(5))
    mouth, pose = np.array(TARGETS["aa"]), Pose(yaw=0.4, tilt=3.0, dx=1.0)
    small, large = (render_face(identity, mouth, pose, size) for size in (96, 384))
    reduced = large.reshape(96, 4, 96, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - small).mean() < 1.5


def test_motion_is_a_function_of_time():
    phones, times = talk(1), np.arange(0.0, 6.0, 0.02)
    fast = np.array(pose_track(np.random.default_rng(2), times, phones))
    slow = np.array(pose_track(np.random.default_rng(2), times[:200:4], phones))
    assert np.array_equal(fast[:200:4], slow)
    blink = fast[:, Pose._fields.index("blink")]
    assert blink.max() > 0.9
    assert np.median(blink) == 0
    assert np.abs(fast[:, :2]).max() <= 1
    assert fast[:, 0].std() > 0.05


def test_a_frame_is_the_same_in_another_process():
    code = (
        "import hashlib, numpy as np\n"
        "from avdiff.corpus.face.presenter import *\n"
        "rng = np.random.default_rng(11); i = sample_identity(rng, 'female')\n"
        "p = pose_track(rng, np.array([1.3]))[0]\n"
        "f = render_face(i, np.linspace(0.2, 0.8, 6), p, 128)\n"
        "print(identity_key(i), hashlib.sha256(f.tobytes()).hexdigest())\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    rng = np.random.default_rng(11)
    identity = sample_identity(rng, "female")
    frame = render_face(
        identity, np.linspace(0.2, 0.8, 6), pose_track(rng, np.array([1.3]))[0], 128
    )
    assert out == [identity_key(identity), hashlib.sha256(frame.tobytes()).hexdigest()]


def test_lip_points_lie_on_the_drawn_lips():
    identity = dataclasses.replace(
        sample_identity(np.random.default_rng(4), "female"), lip_rgb=(0, 0, 255)
    )
    for name, pose in (
        ("aa", Pose()),
        ("ou", Pose(yaw=-0.8, dy=2.0)),
        ("E", Pose(tilt=8.0, dx=-3.0)),
    ):
        mouth = np.array(TARGETS[name])
        frame = render_face(identity, mouth, pose, 512).astype(int)
        points = lip_points(identity, mouth, pose)
        assert points.shape == (20, 2)
        assert points.dtype == np.float32
        lower = (points[9] + points[18]) / 2  # between the outer and inner edge of the lower lip
        upper = (points[3] + points[14]) / 2
        for x, y in (lower, upper):
            red, green, blue = frame[int(y * 512), int(x * 512)]
            assert blue > 150
            assert max(red, green) < 60
        inner = (points[14] + points[18]) / 2
        assert frame[int(inner[1] * 512), int(inner[0] * 512)][2] < 200  # the opening is not lip
        gap = np.linalg.norm(points[18] - points[14])
        assert gap == pytest.approx(float(mouth_opening(identity, mouth)), rel=0.08)


def test_lip_points_move_with_the_head():
    identity, mouth = sample_identity(np.random.default_rng(8)), np.array(TARGETS["E"])
    rest = lip_points(identity, mouth, Pose())
    moved = lip_points(identity, mouth, Pose(dx=12.8, dy=-6.4))
    assert moved == pytest.approx(rest + np.float32((0.1, -0.05)), abs=1e-6)
    assert np.ptp(rest[:, 0]) * 128 > 26  # wide enough to read at 128 pixels
    assert rest[3, 1] < rest[9, 1]  # the upper lip is above the lower


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("hair_style", sorted({*who.HAIR_STYLES["female"], *who.HAIR_STYLES["male"]})),
        ("beard", who.BEARDS),
        ("glasses", who.GLASSES),
        ("hat", who.HATS),
        ("earrings", who.EARRINGS),
        ("clothes", who.CLOTHES),
        ("background", who.BACKGROUNDS),
        ("face_shape", who.FACE_SHAPES),
        ("nose", who.NOSES),
    ],
)
def test_every_attribute_shows(field, values):
    base = dataclasses.replace(
        sample_identity(np.random.default_rng(6), "male"),
        hat="none",
        hair_style="short",
        beard="none",
        glasses="none",
        earrings="none",
        nose_size=1.1,
    )
    frames = {
        value: render_face(dataclasses.replace(base, **{field: value}), np.zeros(6), Pose())
        for value in values
    }
    for one in values:
        for two in values:
            if one < two:
                changed = (np.abs(frames[one].astype(int) - frames[two]).max(-1) > 12).sum()
                assert changed >= 6, (one, two)


def test_visemes_look_different():
    identity = sample_identity(np.random.default_rng(9), "female")
    shots = {
        name: render_face(identity, np.array(target), Pose())[70:110, 40:88].astype(float)
        for name, target in TARGETS.items()
        if name != "PP"
    }  # p and silence are both closed lips
    names = list(shots)
    for index, one in enumerate(names):
        for two in names[index + 1 :]:
            assert np.abs(shots[one] - shots[two]).mean() > 0.8, (one, two)


def test_identities_agree_with_gender_and_split():
    rng = np.random.default_rng(0)
    people = [sample_identity(rng) for _ in range(600)]
    assert len({identity_key(p) for p in people}) == 600
    for person in people:
        assert person.hair_style in who.HAIR_STYLES[person.gender]
        assert person.gender == "male" or person.beard == "none"
        assert person.gender == "female" or person.lipstick == "none"
        told = person.attributes()
        assert set(told) >= {
            "gender",
            "hair_color",
            "hair_style",
            "skin",
            "beard",
            "glasses",
            "hat",
            "clothes",
            "clothes_color",
            "background",
        }
    shares = {split: np.mean([identity_split(p) == split for p in people]) for split in who.SPLITS}
    assert 0.84 < shares["train"] < 0.95
    assert min(shares["val"], shares["test"]) > 0.02
    held = [sample_identity(rng, "male", "test") for _ in range(5)]
    assert {(p.gender, identity_split(p)) for p in held} == {("male", "test")}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sample_identity(np.random.default_rng(0), "robot"), "gender='robot'"),
        (lambda: sample_identity(np.random.default_rng(0), split="dev"), "split='dev'"),
        (
            lambda: render_face(sample_identity(np.random.default_rng(0)), np.zeros(6), Pose(), 4),
            "size=4",
        ),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
