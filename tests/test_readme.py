"""The commands of the README in their order, with few steps and images, and common next commands."""

import importlib
import importlib.util
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
from absl import flags
from messages import missing
from ml_collections import config_flags
from processes import ROOT, error_line, ok, run
from tiny import SMOKE as ONE_LEVEL

from ddim_jax import config as config_lib
from ddim_jax import data, sampling
from ddim_jax.config import evaluation, weights
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import metrics
from ddim_jax.utils import sharding

README = (ROOT / "README.md").read_text()

FEW_IMAGES = "--config.sample.num_images=4 --config.sample.batch_size=4"
QUICK = f"{FEW_IMAGES} --config.sample.steps=2"
FEW_UPDATES = (
    "--config.train.num_steps=4 --config.train.batch_size=16 --config.train.warmup=0 --config.train.log_every=2 "
    "--config.train.checkpoint_every=2 --config.train.grid_every=0"
)
OFFLINE = ("google/ddpm-cifar10-32", "HF_HUB_OFFLINE")  # names in the error without a network connection
NOT_PREPARED = ("'cifar10'", "python -m ddim_jax.prepare --data cifar10")


class Case(NamedTuple):
    """How the test runs a command."""

    more: str = ""  # further options, for few steps and images
    error: tuple[str, ...] = ()  # names in its error, for a command that needs data or a network connection
    why: str = ""  # why it is not run; only its options are checked
    words: Mapping[str, str] = {}  # replacements of words of the command


HAS_FLATBUFFERS = importlib.util.find_spec("flatbuffers") is not None
EXPORTED = Case() if HAS_FLATBUFFERS else Case(error=("flatbuffers", "export"))
SAMPLES = {"DIR_OR_NPZ": "samples/digits/*"}
CASES = {
    "python3 -m venv .venv": Case(why="an installation"),
    ".venv/bin/pip install -q -e .": Case(why="an installation"),
    "python -m ddim_jax.sample --config configs/digits.py": Case(QUICK),
    "python -m ddim_jax.train --config configs/digits.py --workdir runs/digits": Case(FEW_UPDATES),
    "python -m ddim_jax.sample --config configs/digits.py --workdir runs/digits": Case(QUICK),
    ".venv/bin/pip install -q -e '.[dev]'": Case(why="an installation"),
    "python -m pytest -q -n 2": Case(why="this suite"),
    "python -m ddim_jax.encode --config configs/digits.py --config.sample.steps=50 --out latents": Case(
        "--count=4 --config.sample.steps=3"
    ),
    "python -m ddim_jax.encode --config configs/default.py --config.pretrained=google/ddpm-cifar10-32 "
    "--images DIR_OR_NPZ --out latents": Case(error=OFFLINE),
    "python -m ddim_jax.evaluate --config configs/digits.py --samples DIR_OR_NPZ --out numbers.json": Case(
        "--config.evaluate.num_images=4 --config.evaluate.metrics=fid", words=SAMPLES
    ),
    "python -m ddim_jax.evaluate --config configs/cifar10.py --save_reference cifar10_train.npz": Case(
        "--config.evaluate.features=digits", error=NOT_PREPARED
    ),
    "python -m ddim_jax.evaluate --config configs/cifar10.py --config.evaluate.reference=cifar10_train.npz "
    "--samples DIR_OR_NPZ": Case(
        "--config.evaluate.num_images=4 --config.evaluate.features=digits",
        error=("config.evaluate.reference", "cifar10_train.npz"),
        words=SAMPLES,
    ),
    "python -m experiments.table1_fid --config configs/cifar10.py --config.pretrained=google/ddpm-cifar10-32 "
    "--out table1": Case(error=OFFLINE),
    "python -m experiments.table1_fid --config configs/digits.py --out mine --etas 0,0.5 --steps 10,20 "
    "--sweep sample.tau=uniform,quadratic": Case(
        "--etas 0 --steps 2 --config.evaluate.num_images=20 --config.evaluate.metrics=fid --config.sample.batch_size=20"
    ),
    "python -m experiments.ablation --config configs/digits.py --out ablation --axis sample.eta=0,0.5,1 "
    "--axis sample.steps=10,20 --seeds 0,1,2": Case(
        "--seeds 0 --config.evaluate.num_images=20 --config.evaluate.metrics=fid --config.sample.batch_size=20"
    ),
    "python -m ddim_jax.sample --config configs/default.py --config.pretrained=google/ddpm-cifar10-32 "
    "--config.sample.tau=quadratic": Case(error=OFFLINE),
    "python -m ddim_jax.train --config configs/cifar10.py --config.pretrained=google/ddpm-cifar10-32 "
    "--workdir runs/finetuned ...": Case(error=OFFLINE, words={"...": ""}),
    "python -m ddim_jax.convert --from runs/digits --to digits-diffusers": Case(),
    "python -m ddim_jax.convert --from runs/digits --to digits.safetensors": Case(),
    "python -m ddim_jax.convert --from google/ddpm-cifar10-32 --to runs/cifar10 --format orbax": Case(error=OFFLINE),
    "pip install -e '.[export]'": Case(why="an installation"),
    "python -m ddim_jax.convert --from runs/digits --to digits.stablehlo --sample steps=20 "
    "--sample batch_size=16": EXPORTED,
    **{
        f"python -m ddim_jax.prepare --data {name} --from FOLDER": Case(error=("FOLDER",))
        for name in ("cifar10", "celeba64", "lsun_church256", "lsun_bedroom256")
    },
    "python -m ddim_jax.train --config configs/cifar10.py --config.model.dtype=bfloat16 --workdir runs/cifar10": Case(
        error=NOT_PREPARED
    ),
    "gcloud compute tpus tpu-vm ssh NAME --worker=all '--command=cd ddim_jax && .venv/bin/python -m ddim_jax.train "
    "--config configs/cifar10.py --config.model.dtype=bfloat16 --workdir /mnt/runs/cifar10 --distributed'": Case(
        why="a TPU pod slice"
    ),
    "python -m benchmarks.training --config configs/cifar10.py --config.model.dtype=bfloat16": Case(
        why="it takes many minutes on a CPU"
    ),
    "python -m experiments.from_scratch --config configs/cifar10.py --config.model.dtype=bfloat16 --minutes 600 "
    "--out cifar10": Case(error=NOT_PREPARED),
    "pip install -e '.[parity]'": Case(why="an installation"),
    "python -m benchmarks.suite --config configs/cifar10.py --out FILE": Case(why="it takes an hour"),
    "pip install -e '.[cuda]'": Case(why="an installation, for a GPU"),
    "pip install -e '.[tpu]'": Case(why="an installation, for a TPU"),
    "python -c 'import jax; print(jax.devices())'": Case(why="not a command of ddim_jax"),
    "pip install -e '.[plan]'": Case(why="an installation"),
    "python -m ddim_jax.plan --config configs/cifar10.py --config.model.dtype=bfloat16 --chips v5e-8": Case(
        why="it takes minutes, and needs libtpu"
    ),
    "python -m ddim_jax.plan --config configs/digits.py --chips cpu-2": Case("--what=sample --config.sample.steps=2"),
}


