"""Invalid values in configs, saved configs and options. Each raises an error of one line that names its field, or the
value is valid and stays unchanged.
"""

import copy
import dataclasses
import json
import re
import subprocess
import sys
import typing

import numpy as np
import pytest
from attacking import holds, refused, refuses
from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT, run

from configs import default, digits
from ddim_jax import config as config_lib
from ddim_jax import registry
from ddim_jax.config import Config
from ddim_jax.utils.errors import ConfigError

DEFAULT = json.loads(json.dumps(default.get_config().to_dict()))


def fields(section, path=""):
    """(dotted name, type) of every field of a config."""
    for name, kind in typing.get_type_hints(type(section)).items():
        if dataclasses.is_dataclass(kind):
            yield from fields(getattr(section, name), f"{path}{name}.")
        else:
            yield path + name, kind


FIELDS = {name: kind for name, kind in fields(config_lib.parse(DEFAULT)) if kind is not typing.Any}
ADAM_FIELDS = {f"train.optimizer.{name}" for name in ("b1", "b2", "eps", "eps_root", "nesterov")}
SAVED = json.loads(json.dumps(dataclasses.asdict(config_lib.parse(DEFAULT))))


def changed(field, value, base=DEFAULT):
    values = copy.deepcopy(base)
    *sections, name = field.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return values


def get(config, field):
    for name in field.split("."):
        config = getattr(config, name)
    return config


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Hostile:
    def __repr__(self):
        raise RuntimeError("no repr")


WRONG = [
    *(b"bytes", 1j, {1, 2}, {"a": {"b": 1}}, range(3), Hostile(), nested(100_000), [nested(100_000)], [Hostile()]),
    *(np.zeros(3), np.array("x", object), [["a"]], ("1", "2"), (None,), [[1]], type, len, "a" * 10**7, ["a" * 10**7]),
    *(10**30, -(10**30), 10**400, 10**5000, -(10**5000), [10**30], [10**5000], float("nan"), float("inf")),
    *(-float("inf"), [float("nan")], "\x00", "\x1b[31mred", "a\nb", "../../x", "/abs", " ", "\ud800"),
]


ANY_TEXT = {"data.path", "pretrained", "train.wandb", "sample.tau"} | {
    f"evaluate.{name}" for name in ("features", "weights", "metrics", "reference")
}  # fields of which the config alone accepts any text


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_values(field):
    """None of these values is valid for any field, except a text for a field of ANY_TEXT."""
    for value in WRONG:
        text = isinstance(value, str) and len(value) < 100 and FIELDS[field] is str
        if text and field in ANY_TEXT:
            continue
        number = value[0] if isinstance(value, list) and FIELDS[field] == tuple[float, ...] else value
        if FIELDS[field] in (float, tuple[float, ...]) and type(number) is int and abs(number) == 10**30:
            continue  # in the range of float32
        message = refuses(lambda value=value: config_lib.parse(changed(field, value)), f"config.{field}")
        holds(len(message) < 1000 and message.isprintable(), message[:200])


SCALARS = st.one_of(
    st.integers(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.booleans(),
    st.text(max_size=20),
    st.none(),
    st.floats(-10, 10).map(np.float32),
    st.integers(-5, 5).map(np.int64),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))


@given(st.sampled_from(list(FIELDS)), VALUES)
def test_a_value_raises_an_error_or_has_the_type_of_its_field(field, value):
    try:
        config = config_lib.parse(changed(field, value))
    except ConfigError as error:
        message = str(error)
        holds(message.startswith("config") and message.isprintable() and len(message) < 1000, message)
        return
    found = get(config, field)
    kind = FIELDS[field]
    if typing.get_origin(kind) is tuple:
        holds(type(found) is tuple and all(type(item) is typing.get_args(kind)[0] for item in found), repr(found))
    else:
        holds(type(found) is kind, f"{field}: {found!r}")
    holds(config_lib.parse(json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))) == config)


@pytest.mark.parametrize("field", [name for name, kind in FIELDS.items() if kind is int])
def test_integers_beyond_32_bits(field):
    for value in (2**32, 2**53 + 1, 2**63, 10**30):
        refuses(lambda value=value: config_lib.parse(changed(field, value)), f"config.{field}")


