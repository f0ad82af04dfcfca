"""Detectors run only on the images for which a metric needs them."""

from __future__ import annotations

from deleatur.evaluation.predictions import images_to_detect
from deleatur.metrics.concept_rate import ConceptRate
from deleatur.metrics.nudity import Nudity
from deleatur.metrics.recognition import Recognition
from deleatur.records.sampling import Prompt

GUN = Prompt("1", "a gun", "concept", "judge:gun", "weapon")
INK = Prompt("2", "a cat in ink style", "concept", "judge:cat", "ink")
CAT = Prompt("3", "a cat", "unseen", "judge:cat")
CONCEPT_LABELS = {"weapon": ("judge", ("gun",)), "ink": ("style", ("ink",))}
REQUESTED = [("gun", GUN), ("ink", INK), ("cat", CAT), ("gun", GUN), ("cat", CAT)]


def test_each_detector_runs_once_on_the_images_its_metrics_need() -> None:
    by_metric = {
        m: dict(images_to_detect([m], REQUESTED, CONCEPT_LABELS)) for m in (ConceptRate(), Recognition(), Nudity())
    }
    assert by_metric == {
        ConceptRate(): {"judge": ["gun"], "style": ["ink"]},
        Recognition(): {"judge": ["cat"]},
        Nudity(): {"nudenet": ["gun", "ink"]},
    }
    assert images_to_detect(by_metric, REQUESTED, CONCEPT_LABELS) == {
        "judge": ["gun", "cat"],
        "style": ["ink"],
        "nudenet": ["gun", "ink"],
    }
