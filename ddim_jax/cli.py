"""What the commands share: flags, and mistakes told in one line on stderr with exit code 2."""

from __future__ import annotations

import difflib
import errno
import logging as logging_of_python
import os
import pathlib
import re
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from ddim_jax import cache, files, sharding, usage, weights
from ddim_jax import config as config_lib
from ddim_jax.config import Config
from ddim_jax.errors import CheckpointError, ConfigError, error_context

FLAGS = flags.FLAGS
HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull"}

COMMON = {"compilation_cache": (True, "Keep compiled programs in ~/.cache/ddim_jax: what is run again starts sooner.")}
SEVERAL = {"distributed": (False, "This is one of several processes, as the environment says.")}


def start(
    main: Callable[[types.SimpleNamespace], None],
    options: Mapping[str, tuple[Any, str]],
    config: bool = True,
    several: bool = False,
) -> NoReturn:
    """Runs main(options) and ends the process: exit code 0 if all went well, 2 for a mistake of the user's, 130
    for Ctrl-C.

    options: name -> (default, help text); a bool default makes a switch, None or a string an option with a text, a
    list one that may be given again and again. With config there is --config too, and main finds the checked Config in
    `options.config`, and the values that it was made of in `options.values`. several: whether it may be one of several
    processes.
    """
    options = {**options, **COMMON, **(SEVERAL if several else {})}
    for name, (default, text) in options.items():
        kinds = {bool: flags.DEFINE_bool, list: flags.DEFINE_multi_string}
        kinds.get(type(default), flags.DEFINE_string)(name, default, text)
    if config:
        config_flags.DEFINE_config_file(
            "config", None, "The config file; any field of it by --config.SECTION.FIELD=VALUE."
        )

    for name in [*options, *(["config"] if config else [])]:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # what --help lists
    sys.unraisablehook, threading.excepthook = _unraisable, _in_a_thread
    logging_of_python.getLogger("asyncio").setLevel(logging_of_python.CRITICAL)  # the same, by another way

    def guarded(argv):
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # Orbax reports every step of every save, and one fault many times
        try:
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}: options begin with --")
            if config:
                sharding.a_device_per_core(*_batch_and_width())
            given = types.SimpleNamespace(**{name: FLAGS[name].value for name in options})
            if given.compilation_cache:
                cache.keep_programs()
            if several and given.distributed:
                with error_context("--distributed"):
                    sharding.start_processes()
            if config:
                given.config = _config()
                given.values = FLAGS.config.to_dict()
            main(given)
        except (ConfigError, CheckpointError) as error:
            fail(str(error))
        except OSError as error:
            if error.filename is None and error.errno != errno.ENOSPC:
                raise
            fail(f"{error.filename}: {error.strerror}" if error.filename else "the disk is full")
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on from what is done", code=130)

    app.run(guarded, flags_parser=_parse_flags)


def _unraisable(event: Any) -> None:
    """Python's own, but for what the other reads of a damaged checkpoint say, hundreds of times, when one failed."""
    if not str(event.exc_value).startswith(("Event loop is closed", "Encountered error while reading array index")):
        sys.__unraisablehook__(event)


def _in_a_thread(event: Any) -> None:
    """Python's own, but for a full disk, which the command itself meets and tells in one line."""
    if getattr(event.exc_value, "errno", None) != errno.ENOSPC:
        threading.__excepthook__(event)


def say(*words: Any) -> None:
    """Prints, if this is the first process."""
    if sharding.is_first():
        print(*words, flush=True)


def fail(message: str, code: int = 2) -> NoReturn:
    print("error: " + files.printable(" ".join(message.split())), file=sys.stderr, flush=True)
    sys.exit(code)


def _batch_and_width() -> tuple[int, int]:
    """Of a part of a batch, and of the widest layer; 1 and 0 where the config has mistakes: `_config` names them."""
    try:
        found = config_lib.typed(FLAGS.config.to_dict())
    except (AttributeError, ConfigError):  # AttributeError: there is no --config
        return 1, 0
    train, model = found.train, found.model
    whole = train.batch_size % train.accumulate == 0
    return train.batch_size // train.accumulate if whole else 1, model.channels * max(model.channel_mult)


def _config() -> Config:
    if FLAGS.config is None:
        raise ConfigError("--config is missing, for example --config configs/digits.py")
    values = FLAGS.config.to_dict()
    if not config_lib.typed(values).pretrained:
        return config_lib.parse(values)
    for field in config_flags.get_override_values(FLAGS["config"]):
        section, _, name = field.partition(".")
        if section == "schedule" or (section == "model" and name not in config_lib.FREE_OF_NETWORK):
            raise ConfigError(f"config.{field}: with config.pretrained it is the checkpoint's own; leave it out")
    return config_lib.parse(weights.completed(values))


def config_arguments() -> list[str]:
    """The options that give another command the same config."""
    changed = config_flags.get_override_values(FLAGS["config"])
    file = config_flags.get_config_filename(FLAGS["config"])
    return [f"--config={file}", *(f"--config.{field}={value}" for field, value in changed.items())]


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with every mistake as one line; --help ends the process with what `usage` makes of it."""
    if HELP & {*argv[1:]}:
        print(usage.text(sys.modules["__main__"].__doc__ or "", _options(), "config" in FLAGS))
        sys.exit(0)
    try:
        for field in re.findall(r"^--?config\.([^=\n]*)", "\n".join(argv[1:]), re.MULTILINE):
            if "config" in FLAGS:
                config_lib.type_of(field)
        logging_of_python.disable(logging_of_python.WARNING)  # what ml_collections thinks of a config file
        rest = FLAGS(argv)
        logging_of_python.disable(logging_of_python.NOTSET)
        if "config" in FLAGS and FLAGS["config"].present:
            FLAGS.config.to_dict()  # a config file that could not be loaded says so when it is used
        return rest
    except ConfigError as error:
        fail(str(error))
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config.") and "config" in FLAGS:
            fail("--config is missing, for example --config configs/digits.py")
        fail(f"unknown option --{error.flagname[:100]}{_near(error.flagname)}")
    except flags.Error as error:
        fail(str(error)[:500])
    except Exception as error:  # whatever the user's config file raises
        if "No such file" in str(error):
            fail(f"there is no config file {config_flags.get_config_filename(FLAGS['config'])}")
        fail(f"the config file cannot be loaded: {type(error).__name__}: {str(error)[:500]}")


def _options() -> list[tuple[str, str]]:
    """How the command's options are given, and what they do; not those that absl has by itself."""
    value = {"bool": "--[no]{}", "multi string": "--{}=TEXT ..."}
    return [
        (value.get(flag.flag_type(), "--{}=TEXT").format(flag.name), flag.help)
        for flag in FLAGS.get_key_flags_for_module(sys.argv[0])
    ]


def _near(name: str) -> str:
    """Options, and fields of the config, of nearly this name."""
    known = {flag.name: [f"--{flag.name}"] for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    for field in config_lib.field_names() if "config" in FLAGS else ():
        for part in {field, field.rpartition(".")[2]}:
            known.setdefault(part, []).append(f"--config.{field}")
    likeness = lambda other: difflib.SequenceMatcher(None, name[:100], other).ratio()
    nearest = max(known, key=likeness)  # of several the first, an option of the command
    return f" (did you mean {' or '.join(known[nearest])}?)" if likeness(nearest) >= 0.6 else ""


def writable_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder, made if it is not there; ConfigError if nothing can be written into it."""
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return folder
