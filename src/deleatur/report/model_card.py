"""The model card in Hugging Face's format: the erased concepts, the verdict, all scores and their provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deleatur.gate import SIMULATED_NOTICE, headline
from deleatur.markdown import code, escape_markdown
from deleatur.records.report import Report, Score, Verdict

FILE_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md")
SOURCES = {"token": "soft tokens learned from ratings", "words": "words"}


def render(name: str, base: str, level: float, report: Report, verdict: Verdict) -> str:
    """The card as Markdown; equal evidence gives equal text.

    name: of the registered model. base: address of the base model. level: confidence level, 0 … 1.
    """
    provenance = report.provenance
    candidate = [s for s in report.scores if s.variant == "candidate" and s.versus is None]
    data = ModelCardData(
        model_name=name,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion", "concept-erasure", "deleatur", *provenance.concepts],
        base_model=base,
        eval_results=[_eval_result(s, provenance.prompts) for s in candidate],
    )
    # Not ModelCard.from_template, which escapes nothing.
    environment = Environment(
        finalize=escape_markdown, undefined=StrictUndefined, loader=FileSystemLoader(TEMPLATE.parent)
    )
    environment.filters["code"] = code
    text = environment.get_template(TEMPLATE.name).render(
        name=name,
        provenance=provenance,
        report=report,
        verdict=verdict,
        headline=headline(verdict),
        simulated_notice=SIMULATED_NOTICE,
        source=SOURCES[provenance.concept_source],
        level=f"{100 * level:g}",
        rows=_provenance_rows(report, verdict),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").content)


def _eval_result(score: Score, prompts: str) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        dataset_type="deleatur-prompts",
        dataset_name=f"prompts, {score.slice}",
        dataset_config=score.slice,  # without it the Hub merges all slices
        dataset_revision=prompts,
        metric_type=score.metric,
        metric_name=f"{score.metric} ({score.slice})",
        metric_value=round(score.value, 6),
    )


def _provenance_rows(report: Report, verdict: Verdict) -> list[tuple[str, str]]:
    provenance = report.provenance
    digests = ("base", "pipeline", "delta", "feedback", "tokens", "prompts", "images", "settings")
    detectors = {d.name: d for s in report.scores if (d := s.detector)}
    versions: Mapping[str, str] = provenance.versions
    return [
        *((f"{name}, sha256", getattr(provenance, name)) for name in digests),
        ("report, sha256", verdict.report),
        ("policy, sha256", verdict.policy),
        ("seed", str(provenance.seed)),
        ("sampler", provenance.sampler),
        ("guide", provenance.guide),
        ("preservation loss", "on" if provenance.preserve else "off"),
        *((f"detector {d.name}, sha256", d.weights) for d in sorted(detectors.values(), key=lambda d: d.name)),
        *sorted(versions.items()),
    ]
