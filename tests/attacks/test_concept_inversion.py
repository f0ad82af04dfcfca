"""Concept inversion: attempts are independent of each other."""

from __future__ import annotations

import torch

from deleatur.attacks import AttackContext, AttackTarget
from deleatur.attacks.concept_inversion import ConceptInversion
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.training.textual_inversion import MultiTokenConfig, prompt_templates


def test_attempts_differ_and_do_not_affect_each_other(model: Model) -> None:
    z = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    target = AttackTarget(
        model, {}, "weapon", z, encode.word_embedding(model, "object"), prompt_templates("object", ["cat"] * 4)
    )

    loop = MultiTokenConfig(iterations=3, batch_size=2, lr=1e-2)
    one, two = (
        ConceptInversion(num_attempts=n, training=loop).attack(target, AttackContext(0)).vectors for n in (1, 2)
    )
    assert two.shape == (2, 1, one.shape[-1])
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(two[0], two[1], atol=1e-4)


def test_budget_counts_all_attempts(model: Model) -> None:
    z = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    target = AttackTarget(
        model, {}, "weapon", z, encode.word_embedding(model, "object"), prompt_templates("object", ["cat"] * 4)
    )
    result = ConceptInversion(num_attempts=2, training=MultiTokenConfig(iterations=3, batch_size=5)).attack(
        target, AttackContext(0)
    )
    assert result.budget == {"forward": 30, "backward": 30}
    assert len(result.losses) == 3
