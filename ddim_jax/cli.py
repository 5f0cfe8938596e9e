"""Common code of all commands: flags, and errors that are printed as one line on stderr with exit code 2.

One file because every command needs all of it.
"""

from __future__ import annotations

import contextlib
import difflib
import logging as python_logging
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

COMMON = {"compilation_cache": (True, "Cache compiled programs in ~/.cache/ddim_jax, so that later runs start sooner.")}
DISTRIBUTED = {"distributed": (False, "Multi-process run: the environment gives the rank and the number of processes.")}


def start(
    main: Callable[[types.SimpleNamespace], None],
    options: Mapping[str, tuple[Any, str]],
    config: bool = True,
    distributed: bool = False,
    may_be_empty: Collection[str] = (),
) -> NoReturn:
    """Parses the flags, calls main(options) and ends the process. Exit code 0: success; 2: an error of the user, or a
    resource that the machine lacks; after a signal: see `interrupts`.

    options: name -> (default, help text). A bool default defines a switch, a list default an option that may be
        repeated, None or a string default an option with a string value.
    config: whether the command has --config. Then `options.config` is the checked Config, and `options.values` the
        nested dict that it was parsed from.
    distributed: whether the command has --distributed.
    may_be_empty: options with a default for which an empty string is valid, because they are not paths.
    """
    interrupts.install()
    options = {**options, **COMMON, **(DISTRIBUTED if distributed else {})}
    for name, (default, text) in options.items():
        define = {bool: flags.DEFINE_bool, list: flags.DEFINE_multi_string}
        define.get(type(default), flags.DEFINE_string)(name, default, text)
    if config:
        config_flags.DEFINE_config_file(
            "config", None, "The config file. Set any field of it by --config.SECTION.FIELD=VALUE."
        )

    for name in [*options, *(["config"] if config else [])]:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # --help lists the key flags
    sys.unraisablehook, threading.excepthook = _unraisable_hook, _thread_hook
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be invalid UTF-8
    # asyncio logs the same errors that _unraisable_hook filters.
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)

    def guarded(argv):
        if not FLAGS["verbosity"].present:
            # Orbax logs every step of every save, and one error many times.
            logging.set_verbosity(logging.FATAL)
        try:
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}: options begin with --")
            if config:
                sharding.split_cpu_into_devices(*_batch_and_width())
            parsed = types.SimpleNamespace(**{name: FLAGS[name].value for name in options})
            for name, (default, _) in options.items():
                if FLAGS[name].value == "" != default and name not in may_be_empty:
                    # An empty path would mean the current folder.
                    raise ConfigError(f"--{name} is empty")
            if parsed.compilation_cache:
                compilation_cache.enable_compilation_cache()
            if distributed and parsed.distributed:
                with error_context("--distributed"):
                    sharding.start_processes()
            if config:
                parsed.values = _values()
                parsed.config = _config(parsed.values)
            main(parsed)
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
        if _write_errors:  # in a thread, so that main did not raise
            fail(_reason(_write_errors[0]))

    try:
        app.run(guarded, flags_parser=_parse_flags)
    except SystemExit as end:
        interrupts.done(_flush_stdout(end.code or 0))
        raise


_write_errors: list[OSError] = []  # errors of threads and destructors that could not write a file


def _reason(error: OSError) -> str:
    """The error in one line, with the file name where the error has one."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _flush_stdout(code: int) -> int:
    """Flushes stdout and returns the exit code. If stdout cannot be written, its buffer is discarded: otherwise Python
    fails at exit when it flushes stdout.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _unraisable_hook(event: Any) -> None:
    """Stores an OSError in `_write_errors`. Ignores the errors that the pending reads of a damaged checkpoint report,
    hundreds of times, after one read has failed. Otherwise calls Python's hook.
    """
    if isinstance(event.exc_value, OSError):
        _write_errors.append(event.exc_value)
    elif not str(event.exc_value).startswith(("Event loop is closed", "Encountered error while reading array index")):
        sys.__unraisablehook__(event)


def _thread_hook(event: Any) -> None:
    """Stores an OSError in `_write_errors`: the command prints it in one line. Otherwise calls Python's hook."""
    if isinstance(event.exc_value, OSError):
        _write_errors.append(event.exc_value)
    else:
        threading.__excepthook__(event)


def say(text: str) -> None:
    """Prints the text in the main process. Control characters, which may come from files, are escaped."""
    if sharding.is_main_process():
        print("\n".join(map(files.printable, text.split("\n"))), flush=True)


def fail(message: str, code: int = 2) -> NoReturn:
    """Prints the message as one line on stderr and exits."""
    print("error: " + files.printable(" ".join(message.split())), file=sys.stderr, flush=True)
    sys.exit(code)


def _batch_and_width() -> tuple[int, int]:
    """The batch size of one accumulation step, and the number of channels of the network's widest layer. 1 or 0 where
    the config is invalid: `_config` raises the error later.
    """
    try:
        config = config_lib.typed(_values())
    except ConfigError:
        return 1, 0
    train, model = config.train, config.model
    divisible = train.batch_size % train.accumulate == 0
    try:
        width = config_lib.network(model).attribute("width", sharding.SMALL_WIDTH + 1)
    except ConfigError:
        width = 0
    return train.batch_size // train.accumulate if divisible else 1, width


