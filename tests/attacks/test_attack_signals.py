"""Ctrl-C and SIGTERM at any moment: one line and the exit code 130 or 75, or a complete result and the exit code 0."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from attacking import holds, refused
from processes import ROOT, ok, run, signalled, start, wait_for_first_line
from test_commands import assert_same_run, trained  # noqa: F401, a fixture
from tiny import SMOKE

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
BOTH = pytest.mark.parametrize("number", CODES)


# --- the mechanism, in processes without JAX ---


def script(code, *signals, **options):
    """The CompletedProcess of this code, which prints a line when it is ready for each of the signals."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from ddim_jax.utils import interrupts\ninterrupts.install()\nimport os, time\n{code}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, options.get("inherited", signal.SIG_DFL)),
    )
    lines = []
    for number in signals:
        lines.append(process.stdout.readline())
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, "".join(lines) + out, err)


NOW = "print('now', flush=True)\n"


@BOTH
@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(50)",
        "while True:\n try:\n  time.sleep(50)\n except BaseException: pass",  # like a callback of a compiler
        "class A:\n def __del__(self): time.sleep(50)\nA()",
        # A C function that does not return to Python. A signal may interrupt one call; the next call follows.
        "import ctypes\nwhile True: ctypes.CDLL(None).sleep(50)",
        "import threading\nthreading.Thread(target=time.sleep, args=(50,)).start()",  # Python joins it at exit
        "import atexit\natexit.register(time.sleep, 50)",
    ],
)
def test_a_signal_is_never_lost(number, busy):
    begin = time.monotonic()
    refused(script(NOW + busy, number), code=CODES[number])
    assert time.monotonic() - begin < 40


@BOTH
def test_postponed_signals(number):
    """The first signal waits for the end of the block. The second one ends the process."""
    wait = "with interrupts.postponed() as came:\n" + " print('now', flush=True)\n while not came(): time.sleep(0.01)\n"
    saved = script(wait + " print('saved', came(), flush=True)", number)
    refused(saved, code=CODES[number])
    holds(f"saved {int(number)}" in saved.stdout)
    refused(script(wait + " print('now', flush=True)\n time.sleep(50)", number, signal.SIGINT), code=130)
    own = script(wait + " raise SystemExit(7)", number)
    holds(own.returncode == 7 and not own.stderr, own.stderr)


def test_an_incomplete_file_is_removed(tmp_path):
    code = "import pathlib\nfrom ddim_jax.utils import files\n"
    code += f"with files.replacing(pathlib.Path({str(tmp_path)!r}, 'x')):\n "
    refused(script(code + NOW + " time.sleep(50)", signal.SIGINT), code=130)
    holds(not list(tmp_path.iterdir()))


def test_a_signal_after_the_end_does_not_change_the_exit_code():
    done = script("interrupts.done(0)\n" + NOW + "time.sleep(50)", signal.SIGINT)
    holds(done.returncode == 0 and not done.stderr)


def test_an_ignored_ctrl_c_stays_ignored():
    """As in the background of a shell script, and with nohup."""
    background = script(NOW + "time.sleep(0.3)\nprint('on')", signal.SIGINT, inherited=signal.SIG_IGN)
    holds(background.returncode == 0 and background.stdout.endswith("on\n"), background.stderr)


def test_a_signal_to_a_forked_process():
    """It ends the forked process as in Python, and not its parent."""
    code = (
        "child = os.fork()\n"
        "if not child: time.sleep(50)\n"
        "time.sleep(0.3)\nos.kill(child, 15)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\ntime.sleep(0.3)"
    )
    process = script(code)
    holds(process.stdout == "-15\n" and process.returncode == 0, process.stderr)


def test_closed_standard_streams(tmp_path):
    """The next open file must not get the number of stdout or stderr: printed text would be written into it."""
    code = f"with open({str(tmp_path / 'x')!r}, 'w') as file:\n print('mine', file=file)\n os.write(2, b'noise')\n"
    command = f'{sys.executable} -c "$CODE" >&- 2>&-'
    env = {**os.environ, "CODE": f"from ddim_jax.utils import interrupts\ninterrupts.install()\nimport os\n{code}"}
    holds(subprocess.run(command, shell=True, cwd=ROOT, env=env).returncode == 0)
    holds((tmp_path / "x").read_text() == "mine\n")


