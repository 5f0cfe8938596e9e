"""The commands, each in a process of its own. Those that are waited for are forked from one that has the libraries
already: loading them is most of what a mistake takes to be told.
"""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
GIVEN = os.environ.get("XLA_FLAGS", "")
LIMIT = 300  # seconds
LIBRARIES = ["jax", "flax.linen", "optax", "orbax.checkpoint", "ml_collections", "absl.app", "tensorboardX", "tqdm"]

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(LIBRARIES)


def xla_flags(devices):
    """The last word counts: a process that pytest-xdist starts is given these already."""
    return f"{GIVEN} --xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"


def run(module, *args, devices=1, cwd=ROOT):
    """`python -m module args`, from the root of the repository."""
    env = {**os.environ, "XLA_FLAGS": xla_flags(devices)}
    with tempfile.TemporaryDirectory() as folder:
        out, err = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
        process = _forking.Process(target=_command, args=(module, [*map(str, args)], env, str(cwd), str(out), str(err)))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{module} {args} took {LIMIT} s: {err.read_text()}")
        return subprocess.CompletedProcess([module, *args], process.exitcode, out.read_text(), err.read_text())


def _command(module, args, env, cwd, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes do not
        sys.stdout.flush()


def start(module, *args, devices=1):
    """The same, not waited for, and all by itself: it is there to be killed."""
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
