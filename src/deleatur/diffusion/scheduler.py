"""A checkpoint's scheduler config → its noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from deleatur.diffusion.folders import unsupported
from deleatur.maths.noise import NoiseSchedule

SUPPORTED: dict[str, tuple[object, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "timestep_type": ("discrete",),  # continuous: the network is conditioned on log σ, as in EDM
    "use_flow_sigmas": (False, None),  # flow matching
    "thresholding": (False, None),  # of predicted pixels
}
"""Options that change what betas or the network's output mean, or what a sampler step does."""


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule by which `StableDiffusionPipeline` samples when its scheduler is DDIM.

    Like that pipeline, it takes `steps_offset` as 1 and does not clip samples. Raises ModelError for schedulers of
    other families, such as flow matching and EDM, and for options that the sampler does not implement.
    """
    from diffusers import DDIMScheduler
    from diffusers.schedulers import KarrasDiffusionSchedulers

    # All that share DDIM's discrete betas; those of EDM, which diffusers also lists, have continuous noise levels.
    interchangeable = [s.name for s in KarrasDiffusionSchedulers if not s.name.startswith("EDM")]
    if (name := config.get("_class_name", interchangeable[0])) not in interchangeable:
        raise unsupported(f"one of {', '.join(interchangeable)}", name)
    for option, values in SUPPORTED.items():
        if (value := config.get(option, values[0])) not in values:
            raise unsupported(f"{option} to be {' or '.join(map(str, values))}", value)
    try:
        ddim = DDIMScheduler(**{name: config[name] for name in signature(DDIMScheduler).parameters if name in config})
        alphas, options = ddim.alphas_cumprod, ddim.config
        valid = len(alphas) == options.num_train_timesteps and bool(((ddim.betas >= 0) & (ddim.betas <= 1)).all())
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        raise unsupported("valid betas", str(e).splitlines()[0]) from e
    if not valid:
        low, high = float(ddim.betas.min()), float(ddim.betas.max())
        got = f"{len(alphas)} from {low:.3g} to {high:.3g}"
        raise unsupported(f"{options.num_train_timesteps} betas between 0 and 1", got)
    if not alphas.all() and options.prediction_type == "epsilon":
        raise unsupported("v_prediction where the last ᾱ is 0 (rescale_betas_zero_snr)", options.prediction_type)
    final_alpha = float(ddim.final_alpha_cumprod)
    return NoiseSchedule(alphas, final_alpha, 1, options.prediction_type, options.timestep_spacing)