# --- the commands ---


@pytest.mark.parametrize(
    "module, number",
    [("train", signal.SIGINT), ("sample", signal.SIGTERM)]
    + [
        pytest.param(module, number, marks=pytest.mark.slow)
        for module in ("train", "sample", "encode", "evaluate", "convert", "prepare")
        for number in CODES
    ],
)
def test_a_signal_during_the_imports(module, number):
    process = start(f"ddim_jax.{module}")
    wait_for_first_line(process)
    time.sleep(0.05)
    refused(signalled(process, number), code=CODES[number])


def wait_until(process, path):
    while process.poll() is None and not path.exists():
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_during_the_compilation_of_the_update(number, tmp_path):
    """The value of warmup makes the program a new one, which is not in the compilation cache."""
    process = start("ddim_jax.train", *SMOKE, "--config.train.warmup=3", "--workdir", tmp_path / "run")
    wait_until(process, tmp_path / "run" / "config.json")
    time.sleep(0.3)
    refused(signalled(process, number), code=CODES[number])


@pytest.mark.slow
def test_ctrl_c_ends_training_after_the_step(tmp_path):
    """No checkpoint is incomplete."""
    often = ("--config.train.num_steps=100000", "--config.train.grid_every=0")
    process = start("ddim_jax.train", *SMOKE, *often, "--workdir", tmp_path / "run")
    wait_until(process, tmp_path / "run" / "checkpoints" / "5")
    refused(signalled(process, signal.SIGINT), code=130)
    holds(not list((tmp_path / "run" / "checkpoints").glob("*tmp*")))


def at_random_moments(number, begin, tries=10, seed=0):
    """The processes after the signal, at random moments between the first line and the end."""
    begun = time.monotonic()
    process = begin()
    wait_for_first_line(process)
    assert process.communicate()[0] is None and process.returncode == 0
    length = time.monotonic() - begun
    for moment in np.random.default_rng(seed).uniform(0, length, tries):
        process = begin()
        wait_for_first_line(process)
        time.sleep(moment)
        yield signalled(process, number)


@pytest.mark.slow
@BOTH
def test_training_at_random_moments(number, tmp_path, trained):  # noqa: F811
    """The same command ends with the parameters and the metrics of an uninterrupted run."""
    count = iter(range(100))

    def begin():
        return start("ddim_jax.train", *SMOKE, "--workdir", tmp_path / str(next(count)))

    for i, process in enumerate(at_random_moments(number, begin)):
        if process.returncode == 75 and re.search(r"\bstep \d+", process.stderr):  # it saved this step
            holds("Traceback" not in process.stderr)
        elif process.returncode:
            refused(process, code=CODES[number])
        ok(run("ddim_jax.train", *SMOKE, "--workdir", tmp_path / str(i + 1)))
        assert_same_run(tmp_path / str(i + 1), trained)


@pytest.mark.slow
@BOTH
def test_sampling_at_random_moments(number, tmp_path):
    """The same command ends with the same images."""
    options = ("--config.sample.num_images=64", "--config.sample.batch_size=8", "--config.sample.eta=1", "--png")
    args = ("ddim_jax.sample", "--config", "configs/digits.py", *options, "--film", "--out")
    count = iter(range(100))
    for i, process in enumerate(at_random_moments(number, lambda: start(*args, tmp_path / str(next(count))))):
        if process.returncode:
            refused(process, code=CODES[number])
        ok(run(*args, tmp_path / str(i + 1)))
        resumed, whole = (np.load(tmp_path / str(k) / "samples.npz")["arr_0"] for k in (i + 1, 0))
        holds((resumed == whole).all())
        names = [sorted(path.name for path in (tmp_path / str(k)).iterdir()) for k in (i + 1, 0)]
        holds(names[0] == names[1], str(names))