@pytest.mark.parametrize("field", [name for name, kind in FIELDS.items() if kind is float])
def test_numbers_beyond_float32(field):
    for value in (1e39, -1e39, 1e308, 10**400):
        refuses(lambda value=value: config_lib.parse(changed(field, value)), f"config.{field}")


@pytest.mark.parametrize("field", ["model.norm_epsilon", "train.learning_rate", "train.clip_norm", "sample.clip_range"])
def test_a_positive_number_is_positive_in_float32(field):
    refuses(lambda: config_lib.parse(changed(field, 1e-320)), f"config.{field}", "1e-320")


@pytest.mark.parametrize("section", ["train", "sample"])
@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 7, 2**64])
def test_seeds_beyond_32_bits(section, seed):
    refuses(lambda: config_lib.parse(changed(f"{section}.seed", seed)), f"config.{section}.seed", str(seed))


def test_valid_seeds():
    """The keys differ."""
    import jax

    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, 2**31, 2**32 - 1)}
    holds(len(keys) == 4)
    holds(config_lib.parse(changed("sample.seed", 2**32 - 1)).sample.seed == 2**32 - 1)


@pytest.mark.parametrize(
    "name", ["../../x", "/abs", "..", ".", "", "a/b", "a b", "-rf", "\x1b[2J", "x\x00", "x" * 101, "ü", "a\n"]
)
def test_a_name_that_could_be_a_path(name):
    refuses(lambda: config_lib.parse(changed("name", name)), "config.name")


@pytest.mark.parametrize("values", [3, None, [], "config", {}, {"sample": {}}, {**DEFAULT, "sample": []}])
def test_values_that_are_not_a_config(values):
    refuses(lambda: config_lib.parse(values), "config")
    refuses(lambda: config_lib.parse_saved(values), "config")


@pytest.mark.parametrize("key", [3, None, "", "é" * 10**6, "a\x1b[31m", ("a",), 2.5])
def test_unknown_fields(key):
    shown = repr(key)[:20]
    message = refuses(lambda: config_lib.parse({**DEFAULT, key: 1}), "config", shown)
    holds(message.isprintable() and len(message) < 500, message[:300])
    refuses(lambda: config_lib.parse({**DEFAULT, "sample": {**DEFAULT["sample"], key: 1}}), "config.sample", shown)


@given(st.data())
def test_saved_configs_that_were_changed(data):
    """Any JSON in a saved config gives a Config or a ConfigError."""
    values = copy.deepcopy(SAVED)
    field = data.draw(st.sampled_from(list(FIELDS)))
    *section, name = field.split(".")
    place = values[section[0]] if section and data.draw(st.booleans()) else values
    json_value = SCALARS.filter(lambda value: not isinstance(value, np.generic))
    place[name if place is not values else (section or [name])[0]] = data.draw(
        st.recursive(json_value, lambda inner: st.lists(inner, max_size=2))
    )
    try:
        holds(type(config_lib.parse_saved(values)) is Config)
    except ConfigError as error:
        holds(str(error).startswith("config") and "\n" not in str(error), str(error))


@pytest.mark.parametrize("name", ["my run", "../../x", "/abs/y", "\x1b[31m"])
def test_saved_names_of_earlier_versions_become_valid(name):
    config_lib.parse(changed("name", config_lib.parse_saved(changed("name", name)).name))
    holds(True)


# --- the field that the error names ---


@pytest.mark.parametrize("sampler", registry.SAMPLERS)
@pytest.mark.parametrize("tau, field", [("uniform", "config.sample.steps"), ("1000", "config.sample.tau")])
def test_too_few_steps_name_steps_or_tau(sampler, tau, field):
    values = changed("sample.sampler", sampler)
    values["sample"].update(tau=tau, steps=1)
    config = config_lib.parse(values)
    try:
        config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
        holds(True)
    except ConfigError as error:
        holds(str(error).startswith(f"{field}:"), str(error))


