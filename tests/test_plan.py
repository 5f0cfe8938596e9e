"""Plans: the table of chips, the counts from an HLO text, and the command."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from messages import raises
from processes import ROOT, run
from tiny import SMOKE, make, pipeline, smoke_config

from ddim_jax import plan, samplers, sampling
from ddim_jax.planning import changes, chips, hlo, hlo_text, programs, reports, table, target
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError

# --- chips ---


@pytest.mark.parametrize(
    "name, count, devices, hosts, topology",
    [
        ("v5e-1", 1, 1, 1, "v5e:1x1"),
        ("v5e-8", 8, 8, 1, "v5e:2x4"),
        ("v5litepod-8", 8, 8, 1, "v5e:2x4"),
        ("v5e-16", 16, 16, 4, "v5e:4x4"),
        ("v5e-256", 256, 256, 64, "v5e:16x16"),
        ("v6e-1", 1, 1, 1, "v6e:1x1"),
        ("v6e-8", 8, 8, 1, "v6e:2x4"),
        ("v4-8", 4, 4, 1, "v4:2x2x1"),
        ("v5p-8", 4, 4, 1, "v5:2x2x1"),
        ("v5p-32", 16, 16, 4, "v5:2x2x4"),
        ("v5p-128", 64, 64, 16, "v5:4x4x4"),
        ("tpu7x-8", 4, 8, 1, "tpu7x:2x2x1"),
    ],
)
def test_slices(name, count, devices, hosts, topology):
    """As the documentation of Cloud TPU names them."""
    slice_ = chips.slice_of(name)
    assert (slice_.chips, slice_.devices, slice_.hosts, slice_.topology) == (count, devices, hosts, topology)


def test_every_name_is_a_slice_of_its_size():
    assert len(set(chips.names())) == len(chips.names()) > 30
    for name in chips.names():
        slice_ = chips.slice_of(name)
        assert slice_.chips * slice_.chip.cores_in_name == int(name.rpartition("-")[2])
        assert math.prod(slice_.shape) == slice_.chips and max(slice_.shape) <= 2 * max(min(slice_.shape), 2)
        assert all(side % bound == 0 for side, bound in zip(slice_.shape, slice_.host_bounds, strict=False))


def test_later_chips_have_higher_rates():
    """A wrong digit in the table would show in the operations per byte, too."""
    rates = {name: (chip.flops, chip.bandwidth, chip.memory) for name, chip in chips.CHIPS.items()}
    for earlier, later in (("v4", "v5p"), ("v5e", "v6e"), ("v5p", "tpu7x"), ("v6e", "tpu7x")):
        assert all(a < b for a, b in zip(rates[earlier], rates[later], strict=True))
    assert all(150 < flops / bandwidth < 600 for flops, bandwidth, _ in rates.values())


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5-8", ("v5-8", "v5p-8")),
        ("v5e-2", ("v5e-2", "v5e-1", "v5e-4")),
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

%wide.region_0.17_spmd.clone (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/UNet/down_0_block_1/conv_0/add"}
  ROOT %result = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%region_1.18 (state.1: (s32[], f32[8,4])) -> pred[] {
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
  %loop = (s32[], f32[8,4]{1,0}) while(%first), condition=%region_1.18, body=%wide.region_0.17_spmd.clone, backend_config={"known_trip_count":{"n":"10"}}
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


FUSIONS = """\
HloModule fusions

%sliced (p0: f32[100,4], p1: s32[]) -> f32[4] {
  %p0 = f32[100,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,4}
  ROOT %row = f32[4]{0} bitcast(%part)
}

