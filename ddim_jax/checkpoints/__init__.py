"""Checkpoints of trained networks in the formats of ddim_jax, diffusers, the official DDIM code, guided-diffusion and
improved-diffusion. Opening one never executes code in its files.
"""

from ddim_jax.checkpoints.find import open_checkpoint
from ddim_jax.checkpoints.info import CheckpointInfo
from ddim_jax.checkpoints.safetensors_file import is_from_ddim_jax, save, shipped, shipped_names

__all__ = ["CheckpointInfo", "is_from_ddim_jax", "open_checkpoint", "save", "shipped", "shipped_names"]