def split(line):
    """The commands of a line, each as its words."""
    text = " ".join("\n" if word == "&&" else shlex.quote(word) for word in shlex.split(line, comments=True))
    return [["python" if word == ".venv/bin/python" else word for word in shlex.split(one)] for one in text.split("\n")]


BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
WORDS = {shlex.join(words): words for line in LINES for words in split(line)}  # without duplicates


def module_and_options(words, case):
    """The module and the options with which the test runs a command; (None, []) for a command of another package."""
    if words[0] == "gcloud":  # the command that it starts
        words = split(words[-1].removeprefix("--command="))[-1]
    if words[:2] != ["python", "-m"] or words[2] == "pytest":
        return None, []
    return words[2], [word for word in (case.words.get(word, word) for word in words[3:]) if word] + case.more.split()


def test_every_command_has_a_case():
    assert [*WORDS] == [*CASES]


def parsed(monkeypatch, module, options):
    """The flags of a command with these options. An error for an option that the command does not have."""
    values = flags.FlagValues()
    kinds = {bool: flags.DEFINE_bool, list: flags.DEFINE_multi_string}
    common = {"distributed": (False, ""), "compilation_cache": (True, "")}
    for name, (default, _) in (importlib.import_module(module).OPTIONS | common).items():
        kinds.get(type(default), flags.DEFINE_string)(name, default, "", flag_values=values)
        values.register_key_flag_for_module(module, values[name])
    if "--config" in options:
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        values.register_key_flag_for_module(module, values["config"])
    monkeypatch.setattr(sys, "argv", [module, *options])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    monkeypatch.chdir(ROOT)
    assert values([module, *options]) == [module]
    return values


def config_of(values):
    """The Config, without the values of config.pretrained."""
    return config_lib.parse(values["config"].value.to_dict())


COMMANDS = [command for command, words in WORDS.items() if module_and_options(words, Case())[0]]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_exist(command, monkeypatch):
    """Those in the README, and those of the test."""
    for case in (CASES[command]._replace(more=""), CASES[command]):
        module, options = module_and_options(WORDS[command], case)
        values = parsed(monkeypatch, module, options)
        if "config" in values:
            config_of(values)


# --- the table of options ---


def rows():
    """The options in the second column of the table of sampling options, one list for each row."""
    table = README[README.index("| goal | options |") : README.index("`samples.npz` holds the images")]
    for line in table.splitlines()[2:]:
        if not line.startswith("|"):
            continue
        options = [code for code in re.findall(r"`([^`]+)`", line.split("|")[2]) if code.startswith("--")]
        also = [name for name in re.findall(r"\(([^):]*)", line.split("|")[2])]
        yield from (text.split() for text in (options if " too" not in line else [options[0], " ".join(options)]))
        for name in re.findall(r"\w+", " ".join(also).replace("also", "")):
            if options[0].count("=") == 1 and name not in ("evenly", "spaced", "in", "these"):
                yield [options[0].partition("=")[0] + "=" + name]