%updated (q0: f32[100,4], q1: f32[4], q2: s32[]) -> (f32[100,4], f32[4]) {
  %q0 = f32[100,4]{1,0} parameter(0)
  %q1 = f32[4]{0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %update = f32[1,4]{1,0} bitcast(%q1)
  %put = f32[100,4]{1,0} dynamic-update-slice(%q0, %update, %q2, %none)
  ROOT %both = (f32[100,4]{1,0}, f32[4]{0}) tuple(%put, %q1)
}

%begins (r0: f32[2,4]) -> (f32[2,4], f32[8,4]) {
  %r0 = f32[2,4]{1,0} parameter(0)
  %gather.1 = f32[8,4]{1,0} all-gather(%r0), channel_id=7, replica_groups={}, dimensions={0}
  ROOT %passed.1 = (f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%r0, %gather.1)
}

%ends (s0: f32[2,4]) -> (f32[2,4], f32[8,4]) {
  %s0 = f32[2,4]{1,0} parameter(0)
  %gather.2 = f32[8,4]{1,0} all-gather(%s0), channel_id=7, replica_groups={}, dimensions={0}
  ROOT %passed.2 = (f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%s0, %gather.2)
}

%all-reduce-scatter.1 (t0: f32[8,4]) -> f32[2,4] {
  ROOT %t0 = f32[8,4]{1,0} parameter(0)
}

ENTRY %main (a: f32[100,4], i: s32[], b: f32[2,4], c: f32[8,4]) -> f32[4] {
  %a = f32[100,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[2,4]{1,0} parameter(2)
  %c = f32[8,4]{1,0} parameter(3)
  %read = f32[4]{0} fusion(%a, %i), kind=kLoop, calls=%sliced, metadata={op_name="jit(f)/jvp(DiT)/block_3/jit(silu)/mul"}
  %write = (f32[100,4]{1,0}, f32[4]{0}) fusion(%a, %read, %i), kind=kLoop, calls=%updated
  %first = (f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%b), kind=kCustom, calls=%begins
  %second = (f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%b), kind=kCustom, calls=%ends
  %scattered = f32[2,4]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (f32[2,4]{1,0}, f32[2,4]{1,0}, u32[], u32[]) collective-permute-start(%b), channel_id=9
  %done = f32[2,4]{1,0} collective-permute-done(%start)
  ROOT %out = f32[4]{0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,4}
}
"""  # noqa: E501


def test_traffic_of_parts():
    """A row of 16 bytes of an array of 1600: the first fusion reads a row and the index and writes the row; the second
    one reads the row and the index and writes the row in place; the slice of the last line reads and writes a row.
    """
    traffic = hlo.traffic(FUSIONS)
    assert traffic["fusion", "block/silu"] == 16 + 4 + 16
    assert traffic["dynamic-slice", ""] == 2 * 16
    assert traffic["fusion", ""] == 16 + 4 + 16
    assert traffic["reduce-scatter", ""] == traffic["all-gather", ""] == 128 + 32


def test_collectives_that_overlap_with_computation_count_once():
    """One all-gather is in two fusions. The reduce-scatter of a TPU is a fusion. An asynchronous permutation has its
    operand and its result in one type.
    """
    expected = {"all-gather": (1, 128), "reduce-scatter": (1, 32), "collective-permute": (1, 32)}
    assert hlo.collectives(FUSIONS) == {kind: hlo.Collective(*each) for kind, each in expected.items()}


@pytest.mark.parametrize(
    "op_name, expected",
    [
        ("jit(update)/jvp(UNet)/down_0_block_1/conv_0/conv_general_dilated", "down_block/conv"),
        ("jit(update)/transpose(jvp(UNet))/up_1_block_0/jit(silu)/mul", "up_block/silu"),
        ("jit(scan_steps)/while/body/UNet/middle_attention/bhqk,bkhc->bqhc/dot_general", "middle_attention"),
        ("jit(update)/mul", ""),
        ("args[0]", ""),
    ],
)
def test_module_of_an_operation(op_name, expected):
    assert hlo.module(op_name) == expected


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
    assert (hlo_text.size(type_), hlo_text.size(type_, on_chip=True)) == (in_hbm, on_chip)


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
    collectives = {"all-reduce": hlo.Collective(1, 8)}
    report = reports.Report(100, 45, 10, 80, 5, {"fusion": 600}, {"other": 600}, collectives)
    return table.Row("train", report._replace(**more), 1e12, 64, 1000)


def test_a_row():
    """fits: arguments, temporaries, outputs and code. The bound is the larger one, unless caches hold the traffic."""
    rates = table.Rates(160, 4e12, 1000.0)
    assert table.fits(row(), rates) is True and table.fits(row(), rates._replace(memory=159)) is False
    assert table.fits(row(), rates._replace(memory=None)) is None and table.fits(row(needed=1), rates) is False
    assert table.bounds(row(), rates) == (0.25, 0.6)
    values = table.as_json(row(), rates)
    assert values["most_images_per_second"] == pytest.approx(64 / 0.6)
    assert values["least_hours_of_the_recipe"] == pytest.approx(600 / 3600)
    assert json.loads(json.dumps(values)) == values
    cached = table.as_json(row(), rates._replace(caches=True))
    assert cached["bound_seconds"] == 0.25 and cached["traffic_seconds"] == 0.6
    too_large = table.as_json(row(needed=10**9), rates)
    assert too_large["fits"] is False and too_large["memory_bytes"] == 10**9 and too_large["bound_seconds"] is None
    unknown = table.as_json(row(), table.Rates(None, None, None))
    assert unknown["most_images_per_second"] is None and unknown["fits"] is None
    assert len({line.count("|") for line in table.lines([row(), row(needed=1)], rates)}) == 1


def test_reports_are_cached_by_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path))
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    lower = lambda factor: jax.jit(lambda x: factor * x).trace(jnp.ones(4)).lower()
    program = lambda factor: programs.Program(lower(factor), mesh, 4.0, (), 1)
    first, _ = reports.of(program(2))
    with monkeypatch.context() as patch:
        patch.setattr(reports, "compile_program", lambda program: (reports.Report(-1), None))
        assert reports.of(program(2))[0] == first
        assert reports.of(program(2), cached=False)[0].arguments == -1
    (file,) = (tmp_path / "plans").iterdir()
    for content in (b"", b"{}", b"[1]", file.read_bytes()[:-5]):
        file.write_bytes(content)
        assert reports.of(program(2))[0] == first
    reports.of(program(3))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--another")
    reports.of(program(3))
    assert len(list((tmp_path / "plans").iterdir())) == 3


@pytest.mark.parametrize(
    "message, gib",
    [
        # libtpu 0.0.52
        (
            "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(146.56G) exceeds available HBM (15.75G). HLO module: jit_scan_steps.",
            146.56,
        ),
        # earlier versions, as in the documentation of XLA
        ("Ran out of memory in memory space hbm. Used 23.15G of 15.75G hbm. Exceeded hbm capacity by 7.40G.", 23.15),
        ("Ran out of memory in memory space vmem. Used 17.0M of 16.0M vmem.", None),
    ],
)
def test_the_message_of_the_compiler_for_a_program_that_does_not_fit(message, gib):
    needed = reports.needed_memory(f"RESOURCE_EXHAUSTED: {message}")
    assert needed == (None if gib is None else int(gib * 2**30))
    assert reports.needed_memory(message) is None


def test_the_sampler_is_the_program_of_sampling():
    """The lowered program, with every kind of argument, equals what `integrate` runs."""
    config, process = make(eta=0.5)
    mesh = programs.one_device()
    built = pipeline(config, mesh, process)
    lowered = programs.sampler(built).lowered
    index = jnp.arange(programs.batch_of(built))
    keys, x = sampling.start(built, sharding.split_batch(mesh, np.asarray(index)))
    arguments = samplers.checked(process.sampler, sampling.conditioned(built), process.transitions, x, keys)
    expected = samplers.scan_steps.lower(*arguments, keep=False)
    stripped = lambda program: re.sub(r" ?\{sdy.sharding = #sdy.sharding<[^>]*>\}|sdy.mesh.*", "", program.as_text())
    assert stripped(lowered) == stripped(expected)


# --- changes ---


def test_changes_need_less_memory_in_order():
    config = smoke_config()
    found = [*changes.changes(config, "train", 4)]
    texts = [change.options for change in found]
    assert texts[:2] == ["--config.train.accumulate=2", "--config.train.accumulate=4"]
    assert any("remat" in text for text in texts) and any("fsdp=4" in text for text in texts)
    for text, changed, images in found:
        assert ("fsdp" in text) == (changed.mesh.fsdp == 4) and ("remat" in text) == changed.model.remat
        assert changed.train.batch_size == config.train.batch_size == images * changed.train.accumulate
        assert images % 4 == 0
    sizes = [change.config.sample.batch_size for change in changes.changes(config, "sample", 4)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 4 and all(size % 4 == 0 for size in sizes)


def test_the_first_change_that_fits(monkeypatch):
    config, tried = smoke_config(), []

    def measured(changed, target, cached):
        tried.append(changed.train.accumulate)
        return row(temporaries=1600 // changed.train.accumulate)

    monkeypatch.setitem(plan.ROWS, "train", measured)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    devices = target.Target(lambda data, fsdp: mesh, table.Rates(600, None, None))
    text = plan.change_that_fits(config, row(), devices)
    assert "--config.train.accumulate=4" in text and tried == [2, 4]
    assert "none" in plan.change_that_fits(config, row(), devices._replace(rates=table.Rates(1, None, None)))


# --- the command ---


def test_the_command(tmp_path):
    """The devices of this machine: the sampler is compiled and timed."""
    out = tmp_path / "plan.json"
    done = run("ddim_jax.plan", *SMOKE, "--chips", "cpu-2", "--what", "sample", "--out", out)
    assert done.returncode == 0, done.stderr
    (program,) = json.loads(out.read_text())["programs"]
    assert program["program"] == "sample" and program["measured_seconds"] > 0 and program["fits"] is True
    assert program["collectives"] == {} and program["flops"] > 0
    assert program["hbm_bytes"] > 3 * program["argument_bytes"]  # of every step
    assert "| measured |" in done.stdout and "compiling" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ("--chips", "v5e-8")),
        (("--chips", "v5x-8"), ("--chips", "v5x-8")),
        (("--chips", "cpu-0"), ("--chips", "cpu-0")),
        (("--chips", "cpu-2", "--what", "evaluate"), ("--what", "evaluate", "train", "sample")),
        (("--chips", "cpu-3", "--what", "train"), ("config.train.batch_size", "3", "15", "18")),
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
        programs.prepare_libtpu(chips.slice_of("v5e-8"))


@pytest.mark.slow
def test_every_slice_is_a_topology_of_libtpu():
    """With its devices, its hosts, and meshes whose axes divide an axis of the chips. In a process of its own, because
    it sets environment variables.
    """
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    code = """
import jax
jax.config.update("jax_platforms", "cpu")
from ddim_jax.planning import chips, programs
for name in chips.names():
    slice_ = chips.slice_of(name)
    for fsdp in (1, 2, 4, 8, 16):
        if slice_.devices % fsdp == 0:
            mesh = programs.mesh_of_slice(slice_, -1, fsdp)
    hosts = {device.process_index for device in mesh.devices.flat}
    assert (mesh.size, len(hosts)) == (slice_.devices, slice_.hosts), (name, mesh.size, hosts)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_a_tpu_topology(tmp_path):
    """Four chips of v5e: the gradients are reduced, nothing is gathered in data-parallel training, and the state is
    donated. With fsdp, parameters are gathered, and a device has less of them. A program that does not fit is reported.
    """
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    environment = {**os.environ, "DDIM_JAX_CACHE": str(tmp_path)}

    def planned(name, *options):
        command = [sys.executable, "-m", "ddim_jax.plan", *SMOKE, "--chips=v5e-4", f"--out={tmp_path / name}"]
        done = subprocess.run([*command, *options], cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert all("compil" in line for line in done.stderr.splitlines()), done.stderr  # nothing of libtpu
        return json.loads((tmp_path / name).read_text())["programs"]

    train, sample = planned("a.json")
    assert set(train["collectives"]) == {"all-reduce"} and train["collectives"]["all-reduce"]["count"] <= 3
    assert train["donated_bytes"] > 0.99 * train["argument_bytes"] and train["fits"] and sample["fits"]
    assert sample["collectives"] == {} and train["bound_seconds"] > 0 and train["measured_seconds"] is None
    begin = time.monotonic()
    assert planned("b.json") == [train, sample]  # from the cache
    assert time.monotonic() - begin < 60
    (sharded,) = planned("c.json", "--what=train", "--config.mesh.fsdp=4", "--config.model.channels=64")
    (whole,) = planned("d.json", "--what=train", "--config.model.channels=64")
    assert "all-gather" in sharded["collectives"] and sharded["argument_bytes"] < 0.5 * whole["argument_bytes"]
    code = """
import jax
jax.config.update("jax_platforms", "cpu")
from ddim_jax.planning import chips, programs, reports
from ddim_jax.utils import sharding
mesh = programs.mesh_of_slice(chips.slice_of("v5e-1"))
x = jax.ShapeDtypeStruct((5 * 2**30,), "float32", sharding=sharding.along_batch(mesh))
lowered = jax.jit(lambda x: (x.reshape(2, -1) @ x.reshape(-1, 2)).sum()).trace(x).lower(lowering_platforms=("tpu",))
report, compiled = reports.compile_program(programs.Program(lowered, mesh, 0.0, (x,), 1))
assert compiled is None and report.arguments == 20 * 2**30 < report.memory, report
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
