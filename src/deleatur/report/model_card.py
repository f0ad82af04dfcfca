"""A model card, in Hugging Face's format: what was removed, how that was judged, and what made every number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deleatur.gate import SIMULATED, headline
from deleatur.records.report import Report, Score, Verdict

NAME = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md")
SOURCES = {"token": "soft tokens learned from people's marks", "words": "words"}


def render(name: str, base: str, level: float, report: Report, verdict: Verdict) -> str:
    """name: of the registered model. base: its address, as it was given. The same for the same evidence."""
    made_by = report.identity
    data = ModelCardData(
        model_name=name,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion", "concept-erasure", "deleatur", *made_by.concepts],
        base_model=base,
        eval_results=[_result(s, made_by.prompts) for s in report.scores if s.side == "candidate" and s.versus is None],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        identity=made_by,
        report=report,
        verdict=verdict,
        headline=headline(verdict),
        simulated=SIMULATED,
        source=SOURCES[made_by.concept_source],
        level=f"{100 * level:g}",
        rows=_rows(report, verdict),
    )
    return str(card.content)


def _result(score: Score, prompts: str) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        dataset_type="deleatur-prompts",
        dataset_name=f"prompts, {score.slice}",
        dataset_config=score.slice,  # or the hub takes all slices for one
        dataset_revision=prompts,
        metric_type=score.metric,
        metric_name=f"{score.metric} ({score.slice})",
        metric_value=round(score.value, 6),
    )


def _rows(report: Report, verdict: Verdict) -> list[tuple[str, str]]:
    made_by = report.identity
    digests = ("base", "pipeline", "delta", "feedback", "tokens", "prompts", "pictures", "settings")
    detectors = {d.name: d for s in report.scores if (d := s.detector)}
    versions: Mapping[str, str] = made_by.versions
    return [
        *((f"{name}, sha256", getattr(made_by, name)) for name in digests),
        ("report, sha256", verdict.report),
        ("policy, sha256", verdict.policy),
        ("seed", str(made_by.seed)),
        ("sampler", made_by.sampler),
        ("guide", made_by.guide),
        ("our preserve term", "on" if made_by.preserve else "off"),
        *((f"detector {d.name}, sha256", d.weights) for d in sorted(detectors.values(), key=lambda d: d.name)),
        *sorted(versions.items()),
    ]
