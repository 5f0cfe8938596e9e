"""Utilities for all packages: errors, files, images, devices, signals."""
