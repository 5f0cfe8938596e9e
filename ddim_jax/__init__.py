"""Denoising Diffusion Implicit Models (Song, Meng, Ermon 2020) in JAX. Begin with `schedule.py`, then `samplers.py`."""
