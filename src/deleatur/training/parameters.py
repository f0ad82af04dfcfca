"""Selectors of the UNet's trainable tensors, named as in the SDD release.

Shares of the parameters are those of Stable Diffusion 1.x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from deleatur.errors import SettingsError

Selector = Literal["xattn", "xattn_kv", "selfattn", "noxattn", "notime", "full"]


def _is_not_time_or_output(name: str) -> bool:
    # Only the two `time_embedding` linears: the per-block `time_emb_proj` layers stay trainable, as in the release.
    return not name.startswith(("conv_out.", "time_embedding."))


RULES: dict[str, Callable[[str], bool]] = {
    "xattn": lambda n: "attn2" in n,  # 5.11 %
    "xattn_kv": lambda n: "attn2.to_k" in n or "attn2.to_v" in n,  # 2.23 %
    "selfattn": lambda n: "attn1" in n,  # 5.77 %
    "noxattn": lambda n: "attn2" not in n and _is_not_time_or_output(n),  # 94.6 %
    "notime": _is_not_time_or_output,  # 99.8 %
    "full": lambda n: True,
}
"""Selector → whether a parameter of this name trains."""


def select(unet: nn.Module, selector: Selector) -> dict[str, Tensor]:
    """The selected parameters by name, not copied. Raises SettingsError when the selector matches none."""
    selected: dict[str, Tensor] = {n: p for n, p in unet.named_parameters() if RULES[selector](n)}
    if not selected:
        raise SettingsError(
            f"the selector {selector!r} matches no tensor of this UNet",
            hint="choose another erase.….training.trainable, then: deleatur check",
        )
    return selected
