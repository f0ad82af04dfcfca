"""Which tensors train. Names follow the SDD release; shares are those of the Stable Diffusion 1.x UNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from deleatur.errors import SettingsError

Selector = Literal["xattn", "xattn_kv", "selfattn", "noxattn", "notime", "full"]


def _keeps_time(name: str) -> bool:
    # Only the two `time_embedding` linears: the per-block `time_emb_proj` layers stay trainable, as in the release.
    return not name.startswith(("conv_out.", "time_embedding."))


RULES: dict[str, Callable[[str], bool]] = {
    "xattn": lambda n: "attn2" in n,  # 5.11 %
    "xattn_kv": lambda n: "attn2.to_k" in n or "attn2.to_v" in n,  # 2.23 %
    "selfattn": lambda n: "attn1" in n,  # 5.77 %
    "noxattn": lambda n: "attn2" not in n and _keeps_time(n),  # 94.6 %
    "notime": _keeps_time,  # 99.8 %
    "full": lambda n: True,
}


def select(unet: nn.Module, selector: Selector) -> dict[str, Tensor]:
    """The chosen parameters by name, as they are. Raises SettingsError when the rule matches none."""
    chosen: dict[str, Tensor] = {n: p for n, p in unet.named_parameters() if RULES[selector](n)}
    if not chosen:
        raise SettingsError(f"the selector {selector!r} matches no tensor of this UNet")
    return chosen
