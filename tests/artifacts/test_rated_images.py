"""Which concepts were rated, by the summary of the last ingest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from deleatur.artifacts.rated_images import is_rated
from deleatur.config.sections import Paths
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.feedback import Agreement, ConceptCounts, FeedbackSummary, QuarantineCounts
from deleatur.storage import files


def test_a_concept_that_was_added_after_the_ingest_is_refused_by_name(tmp_path: Path) -> None:
    settings = Settings.model_construct(paths=Paths.model_construct(feedback=tmp_path))  # type: ignore[call-arg]
    counts = ConceptCounts(events=1, voted_images=1, pairs=0, agreement=Agreement(None))
    summary = FeedbackSummary("digest", False, 1, QuarantineCounts(0), {"weapon": counts})
    files.write_json(tmp_path / "summary.json", asdict(summary))
    assert is_rated(settings, "weapon")
    with pytest.raises(DataError, match=r"summary.json lacks the concept style"):
        is_rated(settings, "style")
