"""Ahead-of-time compilation of the training update and of the sampler for TPU slices, and what their programs need.

No TPU is needed: the compiler of the package libtpu runs on any x86-64 Linux machine. Nothing is executed, so no time
is measured for a TPU: the times are lower bounds.
"""
