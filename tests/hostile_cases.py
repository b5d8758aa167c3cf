"""Inputs that nobody should give, and a piece of the sentence that each must be answered with."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from avdiff.guidance import Guidance
from avdiff.media.write import write_clip, write_wav
from avdiff.phonetics.track import PhonemeTrack

NAN, INF = math.nan, math.inf
Z = torch.zeros
SIZE = (64, 64)
EMBEDS = {"prompt": None, "prompt_embeds": Z(1, 4, 32), "prompt_attention_mask": torch.ones(1, 4)}
SCRIPT = PhonemeTrack(
    Z(1, 2, dtype=torch.long),
    Z(1, 2, dtype=torch.long),
    Z(1, 20, dtype=torch.long),
    torch.ones(1) > 0,
)

# Arguments of a pipeline call that are changed -> what the ValueError says.
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "exactly one of prompt"),
    "prompt list empty": ({"prompt": []}, "non-empty list"),
    "prompt number": ({"prompt": 7}, "prompt of type int"),
    "prompt bytes": ({"prompt": b"a woman"}, "prompt of type bytes"),
    "prompt tuple": ({"prompt": ("a", "b")}, "prompt of type tuple"),
    "prompt list of numbers": ({"prompt": ["a", 3]}, "list of texts"),
    "prompt blank": ({"prompt": "   "}, "is empty"),
    "prompt one blank": ({"prompt": ["a bird", "\n"]}, "is empty"),
    "prompt and embeddings": ({**EMBEDS, "prompt": "a"}, "exactly one of prompt"),
    "words in Thai": ({"prompt": 'a woman says "สวัสดี"'}, "script that none"),
    "words in Cyrillic": ({"prompt": 'a woman says "привет"'}, "script that none"),
    "words of punctuation": ({"prompt": 'a woman says "!?!"'}, "holds no word"),
    "words without end": ({"prompt": f'a woman says "{"la " * 2000}"'}, "needs at most 4000"),
    "words too long for the clip": (
        {"prompt": 'a woman says "one two three four five six seven"'},
        "fewer words",
    ),
    "negative number": ({"negative_prompt": 3}, "negative_prompt=3"),
    "negative empty list": ({"negative_prompt": []}, r"negative_prompt=\[\]"),
    "negative of numbers": ({"negative_prompt": [1]}, "negative_prompt="),
    "negative count": ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 texts"),
    "language unknown": ({"prompt": 'a "yes"', "language": "xx"}, "xx"),
    "language number": ({"language": 5}, "language=5"),
    "seconds zero": ({"seconds": 0}, "seconds=0"),
    "seconds negative": ({"seconds": -1}, "seconds=-1"),
    "seconds NaN": ({"seconds": NAN}, "seconds=nan"),
    "seconds infinite": ({"seconds": INF}, "seconds=inf"),
    "seconds text": ({"seconds": "3"}, "seconds='3'"),
    "seconds list": ({"seconds": [1]}, r"seconds=\[1\]"),
    "seconds bool": ({"seconds": True}, "seconds=True"),
    "seconds of a week": ({"seconds": 604800}, "at most 3600"),
    "seconds huge": ({"seconds": 10**400}, "seconds=1000"),
    "both lengths": ({"seconds": 1.0, "num_frames": 25}, "give one of them"),
    "frames even": ({"seconds": None, "num_frames": 8}, "num_frames=8"),
    "frames zero": ({"seconds": None, "num_frames": 0}, "num_frames=0"),
    "frames negative": ({"seconds": None, "num_frames": -25}, "num_frames=-25"),
    "frames a billion": ({"seconds": None, "num_frames": 10**9 + 1}, "at most 3600 s"),
    "frames real": ({"seconds": None, "num_frames": 25.0}, "num_frames=25.0"),
    "frames text": ({"seconds": None, "num_frames": "25"}, "num_frames='25'"),
    "fps zero": ({"frame_rate": 0}, "fps=0"),
    "fps negative": ({"frame_rate": -25}, "fps=-25"),
    "fps NaN": ({"frame_rate": NAN}, "fps=nan"),
    "fps infinite": ({"frame_rate": INF}, "fps=inf"),
    "fps huge": ({"frame_rate": 1e9}, "fps=1000000000"),
    "fps text": ({"frame_rate": "fast"}, "fps=fast"),
    "fps none": ({"frame_rate": None}, "fps=None"),
    "fps list": ({"frame_rate": [25]}, r"fps=\[25\]"),
    "fps a ratio by zero": ({"frame_rate": "25/0"}, "fps=25/0"),
    "fps bomb": ({"frame_rate": "1e99999999"}, "fps=1e99999999"),
    "height odd": ({"height": 100}, "height=100"),
    "width odd": ({"width": 65}, "width=65"),
    "height zero": ({"height": 0}, "height=0"),
    "height negative": ({"height": -64}, "height=-64"),
    "width real": ({"width": 64.0}, "width=64.0"),
    "width text": ({"width": "64"}, "width='64'"),
    "height none": ({"height": None}, "height=None"),
    "height huge": ({"height": 64 * 10**6}, "at most 16384"),
    "more than memory": ({"height": 16384, "width": 16384, "seconds": 60}, "this machine has"),
    "steps zero": ({"num_inference_steps": 0}, "num_inference_steps=0"),
    "steps negative": ({"num_inference_steps": -4}, "num_inference_steps=-4"),
    "steps real": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
    "steps text": ({"num_inference_steps": "8"}, "num_inference_steps='8'"),
    "steps bool": ({"num_inference_steps": True}, "num_inference_steps=True"),
    "steps a billion": ({"num_inference_steps": 10**9}, "at most 10000"),
    "guidance huge": ({"guidance_scale": 1e30}, "guidance_scale=1e"),
    "guidance NaN": ({"guidance_scale": NAN}, "guidance_scale=nan"),
    "guidance infinite": ({"audio_guidance_scale": -INF}, "audio_guidance_scale=-inf"),
    "guidance text": ({"audio_guidance_scale": "high"}, "audio_guidance_scale='high'"),
    "guidance list": ({"guidance_scale": [2, 3]}, r"guidance_scale=\[2, 3\]"),
    "guidance record": ({"guidance": 4.0}, "guidance=4.0"),
    "clips zero": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
    "clips negative": ({"num_videos_per_prompt": -1}, "num_videos_per_prompt=-1"),
    "clips real": ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt=1.5"),
    "clips a million": ({"num_videos_per_prompt": 10**6}, "at most 1000"),
    "nothing wanted": ({"generate_video": False, "generate_audio": False}, "nothing is left"),
    "generator number": ({"generator": 42}, "generator=42"),
    "generator text": ({"generator": "seed"}, "generator='seed'"),
    "generator list of numbers": ({"generator": [1]}, "generator=1"),
    "generators too many": ({"generator": [torch.Generator()] * 3}, "one generator for each"),
    "latents shape": ({"latents": Z(1, 7, 64)}, r"latents of shape \(1, 7, 64\)"),
    "latents flat": ({"latents": Z(5)}, r"latents of shape \(5,\)"),
    "latents NaN": ({"latents": Z(1, 4, 64) * NAN}, "latents: holds NaN"),
    "latents infinite": ({"audio_latents": Z(1, 5, 48) + INF}, "audio_latents: holds NaN or inf"),
    "latents whole": ({"latents": Z(1, 4, 64, dtype=torch.long)}, "latents of torch.int64"),
    "latents list": ({"latents": [1.0]}, "latents of type list"),
    "latents array": ({"audio_latents": np.zeros((1, 5, 48))}, "audio_latents of type ndarray"),
    "embeddings without mask": ({**EMBEDS, "prompt_attention_mask": None}, "needs both or neither"),
    "mask without embeddings": (
        {"prompt_attention_mask": torch.ones(1, 4)},
        "needs both or neither",
    ),
    "mask shape": (
        {**EMBEDS, "prompt_attention_mask": torch.ones(1, 9)},
        "prompt_attention_mask of shape",
    ),
    "mask list": (
        {**EMBEDS, "prompt_attention_mask": [1, 1, 1, 1]},
        "prompt_attention_mask of shape",
    ),
    "embeddings width": ({**EMBEDS, "prompt_embeds": Z(1, 4, 31)}, r"needs \(batch, length, 32\)"),
    "embeddings flat": ({**EMBEDS, "prompt_embeds": Z(4, 32)}, "prompt_embeds of shape"),
    "embeddings NaN": ({**EMBEDS, "prompt_embeds": Z(1, 4, 32) * NAN}, "prompt_embeds: holds NaN"),
    "embeddings of nothing": ({**EMBEDS, "prompt_embeds": Z(0, 4, 32)}, "prompt_embeds of shape"),
    "negative embeddings alone": ({"negative_prompt_embeds": Z(1, 4, 32)}, "needs both or neither"),
    "image path": ({"image": "face.png"}, "image of type str"),
    "image flat": ({"image": Z(64, 64)}, r"image of shape \(64, 64\)"),
    "image grey": ({"image": Z(1, 64, 64)}, r"image of shape \(1, 64, 64\)"),
    "image with alpha": ({"image": Z(4, 64, 64)}, r"image of shape \(4, 64, 64\)"),
    "image of a pixel": ({"image": Z(3, 1, 1)}, r"image of shape \(3, 1, 1\)"),
    "image last": ({"image": Z(64, 64, 3)}, r"image of shape \(64, 64, 3\)"),
    "image size": ({"image": Z(3, 128, 128)}, "needs 3 channels and 64 x 64"),
    "image bytes": ({"image": Z(3, 64, 64, dtype=torch.uint8)}, "image of torch.uint8"),
    "image to 255": ({"image": Z(3, 64, 64) + 255}, "needs values from -1 to 1"),
    "image NaN": ({"image": Z(3, 64, 64) + NAN}, "image: holds NaN"),
    "image and video": ({"image": Z(3, *SIZE), "video": Z(1, 3, 5, *SIZE)}, "both given"),
    "video path": ({"video": "a.mp4"}, "video of type str"),
    "video shape": ({"video": Z(3, 5, 64, 64)}, r"video of shape \(3, 5, 64, 64\)"),
    "video channels": ({"video": Z(1, 1, 5, *SIZE)}, r"video of shape \(1, 1, 5, 64, 64\)"),
    "video frames even": ({"video": Z(1, 3, 4, *SIZE)}, "video of 4 frames"),
    "video size": ({"video": Z(1, 3, 5, 96, 64)}, "needs 3 channels and 64 x 64"),
    "video NaN": ({"video": Z(1, 3, 5, *SIZE) + NAN}, "video: holds NaN"),
    "video of nothing": ({"video": Z(1, 3, 0, *SIZE)}, "video of"),
    "audio path": ({"audio": "a.wav"}, "audio of type str"),
    "audio flat": ({"audio": Z(4800)}, r"audio of shape \(4800,\)"),
    "audio stereo": ({"audio": Z(1, 2, 4800)}, r"audio of shape \(1, 2, 4800\)"),
    "audio empty": ({"audio": Z(1, 1, 0)}, r"audio of shape \(1, 1, 0\)"),
    "audio NaN": ({"audio": Z(1, 1, 4800) + NAN}, "audio: holds NaN"),
    "audio 16 bit": ({"audio": Z(1, 1, 4800, dtype=torch.int16)}, "audio of torch.int16"),
    "audio too loud": ({"audio": Z(1, 1, 4800) + 3e4}, "audio with values from"),
    "script text": ({"phoneme_track": "hello"}, "phoneme_track='hello'"),
    "attention options": ({"attention_kwargs": 3}, "attention_kwargs=3"),
    "callback": ({"callback_on_step_end": 3}, "callback_on_step_end=3"),
    "callback names": (
        {"callback_on_step_end_tensor_inputs": ["loss"]},
        "callback_on_step_end_tensor_inputs",
    ),
    "output type": ({"output_type": "gif"}, "output_type='gif'"),
    "output type list": ({"output_type": ["np"]}, r"output_type=\['np'\]"),
}

# Records that are wrong when they are made.
RECORDS: dict[str, tuple[Any, str]] = {
    "rescale": (lambda: Guidance(rescale=2.0), "rescale=2.0"),
    "interval": (lambda: Guidance(interval=(0.8, 0.2)), r"interval=\(0.8, 0.2\)"),
}

# Arguments of `avdiff generate` -> what the line on stderr says. The files are made by
# `make_files`.
COMMANDS: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], "either a prompt or --prompts"),
    "both": (["a", "--prompts", "good.jsonl"], "either a prompt or --prompts"),
    "empty": (["  "], "prompt: is empty"),
    "two prompts": (["a", "b"], "unexpected extra argument"),
    "lora missing": (["a", "--lora", "none"], "lora=none: cannot be loaded"),
    "lora of text": (["a", "--lora", "words.txt"], "lora=words.txt: cannot be loaded"),
    "suffix": (["a", "-o", "x.avi"], "needs a name that ends in"),
    "no suffix": (["a", "-o", "x"], "needs a name that ends in"),
    "no folder": (["a", "-o", "none/x.mp4"], "a folder that exists"),
    "into a folder": (["a", "-o", "folder.mp4"], "needs a file name"),
    "below a file": (["a", "-o", "words.txt/x.mp4"], "a folder that exists"),
    "unwritable": (["a", "-o", "/proc/x.mp4"], "cannot be written"),
    "name too long": (["a", "-o", "x" * 300 + ".mp4"], "File name too long"),
    "loop of links": (["a", "-o", "loop/x.mp4"], "a folder that exists"),
    "NUL in a name": (["a", "-o", "x\0.mp4"], "NUL"),
    "seconds NaN": (["a", "--seconds", "nan"], "seconds=nan"),
    "seconds zero": (["a", "--seconds", "0"], "seconds=0"),
    "seconds huge": (["a", "--seconds", "1e9"], "needs a duration"),
    "seconds word": (["a", "--seconds", "long"], "'--seconds'"),
    "fps zero": (["a", "--fps", "0"], "fps=0"),
    "fps word": (["a", "--fps", "fast"], "fps=fast"),
    "fps of two big numbers": (["a", "--fps", "30000000001/1000000007"], "smaller whole numbers"),
    "steps zero": (["a", "--steps", "0"], "num_inference_steps=0"),
    "steps word": (["a", "--steps", "many"], "'--steps'"),
    "steps a billion": (["a", "--steps", "1000000000"], "at most 10000"),
    "height": (["a", "--height", "100"], "height=100"),
    "width zero": (["a", "--width", "0"], "width=0"),
    "size huge": (["a", "--width", "9999999936"], "at most 16384"),
    "seed negative": (["a", "--seed", "-1"], "seed=-1"),
    "seed huge": (["a", "--seed", str(2**70)], "seed="),
    "seed word": (["a", "--seed", "luck"], "'--seed'"),
    "guidance huge": (["a", "--guidance", "1e30"], "guidance_scale=1e+30"),
    "guidance NaN": (["a", "--audio-guidance", "nan"], "audio_guidance_scale=nan"),
    "language": (['a "yes"', "--language", "klingon"], "klingon"),
    "words in Thai": (['a woman says "สวัสดี"'], "script that none"),
    "unknown option": (["a", "--colour", "red"], "No such option"),
    "option without value": (["a", "--seed"], "requires an argument"),
    "device": (["a", "--device", "abacus"], "device=abacus"),
    "device number": (["a", "--device", "cuda:99"], "device=cuda:99"),
    "device that has no place": (["a", "--device", "meta"], "device=meta"),
    "nothing wanted": (["a", "--no-video", "--no-audio"], "nothing is left"),
    "image missing": (["a", "--image", "none.png"], "image=none.png"),
    "image folder": (["a", "--image", "folder.mp4"], "image=folder.mp4"),
    "image of words": (["a", "--image", "words.txt"], "image=words.txt"),
    "image corrupt": (["a", "--image", "corrupt.png"], "image=corrupt.png"),
    "image cut": (["a", "--image", "cut.png"], "image=cut.png"),
    "image empty": (["a", "--image", "empty"], "image=empty"),
    "image bomb": (["a", "--image", "bomb.png"], "image=bomb.png"),
    "image loop": (["a", "--image", "loop"], "image=loop"),
    "audio missing": (["a", "--audio", "none.wav"], "none.wav: no such file"),
    "audio folder": (["a", "--audio", "folder.mp4"], "is a folder"),
    "audio of words": (["a", "--audio", "words.txt"], "path=words.txt"),
    "audio without samples": (["a", "--audio", "silent.wav"], "silent.wav"),
    "audio of a film without sound": (["a", "--audio", "mute.mp4"], "has no sound in it"),
    "audio with a false rate": (["a", "--audio", "rate0.wav"], "rate0.wav"),
    "audio is a picture": (["a", "--audio", "dot.png"], "has no sound in it"),
    "video missing": (["a", "--video", "none.mp4"], "none.mp4: no such file"),
    "video cut": (["a", "--seconds", "0.96", "--video", "cut.mp4"], "cut.mp4"),
    "video cut to its head": (["a", "--video", "head.mp4"], "head.mp4"),
    "video is sound": (["a", "--video", "tone.wav"], "has no pictures in it"),
    "video of noise": (["a", "--video", "noise.mp4"], "noise.mp4"),
    "video is a playlist": (["a", "--video", "list.m3u8"], "list.m3u8"),
    "two given": (["a", "--audio", "tone.wav", "--video", "mute.mp4"], "nothing is left"),
    "prompts missing": (["--prompts", "none.jsonl"], "no such file"),
    "prompts folder": (["--prompts", "folder.mp4"], "no such file"),
    "prompts loop": (["--prompts", "loop"], "no such file"),
    "prompts empty": (["--prompts", "empty"], "holds no line"),
    "prompts of words": (["--prompts", "words.txt"], "words.txt, line 1: is not JSON"),
    "prompts not UTF-8": (["--prompts", "latin1.jsonl"], "needs UTF-8"),
    "prompts binary": (["--prompts", "tone.wav"], "tone.wav"),
    "prompts into a file": (["--prompts", "good.jsonl", "-o", "words.txt"], "needs a folder"),
    "prompts below a file": (["--prompts", "good.jsonl", "-o", "words.txt/out"], "words.txt"),
}

# Lines of a prompts file -> what the line on stderr says.
LINES: dict[str, tuple[str, str]] = {
    "unknown key": ('{"prompt": "a", "colour": "red"}', "line 1: needs an object with keys among"),
    "no prompt": ('{"seed": 1}', "prompt: is empty"),
    "prompt null": ('{"prompt": null}', "line 1: prompt=None"),
    "prompt number": ('{"prompt": 3}', "line 1: prompt=3"),
    "prompt blank": ('{"prompt": " "}', "prompt: is empty"),
    "list": ('["a"]', "needs an object"),
    "text": ('"a"', "needs an object"),
    "null": ("null", "needs an object"),
    "cut": ('{"prompt": "a', "is not JSON"),
    "second line": ('{"prompt": "a"}\n{', "line 2: is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "seed text": ('{"prompt": "a", "seed": "1"}', "seed='1'"),
    "seed real": ('{"prompt": "a", "seed": 1.5}', "seed=1.5"),
    "seed bool": ('{"prompt": "a", "seed": true}', "seed=True"),
    "seed negative": ('{"prompt": "a", "seed": -1}', "seed=-1"),
    "seconds text": ('{"prompt": "a", "seconds": "3"}', "seconds='3'"),
    "seconds NaN": ('{"prompt": "a", "seconds": NaN}', "seconds=nan"),
    "seconds bool": ('{"prompt": "a", "seconds": true}', "seconds=True"),
    "output number": ('{"prompt": "a", "output": 5}', "output=5"),
    "output outside": ('{"prompt": "a", "output": "../../x.mp4"}', "needs a name inside"),
    "output absolute": ('{"prompt": "a", "output": "/tmp/x.mp4"}', "needs a name inside"),
    "output twice": (
        '{"prompt": "a", "output": "x.mp4"}\n{"prompt": "b", "output": "x.mp4"}',
        "asked for twice",
    ),
    "output suffix": ('{"prompt": "a", "output": "x.exe"}', "needs a name that ends in"),
    "output in no folder": ('{"prompt": "a", "output": "sub/x.mp4"}', "a folder that exists"),
    "image list": ('{"prompt": "a", "image": ["x"]}', "image="),
    "language": ('{"prompt": "a \\"yes\\"", "language": "xx", "seconds": null}', "xx"),
}


def make_files(folder: Path) -> None:
    """The files that COMMANDS names."""
    rng = np.random.default_rng(0)
    (folder / "words.txt").write_text("neither picture nor sound")
    (folder / "empty").touch()
    (folder / "folder.mp4").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "good.jsonl").write_text('{"prompt": "a bird"}\n')
    (folder / "latin1.jsonl").write_bytes('{"prompt": "una señora"}'.encode("latin1"))
    (folder / "noise.mp4").write_bytes(rng.bytes(5000))
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    picture = folder / "whole.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(picture)
    content = picture.read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "corrupt.png").write_bytes(content[:60] + b"\0" * 400 + content[460:])
    huge = content[:16] + (60_000).to_bytes(4, "big") * 2 + content[24:]
    (folder / "bomb.png").write_bytes(huge)
    picture.unlink()
    write_wav(folder / "tone.wav", 0.1 * np.ones((1, 4800)), 24000)
    sound = (folder / "tone.wav").read_bytes()
    (folder / "rate0.wav").write_bytes(sound[:24] + bytes(4) + sound[28:])
    start = sound.index(b"data")
    (folder / "silent.wav").write_bytes(sound[: start + 4] + bytes(4))
    frames = rng.integers(0, 255, (25, 64, 64, 3), dtype=np.uint8)
    write_clip(folder / "mute.mp4", frames, Fraction(25))
    film = (folder / "mute.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(film[: len(film) * 2 // 3])
    (folder / "head.mp4").write_bytes(film[:200])


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file in place."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
