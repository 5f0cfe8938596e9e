"""The commands, each in its own process. `run` forks it from a server that has imported the libraries, because the
imports take most of the time of a command that ends in an error.
"""

import atexit
import multiprocessing
import os
import pathlib
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time

import messages

ROOT = pathlib.Path(__file__).parents[1]
GIVEN = os.environ.get("XLA_FLAGS", "")
LIMIT = 300  # seconds
LIBRARIES = ["jax", "flax.linen", "optax", "orbax.checkpoint", "ml_collections", "absl.app", "tensorboardX", "tqdm"]

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(LIBRARIES)


def xla_flags(devices):
    """The last flag of a name wins: pytest-xdist passes these flags to its workers."""
    return f"{GIVEN} --xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"


def run(module, *args, devices=1, cwd=ROOT, file_bytes=resource.RLIM_INFINITY):
    """`python -m module args`, in the root of the repository. file_bytes: the largest size of a file."""
    env = {**os.environ, "XLA_FLAGS": xla_flags(devices)}
    with tempfile.TemporaryDirectory() as folder:
        out, err = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
        process = _forking.Process(
            target=_command, args=(module, [*map(str, args)], env, str(cwd), str(out), str(err), file_bytes)
        )
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{module} {args} took {LIMIT} s: {err.read_text()}")
        return subprocess.CompletedProcess([module, *args], process.exitcode, out.read_text(), err.read_text())


def _command(module, args, env, cwd, out, err, file_bytes):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing does not call them
        sys.stdout.flush()


def start(module, *args, devices=1):
    """The same as a Popen, without the server: it can be killed, and handles Ctrl-C."""
    env = {**os.environ, "XLA_FLAGS": xla_flags(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_first_line(process):
    """Waits until the process handles SIGTERM. A command does so from its first line; Python alone does not."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate())


def signalled(process, number):
    """The CompletedProcess after this signal."""
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ok(process):
    assert process.returncode == 0, process.stderr
    return process


def error_line(process, *words):
    """The line with which a command failed: exit code 2, and one line on stderr beside a progress bar. It must contain
    every word as a whole word.
    """
    lines = [line for line in process.stderr.splitlines() if line.strip() and "%|" not in line]
    assert process.returncode == 2, (process.returncode, process.stdout, process.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    messages.assert_names(lines[0], *words)
    return lines[0]
