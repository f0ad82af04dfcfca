"""A Stable Diffusion pipeline, CLIP and classifiers of a few kilobytes with random weights, built in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
)

from deleatur.diffusion.model import Model, assemble

WORDS = ("a", "cat", "dog", "gun", "sword", "object", "style", "ink", "picture", "of", "in", "thing", "weapon", ",")
LENGTH = 16
WIDTH = 16


def tokenizer() -> CLIPTokenizer:
    """Every word of WORDS is one token; other words are characters."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = ["".join(pair), *parts[2:]]
    return _clip_tokenizer(merges)


def splitting_tokenizer() -> CLIPTokenizer:
    """A byte-pair encoding trained on WORDS that splits most of them, as CLIP's splits most names."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(vocab_size=50, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS)], trainer)
    return _clip_tokenizer([tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]])


def _clip_tokenizer(merges: list[tuple[str, str]]) -> CLIPTokenizer:
    letters = [chr(i) for i in range(33, 127)]
    vocab = {t: i for i, t in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token="<|endoftext|>")


def _text_config(tok: CLIPTokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tok),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        "projection_dim": 8,
    }


def parts(seed: int = 0, tok: CLIPTokenizer | None = None) -> dict[str, object]:
    tok = tok or tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {
            "unet": UNet2DConditionModel(
                sample_size=4,
                in_channels=4,
                out_channels=4,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=WIDTH,
                attention_head_dim=2,
                norm_num_groups=4,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=16,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**_text_config(tok))),
            "tokenizer": tok,
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        }


def model(seed: int = 0, dtype: torch.dtype = torch.float32, tok: CLIPTokenizer | None = None) -> Model:
    return assemble(**parts(seed, tok), dtype=dtype)


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        **parts(seed), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def save_clip(folder: Path) -> Path:
    tok = tokenizer()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=_text_config(tok),
        vision_config={**vision, "image_size": 16, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(image_processor=processor, tokenizer=tok).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, labels: tuple[str, ...], seed: int = 2) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ConvNextConfig(
            patch_size=4,
            num_stages=2,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            image_size=16,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        ConvNextForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0).save_pretrained(folder)
    return folder
