"""What is trained and sampled: two pure functions, init and apply, whatever library they were written with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from ddim_jax.schedule import Array


@dataclasses.dataclass(frozen=True)
class Network:
    """`init(key) -> params` and `apply(params, x, time, labels, train, rngs) -> output of the shape of x`.

    shape: of one x, such as (H, W, C). num_classes: 0 for a network without labels. x: (B, *shape). time: (B,), counts
    0..T-1. labels: (B,) ints, None without classes. train: whether dropout acts, of features and of labels, which then
    needs rngs, {"dropout": key}. Networks of equal fields are equal, and compile once.
    """

    shape: tuple[int, ...]
    num_classes: int

    def init(self, key: Array) -> Any:
        raise NotImplementedError

    def apply(
        self,
        params: Any,
        x: Array,
        time: Array,
        labels: Array | None = None,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
    ) -> Array:
        raise NotImplementedError

    def fact(self, name: str, default: Any) -> Any:
        """An attribute of the module, such as `width`, the most features of a layer; else the default."""
        return default


@dataclasses.dataclass(frozen=True)
class Linen(Network):
    """Of a Linen module that is called as (x, time, labels, train)."""

    module: nn.Module

    def init(self, key):
        x = jnp.zeros((1, *self.shape))
        labels = jnp.zeros(1, jnp.int32) if self.num_classes else None
        return self.module.init(key, x, jnp.zeros(1, jnp.int32), labels)["params"]

    def apply(self, params, x, time, labels=None, train=False, rngs=None):
        return self.module.apply({"params": params}, x, time, labels, train=train, rngs=rngs)

    def fact(self, name, default):
        return getattr(self.module, name, default)


@dataclasses.dataclass(frozen=True)
class NNX(Network):
    """Of a class of NNX modules that is made as (**fields, rngs) and called as (x, time), with labels where there are
    classes. Its parameters are those of type `nnx.Param`, as nested dicts; `train` and `eval` switch dropout.
    """

    factory: Callable[..., nnx.Module]
    fields: Mapping[str, Any]

    def init(self, key):
        return nnx.to_pure_dict(nnx.state(self._made(nnx.Rngs(key)), nnx.Param))

    def apply(self, params, x, time, labels=None, train=False, rngs=None):
        # What it is made with is replaced by params, and is not computed.
        module = self._made(nnx.Rngs(0, **(rngs or {})))
        state = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(module, state)
        module.train() if train else module.eval()
        return module(x, time) if labels is None else module(x, time, labels)

    def _made(self, rngs):
        return self.factory(**self.fields, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Functions(Network):
    """Of two plain functions: init(key) -> params, apply(params, x, time, labels, train, rngs) -> output."""

    init_fn: Callable[[Array], Any]
    apply_fn: Callable[..., Array]

    def init(self, key):
        return self.init_fn(key)

    def apply(self, params, x, time, labels=None, train=False, rngs=None):
        return self.apply_fn(params, x, time, labels, train, rngs)


def make(factory: Callable, fields: Mapping[str, Any], shape: tuple[int, ...], num_classes: int) -> Network:
    """The network that a factory makes of its fields: a Linen module, a Network, or a pair of functions (init, apply);
    or the factory is a class of NNX modules. ValueError for anything else, and where a module's `check` refuses.
    """
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        network = NNX(tuple(shape), num_classes, factory, _Fields(fields))
        jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))  # a mistake in the fields shows here
        return network
    made = factory(**fields)
    if hasattr(made, "check"):
        made.check()
    return as_network(made, shape, num_classes)


def as_network(made: Any, shape: tuple[int, ...] | None = None, num_classes: int | None = None) -> Network:
    """The Network itself, or that of a Linen module, or of a pair of functions (init, apply). shape, num_classes: as of
    `Network`; default: what a module says by image_size, image_channels and num_classes. ValueError for anything else.
    """
    if isinstance(made, Network):
        return made
    pair = isinstance(made, tuple) and len(made) == 2 and all(map(callable, made))
    if not isinstance(made, nn.Module) and not pair:
        raise ValueError(
            f"a network must be a Linen module, an NNX class or a pair (init, apply), got {type(made).__name__}"
        )
    if shape is None and all(hasattr(made, name) for name in ("image_size", "image_channels")):
        shape = (made.image_size, made.image_size, made.image_channels)
    if shape is None:
        raise ValueError("shape must be given, that of one x: the network does not say image_size and image_channels")
    num_classes = getattr(made, "num_classes", 0) if num_classes is None else num_classes
    return Functions(tuple(shape), num_classes, *made) if pair else Linen(tuple(shape), num_classes, made)


def param_shapes(network: Network) -> Any:
    """Shapes and dtypes of the parameters of a network, without making any."""
    return _param_shapes(as_network(network))


@functools.lru_cache(maxsize=16)
def _param_shapes(network: Network) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0))


class _Fields(dict):
    """Arguments by name that can be hashed."""

    def __hash__(self):
        return hash(frozenset(self.items()))
