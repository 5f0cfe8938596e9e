"""A laboratory of somebody who uses ddim_jax: their network, sampler, schedule, tau, data, features and metric. Nothing
of it is part of ddim_jax, which finds all of it by "module:attribute".
"""
