"""Networks see the pixels that a browser shows to raters; what cannot be decoded so is refused with the reason."""

from __future__ import annotations

import base64
from collections.abc import Callable

import image_files
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser

from deleatur.diffusion.rgb import to_rgb
from deleatur.errors import DataError
from deleatur.storage import images

UNDECODABLE = list(image_files.undecodable())
Pixels = NDArray[np.int64]
RENDER = """async (data) => {
    const image = new Image(); image.src = 'data:image/png;base64,' + data; await image.decode();
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const page = canvas.getContext('2d');
    page.fillStyle = 'white'; page.fillRect(0, 0, canvas.width, canvas.height); page.drawImage(image, 0, 0);
    return [canvas.height, canvas.width, [...page.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""
"""On a white page. The type in the address does not matter: browsers look at the bytes, as Pillow does."""


@pytest.fixture(scope="module")
def render(browser: Browser) -> Callable[[bytes], Pixels]:
    page = browser.new_page()

    def rendered(data: bytes) -> Pixels:
        height, width, values = page.evaluate(RENDER, base64.b64encode(data).decode())
        return np.array(values).reshape(height, width, 4)[..., :3]

    return rendered


def test_files_are_decoded_as_a_browser_shows_them(render: Callable[[bytes], Pixels]) -> None:
    different = {}
    for name, data in image_files.displayable():
        ours, shown = np.asarray(images.decode(data), int), render(data)
        assert ours.shape == shown.shape, name
        if (difference := int(abs(ours - shown).max())) > 1:  # colour management and blending round differently
            different[name] = difference
    assert not different


@pytest.mark.parametrize(("name", "data", "reason"), UNDECODABLE, ids=[name for name, _, _ in UNDECODABLE])
def test_what_cannot_be_decoded_is_refused_with_the_reason(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        images.decode(data)


def test_sampled_images_are_decoded_to_the_bit() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    assert images.decode(images.encode(noise)).tobytes() == noise.tobytes()
    assert to_rgb(noise) is noise
