"""What the commands share: flags, and mistakes told in one line on stderr with exit code 2."""

from __future__ import annotations

import difflib
import logging as logging_of_python
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ddim_jax import config as config_lib
from ddim_jax.config import Config, help_text, weights
from ddim_jax.utils import compilation_cache, files, interrupts, sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError, error_context

FLAGS = flags.FLAGS
HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull"}

COMMON = {"compilation_cache": (True, "Keep compiled programs in ~/.cache/ddim_jax: what is run again starts sooner.")}
DISTRIBUTED = {"distributed": (False, "This is one of several processes, as the environment says.")}


def start(
    main: Callable[[types.SimpleNamespace], None],
    options: Mapping[str, tuple[Any, str]],
    config: bool = True,
    distributed: bool = False,
    may_be_empty: Collection[str] = (),
) -> NoReturn:
    """Runs main(options) and ends the process: exit code 0 if all of it was done, 2 for a mistake of the user's or
    where the machine cannot do it, and as `interrupts` says for signals.

    options: name -> (default, help text); a bool default makes a switch, None or a string an option with a text, a
    list one that may be given again and again. With config there is --config too, and main finds the checked Config in
    `options.config`, and the values that it was made of in `options.values`. distributed: whether it may be one of
    several processes. may_be_empty: options with a default that are no paths, and that mean something when they are
    empty.
    """
    interrupts.install()
    options = {**options, **COMMON, **(DISTRIBUTED if distributed else {})}
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
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    logging_of_python.getLogger("asyncio").setLevel(logging_of_python.CRITICAL)  # the same, by another way

    def guarded(argv):
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # Orbax reports every step of every save, and one fault many times
        try:
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}: options begin with --")
            if config:
                sharding.split_cpu_into_devices(*_batch_and_width())
            given = types.SimpleNamespace(**{name: FLAGS[name].value for name in options})
            for name, (default, _) in options.items():
                if FLAGS[name].value == "" != default and name not in may_be_empty:
                    # an empty path would be the current folder
                    raise ConfigError(f"--{name} is empty")
            if given.compilation_cache:
                compilation_cache.enable_compilation_cache()
            if distributed and given.distributed:
                with error_context("--distributed"):
                    sharding.start_processes()
            if config:
                given.values = _values()
                given.config = _config(given.values)
            main(given)
            sys.stdout.flush()
        except (ConfigError, CheckpointError) as error:
            fail(str(error))
        except OSError as error:
            fail(_reason(error))
        except MemoryError as error:
            fail(f"not enough memory: {error}")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fail(f"not enough memory: {str(error).splitlines()[0]}")
        except KeyboardInterrupt:
            fail(f"{interrupts.REASONS[signal.SIGINT]}; {interrupts.ADVICE}", interrupts.CODES[signal.SIGINT])
        if _unwritten:  # by a thread, and nobody asked for it
            fail(_reason(_unwritten[0]))

    try:
        app.run(guarded, flags_parser=_parse_flags)
    except SystemExit as end:
        interrupts.done(_flushed(end.code or 0))
        raise


_unwritten: list[OSError] = []  # what threads and destructors could not write


def _reason(error: OSError) -> str:
    """What is wrong, in one line that names the file where it is known."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _flushed(code: int) -> int:
    """The exit code, now that all is printed: what cannot be is dropped, so that Python does not fail on it again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _unraisable(event: Any) -> None:
    """Python's own, but for what the other reads of a damaged checkpoint say, hundreds of times, when one failed."""
    if isinstance(event.exc_value, OSError):
        _unwritten.append(event.exc_value)
    elif not str(event.exc_value).startswith(("Event loop is closed", "Encountered error while reading array index")):
        sys.__unraisablehook__(event)


def _in_a_thread(event: Any) -> None:
    """Python's own, but for files that cannot be written, which the command tells in one line."""
    if isinstance(event.exc_value, OSError):
        _unwritten.append(event.exc_value)
    else:
        threading.__excepthook__(event)


def say(text: str) -> None:
    """Prints, if this is the first process. Control characters, which may come from files, are escaped."""
    if sharding.is_main_process():
        print("\n".join(map(files.printable, text.split("\n"))), flush=True)


def fail(message: str, code: int = 2) -> NoReturn:
    print("error: " + files.printable(" ".join(message.split())), file=sys.stderr, flush=True)
    sys.exit(code)


def _batch_and_width() -> tuple[int, int]:
    """Of a part of a batch, and of the widest layer; 1 and 0 where the config has mistakes: `_config` names them."""
    try:
        found = config_lib.typed(_values())
    except ConfigError:
        return 1, 0
    train, model = found.train, found.model
    whole = train.batch_size % train.accumulate == 0
    try:
        width = config_lib.network(model).fact("width", sharding.SMALL_WIDTH + 1)
    except ConfigError:
        width = 0
    return train.batch_size // train.accumulate if whole else 1, width


_open_fields: dict[str, str] = {}  # fields that belong to a factory, which its config may not list -> their text


def _values() -> dict[str, Any]:
    """The values of --config and of the options for its fields."""
    if FLAGS.config is None:
        raise ConfigError("--config is missing, for example --config configs/digits.py")
    values = FLAGS.config.to_dict()
    for field, text in _open_fields.items():
        values = config_lib.with_value(values, field, config_lib.literal(text))
    return values


def _config(values: dict[str, Any]) -> Config:
    if values.get("pretrained") in (None, ""):
        return config_lib.parse(values)
    for field, value in _changed().items():
        section, _, name = field.partition(".")
        code = name == "name" and ":" in value  # names what may be run, see `compatibility.check_trusted`
        if section in ("model", "schedule") and name not in config_lib.NOT_ARCHITECTURE and not code:
            raise ConfigError(f"config.{field}: with config.pretrained it is the checkpoint's own; leave it out")
    return config_lib.parse(weights.completed(values))


def _changed() -> dict[str, Any]:
    """The fields of the config that options give."""
    return config_flags.get_override_values(FLAGS["config"]) | _open_fields


def config_arguments() -> list[str]:
    """The options that give another command the same config."""
    file = config_flags.get_config_filename(FLAGS["config"])
    return [f"--config={file}", *(f"--config.{field}={value}" for field, value in _changed().items())]


def _without_open_fields(argv: list[str]) -> list[str]:
    """The arguments without those for fields of factories, which `_open_fields` then holds: ml_collections accepts none
    that the config file does not list.
    """
    rest, waiting = [], list(argv)
    while waiting:
        argument = waiting.pop(0)
        found = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
        if found is None or not config_lib.is_open(found[2]):
            rest.append(argument)
        elif found[3] is not None:
            _open_fields[found[2]] = found[3]
        else:  # --config.model.remat, --noconfig.model.remat, --config.model.channels 64
            alone = found[1] or not waiting or waiting[0].startswith("-")
            _open_fields[found[2]] = str(not found[1]) if alone else waiting.pop(0)
    return rest


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with every mistake as one line; --help ends the process with what `help_text` makes of it."""
    if HELP & {*argv[1:]}:
        print(help_text.text(sys.modules["__main__"].__doc__ or "", _options(), "config" in FLAGS))
        sys.exit(0)
    try:
        if "config" in FLAGS:
            sys.argv[:] = argv = _without_open_fields(argv)  # ml_collections reads sys.argv itself
            for field in re.findall(r"^--?config\.([^=\n]*)", "\n".join(argv[1:]), re.MULTILINE):
                config_lib.type_of(field, {})
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
            fail(f"there is no config file: {str(error)[:500]}")
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
