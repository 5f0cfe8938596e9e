"""Wrong values in configs, saved configs and options: each is refused in one line that names its field, or is taken as
it is.
"""

import copy
import dataclasses
import json
import sys
import typing

import numpy as np
import pytest
from absl import flags
from attacking import holds, refused, refuses
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_flags
from processes import run

from configs import default, digits
from ddim_jax import cli, registry
from ddim_jax import config as config_lib
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
ARGUMENTS = {f"train.optimizer.{name}" for name in ("b1", "b2", "eps", "eps_root", "nesterov")}  # of Adam
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


FREE = {"data.path", "pretrained", "train.wandb", "sample.tau"} | {
    f"evaluate.{name}" for name in ("features", "weights", "metrics", "reference")
}  # any text, as far as the config alone can say


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_values(field):
    """None of these is right anywhere, but for the texts, where a text is wanted and no name."""
    for value in WRONG:
        text = isinstance(value, str) and len(value) < 100 and FIELDS[field] is str
        if text and field in FREE:
            continue
        number = value[0] if isinstance(value, list) and FIELDS[field] == tuple[float, ...] else value
        if FIELDS[field] in (float, tuple[float, ...]) and type(number) is int and abs(number) == 10**30:
            continue  # it is in range
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
def test_a_value_is_refused_or_has_the_type_of_its_field(field, value):
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
def test_whole_numbers_that_32_bits_do_not_hold(field):
    for value in (2**32, 2**53 + 1, 2**63, 10**30):
        refuses(lambda value=value: config_lib.parse(changed(field, value)), f"config.{field}")


@pytest.mark.parametrize("field", [name for name, kind in FIELDS.items() if kind is float])
def test_numbers_that_float32_does_not_hold(field):
    for value in (1e39, -1e39, 1e308, 10**400):
        refuses(lambda value=value: config_lib.parse(changed(field, value)), f"config.{field}")


@pytest.mark.parametrize("field", ["model.norm_epsilon", "train.learning_rate", "train.clip_norm", "sample.clip_range"])
def test_what_must_be_above_0_is_above_0_in_float32(field):
    refuses(lambda: config_lib.parse(changed(field, 1e-320)), f"config.{field}", "above 0")


@pytest.mark.parametrize("section", ["train", "sample"])
@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 7, 2**64])
def test_seeds_that_would_draw_the_images_of_others(section, seed):
    refuses(lambda: config_lib.parse(changed(f"{section}.seed", seed)), f"config.{section}.seed", str(seed))


def test_seeds_that_are_seeds():
    """Each of them another noise."""
    import jax

    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, 2**31, 2**32 - 1)}
    holds(len(keys) == 4)
    holds(config_lib.parse(changed("sample.seed", 2**32 - 1)).sample.seed == 2**32 - 1)


@pytest.mark.parametrize(
    "name", ["../../x", "/abs", "..", ".", "", "a/b", "a b", "-rf", "\x1b[2J", "x\x00", "x" * 101, "ü", "a\n"]
)
def test_a_name_is_no_path(name):
    refuses(lambda: config_lib.parse(changed("name", name)), "config.name")


@pytest.mark.parametrize("values", [3, None, [], "config", {}, {"sample": {}}, {**DEFAULT, "sample": []}])
def test_what_is_no_config(values):
    refuses(lambda: config_lib.parse(values), "config")
    refuses(lambda: config_lib.parse_saved(values), "config")


@pytest.mark.parametrize("key", [3, None, "", "é" * 10**6, "a\x1b[31m", ("a",), 2.5])
def test_fields_that_are_none(key):
    message = refuses(lambda: config_lib.parse({**DEFAULT, key: 1}), "config has no field")
    holds(message.isprintable() and len(message) < 500, message[:300])
    refuses(lambda: config_lib.parse({**DEFAULT, "sample": {**DEFAULT["sample"], key: 1}}), "config.sample")


@given(st.data())
def test_saved_configs_that_were_changed(data):
    """Whatever JSON stands where a saved config stood, it is a Config or a ConfigError."""
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
def test_saved_names_of_before_still_open_and_are_no_paths(name):
    config_lib.parse(changed("name", config_lib.parse_saved(changed("name", name)).name))
    holds(True)


# --- which field it was ---


@pytest.mark.parametrize("sampler", registry.SAMPLERS)
@pytest.mark.parametrize("tau, field", [("uniform", "config.sample.steps"), ("1000", "config.sample.tau")])
def test_too_few_steps_are_an_error_of_the_steps(sampler, tau, field):
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
def test_a_large_eta_is_eta(sampler, steps):
    values = changed("sample.eta", 30.0)
    values["sample"].update(steps=steps)
    config = config_lib.parse(values)
    schedule = config_lib.noise_schedule(config.schedule)
    refuses(lambda: config_lib.process(config.sample, schedule), "config.sample.eta: eta must")


