"""Concept inversion: several tries are several ways back, each as if it were alone."""

from __future__ import annotations

import torch

from deleatur.attacks import AttackContext, AttackTarget
from deleatur.attacks.concept_inversion import ConceptInversion
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.training.textual_inversion import Several, templates_of


def test_tries_differ_and_a_further_one_leaves_the_others_alone(model: Model) -> None:
    z = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    target = AttackTarget(
        model, {}, "weapon", z, encode.word_embedding(model, "object"), templates_of("object", ["cat"] * 4)
    )

    loop = Several(iterations=3, batch_size=2, lr=1e-2)
    one, two = (
        ConceptInversion(num_attempts=n, training=loop).attack(target, AttackContext(0)).vectors for n in (1, 2)
    )
    assert two.shape == (2, 1, one.shape[-1])
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(two[0], two[1], atol=1e-4)


def test_the_budget_is_what_all_tries_cost(model: Model) -> None:
    z = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    target = AttackTarget(
        model, {}, "weapon", z, encode.word_embedding(model, "object"), templates_of("object", ["cat"] * 4)
    )
    found = ConceptInversion(num_attempts=2, training=Several(iterations=3, batch_size=5)).attack(
        target, AttackContext(0)
    )
    assert found.budget == {"forward": 30, "backward": 30}
    assert len(found.losses) == 3
