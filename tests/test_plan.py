"""Plans: the table of chips, the counts from an HLO text, and the command."""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from messages import raises
from processes import ROOT, run
from tiny import SMOKE, smoke_config

from ddim_jax import plan
from ddim_jax.planning import chips, hlo, programs, reports, table
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError

# --- chips ---


@pytest.mark.parametrize(
    "name, count, devices, topology",
    [
        ("v5e-1", 1, 1, "v5e:1x1"),
        ("v5e-8", 8, 8, "v5e:2x4"),
        ("v5e-256", 256, 256, "v5e:16x16"),
        ("v6e-8", 8, 8, "v6e:2x4"),
        ("v4-8", 4, 4, "v4:2x2x1"),
        ("v5p-8", 4, 4, "v5:2x2x1"),
        ("v5p-128", 64, 64, "v5:4x4x4"),
        ("tpu7x-8", 4, 8, "tpu7x:2x2x1"),
    ],
)
def test_slices(name, count, devices, topology):
    """As the documentation of Cloud TPU names them."""
    slice_ = chips.slice_of(name)
    assert (slice_.chips, slice_.devices, slice_.topology) == (count, devices, topology)


def test_every_name_is_a_slice_of_its_size():
    assert len(set(chips.names())) == len(chips.names()) > 30
    for name in chips.names():
        slice_ = chips.slice_of(name)
        assert slice_.chips * slice_.chip.cores_in_name == int(name.rpartition("-")[2])
        assert math.prod(slice_.shape) == slice_.chips and max(slice_.shape) <= 2 * max(min(slice_.shape), 2)


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5-8", ("v5-8", "v5p-8")),
        ("v5e-3", ("v5e-3", "v5e-4")),
        ("v5e-512", ("v5e-512", "v5e-256")),
        ("v5p-7", ("v5p-7", "v5p-8")),
        ("", ("--chips",)),
        ("v5e-" + "9" * 50, ("--chips",)),
    ],
)
def test_unknown_chips(name, words):
    with raises(ConfigError, *words):
        chips.slice_of(name)


# --- counts from HLO ---

