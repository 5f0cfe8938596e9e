"""Weights as one file each, and those that ship with the package."""

from ddim_jax.pretrained.safetensors_file import load, save, shipped, shipped_names

__all__ = ["load", "save", "shipped", "shipped_names"]
