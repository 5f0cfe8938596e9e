"""The code of a user of ddim_jax: networks, a sampler, a schedule, a tau, a data set, features and a metric. ddim_jax
does not import it, except by the name "module:attribute".
"""