# field -> its value as a string. These fields belong to a factory, so that the config file may not list them.
_factory_fields: dict[str, str] = {}


def _values() -> dict[str, Any]:
    """The nested dict of --config, with the fields that options set."""
    if FLAGS.config is None:
        raise ConfigError("--config is missing, for example --config configs/digits.py")
    values = FLAGS.config.to_dict()
    for field, text in _factory_fields.items():
        values = config_lib.with_value(values, field, config_lib.literal(text))
    return values


def _config(values: dict[str, Any]) -> Config:
    """The checked Config. With config.pretrained, the checkpoint sets the fields of the network and the schedule."""
    if values.get("pretrained") in (None, ""):
        return config_lib.parse(values)
    completed = weights.completed(values)
    for field, value in _overrides().items():
        section, _, name = field.partition(".")
        if field == "model.image_size" and completed["model"]["image_size"] == values["model"]["image_size"]:
            continue  # of a checkpoint that does not tell the size of its images
        # A name "package.module:attribute" permits the import of that code, see `compatibility.check_trusted`.
        code = name == "name" and ":" in value
        if section in ("model", "schedule") and name not in config_lib.NOT_ARCHITECTURE and not code:
            raise ConfigError(f"config.{field}: config.pretrained sets this field from the checkpoint; leave it out")
    return config_lib.parse(completed)


def _overrides() -> dict[str, Any]:
    """The fields of the config that options set, and their values."""
    return config_flags.get_override_values(FLAGS["config"]) | _factory_fields


def config_arguments() -> list[str]:
    """The options with which another command gets the same config."""
    file = config_flags.get_config_filename(FLAGS["config"])
    return [f"--config={file}", *(f"--config.{field}={value}" for field, value in _overrides().items())]


def _without_factory_fields(argv: list[str]) -> list[str]:
    """Moves the arguments that set fields of factories into `_factory_fields` and returns the other arguments:
    ml_collections rejects a field that the config file does not list.
    """
    rest, remaining = [], list(argv)
    while remaining:
        argument = remaining.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None or not config_lib.is_open(match[2]):
            rest.append(argument)
        elif match[3] is not None:
            _factory_fields[match[2]] = match[3]
        else:  # --config.model.remat, --noconfig.model.remat, --config.model.channels 64
            is_switch = match[1] or not remaining or remaining[0].startswith("-")
            _factory_fields[match[2]] = str(not match[1]) if is_switch else remaining.pop(0)
    return rest


def _parse_flags(argv: list[str]) -> list[str]:
    """Runs absl's parser; every error becomes one line. --help prints `help_text.text` and ends the process."""
    if HELP & {*argv[1:]}:
        with contextlib.suppress(BrokenPipeError):  # as in `--help | head`
            print(help_text.text(sys.modules["__main__"].__doc__ or "", _options(), "config" in FLAGS), flush=True)
        sys.exit(0)
    try:
        if "config" in FLAGS:
            sys.argv[:] = argv = _without_factory_fields(argv)  # ml_collections reads sys.argv
            for field in re.findall(r"^--?config\.([^=\n]*)", "\n".join(argv[1:]), re.MULTILINE):
                config_lib.type_of(field, {})
        python_logging.disable(python_logging.WARNING)  # ml_collections warns about the config file
        rest = FLAGS(argv)
        python_logging.disable(python_logging.NOTSET)
        if "config" in FLAGS and FLAGS["config"].present:
            FLAGS.config.to_dict()  # raises if the config file could not be loaded
        return rest
    except ConfigError as error:
        fail(str(error))
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config.") and "config" in FLAGS:
            fail("--config is missing, for example --config configs/digits.py")
        fail(f"unknown option --{error.flagname[:100]}{_nearest(error.flagname)}")
    except flags.Error as error:
        fail(str(error)[:500])
    except Exception as error:  # the user's config file may raise any exception
        if "No such file" in str(error):
            fail(f"config file not found: {str(error)[:500]}")
        fail(f"the config file cannot be loaded: {type(error).__name__}: {str(error)[:500]}")


def _options() -> list[tuple[str, str]]:
    """(syntax, help text) of each option of the command, without absl's built-in options."""
    syntax = {"bool": "--[no]{}", "multi string": "--{}=TEXT ..."}
    return [
        (syntax.get(flag.flag_type(), "--{}=TEXT").format(flag.name), flag.help)
        for flag in FLAGS.get_key_flags_for_module(sys.argv[0])
    ]


def _nearest(name: str) -> str:
    """A hint with the options and the config fields whose name is closest to `name`; "" if none is close."""
    known = {flag.name: [f"--{flag.name}"] for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    for field in config_lib.field_names() if "config" in FLAGS else ():
        for part in {field, field.rpartition(".")[2]}:
            known.setdefault(part, []).append(f"--config.{field}")
    similarity = lambda other: difflib.SequenceMatcher(None, name[:100], other).ratio()
    nearest = max(known, key=similarity)  # on a tie the first one, an option of the command
    return f" (did you mean {' or '.join(known[nearest])}?)" if similarity(nearest) >= 0.6 else ""


def writable_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder, which is created if it does not exist. ConfigError if it cannot be written to."""
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return folder
