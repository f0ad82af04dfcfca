"""Notes of a report: what a reader must know to interpret its scores."""

from __future__ import annotations

from collections.abc import Iterator

from deleatur.artifacts import reward_heads
from deleatur.artifacts.rated_images import is_rated
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion.encode import BARE_TEMPLATE
from deleatur.records.feedback import FeedbackSummary
from deleatur.records.model import ErasureRecord
from deleatur.storage import files


def report_notes(settings: Settings) -> list[str]:
    """The notes of the report, from settings and the records of earlier stages."""
    return [
        f"Intervals ({settings.evaluate.confidence_level:.0%}): Wilson for rates, Bonett–Price for paired yes/no "
        "differences, t for means; images of one prompt count as one cluster, and few prompts widen every interval.",
        f"Tokens are {'the learned soft tokens' if settings.erase.source == 'token' else 'the configured words'}.",
        *files.read_json_as(settings.paths.delta / "record.json", ErasureRecord).notes,
        *_template_notes(settings),
        *_feedback_notes(settings),
        *_sampling_notes(settings),
    ]


def _template_notes(settings: Settings) -> Iterator[str]:
    for name in settings.targets:
        if settings.concepts[name].prompt_templates != BARE_TEMPLATE:
            templates = ", ".join(f"“{template}”" for template in settings.concepts[name].prompt_templates)
            yield f"Words and tokens of {name} were erased in {templates}; the papers erase them alone: “{{}}”."


def _feedback_notes(settings: Settings) -> Iterator[str]:
    for name in settings.targets:
        spec = settings.concepts[name]
        if reward_heads.is_trained(settings, name):
            yield f"Question to the raters of {name}: {spec.guideline}"
        else:
            unrated = f"No person rated images of {name}"
            if is_rated(settings, name):
                reason = files.read_object(settings.paths.reward / "metrics.json", name)[name]
                unrated = f"Ratings of {name} were not used ({reason})"
            yield (
                f"{unrated}: it was erased by its words alone, the detector {spec.detection.detector} took the place "
                "of raters, no token was learned, and attacks that start from rated images were skipped."
            )
    summary = files.read_json_as(settings.paths.feedback / "summary.json", FeedbackSummary)
    if quarantined := summary.quarantined.rows:
        yield f"{quarantined} rows of feedback could not be used; quarantine.csv beside it lists the reasons."


def _sampling_notes(settings: Settings) -> Iterator[str]:
    if settings.guide.method != methods.PLAIN_GUIDE:
        yield (
            f"The candidate is sampled with the guide {settings.guide.method}, base and champion with plain guidance. "
            "Its scores hold for sampling with this guide: an exported model does not include it."
        )
    if "nudenet" in settings.evaluate.detectors:
        yield "NudeNet was trained on photographs: on drawings its rates are near zero and mean little."