@pytest.mark.parametrize("sampler", ["ddim"])
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_an_eta_that_is_too_large(sampler, steps):
    values = changed("sample.eta", 30.0)
    values["sample"].update(steps=steps)
    config = config_lib.parse(values)
    schedule = config_lib.noise_schedule(config.schedule)
    refuses(lambda: config_lib.process(config.sample, schedule), "config.sample.eta", "30.0")


@pytest.mark.parametrize("field, value", [("clip_quantile", 0.995), ("clip_range", 2.0)])
@pytest.mark.parametrize("clip", [None, False])
def test_a_clipping_option_without_clip_x0(field, value, clip):
    values = changed(f"sample.{field}", value)
    values["sample"]["clip_x0"] = clip
    refuses(lambda: config_lib.parse(values), f"config.sample.{field}", "config.sample.clip_x0", str(value))
    values["sample"]["clip_x0"] = True
    holds(get(config_lib.parse(values), f"sample.{field}") == value)


@pytest.mark.parametrize(
    "field, value, other",
    [
        ("clip_quantile", 0.995, "clip_x0"),
        ("clip_range", 2.0, "clip_x0"),
        ("tau_offset", 1, "tau"),
        ("tau_end", 1, "tau"),
    ],
)
def test_a_field_that_depends_on_a_field_of_the_checkpoint(field, value, other):
    from ddim_jax import checkpoints
    from ddim_jax.config import weights

    shipped = checkpoints.shipped("digits")
    values = changed(f"sample.{field}", value, digits.get_config().to_dict())
    values["pretrained"] = str(shipped)
    refuses(lambda: weights.completed(values), f"config.sample.{field}", f"config.sample.{other}")
    values["sample"].update(clip_x0=True, tau="uniform")
    holds(weights.completed(values)["sample"][field] == value)


# --- options ---


# A command that does nothing. Each line of its stdin is the JSON of a list of arguments. A forked process runs the
# command with them. The answer is [exit code, stderr].
COMMAND = """
import json, os, sys, tempfile
from ddim_jax import cli

OPTIONS = {"workdir": (None, ""), "out": (None, ""), "film": (False, "")}

for line in sys.stdin:
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            os.dup2(stderr.fileno(), 2)
            sys.argv = ["sample", *json.loads(line)]
            try:
                cli.start(lambda options: None, OPTIONS)
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code or 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        print(json.dumps([code, stderr.read().decode()]), flush=True)
"""


@pytest.fixture(scope="module")
def command():
    """(arguments) -> (exit code, stderr)"""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run_with(*args):
        process.stdin.write(json.dumps(args) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run_with
    process.communicate()


WORDS = st.sampled_from(
    ["config", "sample", "eta", "tau", "model", "channel_mult", "out", "film", "train", "seed", "nofilm", "", "x"]
)
VALUE = st.one_of(
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["1", "-1", "1e400", "nan", "(1,", "((((((", "[1,2]", "{'a': 1}", "None", "True", "9" * 5000]),
)
ARGUMENT = st.tuples(
    st.sampled_from(["--", "-", "", "---"]),
    st.lists(WORDS, min_size=1, max_size=4).map(".".join),
    st.one_of(st.none(), VALUE),
).map(lambda parts: parts[0] + parts[1] + ("" if parts[2] is None else "=" + parts[2]))


def test_random_arguments(command):
    @given(st.lists(ARGUMENT, max_size=3))
    def attacked(args):
        code, message = command("--config", "configs/digits.py", *args)
        if code:
            line = message.rstrip("\n")
            holds(code == 2 and line.startswith("error: "), f"{args}: {code} {message}")
            holds(line.isprintable() and len(line) < 1500, f"{args}: {message[:2000]}")
        else:
            holds(True)

    attacked()