@pytest.mark.parametrize("field, value", [("clip_quantile", 0.995), ("clip_range", 2.0)])
@pytest.mark.parametrize("clip", [None, False])
def test_a_bound_without_clipping_is_refused(field, value, clip):
    values = changed(f"sample.{field}", value)
    values["sample"]["clip_x0"] = clip
    refuses(lambda: config_lib.parse(values), f"config.sample.{field}", "clip_x0")
    values["sample"]["clip_x0"] = True
    holds(get(config_lib.parse(values), f"sample.{field}") == value)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("clip_quantile", 0.995, "clip_x0"),
        ("clip_range", 2.0, "clip_x0"),
        ("tau_offset", 1, "tau"),
        ("tau_end", 1, "tau"),
    ],
)
def test_what_the_checkpoint_decides_is_not_ignored(field, value, words, tmp_path):
    from ddim_jax import checkpoints
    from ddim_jax.config import weights

    shipped = checkpoints.shipped("digits")
    values = changed(f"sample.{field}", value, digits.get_config().to_dict())
    values["pretrained"] = str(shipped)
    refuses(lambda: weights.completed(values), f"config.sample.{field}", f"config.sample.{words}")
    values["sample"].update(clip_x0=True, tau="uniform")
    holds(weights.completed(values)["sample"][field] == value)


# --- options ---


@pytest.fixture
def parse(monkeypatch, capsys):
    """(arguments) -> (exit code, stderr) of cli's parser; 0 where it took them."""

    def parse(*args):
        values = flags.FlagValues()
        for name in ("workdir", "out"):
            flags.DEFINE_string(name, None, "", flag_values=values)
        flags.DEFINE_bool("film", False, "", flag_values=values)
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        for name in ("workdir", "out", "film", "config"):
            values.register_key_flag_for_module("sample", values[name])
        monkeypatch.setattr(cli, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", ["sample", *args])
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of another config file
        try:
            cli._parse_flags(["sample", *args])
            if values["config"].value is not None:
                config_lib.parse(values["config"].value.to_dict())
            return 0, ""
        except ConfigError as error:
            return 2, f"error: {error}\n"
        except SystemExit as error:
            return error.code, capsys.readouterr().err

    return parse


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


def test_arguments_of_all_kinds(parse):
    @given(st.lists(ARGUMENT, max_size=3))
    def attacked(args):
        code, message = parse("--config", "configs/digits.py", *args)
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
        (("--config.sample=3",), ("config.sample is a section",)),
        (("--config.=3",), ("config has no field",)),
        (("--config.sample..eta=3",), ("config.sample has no field",)),
        (("--config.sample.eta.x=3",), ("config.sample.eta has no field",)),
        (("--config.sample.tau.x=3",), ("config.sample.tau has no field",)),
        (("--config.sampl.eta=3",), ("did you mean 'sample'",)),
    ],
)
def test_options_that_are_none(parse, args, words):
    code, message = parse("--config", "configs/digits.py", *args)
    holds(code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1, message)
    for word in words:
        holds(word in message, message)


def test_a_field_without_a_config(parse):
    code, message = parse("--config.sample.eta=1")
    holds(code == 2 and "--config is missing" in message, message)


CONFIGS = {
    "no get_config": "x = 1",
    "get_config of nothing": "def get_config(): pass",
    "a number": "def get_config(): return 3",
    "a dict": "def get_config(): return {'name': 'x'}",
    "an error": "def get_config(): raise RuntimeError('a\\nb\\x1b[31m')",
    "no Python": "def get_config(:",
    "nothing": "",
    "another": "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'a': 1})",
}
DEFAULTS = "from configs import digits\ndef get_config():\n    config = digits.get_config()\n    "
CHANGES = {
    "a section that is a number": "config.unlock(); del config.sample; config.sample = 3",
    "pretrained that is a number": "config.unlock(); del config.pretrained; config.pretrained = 3",
    "a tuple of texts": "config.model.channel_mult = ('a', 'b')",
    "a field too many": "config.unlock(); config.sample.etaa = 1",
    "a field too few": "config.unlock(); del config.sample.eta",
}


@pytest.mark.parametrize("name", [*CONFIGS, *CHANGES])
def test_config_files(parse, name, tmp_path):
    text = CONFIGS[name] if name in CONFIGS else f"{DEFAULTS}{CHANGES[name]}\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    code, message = parse("--config", str(tmp_path / "mine.py"))
    holds(code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1, message)
    holds("config" in message and message.strip().isprintable(), message)


def test_a_mistake_in_a_command(tmp_path):
    """Before and after its config is checked as a whole."""
    args = ("--config", "configs/digits.py", "--out", tmp_path / "out")
    refused(run("ddim_jax.sample", *args, "--config.model.channel_mult=((((("), "config.model.channel_mult")
    refused(run("ddim_jax.sample", *args, "--config.name=../../x"), "config.name")
    holds(not (tmp_path / "out").exists())


# --- help ---


def test_help_without_a_config():
    process = run("ddim_jax.sample", "--help")
    holds(process.returncode == 0 and not process.stderr, process.stderr)
    words = process.stdout
    for part in (
        "Draws images.",
        "--workdir",
        "--[no]film",
        *(f"--config.{field}=" for field in FIELDS if field not in ARGUMENTS),
    ):
        holds(part in words, part)


def test_help_of_a_command_without_fields():
    process = run("ddim_jax.prepare", "--help")
    holds(process.returncode == 0 and "--from" in process.stdout and "--config." not in process.stdout)


def test_help_has_the_defaults_and_the_comments_of_the_config_file():
    """Every default that it prints is the one that the file sets."""
    from ddim_jax.config import help_text

    found = help_text.fields((help_text.DEFAULTS.parent / "default.py").read_text())
    values = default.get_config().to_dict()
    assert FIELDS.keys() - ARGUMENTS == found.keys()
    for field, (text, comment) in found.items():
        value = values
        for name in field.split("."):
            value = value[name]
        holds(text == "" and value in (None, "") or text == value or eval(text, {}) == value, field)
        holds(comment.isprintable() and "#" not in comment, field)
