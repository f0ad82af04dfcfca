"""HFI, human feedback inversion (Kim et al. 2024, arXiv 2407.21032): ratings distilled into soft tokens.

v* = argmin_v Σ_x w(x) E ‖ ε − ε_θ(z_t(x), t, E(v)) ‖²  over the K_top images with the highest reward r_ψ

binary:   w ∝ clip(r_ψ, 0, 1)
ranking:  w ∝ softmax(r_ψ / temperature) of scores standardised over the pool, since a Bradley–Terry score has no zero

Several tokens (extension): the images are clustered in CLIP space; each cluster gets its own token and an equal share
of K_top, so that rare kinds of images are represented too. A token is dropped, unless it is the best one, if its
sampled images get less than half of the mean reward of the images it was learned from: it shows something else. A fixed
minimum would not do: r_ψ rates rare kinds of a concept low, and their tokens would be the first to go.

Deviation: images are not flipped at random, as the usual script of textual inversion does; each has one cached latent.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.errors import DataError
from deleatur.inversion import InversionContext, InversionData, Inverter, initial_vectors
from deleatur.maths.seeds import derive, generator
from deleatur.training.cost import Workload
from deleatur.training.textual_inversion import EvaluatedInversionConfig, LearnedToken, TokenTarget, learn_tokens

RETAINED_REWARD = 0.5
"""Share of its images' mean reward that the images sampled from a token have to get."""


class HFI(Inverter):
    top_k: int = Field(100, gt=0)
    """K_top: number of images with the highest rewards that all tokens together are learned from."""
    num_tokens: int = Field(1, gt=0)
    """m, number of tokens; each is used alone."""
    threshold: float = 0.5
    """Minimum reward of a rated image. Ranking: in standard deviations above the pool's mean."""
    temperature: float = Field(1.0, gt=0)
    """Ranking: softmax temperature of the weights; higher is more uniform."""
    training: EvaluatedInversionConfig = Field(default_factory=EvaluatedInversionConfig)

    def notes(self) -> list[str]:
        notes = ["Images are not flipped at random; the usual script of textual inversion flips half of them."]
        if self.num_tokens > 1:
            notes.append(f"Up to {self.num_tokens} tokens, each for one cluster of rated images; the paper has one.")
        if self.training.max_norm:
            notes.append("The norm of the tokens is limited to that of words; the paper does not limit it.")
        return notes

    def workload(self) -> Workload:
        evaluations = -(-self.training.iterations // self.training.eval_every)
        return self.training.workload(self.num_tokens, self.training.tokens_per_batch, evaluations)

    def weights(self, rewards: Tensor, *, rank: bool) -> Tensor:
        """w (n,) of the selected images: non-negative, sum 1; for rankings invariant to a constant offset."""
        if rank:
            return (rewards / self.temperature).softmax(0)
        clipped = rewards.clamp(0, 1)
        return clipped / clipped.sum()

    def clusters(self, data: InversionData, seed: int) -> list[Tensor]:
        """Indices of the selected images, one tensor per token. Raises DataError when no image can be selected."""
        candidates = self._candidates(data)
        count = min(self.num_tokens, len(candidates))
        labels = torch.zeros(len(candidates), dtype=torch.long)
        if count > 1:
            from sklearn.cluster import KMeans  # slow import, which reading settings should not pay for

            kmeans = KMeans(count, n_init=10, random_state=derive(seed, "invert", "clusters") % 2**32)
            labels = torch.from_numpy(kmeans.fit_predict(data.features[candidates].double().numpy())).long()
        share = -(-self.top_k // count)
        clusters = []
        for label in range(count):
            members = candidates[labels == label]
            clusters.append(members[data.rewards[members].argsort(descending=True, stable=True)][:share])
        return clusters

    def _candidates(self, data: InversionData) -> Tensor:
        """Indices of images above the threshold; of the best-rated ones where fewer than `num_tokens` are."""
        accepted = (~data.rejected).nonzero().squeeze(1)
        if not len(accepted):
            raise DataError(
                "expected images that raters said yes to, got a majority of no for every image",
                hint="collect answers about images that show the concept (docs/feedback.md)",
            )
        rewarded = accepted if data.rank else accepted[data.rewards[accepted] > 0]
        if not len(rewarded):
            best = float(data.rewards[accepted].max())
            raise DataError(
                f"expected a reward above 0 for at least one of {len(accepted)} images, got {best:.2f} at most",
                hint="collect more answers about images that show the concept (docs/feedback.md); "
                "dvc metrics show has the reward's AUC",
            )
        selected = rewarded[data.rewards[rewarded] >= self.threshold]
        if len(selected) < self.num_tokens:
            order = data.rewards[rewarded].argsort(descending=True)
            selected = rewarded[order[: max(self.num_tokens, self.top_k)]]
        return selected

    def invert(
        self, model: Model, data: InversionData, initializer: Tensor, context: InversionContext
    ) -> list[LearnedToken]:
        targets, initial = [], []
        clusters = self.clusters(data, context.seed)
        for i, rows in enumerate(clusters):
            g = generator(context.seed, "invert", i)
            initial.append(initial_vectors(initializer, self.training.num_vectors, g))
            templates = [data.templates[row] for row in rows.tolist()]
            targets.append(
                TokenTarget(data.latents[rows], self.weights(data.rewards[rows], rank=data.rank), templates, g)
            )
        learned = learn_tokens(
            model,
            self.training,
            targets,
            torch.stack(initial),
            tokens_per_batch=self.training.tokens_per_batch,
            evaluate=context.evaluate,
            eval_every=self.training.eval_every,
            on_step=context.on_step,
            state=context.state,
        )
        scores = [max(evaluation["score"] for evaluation in t.evaluations) for t in learned]
        floors = [RETAINED_REWARD * float(data.rewards[rows].mean()) for rows in clusters]
        retained = zip(learned, scores, floors, strict=True)
        return [t for t, score, floor in retained if score >= floor or score == max(scores)]