@pytest.mark.parametrize(
    "args, words",
    [
        (("--eta=0.5",), ("--config.sample.eta",)),
        (("--sample.eta=0.5",), ("--config.sample.eta",)),
        (("--steps", "20"), ("--config.sample.steps",)),
        (
            ("--batch_size=3",),
            ("--config.train.batch_size", "--config.sample.batch_size", "--config.evaluate.batch_size"),
        ),
        (("--learning_rat=3",), ("--config.train.learning_rate",)),
        (("--flim",), ("--film",)),
        (("--wrkdir=x",), ("--workdir",)),
        (("--config.sample=3",), ("config.sample",)),
        (("--config.=3",), ("config", "''")),
        (("--config.sample..eta=3",), ("config.sample", "''")),
        (("--config.sample.eta.x=3",), ("config.sample.eta", "'x'")),
        (("--config.sample.tau.x=3",), ("config.sample.tau", "'x'")),
        (("--config.sampl.eta=3",), ("'sampl'", "'sample'")),
    ],
)
def test_unknown_options(command, args, words):
    code, message = command("--config", "configs/digits.py", *args)
    holds(code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1, message)
    for word in words:
        holds(word in message, message)


def test_a_field_without_a_config(command):
    """The error names --config, and not only --config.sample.eta."""
    code, message = command("--config.sample.eta=1")
    holds(code == 2 and message.startswith("error: ") and re.search(r"--config(?![\w.])", message), message)


CONFIGS = {
    "no get_config": "x = 1",
    "None": "def get_config(): pass",
    "a number": "def get_config(): return 3",
    "a dict": "def get_config(): return {'name': 'x'}",
    "an error": "def get_config(): raise RuntimeError('a\\nb\\x1b[31m')",
    "a syntax error": "def get_config(:",
    "an empty file": "",
    "other fields": "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'a': 1})",
}
DEFAULTS = "from configs import digits\ndef get_config():\n    config = digits.get_config()\n    "
CHANGES = {  # lines in a config file that is valid otherwise
    "a section that is a number": "config.unlock(); del config.sample; config.sample = 3",
    "pretrained that is a number": "config.unlock(); del config.pretrained; config.pretrained = 3",
    "a tuple of strings": "config.model.channel_mult = ('a', 'b')",
    "an unknown field": "config.unlock(); config.sample.etaa = 1",
    "a missing field": "config.unlock(); del config.sample.eta",
}


@pytest.mark.parametrize("name", [*CONFIGS, *CHANGES])
def test_invalid_config_files(command, name, tmp_path):
    text = CONFIGS[name] if name in CONFIGS else f"{DEFAULTS}{CHANGES[name]}\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    code, message = command("--config", str(tmp_path / "mine.py"))
    holds(code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1, message)
    holds("config" in message and message.strip().isprintable(), message)


def test_an_invalid_field_of_a_command(tmp_path):
    """Nothing is written."""
    args = ("--config", "configs/digits.py", "--out", tmp_path / "out")
    refused(run("ddim_jax.sample", *args, "--config.model.channel_mult=((((("), "config.model.channel_mult")
    refused(run("ddim_jax.sample", *args, "--config.name=../../x"), "config.name")
    holds(not (tmp_path / "out").exists())


# --- help ---


def test_help_without_a_config():
    process = run("ddim_jax.sample", "--help")
    holds(process.returncode == 0 and not process.stderr, process.stderr)
    for part in (
        "Draws images.",
        "--workdir",
        "--[no]film",
        *(f"--config.{field}=" for field in FIELDS if field not in ADAM_FIELDS),
    ):
        holds(part in process.stdout, part)


def test_help_into_a_pipe_that_is_closed():
    """As in `--help | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ddim_jax.sample", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    process.wait(timeout=200)
    holds(process.returncode == 0 and not process.stderr.read(), process.returncode)


def test_help_of_a_command_without_fields():
    process = run("ddim_jax.prepare", "--help")
    holds(process.returncode == 0 and "--from" in process.stdout and "--config." not in process.stdout)


def test_help_has_the_defaults_and_the_comments_of_the_config_file():
    """Every printed default is the value that configs/default.py sets."""
    from ddim_jax.config import help_text

    found = help_text.fields((help_text.DEFAULTS.parent / "default.py").read_text())
    values = default.get_config().to_dict()
    assert FIELDS.keys() - ADAM_FIELDS == found.keys()
    for field, (text, comment) in found.items():
        value = values
        for name in field.split("."):
            value = value[name]
        holds(text == "" and value in (None, "") or text == value or eval(text, {}) == value, field)
        holds(comment.isprintable() and "#" not in comment, field)
