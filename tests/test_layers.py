"""Who may import whom: a module uses what stands in an earlier line, or in its own, never what stands later."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# module or package of ddim_jax -> (modules of ddim_jax that it may import, third-party packages that it may import)
CORE = {"jax", "numpy"}
BASE = {"errors", "files", "interrupts"}  # for all but the mathematics, which have
CHECKS = {"checks"}
MATHEMATICS = {"schedule", "gaussian", "trajectory", "losses", "samplers", "multistep", "ode", "inference", "inversion"}
MATHEMATICS |= {"checks", "parallel", "guidance", "discrete", "latent", "oracle", "registry"}
ALLOWED = {
    "errors": (set(), set()),
    "interrupts": (set(), set()),
    "files": ({"interrupts"}, set()),
    "checks": (set(), CORE),
    "schedule": (set(), CORE),
    "gaussian": ({"schedule"}, CORE),
    "trajectory": ({"schedule", "gaussian"}, CORE),
    "losses": ({"schedule", "gaussian", "trajectory"}, CORE),
    "samplers": ({"schedule", "gaussian", "trajectory"}, CORE),
    "multistep": ({"schedule", "gaussian", "trajectory"}, CORE),
    "ode": ({"schedule", "gaussian", "trajectory", "samplers", "multistep"}, CORE),
    "inference": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "inversion": ({"schedule", "gaussian", "trajectory", "samplers", "multistep"}, CORE),
    "parallel": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "guidance": ({"schedule", "gaussian"}, CORE),
    "discrete": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "latent": ({"schedule"}, CORE),
    "oracle": ({"schedule", "gaussian", "trajectory", "samplers"}, CORE),
    "registry": ({"schedule", "gaussian", "losses", "trajectory", "samplers", "multistep"}, CORE),
    "ranges": ({"checks"}, {"numpy"}),
    "models": ({"checks", "ranges", "schedule", "gaussian", "discrete"}, CORE | {"flax"}),
    "images": (set(), {"numpy", "PIL"}),
    "data": (
        {"images", "registry"},
        {"numpy", "PIL", "sklearn", "tqdm", "tensorflow_datasets", "grain", "absl", "lmdb"},
    ),
    "train_state": ({"models", "schedule"}, CORE | {"optax"}),
    "sharding": (set(), CORE),
    "checkpoint": ({"sharding", "train_state"}, CORE | {"orbax"}),
    "training": (
        {"checks", "schedule", "gaussian", "losses", "discrete", "models", "data", "sharding", "train_state"}
        | {"checkpoint"},
        CORE | {"flax", "optax", "chex", "tqdm"},
    ),
    "config": (
        {"ranges", "registry", "trajectory", "samplers", "schedule", "data", "models", "training"},
        CORE | {"optax"},
    ),
    "usage": ({"config"}, set()),
    "pretrained": (
        {"checkpoint", "config", "images", "models", "registry", "schedule"},
        CORE | {"flax", "safetensors", "yaml", "huggingface_hub", "torch"},
    ),
    "cache": ({"checkpoint", "images"}, {"jax", "tqdm"}),
    "evaluation": (
        {"cache", "checkpoint", "data", "images", "pretrained", "registry", "schedule", "sharding"},
        CORE | {"flax", "optax", "safetensors", "tqdm"},
    ),
    "yardstick": (
        {"checkpoint", "config", "data", "evaluation", "images", "registry", "sharding"},
        CORE,
    ),
    "weights": ({"config", "pretrained", "ranges", "sharding", "train_state", "checkpoint"}, CORE),
    "sampling": (
        {"config", "gaussian", "models", "pretrained", "registry", "samplers", "schedule", "sharding", "train_state"}
        | {"checks", "trajectory", "weights"},
        CORE,
    ),
    "memory": ({"config", "sharding", "train_state"}, CORE),
    "journal": (
        {"config", "images", "sharding", "training"},
        CORE | {"tensorboardX", "tqdm", "wandb"},
    ),
    "generate": (
        {"config", "guidance", "inversion", "losses", "samplers", "schedule", "sharding", "data", "gaussian", "models"},
        CORE,
    ),
    "fingerprint": ({"config", "gaussian", "generate", "registry", "samplers", "trajectory"}, CORE),
    "output": ({"images", "sharding"}, {"numpy", "tqdm"}),
    "cli": (
        {"cache", "config", "checkpoint", "sharding", "usage", "weights"},
        {"absl", "jax", "ml_collections"},
    ),
}
MAINS = {"train", "sample", "encode", "evaluate", "convert", "prepare"}


def imports(file):
    """(modules of ddim_jax, other top-level packages) that a file imports anywhere."""
    ours, others = set(), set()
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
            (ours if top == "ddim_jax" else others).add(rest.split(".")[0] if top == "ddim_jax" else top)
    return ours, others


def files():
    for file in sorted((ROOT / "ddim_jax").rglob("*.py")):
        yield file.relative_to(ROOT / "ddim_jax").parts[0].removesuffix(".py"), file


def test_the_table_knows_every_module():
    assert {name for name, _ in files()} - {"__init__"} == set(ALLOWED) | MAINS


@pytest.mark.parametrize(
    "name, file", [pytest.param(name, file, id=str(file.relative_to(ROOT))) for name, file in files()]
)
def test_imports_follow_the_arrows(name, file):
    import sys

    ours, others = imports(file)
    others -= sys.stdlib_module_names
    if name in MAINS or name == "__init__":
        assert not others & {"configs", "experiments"}
        assert not ours & MAINS
        return
    modules, packages = ALLOWED[name]
    assert ours <= modules | {name} | (CHECKS if name in MATHEMATICS else BASE)
    assert others <= packages


def test_the_arrows_have_no_cycle():
    done = set()
    for name, (modules, _) in sorted(ALLOWED.items(), key=lambda item: list(ALLOWED).index(item[0])):
        assert modules <= done, f"{name} imports what stands after it"
        done.add(name)


def test_the_core_runs_with_jax_and_numpy_alone():
    """In a process where every other package is missing."""
    import subprocess
    import sys

    code = """
import sys
REFUSED = {"flax", "optax", "orbax", "absl", "ml_collections", "chex", "PIL", "tqdm", "sklearn", "safetensors",
           "huggingface_hub", "yaml", "torch"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from ddim_jax import checks, discrete, gaussian, guidance, inference, inversion, latent, losses, multistep, ode, oracle
from ddim_jax import parallel, registry, samplers, schedule, trajectory
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
