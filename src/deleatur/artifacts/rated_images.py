"""The rated images of one concept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.feedback import votes
from deleatur.feedback.events import EVENT_SCHEMA
from deleatur.records.feedback import FeedbackSummary
from deleatur.records.model import RatedImages
from deleatur.storage import files, images


def is_rated(settings: Settings, concept: str) -> bool:
    """Whether the feedback has usable answers about the concept. Raises DataError if `ingest` did not know it."""
    path = settings.paths.feedback / "summary.json"
    counts = files.read_json_as(path, FeedbackSummary).concepts.get(concept)
    if counts is None:
        raise DataError(f"{path} lacks the concept {concept}: params.yaml has changed since", hint="dvc repro")
    return bool(counts.voted_images + counts.pairs)


class RatedPool:
    """All rated images of one concept with their answers and prompts, ordered by digest."""

    def __init__(self, settings: Settings, name: str) -> None:
        answers = files.read_table(settings.paths.feedback / "answers.parquet", EVENT_SCHEMA)
        self.answers = answers[answers["concept"] == name]
        # All images of a ranking screen have its prompt.
        screens = zip(self.answers["items"], self.answers["prompt"], strict=True)
        prompt_of = {d: p for items, p in screens for d in items}
        encoded = {p.sha256: p for p in images.read_shards(settings.paths.feedback) if p.sha256 in prompt_of}
        digests = sorted(encoded)
        self.row_of = {d: i for i, d in enumerate(digests)}
        self.images = [images.decode(encoded[d].image) for d in digests]
        self.prompts = [prompt_of[d] for d in digests]
        if len(digests) > 1 and len({image.tobytes() for image in self.images}) == 1:
            raise DataError(
                f"expected different images of {name}, got {len(digests)} files with the same pixels",
                hint="write the archive again from the images that were shown, then: deleatur stage ingest",
            )

    def labelled(self) -> RatedImages:
        """Images split by majority vote: the concept is visible (positive) or not (negative)."""
        vote_share = votes.vote_shares(self.answers, votes.rater_table(self.answers)).reindex(list(self.row_of))
        # An image without a vote has the share NaN, and belongs to neither.
        positive = [image for image, share in zip(self.images, vote_share, strict=True) if share >= 0.5]
        negative = [image for image, share in zip(self.images, vote_share, strict=True) if share < 0.5]
        return RatedImages(positive, negative)

    def groups(self) -> NDArray[np.int64]:
        """(n,) prompt index of each image, for cross-validation folds that do not split a prompt."""
        return np.unique(self.prompts, return_inverse=True)[1]
