"""HFI, human feedback inversion (Kim et al. 2024, arXiv 2407.21032): ratings condensed into soft tokens.

v* = argmin_v Σ_x w(x) E ‖ ε − ε_θ(z_t(x), t, E(v)) ‖²  over the K_top pictures with the highest reward r_ψ

binary:   w ∝ clip(r_ψ, 0, 1)
ranking:  w ∝ softmax(r_ψ / temperature) of scores standardised over the pool, since a Bradley–Terry score has no zero

Several tokens (ours): the pictures are clustered in CLIP space and each cluster gets its own token and an equal share
of K_top, so that no rated kind is left out because another is more frequent. A token whose own pictures the reward does
not recognise is no description of the concept and is left out; the best one always stays.
"""

from __future__ import annotations

import torch
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.errors import DataError
from deleatur.inversion import InversionContext, InversionData, Inverter, initial_vectors
from deleatur.maths.seeds import derive, generator
from deleatur.training.cost import Work
from deleatur.training.textual_inversion import Inversion, Learned, Lesson, learn


class HFI(Inverter):
    top_k: int = Field(100, gt=0)
    """K_top: how many of the best-rated pictures all tokens together are learned from."""
    num_tokens: int = Field(1, gt=0)
    """m, tokens that stand alone."""
    threshold: float = 0.5
    """Below this reward neither a rated picture nor a token, by the pictures it draws, is used.
    Ranking: in standard deviations above the pool's mean."""
    temperature: float = Field(1.0, gt=0)
    """Ranking: how evenly the pictures weigh; higher is more even."""
    training: Inversion = Field(default_factory=Inversion)

    def notes(self) -> list[str]:
        found = []
        if self.num_tokens > 1:
            found.append(
                f"Up to {self.num_tokens} tokens stand alone, each for one kind of rated picture; in the paper, one."
            )
        if self.training.max_norm:
            found.append("Tokens are no longer than words; the paper leaves their length free.")
        return found

    def work(self) -> Work:
        looks = -(-self.training.iterations // self.training.eval_every)
        return self.training.work(self.num_tokens, self.training.tokens_per_batch, looks)

    def weights(self, rewards: Tensor, *, rank: bool) -> Tensor:
        """w (n,) of selected pictures: non-negative, sum 1; for rankings unchanged by a constant added to all."""
        if rank:
            return (rewards / self.temperature).softmax(0)
        clipped = rewards.clamp(0, 1)
        return clipped / clipped.sum()

    def clusters(self, rated: InversionData, seed: int) -> list[Tensor]:
        """Indices of the selected pictures, one tensor per token."""
        free = (~rated.rejected).nonzero().squeeze(1)
        if not len(free):
            raise DataError(
                "every picture was refused by its raters: there is nothing to invert", hint="see docs/feedback.md"
            )
        seen = free if rated.rank else free[rated.rewards[free] > 0]
        if not len(seen):
            best = float(rated.rewards[free].max())
            raise DataError(
                f"expected a reward above 0 for one of {len(free)} pictures, got {best:.2f} at best: "
                "the reward sees the concept in none",
                hint="more answers about pictures that show it help (docs/feedback.md); dvc metrics show has its AUC",
            )
        good = seen[rated.rewards[seen] >= self.threshold]
        if len(good) < self.num_tokens:
            good = seen[rated.rewards[seen].argsort(descending=True)[: max(self.num_tokens, self.top_k)]]
        count = min(self.num_tokens, len(good))
        labels = torch.zeros(len(good), dtype=torch.long)
        if count > 1:
            means = KMeans(count, n_init=10, random_state=derive(seed, "invert", "clusters") % 2**32)
            labels = torch.from_numpy(means.fit_predict(rated.features[good].double().numpy())).long()
        share = -(-self.top_k // count)
        out = []
        for label in range(count):
            own = good[labels == label]
            out.append(own[rated.rewards[own].argsort(descending=True, stable=True)][:share])
        return out

    def invert(self, model: Model, rated: InversionData, initial: Tensor, context: InversionContext) -> list[Learned]:
        lessons, starts = [], []
        for i, rows in enumerate(self.clusters(rated, context.seed)):
            g = generator(context.seed, "invert", i)
            starts.append(initial_vectors(initial, self.training.num_vectors, g))
            templates = [rated.templates[row] for row in rows.tolist()]
            lessons.append(
                Lesson(rated.latents[rows], self.weights(rated.rewards[rows], rank=rated.rank), templates, g)
            )
        learned = learn(
            model,
            self.training,
            lessons,
            torch.stack(starts),
            together=self.training.tokens_per_batch,
            look=context.evaluate,
            check_every=self.training.eval_every,
            on_step=context.on_step,
            state=context.state,
        )
        scores = [max(found["score"] for found in t.looks) for t in learned]
        return [t for t, score in zip(learned, scores, strict=True) if score >= min(self.threshold, max(scores))]
