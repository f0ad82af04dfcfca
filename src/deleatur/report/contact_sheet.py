"""Contact sheets: images of the base model, the champion and the candidate side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from PIL import Image, ImageFilter

from deleatur.diffusion.rgb import to_rgb
from deleatur.gate import CONCEPT_ROLES
from deleatur.records.sampling import Role, Variant
from deleatur.report.plots import short_label
from deleatur.storage.files import atomic_write
from deleatur.storage.images import contact_sheet, encode

VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class PromptRow:
    """One prompt with one image per variant, all sampled from the same noise."""

    id: str
    images: Mapping[Variant, Image.Image]
    text: str = ""
    """Caption in place of the id, unless the images are covered."""


@dataclass(frozen=True)
class ContactSheet:
    """Images of prompts of one role, a row for each prompt."""

    title: str
    role: Role
    rows: Sequence[PromptRow]

    @property
    def is_covered(self) -> bool:
        """Whether its prompts ask for an erased concept: images are then blurred, and prompts named by id."""
        return self.role in CONCEPT_ROLES

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(variant for variant in VARIANTS if any(variant in row.images for row in self.rows))

    def caption(self, row: PromptRow) -> str:
        return row.id if self.is_covered else row.text or row.id


def write_contact_sheet(
    sheet: ContactSheet, path: Path, *, simulated: bool, cover: bool = True, cell_size: int | None = None
) -> None:
    """Writes the sheet as one PNG. cover: blur images of erased concepts beyond recognition. cell_size: pixels."""
    blurred = cover and sheet.is_covered
    rows = [[_blurred(row.images[v]) if blurred else row.images[v] for v in sheet.variants] for row in sheet.rows]
    captions = [short_label(sheet.caption(row)) for row in sheet.rows]
    corner = "simulated raters" if simulated else ""
    image = contact_sheet(rows, captions, sheet.variants, corner=corner, cell_size=cell_size)
    with atomic_write(path) as partial:
        partial.write_bytes(encode(image))


def _blurred(image: Image.Image) -> Image.Image:
    return to_rgb(image).filter(ImageFilter.GaussianBlur(max(image.size) / 6))
