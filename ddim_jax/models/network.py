"""A network as two pure functions, init and apply, for any neural network library."""

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
    """A network: `init(key) -> params` and `apply(params, x, time, labels, train, rngs) -> output of the shape of x`.

    shape: the shape of one x, such as (H, W, C).
    num_classes: 0 for a network without labels.

    Networks with equal fields are equal, and compile once.
    """

    shape: tuple[int, ...]
    num_classes: int

    def init(self, key: Array) -> Any:
        """The initial parameters. key: one key."""
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
        """The output of the network, in the shape of x.

        x: (B, *shape).
        time: (B,), counts 0..T-1.
        labels: (B,) ints, or None for a network without classes.
        train: whether dropout of features and of labels is active. It then needs rngs.
        rngs: {"dropout": key}.
        """
        raise NotImplementedError

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute of the module, such as `width`, the largest number of features of a layer, or the default."""
        return default


@dataclasses.dataclass(frozen=True)
class Linen(Network):
    """The `Network` of a Linen module that is called as module(x, time, labels, train)."""

    module: nn.Module

    def init(self, key):
        x = jnp.zeros((1, *self.shape))
        labels = jnp.zeros(1, jnp.int32) if self.num_classes else None
        return self.module.init(key, x, jnp.zeros(1, jnp.int32), labels)["params"]

    def apply(self, params, x, time, labels=None, train=False, rngs=None):
        return self.module.apply({"params": params}, x, time, labels, train=train, rngs=rngs)

    def attribute(self, name, default):
        return getattr(self.module, name, default)


@dataclasses.dataclass(frozen=True)
class NNX(Network):
    """The `Network` of a class of NNX modules.

    A module is created as factory(**fields, rngs=rngs) and called as module(x, time), or module(x, time, labels) with
    classes. The parameters are its variables of type `nnx.Param`, as nested dicts. `module.train()` and `module.eval()`
    switch dropout.
    """

    factory: Callable[..., nnx.Module]
    fields: Mapping[str, Any]

    def init(self, key):
        return nnx.to_pure_dict(nnx.state(self._create(nnx.Rngs(key)), nnx.Param))

    def apply(self, params, x, time, labels=None, train=False, rngs=None):
        # The initial parameters are replaced by params. XLA does not compute them.
        module = self._create(nnx.Rngs(0, **(rngs or {})))
        state = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(module, state)
        module.train() if train else module.eval()
        return module(x, time) if labels is None else module(x, time, labels)

    def _create(self, rngs):
        return self.factory(**self.fields, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Functions(Network):
    """The `Network` of two functions: init(key) -> params, apply(params, x, time, labels, train, rngs) -> output."""

    init_fn: Callable[[Array], Any]
    apply_fn: Callable[..., Array]

    def init(self, key):
        return self.init_fn(key)

    def apply(self, params, x, time, labels=None, train=False, rngs=None):
        return self.apply_fn(params, x, time, labels, train, rngs)


def make(factory: Callable, fields: Mapping[str, Any], shape: tuple[int, ...], num_classes: int) -> Network:
    """Creates the `Network` factory(**fields).

    factory: a class of NNX modules, or a callable that returns a Linen module, a `Network` or a pair of functions
        (init, apply).
    fields: the arguments of the factory.
    shape, num_classes: see `Network`.

    Raises ValueError for another factory, and if the `check` of the module fails.
    """
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        network = NNX(tuple(shape), num_classes, factory, _Fields(fields))
        jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))  # raises the errors of invalid fields
        return network
    network = factory(**fields)
    if hasattr(network, "check"):
        network.check()
    return as_network(network, shape, num_classes)


def as_network(network: Any, shape: tuple[int, ...] | None = None, num_classes: int | None = None) -> Network:
    """Converts a Linen module, or a pair of functions (init, apply), to a `Network`. Returns a `Network` unchanged.

    shape, num_classes: see `Network`; default: from the attributes image_size, image_channels and num_classes.

    Raises ValueError for anything else, and if the shape is unknown.
    """
    if isinstance(network, Network):
        return network
    pair = isinstance(network, tuple) and len(network) == 2 and all(map(callable, network))
    if not isinstance(network, nn.Module) and not pair:
        raise ValueError(
            f"network must be a Linen module, an NNX class or a pair (init, apply), got {type(network).__name__}"
        )
    if shape is None and all(hasattr(network, name) for name in ("image_size", "image_channels")):
        shape = (network.image_size, network.image_size, network.image_channels)
    if shape is None:
        raise ValueError("shape of one x must be given: the network has no attributes image_size and image_channels")
    num_classes = getattr(network, "num_classes", 0) if num_classes is None else num_classes
    return Functions(tuple(shape), num_classes, *network) if pair else Linen(tuple(shape), num_classes, network)


def param_shapes(network: Network) -> Any:
    """The shapes and dtypes of the parameters of a network. No parameters are created."""
    return _param_shapes(as_network(network))


@functools.lru_cache(maxsize=16)
def _param_shapes(network: Network) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0))


class _Fields(dict):
    """A hashable dict of arguments."""

    def __hash__(self):
        return hash(frozenset(self.items()))
