"""Images as networks see them: 8-bit sRGB on white, the pixels that a browser shows to people.

`Image.convert("RGB")` gives other pixels: it clips 16-bit grey to white, drops transparency (which leaves whatever
colour the invisible pixels have, usually black), and ignores orientation and colour profile.
"""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

SRGB = ImageCms.createProfile("sRGB")
COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
"""Mode of an image → colour space of the ICC profiles that apply to it."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the stored image upright."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error)
"""What Pillow raises for damaged data."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, upright, in sRGB, transparency on white; of an animation, the first frame.

    An image that meets all of this already is returned itself, not a copy.
    """
    profile = image.info.get("icc_profile")
    turn = _turn(image)
    upright = image if turn is None else image.transpose(turn)
    if upright.mode == "RGB" and "transparency" not in image.info and not profile:
        return upright
    colour, alpha = _split_alpha(upright, image.info.get("transparency"))
    colour = _to_srgb(colour, profile)
    if alpha is None:
        return colour
    page = Image.new("RGB", colour.size, "white")
    page.paste(colour, mask=alpha)
    return page


def _turn(image: Image.Image) -> Image.Transpose | None:
    """By the orientation in the EXIF data, which browsers apply to PNG and JPEG, and not to WebP."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b"") if image.format != "WEBP" else b"")
        return TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
    except UNREADABLE:
        return None


def _split_alpha(image: Image.Image, key: object) -> tuple[Image.Image, Image.Image | None]:
    """Colour in mode L, RGB or CMYK, and opacity. key: the transparent colour, or the opacities of a palette."""
    if image.mode.startswith("I"):  # 16-bit grey: the high byte, as browsers do
        values = np.asarray(image).astype(np.uint16)
        colour = Image.fromarray((values >> 8).astype(np.uint8))
        return colour, None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if key is not None or "A" in image.mode:
        rgba = image.convert("RGBA")
        colour = rgba.convert("RGB")
        return colour.getchannel(0) if image.mode in ("1", "L", "LA") else colour, rgba.getchannel("A")
    if image.mode in COLOUR_SPACES:
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts by the embedded profile. One that is damaged or of another colour space is ignored, as browsers do."""
    if profile:
        try:
            source = ImageCms.getOpenProfile(BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space == "RGB" and colour.mode == "L":
                colour = colour.convert("RGB")
            if space == COLOUR_SPACES[colour.mode]:
                converted = ImageCms.profileToProfile(colour, source, SRGB, outputMode="RGB")
                assert converted is not None, "not in place"
                return converted
        except (ImageCms.PyCMSError, *UNREADABLE):
            pass
    return colour.convert("RGB")