ROWS = [row if row[0] == "--config" else ["--config", "configs/digits.py", *row] for row in rows()]


def test_the_table_is_read():
    assert ["--config", "configs/digits.py", "--config.sample.sampler=heun"] in ROWS
    assert ["--config", "configs/digits.py", "--config.sample.tau=karras"] in ROWS
    assert len(ROWS) >= 25


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_every_row_gives_a_sampling_process(row, monkeypatch):
    config = config_of(parsed(monkeypatch, "ddim_jax.sample", row))
    config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))


@pytest.mark.slow
def test_the_custom_timesteps_draw_digits(monkeypatch):
    """The confidence of a classifier is as high as for uniform steps."""
    (custom,) = (row for row in ROWS if any(re.search("tau=.*,", option) for option in row))
    few = ["--config.sample.num_images=64", "--config.sample.batch_size=64"]
    config, mesh = config_of(parsed(monkeypatch, "ddim_jax.sample", custom + few)), sharding.data_mesh()
    network = evaluation.open_network(config)
    pipeline = config_lib.pipeline(config, weights.find(config, None, mesh).params, mesh)
    drawn = np.concatenate(list(sampling.batches(pipeline, config.sample.num_images)))
    outputs = features_lib.extract(network, data.ArraySource(drawn), mesh, 64, ("logits",))
    assert metrics.confidence(outputs.logits).confidence > 0.95


# --- as processes ---


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder with the configs of the repository. No network connection, no prepared data."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def sampled(home, *options):
    """The output folder of `ddim_jax.sample`, which it prints."""
    done = ok(run("ddim_jax.sample", *options, *QUICK.split(), cwd=home))
    return home / pathlib.Path(done.stdout.splitlines()[-1]).parent


DIGITS = ("--config", "configs/digits.py")


@pytest.mark.slow
def test_sample_another_option_sample_evaluate(home):
    """Different options have different folders, and repeated options have the same. A folder can be evaluated."""
    first = sampled(home, *DIGITS)
    clipped = sampled(home, *DIGITS, "--config.sample.clip_x0=True", "--config.sample.clip_range=0.5")
    assert clipped != first and sampled(home, *DIGITS) == first
    few = ("--config.evaluate.num_images=4", "--config.evaluate.metrics=fid")
    numbers = [
        ok(run("ddim_jax.evaluate", *DIGITS, *few, "--samples", out, cwd=home)).stdout for out in (first, clipped)
    ]
    assert all(text.startswith("fid") for text in numbers) and numbers[0] != numbers[1]


@pytest.mark.slow
def test_the_commands_in_their_order(home):
    for command in COMMANDS:
        case = CASES[command]
        module, options = module_and_options(WORDS[command], case)
        if case.why:
            continue
        options = [str(next(home.glob(word))) if "*" in word else word for word in options]
        process = run(module, *options, cwd=home)
        if case.error:
            assert not missing(error_line(process), *case.error), (command, process.stderr)
        else:
            assert process.returncode == 0, (command, process.stdout, process.stderr)


@pytest.mark.slow
def test_every_row_of_the_table_one_after_the_other(home):
    """Into the default folders: the results of one do not stop another."""
    few = FEW_IMAGES.split()
    assert len({sampled_row(home, row, few) for row in ROWS if "num_images" not in str(row)}) >= 20


def sampled_row(home, row, few):
    done = ok(run("ddim_jax.sample", *row, *few, cwd=home))
    return pathlib.Path(done.stdout.splitlines()[-1]).parent


SMOKE = (*ONE_LEVEL, "--workdir", "runs/smoke")


@pytest.mark.slow
def test_train_sample_resume_sample(home):
    ok(run("ddim_jax.train", *SMOKE, "--config.train.num_steps=5", cwd=home))
    first = sampled(home, *SMOKE)
    ok(run("ddim_jax.train", *SMOKE, "--config.train.num_steps=10", cwd=home))
    assert sampled(home, *SMOKE) != first


@pytest.mark.slow
def test_train_from_a_checkpoint_and_sample_with_the_printed_command(home):
    ok(run("ddim_jax.train", *SMOKE, "--config.train.num_steps=5", cwd=home))
    tuned = ("--config.pretrained=runs/smoke", "--config.train.num_steps=5", "--workdir", "runs/tuned")
    done = ok(run("ddim_jax.train", "--config", "configs/smoke.py", *tuned, cwd=home))
    (printed,) = re.findall(r"^.*?python -m (ddim_jax.sample .*)$", done.stdout, re.MULTILINE)
    ok(run(*shlex.split(printed), *QUICK.split(), cwd=home))
