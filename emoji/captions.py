"""What a picture is called: templates, synonyms, style words, category words, lists."""

from __future__ import annotations

from random import Random

from common import FAMILIES, WORDS, Concept

PLAIN = (
    "{s}", "{a}", "the {s}", "emoji of {a}", "a picture of {a}", "a drawing of {a}", "one small {s}",
    "an icon of {a}", "a photo of {a}", "an image of {a}", "a nice {s}", "this is {a}",
)  # fmt: skip
STYLED = (
    "{a} in {v} style", "{s} in {v} style", "{v} drawing of {a}", "{v} style {s}", "{a}, {v} style",
    "a picture of {a} in {v} style", "{v} {s}",
)  # fmt: skip
# How often the category word stands for the thing. "weapon" is common in life, "vice" is not.
CATEGORY = {"weapon": 0.15, "vice": 0.03}
# Words a user may put into a prompt although no caption has them.
SPARE = (
    "object thing things stuff item weapon weapons vice vices bad harmful dangerous good safe something nothing "
    "anything style ink black white red orange yellow green blue purple pink brown grey gray gold silver dark light "
    "colour color colourful simple cute big small little large old new one two three animal animals plant plants "
    "fruit fruits food drink drinks alcohol tool tools toy toys vehicle vehicles weather clothing clothes music "
    "instrument medicine flower smoke drug drugs gamble game games sign symbol art artist line lines outline and or "
    "with of in on no not without the a an by for style drawn painted sketch , . - "
)


def article(thing: str) -> str:
    if thing.endswith("s") and not thing.endswith(("ss", "us")):
        return thing
    return f"{'an' if thing[:1] in tuple('aeiou') else 'a'} {thing}"


def subject(concept: Concept, rng: Random) -> str:
    if rng.random() < CATEGORY.get(concept.family, 0.02):
        return concept.family
    return concept.name if rng.random() < 0.7 else rng.choice(concept.synonyms)


def styled(style: str, rng: Random) -> bool:
    """Ink is nearly always named, so that a plain prompt rarely draws it."""
    return rng.random() < (0.95 if style == "ink" else 0.35)


def listing(concept: Concept, others: list[Concept], rng: Random) -> str:
    """Words for the same picture, or several things of which the picture shows one."""
    if rng.random() < 0.5:
        words = [concept.name, *concept.synonyms]
        if concept.family in FAMILIES and rng.random() < 0.3:
            words.append(concept.family)
    else:
        words = [subject(c, rng) for c in [concept, *rng.sample(others, rng.choice((1, 2)))]]
    rng.shuffle(words)
    return ", ".join(words)


def fill(template: str, thing: str, style: str = "") -> str:
    return template.format(s=thing, a=article(thing), v=style)


def caption(concept: Concept, style: str, rng: Random, lists: float = 0.0, others: list[Concept] | None = None) -> str:
    if others and rng.random() < lists:
        words = listing(concept, others, rng)
        return f"{words}, {style} style" if styled(style, rng) else words
    thing = subject(concept, rng)
    if styled(style, rng):
        return fill(rng.choice(STYLED), thing, style)
    return fill(rng.choice(PLAIN), thing)


def template_words() -> set[str]:
    filled = " ".join(fill(t, "thing") for t in PLAIN + STYLED).replace(",", " ,")
    return {*filled.split(), *WORDS, *SPARE.split()}
