"""What a guide costs: predictions per picture and step."""

from __future__ import annotations

import pytest

from deleatur import plug
from deleatur.diffusion import encode
from deleatur.diffusion.load import Model
from deleatur.diffusion.sample import sample
from deleatur.guides import Guide

COSTS = {"cfg": (2, 2, 2), "negative": (2, 2, 2), "sld": (2, 3, 3), "sega": (2, 3, 4)}
"""Without, with one and with two concepts."""


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in COSTS for k in range(3)])
def test_a_picture_costs_what_the_method_says_however_many_words_a_concept_has(model: Model, name: str, k: int) -> None:
    guide = plug.find("guides", name, Guide)()
    concepts = [encode.concept_from_words(model, f"c{i}", ["gun", "sword", "cat"]) for i in range(k)]
    calls: list[int] = []
    hook = model.unet.register_forward_hook(lambda unet, args, out: calls.append(len(args[0])))
    try:
        conditions = guide.conditions(model, concepts)
        sample(model, encode.encode_text(model, ["a dog"]), [1], guide=guide, conditions=conditions, steps=3, batch=1)
    finally:
        hook.remove()
    assert calls == [COSTS[name][k]] * 3, "one network call a step"
    assert set(plug.names("guides")) == set(COSTS)
