"""Eight virtual CPU devices, strict rank promotion, and one compilation cache for all that the tests start. XLA
optimises less than it does for users: the tests mostly wait for it to compile.
"""

import fcntl
import getpass
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

CACHE = pathlib.Path(tempfile.gettempdir()) / f"ddim_jax_tests_{getpass.getuser()}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
GIVEN = os.environ.get("XLA_FLAGS", "")


def xla_flags(devices):
    """The last word counts: a process that pytest-xdist starts is given these already."""
    return f"{GIVEN} --xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"


os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ.update(JAX_COMPILATION_CACHE_DIR=str(CACHE), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.5")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("untimed", deadline=None)  # the first example may compile
hypothesis.settings.load_profile("untimed")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh():
    """One device, whatever the machine has."""
    return meshes()[0]


def meshes():
    """One device, and eight."""
    return [
        jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:n])
        for n in (1, 8)
    ]


def once(tmp_path_factory, name, make):
    """A folder of that name that make(folder) has filled, by the first of the processes that run the tests."""
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


def run(module, *args, devices=1, cwd=ROOT, **kwargs):
    """`python -m module args` in a process of its own, from the root of the repository."""
    env = {**os.environ, "XLA_FLAGS": xla_flags(devices)}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def start(module, *args, devices=1):
    """The same, not waited for."""
    env = {**os.environ, "XLA_FLAGS": xla_flags(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ok(process):
    assert process.returncode == 0, process.stderr
    return process


def error_line(process):
    """The one line that a mistake may print, beside a progress bar."""
    lines = [line for line in process.stderr.splitlines() if line.strip() and "%|" not in line]
    assert process.returncode == 2, (process.returncode, process.stdout, process.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    return lines[0]