PROGRAM = """\
HloModule example, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %twice = f32[8,4]{1,0} add(%p, %p)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/UNet/down_0_block_1/conv_0/add"}
  ROOT %result = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (input: f32[8,4]) -> f32[8,4] {
  %input = f32[8,4]{1,0} parameter(0)
  %copy-start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%input)
  %copy-done = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,4]{1,0:T(8,128)}), f32[2,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%input), slice={[0:2]}
  %slice-done = f32[2,4]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %out-start = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%input)
  %out-done = f32[8,4]{1,0} copy-done(%out-start)
  %chip = f32[8,4]{1,0:T(8,128)S(1)} add(%copy-done, %copy-done)
  %half = bf16[8,4]{1,0} convert(%chip)
  %zero = s32[] constant(0)
  %first = (s32[], f32[8,4]{1,0}) tuple(%zero, %input)
  %loop = (s32[], f32[8,4]{1,0}) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %last = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %all = f32[8,4]{1,0} all-reduce(%last), replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_traffic_of_a_program():
    """By hand; the array has 128 bytes. copy: one end in HBM of the first one, two of the second one; the end on the
    chip and the operation there do not count. slice: a fourth of the array. convert: 64 bytes written. The loop: read
    and written ten times. all-reduce: read and written.
    """
    expected = {("copy", ""): 3 * 128, ("slice", ""): 32, ("convert", ""): 64, ("fusion", "down_block/conv"): 10 * 256}
    expected |= {("all-reduce", ""): 256, ("add", ""): 0}
    assert hlo.traffic(PROGRAM) == Counter(expected)
    assert hlo.collectives(PROGRAM) == {"all-reduce": hlo.Collective(1, 128)}


def test_the_trips_of_a_loop():
    """As noted by the compiler; else the bound in the condition, as `lax.scan` has it; else once."""
    noted = ', backend_config={"known_trip_count":{"n":"10"}}'
    constant, compare = "%more = pred[] constant(true)", "%n = s32[] constant(7)\n  ROOT %lt = pred[] compare(%j, %n)"
    assert hlo.traffic(PROGRAM.replace(noted, ""))["fusion", "down_block/conv"] == 256
    bounded = PROGRAM.replace(noted, "").replace(f"ROOT {constant}", compare)
    assert hlo.traffic(bounded)["fusion", "down_block/conv"] == 7 * 256


@pytest.mark.parametrize(
    "type_, in_hbm, on_chip",
    [
        ("f32[8,4]{1,0}", 128, 0),
        ("bf16[3]{0:T(256)S(1)}", 0, 6),
        ("(f32[2]{0}, s32[]{:S(1)}, pred[5]{0})", 13, 4),
        ("f32[]", 4, 0),
        ("token[]", 0, 0),
        ("s4[3]{0}", 2, 0),
    ],
)
def test_size_of_a_type(type_, in_hbm, on_chip):
    assert (hlo.size(type_), hlo.size(type_, on_chip=True)) == (in_hbm, on_chip)


def test_collectives_of_a_compiled_program():
    """The mean over a sharded batch is one all-reduce of a number; a replicated output of it is an all-gather."""
    mesh = jax.make_mesh((2, 1), ("data", "fsdp"), devices=jax.devices()[:2])
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding.along_batch(mesh))
    replicated = sharding.replicated(mesh)
    mean = jax.jit(lambda x: x.sum(0), out_shardings=replicated).trace(x).lower().compile().as_text()
    assert hlo.collectives(mean) == {"all-reduce": hlo.Collective(1, 64)}
    gathered = jax.jit(lambda x: 2 * x, out_shardings=replicated).trace(x).lower().compile().as_text()
    assert hlo.collectives(gathered) == {"all-gather": hlo.Collective(1, 512)}
    elementwise = jax.jit(lambda x: 2 * x, out_shardings=jax.NamedSharding(mesh, PartitionSpec("data")))
    assert hlo.collectives(elementwise.trace(x).lower().compile().as_text()) == {}


# --- the report ---


def row(**more):
    report = programs.Report(100, 50, 10, 80, {"fusion": 600}, {"": 600}, {"all-reduce": hlo.Collective(1, 8)})
    return table.Row("train", report._replace(**more), 1e12, 64, 1000)


def test_a_row():
    """fits: arguments + temporaries + outputs. The bound is the larger one."""
    rates = table.Rates(160, 4e12, 1000.0)
    assert table.fits(row(), rates) is True and table.fits(row(), rates._replace(memory=159)) is False
    assert table.fits(row(), rates._replace(memory=None)) is None and table.fits(row(needed=1), rates) is False
    assert table.bounds(row(), rates) == (0.25, 0.6)
    values = table.as_json(row(), rates)
    assert values["most_images_per_second"] == pytest.approx(64 / 0.6)
    assert values["least_hours_of_the_recipe"] == pytest.approx(600 / 3600)
    assert json.loads(json.dumps(values)) == values
    unknown = table.as_json(row(), table.Rates(None, None, None))
    assert unknown["most_images_per_second"] is None and unknown["fits"] is None
    assert len({line.count("|") for line in table.lines([row(), row()], rates)}) == 1


def test_reports_are_cached_by_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path))
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    lower = lambda factor: jax.jit(lambda x: factor * x).trace(jnp.ones(4)).lower()
    first, _ = reports.of(lower(2), mesh)
    monkeypatch.setattr(programs, "report", lambda lowered: pytest.fail("compiled again"))
    assert reports.of(lower(2), mesh)[0] == first
    (file,) = (tmp_path / "plans").iterdir()
    monkeypatch.undo()
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path))
    for content in (b"", b"{}", b"[1]", file.read_bytes()[:-5]):
        file.write_bytes(content)
        assert reports.of(lower(2), mesh)[0] == first
    reports.of(lower(3), mesh)
    assert len(list((tmp_path / "plans").iterdir())) == 2


# --- changes ---


def test_changes_need_less_memory_in_order():
    config = smoke_config()
    found = dict(plan.alternatives(config, "train", 4))
    assert list(found)[:2] == ["--config.train.accumulate=2", "--config.train.accumulate=4"]
    assert any("remat" in text for text in found) and any("fsdp=4" in text for text in found)
    for text, changed in found.items():
        assert ("fsdp" in text) == (changed.mesh.fsdp == 4) and ("remat" in text) == changed.model.remat
        assert changed.train.batch_size == config.train.batch_size
        assert changed.train.batch_size % (4 * changed.train.accumulate) == 0
    sizes = [changed.sample.batch_size for _, changed in plan.alternatives(config, "sample", 4)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == config.sample.batch_size // 2


def test_the_first_change_that_fits(monkeypatch):
    config, tried = smoke_config(), []

    def measured(changed, mesh, execute):
        tried.append(changed.train.accumulate)
        return row(temporaries=1600 // changed.train.accumulate)

    monkeypatch.setattr(plan, "train_row", measured)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    text = plan.change_that_fits(config, row(), lambda config: mesh, table.Rates(600, None, None))
    assert "--config.train.accumulate=4" in text and tried == [2, 4]
    text = plan.change_that_fits(config, row(), lambda config: mesh, table.Rates(1, None, None))
    assert "none" in text


# --- the command ---


def test_the_command(tmp_path):
    """The devices of this machine: the sampler is compiled and timed."""
    out = tmp_path / "plan.json"
    done = run("ddim_jax.plan", *SMOKE, "--chips", "cpu-2", "--what", "sample", "--out", out)
    assert done.returncode == 0, done.stderr
    (program,) = json.loads(out.read_text())["programs"]
    assert program["program"] == "sample" and program["measured_seconds"] > 0 and program["fits"] is True
    assert program["collectives"] == {} and program["flops"] > 0
    assert "| measured |" in done.stdout and "compiling" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ("--chips", "v5e-8")),
        (("--chips", "v5x-8"), ("--chips", "v5x-8")),
        (("--chips", "cpu-0"), ("--chips", "cpu-0")),
        (("--chips", "cpu-2", "--what", "evaluate"), ("--what", "evaluate", "train", "sample")),
        (("--chips", "cpu-3", "--what", "train"), ("config.train.batch_size", "3")),
        (("--chips", "cpu-2", "--config.mesh.fsdp=3"), ("config.mesh", "3", "2")),
        (("--chips", "cpu-2", "--out", "README.md"), ("--out", "README.md")),
    ],
)
def test_bad_input(arguments, words):
    done = run("ddim_jax.plan", *SMOKE, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_without_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with raises(ConfigError, "libtpu", "plan"):
        programs.check_libtpu()


@pytest.mark.slow
def test_a_tpu_topology(tmp_path):
    """Four chips of v5e: the gradients are reduced, nothing is gathered in data-parallel training, and the state is
    donated. One process at a time: libtpu holds a lock.
    """
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    command = [sys.executable, "-m", "ddim_jax.plan", *SMOKE, "--chips", "v5e-4"]
    environment = {**os.environ, "DDIM_JAX_CACHE": str(tmp_path)}
    done = subprocess.run([*command, f"--out={tmp_path / 'a.json'}"], cwd=ROOT, env=environment, text=True)
    assert done.returncode == 0
    train, sample = json.loads((tmp_path / "a.json").read_text())["programs"]
    assert set(train["collectives"]) == {"all-reduce"} and train["collectives"]["all-reduce"]["count"] <= 3
    assert train["donated_bytes"] > 0.99 * train["argument_bytes"] and train["fits"] and sample["fits"]
    assert sample["collectives"] == {}
    fsdp = [*command, "--what=train", "--config.mesh.fsdp=4", f"--out={tmp_path / 'b.json'}"]
    assert subprocess.run(fsdp, cwd=ROOT, env=environment, text=True).returncode == 0
    (sharded,) = json.loads((tmp_path / "b.json").read_text())["programs"]
    assert "all-gather" in sharded["collectives"] and sharded["argument_bytes"] < train["argument_bytes"]
