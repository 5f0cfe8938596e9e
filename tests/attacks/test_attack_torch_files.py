"""Files that PyTorch wrote, read without it: real ones give their tensors, hostile and damaged ones give one line."""

import io
import pathlib
import pickle
import pickletools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from attacking import holds
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import WAYS, altered
from processes import ROOT

from ddim_jax.checkpoints import pickles, torch_file
from ddim_jax.checkpoints.torch_file import Tensor
from ddim_jax.utils.errors import CheckpointError, DamagedError

DATA = ROOT / "tests" / "data"  # written by PyTorch 2.13
FORMATS = ["torch_zip.pth", "torch_legacy.pth"]
EXPECTED = dict(np.load(DATA / "torch_expected.npz"))
MEMORY = 256 << 20


def loaded(path):
    """The content with every tensor read; None where it is refused in one line."""
    try:
        content = torch_file.load(path)
        return [{name: value.read() for name, value in content[0].items()}, *content[1:]]
    except (CheckpointError, DamagedError) as error:
        holds("\n" not in str(error) and str(path) in str(error), error)
        return None
    except (IndexError, KeyError, TypeError, AttributeError):  # of this function: the content is another one
        return None


@pytest.mark.parametrize("name", FORMATS)
def test_a_real_file(name):
    """Every dtype, views, a transposed tensor, an empty one, a scalar, a parameter; an optimizer's state; numbers."""
    state, optimizer, epoch, step = torch_file.load(DATA / name)
    holds((epoch, step) == (5, 1000) and optimizer["param_groups"][0]["betas"] == (0.9, 0.999))
    holds(optimizer["state"][0]["step"].read() == 5)
    holds(state.keys() == EXPECTED.keys())
    for key, expected in EXPECTED.items():
        array = state[key].read()
        holds(array.shape == expected.shape, key)
        np.testing.assert_array_equal(array.astype(expected.dtype), expected, err_msg=key)


def test_files_of_the_torch_that_is_installed(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    state = torch.nn.Conv2d(2, 3, 3).state_dict()
    for zipped in (True, False):
        torch.save(state, tmp_path / "now.pth", _use_new_zipfile_serialization=zipped)
        found = torch_file.load(tmp_path / "now.pth")
        for name, tensor in state.items():
            np.testing.assert_array_equal(found[name].read(), tensor.numpy())


# --- damaged files ---


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file(name, data, tmp_path_factory):
    """Refused in one line, or read; from a zip archive, whose CRCs tell, never with another value."""
    content = altered(data, bytearray((DATA / name).read_bytes()), WAYS, 4)
    path = tmp_path_factory.mktemp("damaged") / "x.pth"
    path.write_bytes(content)
    found = loaded(path)
    if found is not None and name == "torch_zip.pth" and found[0].keys() == EXPECTED.keys():
        for key, expected in EXPECTED.items():
            holds(np.array_equal(found[0][key].astype(expected.dtype), expected), key)


# --- hostile pickles ---


def zipped(path, pickled, storages=(("0", b"\0" * 16),), **entries):
    """A zip archive as PyTorch writes it, with this data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages:
            archive.writestr(f"archive/data/{key}", content)
    return path


def refused(path, *words):
    tracemalloc.start()
    try:
        with pytest.raises((CheckpointError, DamagedError)) as caught:
            content = torch_file.load(path)
            for value in content.values() if isinstance(content, dict) else ():
                value.read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    holds(str(path) in message and "\n" not in message and len(message) < 1000, message[:300])
    holds(all(word in message for word in words), message)
    holds(peak < MEMORY, peak)


class Called:
    """Pickled as a call of this function with these arguments."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def flag(path):
    pathlib.Path(path).touch()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_call_of_a_pickle_is_made(protocol, tmp_path):
    written = tmp_path / "executed"
    for value in (
        Called(flag, str(written)),
        {"a": [Called(flag, str(written))]},
        Called(eval, "1/0"),
        Called(exec, ""),
    ):
        refused(zipped(tmp_path / "x.pth", pickle.dumps(value, protocol)))
    holds(not written.exists())


CALLING = {
    "GLOBAL and REDUCE": b"cos\nsystem\n(S'true'\ntR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "NEWOBJ": b"\x80\x02ccollections\nCounter\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "BUILD of a global": b"cos\nsystem\n}b.",
    "BUILD of a list": b"]}b.",
    "BUILD of a tensor's state": b"ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "a call of a call": b"ccollections\nOrderedDict\n)R)R.",
    "a call of a text": b"S'os.system'\nS'true'\n\x85R.",
    "a persistent id that is a text": b"S'storage'\nQ.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05K\x01\x98.",
}


