"""The world of a model that learned from the presenter corpus: the caption tables, and what they do
not tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from avdiff.corpus.captions import phrases
from avdiff.models.prompt_domain import PromptDomain, caption_words

ABOUT = (
    "draws one cartoon presenter who says the words in quotes (English, Spanish, French, Hindi, "
    "Italian, Japanese, "
    "Portuguese or Chinese), or one event that sounds: a bouncing ball, a drum, a bell, a tapped "
    "glass, clapping hands "
    "or a knock on a door"
)
# How the Unicode names of letters begin that the eight languages use (ª and º, full-width forms and
# 々 among them).
SCRIPTS = (
    "LATIN",
    "DEVANAGARI",
    "HIRAGANA",
    "KATAKANA",
    "CJK",
    "FEMININE",
    "MASCULINE",
    "FULLWIDTH",
    "HALFWIDTH",
    "IDEOGRAPHIC",
    "MODIFIER",
)
CODES = ("en", "es", "fr", "hi", "it", "ja", "pt", "zh")
FILLER = (
    "the and with who whose that this these those her his their its she they very some one from "
    "for into there are was "
    "then now while which "
    "los las una unos unas del con por que para esta este muy "
    "les des une dans avec sur qui que est elle très ses son "
    "der uno gli nel nella della degli con che per sul sulla molto "
    "dos das uma com que por para numa muito "
    "है हैं और के की का को में से पर एक यह वह"
)
PEOPLE = (
    "woman women man men lady guy presenter person people someone somebody voice girl boy host "
    "hostess anchor "
    "newsreader reporter speaker narrator teacher moderator announcer face character figure "
    "portrait she he "
    "mujer señora presentadora hombre señor presentador alguien voz persona chica chico niña niño "
    "femme dame présentatrice homme monsieur présentateur quelqu voix personne fille garçon "
    "donna signora presentatrice uomo signore presentatore qualcuno voce persona ragazza ragazzo "
    "mulher senhora apresentadora homem senhor apresentador alguém voz pessoa menina menino "
    "महिला औरत आदमी पुरुष कोई आवाज़ व्यक्ति लड़की लड़का "
    "女性 女の人 男性 男の人 誰か 声 人 女 男 女士 女人 女子 先生 男人 男子 有人 声音"
)
OBJECTS = (
    "ball balls marble marbles drum drums drumstick bell bells glass hand hands clap claps "
    "clapping fist door doors "
    "knock knocks knocking "
    "pelota bola canica tambor baqueta campana copa manos palmas mano puerta "
    "balle boule bille tambour baguette cloche verre mains main porte "
    "palla biglia tamburo bacchetta campana bicchiere calice mani mano porta "
    "bola tambor baqueta sino taça copo mãos palmas mão porta "
    "गेंद गोली ढोल घंटी चम्मच गिलास हाथ ताली दरवाज़े दरवाज़ा दस्तक "
    "ボール 玉 太鼓 鐘 グラス 手 拍手 ドア 球 铃 鼓 杯 手 门"
)
ACTIONS = (
    "bounc drop hit fall struck strik beat play ring tap clink clap knock sound "
    "rebot bot golpe toc suen sonar da aplaud llam cae "
    "rebond frapp sonn tap tint applaud toqu tomb "
    "rimbalz colp suon tocc batt bat applaud buss cad "
    "quic bat toc cai soa "
    "उछल गिर चोट बज टकरा ताली दस्तक "
    "跳ね 弾 落ち たた 鳴 打 拍手 ノック 弹 落 敲 响 拍"
)
FOREIGN = (
    "photo photos photograph photographs photography photographic photorealistic realistic "
    "photoreal footage landscape "
    "landscapes scenery mountain mountains ocean sea forest river waterfall beach sunset sunrise "
    "city skyline street "
    "painting watercolor watercolour sketch anime manga 3d render cinematic drone aerial movie "
    "trailer dog cat horse "
    "bird dragon robot car train spaceship castle crowd "
    "foto fotografía fotografia paisaje montaña montañas bosque playa ciudad perro gato "
    "photographie paysage montagne montagnes forêt plage ville chien chat "
    "paesaggio montagna montagne foresta spiaggia città cane gatto "
    "paisagem montanha montanhas floresta praia cidade cachorro cão "
    "तस्वीर फ़ोटो पहाड़ जंगल समुद्र शहर कुत्ता बिल्ली "
    "写真 風景 山脈 海辺 森林 都市 犬 猫 照片 风景 山脉 大海 城市 狗"
)


def presenter_domain() -> PromptDomain:
    """What the presenter knows."""
    vocabulary = {code: " ".join(caption_words(_texts(phrases(code)))) for code in CODES}
    return PromptDomain(ABOUT, vocabulary, FILLER, PEOPLE, OBJECTS, ACTIONS, FOREIGN, SCRIPTS)


def _texts(table: Any) -> Iterator[str]:
    """All texts of a caption table, without their {places}."""
    if isinstance(table, str):
        yield re.sub(r"\{\w*\}", " ", table)
    elif isinstance(table, dict | list):
        for value in table.values() if isinstance(table, dict) else table:
            yield from _texts(value)
