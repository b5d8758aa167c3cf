"""What the voices of a speech bank say: sentences from templates, digit strings, and strings of
frequent words.

Templates bring natural rhythm, digits a small vocabulary to measure with, frequent words all sounds
of a language.
"""

from __future__ import annotations

import numpy as np

from avdiff.g2p.lexicon import load_lexicon
from avdiff.g2p.numbers import cardinal

SHARES = {"template": 0.5, "digits": 0.15, "words": 0.35}
WORDS_FROM = 2000  # most frequent words of the lexicon to draw from
_SPACELESS = ("ja", "zh")
TRAINS = ("train", "tren", "treno", "trem", "電車", "火车")  # they leave at an hour of the clock

# {n} a number in words; {thing} {place} {name} {color} {kind} {day} {do} from the lists below.
TEMPLATES: dict[str, str] = {
    "en": "can you see the {color} {thing}?|please {do} the {thing}|the {thing} is {color}|where is the {place}?|"
    "hello, my name is {name}|{name} went to the {place} yesterday|it costs {n} dollars|what a {kind} {thing}!|"
    "we have {n} books and {n} cups|the train leaves at {n}|see you on {day}|thank you very much, {name}|"
    "today is a {kind} day|turn left after the {place}|I think the {kind} {thing} is yours|do you want to {do} it now?",
    "es": "¿puedes ver {thing} de {name}?|{do} {thing} por favor|{thing} es {color}|¿dónde está {place}?|"
    "hola, me llamo {name}|{name} fue a ver {place} ayer|cuesta {n} euros|tenemos {n} libros y {n} vasos|"
    "el tren sale a las {n}|nos vemos el {day}|muchas gracias, {name}|hoy es un día {kind}|gira después de ver {place}",
    "fr": "pouvez-vous voir {thing}?|{do} {thing} s'il vous plaît|{thing} est {color}|où est {place}?|"
    "salut, je m'appelle {name}|{name} a vu {place} hier|ça coûte {n} euros|nous avons {n} livres et {n} verres|"
    "le train part à {n} heures|à {day}, {name}|merci beaucoup, {name}|aujourd'hui, il fait très {kind}",
    "hi": "क्या आप {thing} देख सकते हैं?|कृपया {thing} {do}|{thing} {color} है|{place} कहाँ है?|नमस्ते, मेरा नाम {name} है|"
    "{name} कल {place} गया|इसकी कीमत {n} रुपये है|हमारे पास {n} किताबें हैं|{day} को मिलते हैं|बहुत धन्यवाद, {name}|"
    "आज बहुत {kind} दिन है|मुझे {n} सेब चाहिए",
    "it": "puoi vedere {thing}?|{do} {thing} per favore|{thing} è {color}|dov'è {place}?|ciao, mi chiamo {name}|"
    "{name} ha visto {place} ieri|costa {n} euro|abbiamo {n} libri e {n} tazze|il treno parte alle {n}|"
    "ci vediamo {day}|grazie mille, {name}|oggi è un giorno {kind}|gira a sinistra dopo {place}",
    "ja": "{thing}が見えますか|{thing}を{do}ください|この{thing}は{color}です|{place}はどこですか|"
    "こんにちは、私は{name}です|{name}さんは昨日{place}に行きました|これは{n}円です|本が{n}冊あります|電車は{n}時に出ます|{day}に会いましょう|"
    "ありがとうございます、{name}さん|今日は{kind}日です",
    "pt": "você pode ver {thing}?|{do} {thing} por favor|{thing} é {color}|onde fica {place}?|olá, meu nome é {name}|"
    "{name} viu {place} ontem|custa {n} reais|temos {n} livros e {n} copos|o trem sai às {n}|até {day}|"
    "muito obrigado, {name}|hoje é um dia {kind}|vire à esquerda depois de ver {place}",
    "zh": "你能看见那个{thing}吗？|请{do}这个{thing}|这个{thing}是{color}的|{place}在哪里？|你好，我叫{name}|"
    "{name}昨天去了{place}|这个要{n}块钱|我们有{n}本书|火车{n}点开|{day}见|非常感谢，{name}|今天是{kind}的一天",
}
LISTS: dict[str, dict[str, str]] = {
    "en": {
        "thing": "ball bicycle camera chair shirt boat cake picture window box phone garden mirror jacket spoon",
        "place": "school museum bakery beach park market station theatre office village",
        "name": "Anna Peter Maria John David Sophie Michael Emma George Julia",
        "color": "red blue green white black brown pink yellow purple orange",
        "kind": "big small lovely strange beautiful perfect quiet funny wonderful cheap",
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "do": "open close show move clean paint keep fix bring wash",
    },
    "es": {
        "thing": "el_libro el_zapato el_coche la_puerta la_mesa el_vaso la_silla el_reloj la_camisa el_barco la_llave",
        "place": "el_parque el_colegio el_mercado el_museo la_playa la_estación el_teatro la_farmacia el_hospital",
        "name": "María Carmen Miguel David Lucía Javier Elena Pablo Sofía Antonio",
        "color": "grande verde azul gris marrón fuerte amable interesante",
        "kind": "bonito extraño tranquilo perfecto difícil maravilloso largo",
        "day": "lunes martes miércoles jueves viernes sábado domingo",
        "do": "abre cierra mira mueve limpia pinta lava trae",
    },
    "fr": {
        "thing": "le_livre la_porte le_chapeau la_voiture le_téléphone la_chaise le_vélo la_fenêtre le_bateau la_table",
        "place": "le_port le_marché le_théâtre la_gare le_musée la_plage l'école le_stade la_boulangerie",
        "name": "Pierre Lucie Michel Jean Camille Julien Sophie Nicolas Chloé Antoine",
        "color": "rouge jaune drôle magnifique étrange utile célèbre propre",
        "kind": "beau chaud froid bon sombre doux mauvais",
        "day": "lundi mardi mercredi jeudi vendredi samedi dimanche",
        "do": "ouvrez fermez regardez gardez lavez montrez prenez",
    },
    "hi": {
        "thing": "फूल कपड़ा जूता दरवाज़ा मकान कमरा पानी खाना बर्तन चश्मा",
        "place": "बाज़ार मंदिर स्टेशन विद्यालय अस्पताल बगीचा समुद्र दफ़्तर",
        "name": "राम सीता मीना रवि अनिल गीता सुनील पूजा",
        "color": "लाल नीला पीला हरा सफ़ेद काला गुलाबी भूरा",
        "kind": "अच्छा अजीब सुंदर शांत लंबा खुशी",
        "day": "सोमवार मंगलवार बुधवार गुरुवार शुक्रवार शनिवार रविवार",
        "do": "खोलिए देखिए लाइए दिखाइए रखिए दीजिए",
    },
    "it": {
        "thing": "il_libro la_porta il_cappello il_pallone la_sedia il_quadro la_macchina il_vaso la_camicia la_barca",
        "place": "il_parco il_negozio la_scuola il_museo la_spiaggia la_stazione il_teatro la_farmacia",
        "name": "Davide Sofia Giulia Marco Alberto Chiara Francesca Matteo",
        "color": "verde grande blu marrone forte interessante gentile celeste",
        "kind": "strano bello tranquillo perfetto lungo difficile meraviglioso",
        "day": "lunedì martedì mercoledì giovedì venerdì sabato domenica",
        "do": "apri chiudi guarda sposta pulisci lava porta",
    },
    "ja": {
        "thing": "鏡 帽子 窓 机 電話 写真 時計 椅子 自転車 花 箱 本",
        "place": "駅 公園 市場 学校 病院 海 図書館 町",
        "name": "花子 高橋 田中 鈴木 山田 佐藤 中村 小林",
        "color": "赤 青 黒 白 茶色 緑 黄色 紫",
        "kind": "楽しい 難しい 静かな 大切な 新しい 長い 寒い",
        "day": "月曜日 火曜日 水曜日 木曜日 金曜日 土曜日 日曜日",
        "do": "開けて 見せて 取って 持って 洗って 動かして",
    },
    "pt": {
        "thing": "o_livro a_porta o_copo o_barco a_cadeira o_carro a_camisa o_chapéu a_mesa o_relógio",
        "place": "o_castelo o_mercado a_escola o_museu a_praia a_estação o_teatro a_farmácia",
        "name": "Maria Clara João Pedro Ana Lucas Beatriz Rafael",
        "color": "verde azul grande cinza forte marrom interessante simples",
        "kind": "pequeno bonito estranho tranquilo perfeito longo difícil",
        "day": "segunda terça quarta quinta sexta sábado domingo",
        "do": "abra feche veja mova limpe pinte traga",
    },
    "zh": {
        "thing": "椅子 电话 镜子 相机 帽子 杯子 门 窗户 桌子 手表 箱子",
        "place": "学校 公园 市场 医院 车站 图书馆 海边 商店",
        "name": "刘洋 王芳 李娜 张伟 陈静 赵磊 杨明 周丽",
        "color": "红色 蓝色 黑色 白色 紫色 绿色 黄色 灰色",
        "kind": "开心 奇怪 美丽 安静 重要 特别",
        "day": "星期一 星期二 星期三 星期四 星期五 星期六 星期天",
        "do": "打开 看看 拿走 洗洗 检查 画",
    },
}


