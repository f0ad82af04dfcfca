"""Values that are no numbers end every training loop at once, with the step, the learning rate and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.erasers.abo import AllButOne
from deleatur.erasers.esd import ESD
from deleatur.erasers.rece import RECE
from deleatur.erasers.sdd import SDD
from deleatur.erasers.sfd import SFD
from deleatur.erasers.uce import UCE
from deleatur.errors import DeleaturError, ErasureRefused, ModelError
from deleatur.training.early_stopping import Evaluation
from deleatur.training.loop import ErasureContext
from deleatur.training.textual_inversion import TextualInversionConfig, TokenTarget, learn_tokens, prompt_templates

SHORT: dict[str, Any] = {"iterations": 4, "batch_size": 2}


def erase(model: Model, eraser: Eraser, **context: Any) -> None:
    concept = encode.concept_from_words(model, "weapon", ["gun"])
    eraser.erase(model, [concept], ErasureContext(1, encode.encode_text(model, ["", "a cat"]), **context))


def invert(model: Model, lr: float, start: torch.Tensor) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, *model.latent_shape, generator=g)
    target = TokenTarget(z, torch.full((2,), 0.5), prompt_templates("object", [""] * 2), g)
    learn_tokens(model, TextualInversionConfig(iterations=4, batch_size=2, lr=lr), [target], start[None, None])


DIVERGING: dict[str, tuple[Callable[[Model], None], str]] = {
    "sdd": (lambda m: erase(m, SDD(training={**SHORT, "sampler_steps": 2, "lr": 1e30})), "training.lr"),  # type: ignore[arg-type]
    "esd": (lambda m: erase(m, ESD(training={**SHORT, "sampler_steps": 2, "lr": 1e30})), "training.lr"),  # type: ignore[arg-type]
    "abo": (
        lambda m: erase(
            m,
            AllButOne(
                alternatives={"weapon": "cat"},
                training={**SHORT, "sampler_steps": 2, "pool_size": 4, "lr": 1e30},  # type: ignore[arg-type]
            ),
        ),
        "training.lr",
    ),
    "sfd": (lambda m: erase(m, SFD(training={**SHORT, "lr": 1e30})), "training.lr"),  # type: ignore[arg-type]
    "sfd, fake score": (lambda m: erase(m, SFD(fake_lr=1e30, training={**SHORT, "lr": 1e-9})), "sfd.fake_lr"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_training_is_refused_with_its_step_and_rate(model: Model, name: str) -> None:
    run, option = DIVERGING[name]
    with pytest.raises(
        ErasureRefused, match=r"diverged: .* became (nan|inf) at step [1-4], with a learning rate of 1e\+30$"
    ) as e:
        run(model)
    assert e.value.exit_code == 5
    assert option in e.value.hint
    assert "to a tenth, " in e.value.hint


def test_an_inversion_that_meets_a_broken_image_is_refused(model: Model) -> None:
    """The layer norm of the text encoder keeps any vector finite; latents may be broken, and are sampled at random."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, *model.latent_shape, generator=g)
    z[1] = torch.inf
    target = TokenTarget(z, torch.tensor([0.9, 0.1]), prompt_templates("object", [""] * 2), g)
    config = TextualInversionConfig(iterations=99, batch_size=1, lr=0.01)
    with pytest.raises(ErasureRefused, match=r"the inversion's loss became \w+ at step \d+, .* rate of 0.01$") as e:
        learn_tokens(model, config, [target], encode.word_embedding(model, "object")[None, None])
    assert "training.lr of the inversion or attack to a tenth, 0.001" in e.value.hint


@pytest.fixture(scope="module")
def broken() -> Model:
    model = tiny.model()
    with torch.no_grad():
        model.unet.get_parameter("conv_out.bias").fill_(torch.nan)
    return model


BROKEN: dict[str, Callable[[Model], None]] = {
    "sdd": lambda m: erase(m, SDD(training={**SHORT, "sampler_steps": 2, "lr": 1e-3})),  # type: ignore[arg-type]
    "sfd": lambda m: erase(m, SFD(training={**SHORT, "lr": 1e-3})),  # type: ignore[arg-type]
    "inversion": lambda m: invert(m, 1e-3, encode.word_embedding(m, "object")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_predicts_no_numbers_is_named_before_any_step(broken: Model, name: str) -> None:
    """Not the learning rate: at step 1 no weight has changed."""
    with pytest.raises(ModelError, match=r"of the untrained model, got .* nan at step 1") as e:
        BROKEN[name](broken)
    assert e.value.exit_code == 4
    assert "deleatur doctor" in e.value.hint


@pytest.mark.parametrize("eraser", [UCE(edit={"erase": 1e308}), RECE(epochs=1, edit={"erase": 1e308})])  # type: ignore[arg-type]
def test_an_edit_without_solution_is_refused(model: Model, eraser: Eraser) -> None:
    with pytest.raises(ErasureRefused, match="singular or infinite matrix") as e:
        erase(model, eraser)
    assert "raise edit.lam" in e.value.hint


@pytest.mark.parametrize(
    "eraser",
    [
        UCE(edit={"max_preserved_drop": 0.5}),  # type: ignore[arg-type]
        SDD(training={**SHORT, "sampler_steps": 2, "lr": 1e-3, "eval_every": 1, "max_preserved_drop": 0.5}),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("evaluation", [0, 1])
def test_evaluations_that_are_no_numbers_are_not_acceptable(model: Model, eraser: Eraser, evaluation: int) -> None:
    scores = iter([1.0] * evaluation + [float("nan")] + [1.0] * 9)
    with pytest.raises(DeleaturError, match="degraded") as e:
        erase(model, eraser, probe=lambda weights: Evaluation(1.0, next(scores)))
    assert e.value.exit_code == 5
