"""Eight virtual CPU devices, strict rank promotion, and one compilation cache for the tests and their processes. XLA
optimises less than by default, because the tests spend most of their time in compilation.
"""

import fcntl
import getpass
import os
import pathlib
import shutil
import tempfile

from processes import xla_flags

CACHE = pathlib.Path(tempfile.gettempdir()) / f"ddim_jax_tests_{getpass.getuser()}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ.update(JAX_COMPILATION_CACHE_DIR=str(CACHE), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("untimed", deadline=None)  # the first example may compile
hypothesis.settings.load_profile("untimed")


COMPILATIONS = []  # one entry for each program that XLA has compiled or loaded from the compilation cache
COMPILED = "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: COMPILATIONS.append(duration) if event == COMPILED else None
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh():
    """A mesh of one device."""
    return meshes()[0]


def meshes():
    """A mesh of one device, and a mesh of eight."""
    return [
        jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:n])
        for n in (1, 8)
    ]


def once(tmp_path_factory, name, make):
    """A folder that make(folder) has filled. The workers of pytest-xdist share it: the first one fills it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
    return folder
