"""Captions of training images: templates, synonyms, style words, category words, lists."""

from __future__ import annotations

from random import Random

from common import FAMILIES, STYLE_WORDS, Concept

PLAIN = (
    "{s}", "{a}", "the {s}", "emoji of {a}", "a picture of {a}", "a drawing of {a}", "one small {s}",
    "an icon of {a}", "a photo of {a}", "an image of {a}", "a nice {s}", "this is {a}",
)  # fmt: skip
STYLED = (
    "{a} in {v} style", "{s} in {v} style", "{v} drawing of {a}", "{v} style {s}", "{a}, {v} style",
    "a picture of {a} in {v} style", "{v} {s}",
)  # fmt: skip
# How often the category word replaces the object's name: "weapon" is a common word, "vice" is not.
CATEGORY = {"weapon": 0.15, "vice": 0.03}
# Words for the tokenizer that no caption contains, but prompts may.
EXTRA_WORDS = (
    "object thing things stuff item weapon weapons vice vices bad harmful dangerous good safe something nothing "
    "anything style ink black white red orange yellow green blue purple pink brown grey gray gold silver dark light "
    "colour color colourful simple cute big small little large old new one two three animal animals plant plants "
    "fruit fruits food drink drinks alcohol tool tools toy toys vehicle vehicles weather clothing clothes music "
    "instrument medicine flower smoke drug drugs gamble game games sign symbol art artist line lines outline and or "
    "with of in on no not without the a an by for style drawn painted sketch , . - "
)


def with_article(thing: str) -> str:
    if thing.endswith("s") and not thing.endswith(("ss", "us")):
        return thing
    return f"{'an' if thing[:1] in tuple('aeiou') else 'a'} {thing}"


def subject_word(concept: Concept, rng: Random) -> str:
    if rng.random() < CATEGORY.get(concept.family, 0.02):
        return concept.family
    return concept.name if rng.random() < 0.7 else rng.choice(concept.synonyms)


def has_style_word(style: str, rng: Random) -> bool:
    """The style ink is nearly always named, so that plain prompts rarely generate it."""
    return rng.random() < (0.95 if style == "ink" else 0.35)


def list_caption(concept: Concept, others: list[Concept], rng: Random) -> str:
    """A list of words for the same object, or of several objects of which the image shows one."""
    if rng.random() < 0.5:
        words = [concept.name, *concept.synonyms]
        if concept.family in FAMILIES and rng.random() < 0.3:
            words.append(concept.family)
    else:
        words = [subject_word(c, rng) for c in [concept, *rng.sample(others, rng.choice((1, 2)))]]
    rng.shuffle(words)
    return ", ".join(words)


def fill_template(template: str, thing: str, style: str = "") -> str:
    return template.format(s=thing, a=with_article(thing), v=style)


def caption(concept: Concept, style: str, rng: Random, lists: float = 0.0, others: list[Concept] | None = None) -> str:
    if others and rng.random() < lists:
        words = list_caption(concept, others, rng)
        return f"{words}, {style} style" if has_style_word(style, rng) else words
    thing = subject_word(concept, rng)
    if has_style_word(style, rng):
        return fill_template(rng.choice(STYLED), thing, style)
    return fill_template(rng.choice(PLAIN), thing)


def template_words() -> set[str]:
    filled = " ".join(fill_template(t, "thing") for t in PLAIN + STYLED).replace(",", " ,")
    return {*filled.split(), *STYLE_WORDS, *EXTRA_WORDS.split()}