def draw_sentence(rng: np.random.Generator, language: str) -> str:
    """One sentence of a language, numbers written out.

    Args:
        language: one of the eight codes.
    """
    kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    if kind == "digits":
        return _join(
            [cardinal(int(d), language) for d in rng.integers(0, 10, rng.integers(3, 7))], language
        )
    if kind == "words":
        return _join(_frequent(rng, language), language)
    templates = TEMPLATES[language].split("|")
    return _fill(templates[int(rng.integers(len(templates)))], rng, language)


def _fill(template: str, rng: np.random.Generator, language: str) -> str:
    """Replace each placeholder by a draw of its own."""
    while "{n}" in template:
        highest = 13 if any(train in template for train in TRAINS) else 100
        template = template.replace("{n}", cardinal(int(rng.integers(2, highest)), language), 1)
    for name, words in LISTS[language].items():
        while "{" + name + "}" in template:
            word = str(rng.choice(words.split())).replace("_", " ")
            template = template.replace("{" + name + "}", word, 1)
    return template


def _frequent(rng: np.random.Generator, language: str) -> list[str]:
    """Two to six frequent words of at least two letters (one in Chinese)."""
    words = _common_words(language)
    return [
        words[int(i)]
        for i in rng.integers(
            0, len(words), rng.integers(2, 7 if language not in _SPACELESS else 5)
        )
    ]


def _common_words(language: str) -> list[str]:
    shortest = 1 if language in _SPACELESS else 2
    common = list(load_lexicon(language).words)[:WORDS_FROM]
    return [word for word in common if len(word) >= shortest and word[0].isalpha()]


def _join(words: list[str], language: str) -> str:
    """Words in a row; Japanese and Chinese ones need a mark between them to stay apart."""
    return {"ja": "、", "zh": "，"}.get(language, " ").join(words)
