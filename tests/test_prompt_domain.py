"""PromptDomain: everything that the presenter was taught passes, what lies beyond it is answered by
a sentence.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from tiny import tiny_pipeline

from avdiff import PRESENTER
from avdiff.corpus.captions import event_captions, parse_prompt, speech_captions
from avdiff.corpus.domain import CODES, presenter_domain
from avdiff.corpus.events.scene import sample_event
from avdiff.corpus.face.identity import sample_identity
from avdiff.files import BUNDLED
from avdiff.models.prompt_domain import PromptDomain
from avdiff.pipelines.pipeline_av import AVDiffPipeline

HELDOUT = BUNDLED / "prompts" / "heldout.jsonl"
WORDS = {
    "en": "good morning",
    "es": "buenos días",
    "fr": "bonjour à tous",
    "hi": "नमस्ते",
    "it": "buongiorno a tutti",
    "ja": "おはようございます",
    "pt": "bom dia",
    "zh": "大家早上好",
}


@pytest.fixture(scope="module")
def prompt_domain() -> PromptDomain:
    return presenter_domain()


def told(prompt_domain: PromptDomain) -> dict:
    """What a world declares, without what diffusers adds."""
    return {
        key: value
        for key, value in json.loads(prompt_domain.to_json_string()).items()
        if not key.startswith("_")
    }


def faults(prompt_domain: PromptDomain, prompts: list[str]) -> dict[str, str]:
    found = {prompt: prompt_domain.fault(*parse_prompt(prompt)) for prompt in prompts}
    return {prompt: fault for prompt, fault in found.items() if fault}


def test_every_held_out_prompt_passes(prompt_domain) -> None:
    prompts = [
        json.loads(line)["prompt"] for line in HELDOUT.read_text(encoding="utf8").splitlines()
    ]
    assert len(prompts) == 232 and not faults(prompt_domain, prompts)


@pytest.mark.parametrize("language", CODES)
def test_every_form_of_caption_passes(prompt_domain, language: str) -> None:
    rng = np.random.default_rng(7)
    prompts: list[str] = []
    for _ in range(150):
        prompts += speech_captions(
            sample_identity(rng).attributes(), WORDS[language], language, rng
        )
        prompts += event_captions(sample_event(rng, 3.0), language, rng)
    assert len(set(prompts)) > 400 and not faults(prompt_domain, prompts)


@pytest.mark.parametrize(
    "prompt",
    [
        'A cheerful young teacher with red hair says "hello"',
        ('a person in a hoodie shouts: "stop"'),
        '"just words"',
        "A bell is ringing",
        "someone is clapping",
        ("a wooden ball is falling and bounces twice on the floor"),
        'The lady in the green jacket whispers "come here"',
        ('A newsreader says "it is raining in Paris"'),
        "un tambor suena tres veces",
        "太鼓が鳴る",
        "有人敲门",
        'Die Frau (a woman) says "guten Tag"',
    ],
)
def test_free_wordings_pass(prompt_domain, prompt: str) -> None:
    assert not faults(prompt_domain, [prompt])


OUTSIDE = [
    "a landscape with mountains at dawn",
    "a photograph of a woman",
    ('A photo of a woman who says "hello"'),
    "a woman with red hair",
    "a man in a suit",
    "an astronaut rides a horse on the moon",
    ("a cat plays the piano"),
    "waves crash against the rocks",
    "a red sports car drifts around a corner",
    'A dog says "woof"',
    'A robot says "I am a machine"',
    "aerial view of a city at night",
    ("oil painting of a bell in a tower"),
    "un paisaje con montañas",
    "une forêt en automne",
    "un castello sul lago",
    ("uma praia ao pôr do sol"),
    "पहाड़ों पर सूर्योदय",
    "富士山の風景",
    "一只猫在弹钢琴",
    "Женщина говорит",
    'Женщина говорит "привет"',
    'A woman says "สวัสดี"',
    'A man says "привет"',
    'A woman says "안녕하세요"',
    'A man says "مرحبا"',
    'A woman says "γειά σου"',
    "asdf qwer zxcv",
    "fireworks over the harbour",
    ("a busy street in Tokyo, cinematic"),
    "a glass skyscraper in the rain",
    "someone is cooking pasta in a kitchen",
    ("a crowd cheers in a stadium"),
    'A jazz band on stage plays while a singer in sequins croons "love"',
    "a ball",
    ("3D render of a castle"),
    "a close-up of a portrait",
    "🎉🎉🎉",
    "12345",
    "Eine Frau mit rotem Haar",
    "a bell tower",
]


def test_what_lies_outside_is_refused_in_one_sentence(prompt_domain) -> None:
    assert len(OUTSIDE) >= 40
    for prompt in OUTSIDE:
        with pytest.raises(
            ValueError, match=r"this model draws one .*--model.*--skip-domain-check"
        ) as caught:
            prompt_domain.check(prompt, *parse_prompt(prompt))
        assert "\n" not in str(caught.value) and prompt[:40] in str(caught.value)


def test_given_sound_needs_no_words(prompt_domain) -> None:
    assert prompt_domain.fault("A woman with red hair", None) and not prompt_domain.fault(
        "A woman with red hair", None, given=True
    )


def test_the_embedded_model_declares_it(prompt_domain) -> None:
    assert told(PromptDomain.from_pretrained(Path(PRESENTER) / "prompt_domain")) == told(
        prompt_domain
    )
    assert json.loads((Path(PRESENTER) / "model_index.json").read_text())["prompt_domain"] == [
        "avdiff",
        "PromptDomain",
    ]


def test_pipeline_carries_and_asks_its_world(prompt_domain, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe(
        "mountains", num_inference_steps=1, seconds=0.2, height=64, width=64
    )  # no world: nothing is refused
    pipe.register_modules(prompt_domain=prompt_domain)
    pipe.save_pretrained(tmp_path)
    pipe = AVDiffPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert told(pipe.prompt_domain) == told(prompt_domain)
    fast = dict(num_inference_steps=1, height=64, width=64, output_type="latent")
    with pytest.raises(ValueError, match="asks for 'mountains'"):
        pipe(["a drum is struck once", "mountains"], seconds=0.2, **fast)
    pipe.transformer.add_adapter(
        LoraConfig(r=1, target_modules=["to_q"])
    )  # which may have learned to draw more
    assert pipe("mountains", seconds=0.2, **fast).frames is not None
    pipe.transformer.delete_adapters("default")
    assert pipe("mountains", check_prompt=False, seconds=0.2, **fast).frames is not None
    assert pipe('a lady says "yes"', **fast).frames is not None