@pytest.mark.parametrize("kind", CALLING)
def test_an_opcode_that_imports_calls_or_builds(kind, tmp_path):
    refused(zipped(tmp_path / "x.pth", CALLING[kind]))


def test_every_opcode_is_one_that_makes_values_or_is_refused():
    """Those that this reader runs are in this list; a new opcode of Python is refused until it is looked at."""
    calling = {"REDUCE", "NEWOBJ", "BUILD", "GLOBAL", "STACK_GLOBAL", "PERSID", "BINPERSID"}  # through the tables alone
    never = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    for opcode in pickletools.opcodes:
        if opcode.name in never:
            with pytest.raises(pickles.Unsupported, match=opcode.name):
                argument = {"INST": b"os\nsystem\n"}.get(opcode.name, b"\x01\0\0\0"[: _argument_bytes(opcode)])
                pickles.load(io.BytesIO(b"((" + opcode.code.encode("latin-1") + argument + b"."), {})
        elif opcode.name in calling:
            holds(opcode.name in CALLING or opcode.code in "R\x81bc\x93PQ")


def _argument_bytes(opcode):
    return 0 if opcode.arg is None or opcode.arg.n < 0 else opcode.arg.n


GREEDY = {
    "nested lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested tuples": b")" + b"\x85" * 100_000 + b".",
    "a tuple of the same tuple twice, sixty times, as a key": b"}K\x01" + b"2\x86" * 60 + b"K\x01s.",
    "a tuple of the same tuple as a shape": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x01"
    + b"2\x86" * 60
    + b")tR.",
    "a large index of the memo": b"K\x01r\xff\xff\xff\xff.",
    "a text that is longer than the file": b"X\xff\xff\xff\x7fabc.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    "one value a million times": b"K\x01" + b"2" * 1_000_000 + b".",
    "a number of many digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a number of many bytes": b"\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000 + b".",
    "no end": b"K\x01",
    "nothing on the stack": b".",
    "a mark that is not there": b"t.",
    "an index that is not there": b"h\x05.",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", GREEDY)
def test_a_pickle_that_asks_for_much(kind, tmp_path):
    """Refused, or a plain value that is no state dict: in bounded memory."""
    path = zipped(tmp_path / "x.pth", GREEDY[kind])
    tracemalloc.start()
    try:
        torch_file.load(path)
    except (CheckpointError, DamagedError) as error:
        holds("\n" not in str(error) and len(str(error)) < 1000)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    holds(peak < MEMORY, peak)


def test_a_pickle_that_is_too_long(tmp_path):
    refused(zipped(tmp_path / "x.pth", b"K\x01" + b"0K\x01" * (6 << 20) + b"."), str(pickles.MAX_BYTES))


# --- tensors that are none ---


class Storage:
    """Pickled as a persistent id."""

    def __init__(self, kind="FloatStorage", key="0", count=4):
        self.id = ("storage", Name("torch", kind), key, "cpu", count)


class Name:
    def __init__(self, module, name):
        self.module, self.name = module, name


def tensor(storage, offset, shape, strides):
    return Name("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, {})


def pickled(function, arguments):
    """{"a": function(*arguments)}, written opcode by opcode: PyTorch is not needed."""
    return b"}" + _value("a") + _value(function) + _value(arguments) + b"Rs."


def _value(value):
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Storage):
        return _value(value.id) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_value, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


BAD_TENSORS = {
    "strides beyond the storage": tensor(Storage(), 0, (2, 2), (4, 1)),
    "an offset beyond the storage": tensor(Storage(), 4, (1,), (1,)),
    "a negative offset": tensor(Storage(), -1, (1,), (1,)),
    "a negative stride": tensor(Storage(), 3, (2,), (-1,)),
    "a negative length": tensor(Storage(), 0, (-1,), (1,)),
    "strides of 0 over a huge shape": tensor(Storage(), 0, (10**6, 10**6), (0, 0)),
    "lengths whose product is no int64": tensor(Storage(), 0, (2**40, 2**40, 2**40), (0, 0, 0)),
    "numbers of many digits": tensor(Storage(), 0, (10**4000, 10**4000), (0, 0)),
    "a length that is a float": tensor(Storage(), 0, (2.0,), (1,)),
    "a length that is a bool": tensor(Storage(), 0, (True,), (1,)),
    "fewer strides than lengths": tensor(Storage(), 0, (2, 2), (1,)),
    "a thousand axes": tensor(Storage(), 0, (1,) * 1000, (1,) * 1000),
    "a shape that is a number": tensor(Storage(), 0, 4, 1),
    "no storage": tensor("storage", 0, (1,), (1,)),
    "a storage that is missing": tensor(Storage(key="../../../etc/passwd"), 0, (1,), (1,)),
    "a storage of another size": tensor(Storage(count=5), 0, (1,), (1,)),
    "a storage of 2^60 elements": tensor(Storage(count=1 << 60), 0, (1,), (1,)),
    "a storage of no elements": tensor(Storage(count=None), 0, (1,), (1,)),
    "a storage of an unknown type": tensor(Storage(kind="ComplexFloatStorage"), 0, (1,), (1,)),
    "a quantised tensor": (Name("torch._utils", "_rebuild_qtensor"), (Storage(), 0, (1,), (1,), (), False, {})),
    "a parameter of nothing": (Name("torch._utils", "_rebuild_parameter"), (None, False, {})),
    "an OrderedDict of pairs that are none": (Name("collections", "OrderedDict"), (5,)),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_that_is_none(kind, tmp_path):
    refused(zipped(tmp_path / "x.pth", pickled(*BAD_TENSORS[kind])))


def test_a_tensor_written_opcode_by_opcode(tmp_path):
    """The same with nothing wrong."""
    values = np.arange(4, dtype=np.float32)
    path = zipped(tmp_path / "x.pth", pickled(*tensor(Storage(), 1, (3,), (1,))), [("0", values.tobytes())])
    found = torch_file.load(path)["a"]
    holds(isinstance(found, Tensor) and (found.read() == values[1:]).all())


# --- archives that are none ---


def test_a_compressed_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"}.")
        archive.writestr("archive/data/0", b"\0" * (64 << 20))
    refused(tmp_path / "x.pth")


def test_entries_of_one_name(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", b"}.")
    refused(tmp_path / "x.pth")


def test_entries_that_overlap(tmp_path):
    """Of the central directory two entries lie at one place: what is read twice would count twice."""
    path = zipped(tmp_path / "x.pth", b"}.", [("0", b"\0" * 16), ("1", b"\1" * 16)])
    content = bytearray(path.read_bytes())
    offsets = [i + 42 for i in range(len(content)) if content[i : i + 4] == b"PK\x01\x02"]
    content[offsets[-1] : offsets[-1] + 4] = content[offsets[-2] : offsets[-2] + 4]
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"archive/version": b"3"},
        {"a/data.pkl": b"}.", "b/data.pkl": b"}."},
        {"archive/data.pkl": b"}.", "archive/byteorder": b"big"},
        {"archive/data.pkl": b"}.}."},
    ],
    ids=["nothing", "no data.pkl", "two", "big-endian", "two pickles"],
)
def test_an_archive_that_pytorch_does_not_write(entries, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\x80\x02K\x05.", pickle.dumps({"a": 1}), pickle.dumps(Called(flag, "x"))]
)
def test_a_file_of_another_format(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth")


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "x.pth")
