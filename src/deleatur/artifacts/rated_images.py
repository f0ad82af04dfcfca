"""The rated images of one concept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deleatur.config.settings import Settings
from deleatur.feedback import votes
from deleatur.records.model import Pictures
from deleatur.storage import files, images


class RatedImages:
    """The rated pictures of one concept, in the order of their digests."""

    def __init__(self, settings: Settings, name: str) -> None:
        answers = files.read_table(settings.paths.feedback / "answers.parquet")
        self.answers = answers[answers["concept"] == name]
        # A ranking screen's pictures share its prompt.
        asked = zip(self.answers["items"], self.answers["prompt"], strict=True)
        prompt = {d: p for items, p in asked for d in items}
        found = {p.sha256: p for p in images.read_shards(settings.paths.feedback) if p.sha256 in prompt}
        digests = sorted(found)
        self.row = {d: i for i, d in enumerate(digests)}
        self.pictures = [images.decode(found[d].image) for d in digests]
        self.prompt = [prompt[d] for d in digests]

    def rated(self) -> Pictures:
        """What most raters marked, and what most of them passed."""
        share = votes.seen(self.answers, votes.raters(self.answers)).reindex(list(self.row))
        both = (share >= 0.5, share < 0.5)
        marked, passed = ([p for p, its in zip(self.pictures, rows, strict=True) if its] for rows in both)
        return Pictures(marked, passed)

    def groups(self) -> NDArray[np.int64]:
        """(n,) the number of each picture's prompt, for cross-validation that keeps a prompt together."""
        return np.unique(self.prompt, return_inverse=True)[1]
