"""The diffusion model: loading, text encoding, noise prediction and sampling. Only this package imports diffusers."""
