"""The import rules: a module imports only the modules of earlier lines of ALLOWED, and those of its own line."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# module or package of ddim_jax -> (modules of ddim_jax that it may import, third-party packages that it may import).
# All but the mathematics may import utils.
CORE = {"jax", "numpy"}
MATHEMATICS = {"schedule", "gaussian", "trajectory", "losses", "samplers", "multistep", "ode", "inference_process"}
MATHEMATICS |= {"checks", "parallel", "guidance", "discrete", "latent", "oracle", "registry", "inversion"}
ALLOWED = {
    "checks": (set(), CORE),
    "utils": ({"checks"}, CORE | {"PIL", "tqdm"}),
    "schedule": (set(), CORE),
    "gaussian": ({"schedule"}, CORE),
    "trajectory": ({"schedule", "gaussian"}, CORE),
    "losses": ({"schedule", "gaussian", "trajectory"}, CORE),
    "samplers": ({"schedule", "gaussian", "trajectory"}, CORE),
    "multistep": ({"schedule", "gaussian", "trajectory"}, CORE),
    "ode": ({"schedule", "gaussian", "trajectory", "samplers", "multistep"}, CORE),
    "inference_process": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "inversion": ({"schedule", "gaussian", "trajectory", "samplers", "multistep"}, CORE),
    "parallel": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "guidance": ({"schedule", "gaussian"}, CORE),
    "discrete": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "latent": ({"schedule"}, CORE),
    "oracle": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "registry": ({"schedule", "gaussian", "losses", "trajectory", "samplers", "multistep"}, CORE),
    "models": ({"checks", "schedule", "gaussian", "discrete"}, CORE | {"flax"}),
    "data": ({"registry"}, {"numpy", "PIL", "sklearn", "tqdm", "tensorflow_datasets", "grain", "absl", "lmdb"}),
    "checkpoints": (
        {"models", "registry"},
        CORE | {"flax", "orbax", "safetensors", "yaml", "huggingface_hub", "torch"},
    ),
    "sampling": (
        {"checks", "data", "gaussian", "guidance", "inversion", "losses", "models", "registry", "samplers", "schedule"}
        | {"trajectory"},
        CORE,
    ),
    "stablehlo": ({"data", "samplers", "sampling"}, CORE),
    "encoding": ({"data", "sampling"}, CORE),
    "training": (
        {"checkpoints", "checks", "data", "discrete", "gaussian", "losses", "models", "schedule"},
        CORE | {"flax", "optax", "chex", "tqdm", "tensorboardX", "wandb"},
    ),
    "evaluation": (
        {"checkpoints", "data", "registry", "sampling", "schedule"},
        CORE | {"flax", "optax", "safetensors", "tqdm"},
    ),
    "config": (
        {"checkpoints", "data", "evaluation", "gaussian", "models", "registry", "samplers", "sampling", "schedule"}
        | {"training", "trajectory"},
        CORE | {"optax"},
    ),
    "planning": ({"sampling", "samplers", "training"}, CORE | {"libtpu"}),
    "cli": ({"config"}, {"absl", "jax", "ml_collections"}),
}
MAINS = {"train", "sample", "encode", "evaluate", "convert", "prepare", "plan"}


def imports(file):
    """(modules of ddim_jax, other top-level packages) that a file imports anywhere."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "ddim_jax":
            names = [f"ddim_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            top, _, rest = name.partition(".")
            (own if top == "ddim_jax" else others).add(rest.split(".")[0] if top == "ddim_jax" else top)
    return own, others


def files():
    for file in sorted((ROOT / "ddim_jax").rglob("*.py")):
        yield file.relative_to(ROOT / "ddim_jax").parts[0].removesuffix(".py"), file


def test_every_module_is_in_the_table():
    assert {name for name, _ in files()} - {"__init__"} == set(ALLOWED) | MAINS


@pytest.mark.parametrize(
    "name, file", [pytest.param(name, file, id=str(file.relative_to(ROOT))) for name, file in files()]
)
def test_imports_follow_the_table(name, file):
    own, others = imports(file)
    others -= sys.stdlib_module_names
    if name in MAINS or name == "__init__":
        assert not others & {"configs", "experiments"}
        assert not own & MAINS
        return
    modules, packages = ALLOWED[name]
    assert own <= modules | {name} | ({"checks"} if name in MATHEMATICS else {"utils"})
    assert others <= packages


def test_only_the_commands_import_config():
    above = MAINS | {"cli", "config", "__init__"}
    readers = {str(file) for name, file in files() if "config" in imports(file)[0] and name not in above}
    assert not readers


def test_checkpoints_do_not_import_training():
    assert "training" not in set().union(*(imports(file)[0] for name, file in files() if name == "checkpoints"))


def test_no_file_is_long_without_a_reason():
    """The docstring of a file of more than 300 lines says why it is one file."""
    for _, file in files():
        source = file.read_text()
        if len(source.splitlines()) > 300:
            assert "One file because" in ast.get_docstring(ast.parse(source)), file


def test_the_table_has_no_cycle():
    done = set()
    for name, (modules, _) in sorted(ALLOWED.items(), key=lambda item: list(ALLOWED).index(item[0])):
        assert modules <= done, f"{name} imports a module of a later line"
        done.add(name)


@pytest.mark.parametrize("folder", ["ddim_jax", "experiments", "benchmarks", "configs"])
def test_every_module_can_be_imported(folder):
    for file in (ROOT / folder).rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name in ("torch", "diffusers"), error  # of the extra parity


def test_the_core_runs_with_jax_and_numpy_alone():
    """In a process without the other packages."""
    code = """
import sys
REFUSED = {"flax", "optax", "orbax", "absl", "ml_collections", "chex", "PIL", "tqdm", "sklearn", "safetensors",
           "huggingface_hub", "yaml", "torch"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from ddim_jax import checks, discrete, gaussian, guidance, inference_process, inversion, latent, losses, multistep
from ddim_jax import ode, oracle, parallel, registry, samplers, schedule, trajectory
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
