"""Objectives, optimizers and moving averages, by name and as objects."""
