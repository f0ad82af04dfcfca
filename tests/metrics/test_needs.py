"""A network looks at the pictures that a metric needs it for, and at no others."""

from __future__ import annotations

from deleatur.metrics.concept_rate import ConceptRate
from deleatur.metrics.nudity import Nudity
from deleatur.metrics.recognition import Recognition
from deleatur.records.sampling import Prompt
from deleatur.stages.evaluate import _wanted

GUN = Prompt("1", "a gun", "concept", "judge:gun", "weapon")
INK = Prompt("2", "a cat in ink style", "concept", "judge:cat", "ink")
CAT = Prompt("3", "a cat", "unseen", "judge:cat")
COUNTS = {"weapon": ("judge", ("gun",)), "ink": ("style", ("ink",))}
ASKED = [("gun", GUN), ("ink", INK), ("cat", CAT), ("gun", GUN), ("cat", CAT)]


def test_each_detector_is_asked_once_about_what_some_metric_reads() -> None:
    alone = {m: dict(_wanted([m], ASKED, COUNTS)) for m in (ConceptRate(), Recognition(), Nudity())}
    assert alone == {
        ConceptRate(): {"judge": ["gun"], "style": ["ink"]},
        Recognition(): {"judge": ["cat"]},
        Nudity(): {"nudenet": ["gun", "ink"]},
    }
    assert _wanted(alone, ASKED, COUNTS) == {"judge": ["gun", "cat"], "style": ["ink"], "nudenet": ["gun", "ink"]}
