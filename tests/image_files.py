"""Image files as rating tools and editors write them, each by the feature that decoders get wrong."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

W, H = 16, 12
COLOUR = np.stack(
    [*np.meshgrid(np.linspace(0, 255, W), np.linspace(0, 255, H)), np.full((H, W), 90.0)], axis=-1
).astype(np.uint8)
GREY = COLOUR[..., 0]
GREY16 = np.linspace(0, 65535, W * H).reshape(H, W).astype(">u2")
ALPHA = np.linspace(0, 255, W * H).reshape(H, W).astype(np.uint8)
RGBA = np.dstack([COLOUR, ALPHA])
ORIENTATION = 0x0112
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def saved(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    pixels: NDArray[np.uint8], depth: int, colour_type: int, *chunks: bytes, size: tuple[int, int] = (W, H)
) -> bytes:
    """A PNG of rows of packed pixels, (H, bytes), with chunks that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    body = [header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def packed(values: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint8]:
    """(H, bytes) of 8-bit or big-endian 16-bit values."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(H, -1)


def sixteen_bit(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return packed(values.astype(">u2") * 257)


def icc_profile(space: bytes, **tags: bytes) -> bytes:
    """A matrix or grey display profile, version 2."""
    text = {"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0".ljust(80, b"\0"), "cprt": b"text\0\0\0\0x\0"}
    named = {**text, "wtpt": xyz(0.9642, 1, 0.8249), **tags}
    table, content, start = b"", b"", 128 + 4 + 12 * len(named)
    for name, tag in named.items():
        table += name.encode() + struct.pack(">II", start + len(content), len(tag))
        content += tag + b"\0" * (-len(tag) % 4)
    white = b"".join(fixed(value) for value in (0.9642, 1, 0.8249))
    head = struct.pack(">I", start + len(content)) + b"lcms" + struct.pack(">I", 0x02400000) + b"mntr" + space
    head = (head + b"XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28 + white).ljust(128, b"\0")
    return head + struct.pack(">I", len(named)) + table + content


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">I", 1) + struct.pack(">H", round(value * 256)) + b"\0\0"


CURVES = {"rTRC": gamma(2.2), "gTRC": gamma(2.2), "bTRC": gamma(2.2)}
DISPLAY_P3 = icc_profile(
    b"RGB ",
    rXYZ=xyz(0.51512, 0.2412, -0.00105),
    gXYZ=xyz(0.29198, 0.69225, 0.04189),
    bXYZ=xyz(0.1571, 0.06657, 0.78407),
    **CURVES,
)
RED_IS_GREEN = icc_profile(
    b"RGB ",
    rXYZ=xyz(0.3851, 0.7169, 0.0971),
    gXYZ=xyz(0.4361, 0.2225, 0.0139),
    bXYZ=xyz(0.1431, 0.0606, 0.7141),
    **CURVES,
)
LINEAR_GREY = icc_profile(b"GRAY", kTRC=gamma(1.0))


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def displayable() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of files that have to look as they do in a browser."""
    colour, grey, rgba = Image.fromarray(COLOUR), Image.fromarray(GREY), Image.fromarray(RGBA)
    grey_alpha = Image.merge("LA", [grey, Image.fromarray(ALPHA)])
    palette, bits = colour.quantize(16), (GREY > 128)
    inverted = Image.fromarray(255 - COLOUR)
    animation = {"save_all": True, "append_images": [inverted], "duration": 100_000}
    key = tuple(int(v) for v in COLOUR[5, 5])
    yield "rgb", saved(colour)
    yield "grey", saved(grey)
    yield "grey, 1 bit", saved(Image.fromarray(bits))
    yield "grey, 4 bits", png((GREY[:, ::2] >> 4 << 4) | (GREY[:, 1::2] >> 4), 4, 0)
    yield "grey, 16 bits", png(packed(GREY16), 16, 0)
    yield "rgb, 16 bits", png(packed(COLOUR.astype(">u2") * 257 - (COLOUR > 0) * np.uint16(100)), 16, 2)
    yield "rgba", saved(rgba)
    yield "rgba, 16 bits", png(sixteen_bit(RGBA), 16, 6)
    yield "black on transparent", saved(Image.fromarray(np.dstack([COLOUR * 0, ALPHA])))
    yield "grey and alpha", saved(grey_alpha)
    yield "grey and alpha, 16 bits", png(sixteen_bit(np.dstack([GREY, ALPHA])), 16, 4)
    yield "palette", saved(palette)
    yield "palette with alpha", saved(palette, transparency=bytes(range(0, 256, 16)))
    yield "palette, one transparent", saved(palette, transparency=3)
    yield "rgb, one transparent", saved(colour, transparency=key)
    yield "grey, one transparent", saved(grey, transparency=key[0])
    yield "1 bit, one transparent", png(np.packbits(bits, axis=1), 1, 0, chunk(b"tRNS", b"\0\0"))
    yield "16 bits, one transparent", png(packed(GREY16), 16, 0, chunk(b"tRNS", GREY16[3, 4].tobytes()))
    yield "gif, one transparent", saved(palette, "GIF", transparency=3)
    yield "webp", saved(colour, "WEBP", lossless=True)
    yield "webp with alpha", saved(rgba, "WEBP", lossless=True, exact=True)
    yield "jpeg", saved(colour, "JPEG", quality=95)
    yield "jpeg, grey", saved(grey, "JPEG", quality=95)
    yield "jpeg, cmyk", saved(colour.convert("CMYK"), "JPEG", quality=95)
    yield "animated png", saved(colour, "PNG", **animation)
    yield "animated gif", saved(colour, "GIF", **animation)
    yield "animated webp", saved(colour, "WEBP", lossless=True, **animation)
    for orientation in range(1, 9):
        yield f"png, orientation {orientation}", saved(colour, exif=oriented(orientation))
    yield "jpeg, orientation 6", saved(colour, "JPEG", quality=95, exif=oriented(6))
    yield "webp, orientation 6", saved(colour, "WEBP", lossless=True, exif=oriented(6))
    yield "grey and alpha, orientation 8", saved(grey_alpha, exif=oriented(8))
    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", XMP.decode())
    yield "png, orientation in XMP", saved(colour, pnginfo=xmp)
    yield "jpeg, orientation in XMP", saved(colour, "JPEG", quality=95, xmp=XMP)
    yield "damaged EXIF", saved(colour, exif=b"Exif\0\0nonsense that is no TIFF")
    yield "display p3", saved(colour, icc_profile=DISPLAY_P3)
    for file_format in ("PNG", "JPEG", "WEBP"):
        lossless = {"lossless": True} if file_format == "WEBP" else {}
        yield f"{file_format}, colours swapped", saved(colour, file_format, icc_profile=RED_IS_GREEN, **lossless)
    yield "rgba, colours swapped", saved(rgba, icc_profile=RED_IS_GREEN)
    yield "palette, colours swapped", saved(palette, icc_profile=RED_IS_GREEN)
    yield "grey with a grey profile", saved(grey, icc_profile=LINEAR_GREY)
    yield "grey and alpha with a grey profile", saved(grey_alpha, icc_profile=LINEAR_GREY)
    yield "grey with an RGB profile", saved(grey, icc_profile=RED_IS_GREEN)
    yield "rgb with a grey profile", saved(colour, icc_profile=LINEAR_GREY)
    yield "damaged profile", saved(colour, icc_profile=b"garbage" * 30)
    yield "gamma of sRGB", png(packed(COLOUR), 8, 2, chunk(b"gAMA", struct.pack(">I", 45455)))
    other_gamma = chunk(b"gAMA", struct.pack(">I", 100_000))
    yield "sRGB and another gamma", png(packed(COLOUR), 8, 2, chunk(b"sRGB", b"\0"), other_gamma)


def undecodable() -> Iterator[tuple[str, bytes, str]]:
    """Name and bytes of files that cannot be used, and a part of the reason."""
    colour = Image.fromarray(COLOUR)
    intact = saved(colour)
    yield "empty", b"", "0 bytes"
    yield "text", b"<html>404</html>", "16 bytes of another kind"
    yield "another format", saved(colour, "BMP"), "another kind"
    yield "truncated", intact[: len(intact) * 2 // 3], "truncated"
    yield "bit flipped", intact[:60] + bytes([intact[60] ^ 1]) + intact[61:], "broken data stream"
    yield "jpeg, truncated", saved(colour, "JPEG")[:-40], "truncated"
    bomb = png(np.zeros((0, 0), np.uint8), 1, 0, size=(20_000, 20_000))
    yield "decompression bomb", bomb, "decompression bomb"
    yield "large image", png(np.zeros((0, 0), np.uint8), 1, 0, size=(10_000, 10_000)), "decompression bomb"
    yield "linear gamma", png(packed(COLOUR), 8, 2, chunk(b"gAMA", struct.pack(">I", 100_000))), "a gamma other than"
    primaries = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    p3 = png(packed(COLOUR), 8, 2, chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"cHRM", primaries))
    yield "primaries of P3", p3, "primaries other than"
    yield "cICP of P3", png(packed(COLOUR), 8, 2, chunk(b"cICP", bytes([12, 13, 0, 1]))), "cICP"
    four_bit = (GREY[:, ::2] >> 4 << 4) | (GREY[:, 1::2] >> 4)
    yield "4 bits, one transparent", png(four_bit, 4, 0, chunk(b"tRNS", b"\0\5")), "a transparent colour at 4 bits"
