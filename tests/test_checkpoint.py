"""Reading a checkpoint gives what was saved, for every format and wrapper; hostile and damaged files get one line."""

import argparse
import collections
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import fuzz
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from compactcli import checkpoint, peel, pickles, torchfile
from compactcli.checkpoint import Checkpoint, read
from compactcli.errors import CompactError
from compactcli.vision import torchvision

SHARED = Path(__file__).parents[2] / "shared" / "checkpoints"
REAL = sorted(path.name for path in SHARED.glob("*.t*"))
# (bytes of the magic, version and system of an old file, in front of its state)
LEGACY = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)


class Shell:
    """Unpickling one runs a command, as any pickle can."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Net().state_dict()


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest):
    """An object as the bytes of torch.save, in both of its formats."""

    def saved(content: object, **options: object) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=request.param, **options)
        return file.getvalue()

    return saved


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name
        assert found[name].device.type == "cpu"
        assert not found[name].requires_grad


def refused(source: str | Path | bytes, match: str, **options: bool) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(CompactError, match=match) as caught:
        read(source, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


def zip_of(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def header_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# What torch.save can write


def test_torch_files_give_what_was_saved(save, state):
    found = read(save(state))
    assert_same(found.tensors, state)
    assert (found.metadata, found.config, found.folder, found.name, found.notes) == ({}, None, None, "stdin", ())


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_real_dtype_survives_torch_files(save, dtype):
    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    found = read(save({"weight": values, "scalar": values[0, 1]})).tensors
    assert found["weight"].dtype == dtype
    assert torch.equal(found["weight"].double(), values.double())
    assert found["scalar"].shape == ()
    assert found["scalar"].double() == values[0, 1].double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_real_dtype_survives_safetensors(dtype):
    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    found = read(safetensors.torch.save({"weight": values})).tensors["weight"]
    assert found.dtype == dtype
    assert torch.equal(found.double(), values.double())


def test_views_parameters_and_empty_tensors(save):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "transposed": base.T,
        "part": base[1:3, ::2],
        "expanded": torch.zeros(1).expand(1, 1),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5),
        "parameter": nn.Parameter(base),
        "tagged": base.clone(),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    content["tagged"].tag = "an attribute makes torch.save choose another form"
    assert_same(read(save(content)).tensors, {name: tensor.detach() for name, tensor in content.items()})


def test_shared_tensors_stay_shared(save):
    generator = torch.randn(6, 5)
    found = read(save({"a.generator": generator, "b.generator": generator})).tensors
    assert found["a.generator"].data_ptr() == found["b.generator"].data_ptr()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(save, state, protocol):
    assert_same(read(save(state, pickle_protocol=protocol)).tensors, state)


def test_what_lies_beside_the_tensors_is_ignored(save, state):
    content = {
        "state_dict": state,
        "args": argparse.Namespace(lr=0.1),
        "best_prec1": np.float64(93.4),
        "history": collections.Counter(a=1),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "sizes": {1, 2},
        "raw": b"bytes",
        "big": 1 << 100,
    }
    found = read(save(content))
    assert_same(found.tensors, state)
    assert found.notes == ("took state_dict (beside args, best_prec1, history, optimizer, sizes, raw and 1 more)",)


def test_a_file_without_checksums(state):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        file = io.BytesIO()
        torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read(file.getvalue()).tensors, state)


def old_file(entries: dict[str, object], blocks: dict[str, bytes]) -> bytes:
    """A file as torch before 0.4 wrote it. `entries` are pickles by hand: strings of operations."""
    body = b"\x80\x02ccollections\nOrderedDict\n)R("
    for name, operations in entries.items():
        body += b"X" + len(name).to_bytes(4, "little") + name.encode() + operations
    keys = pickle.dumps(list(blocks), 2)
    data = b"".join((len(block) // 4).to_bytes(8, "little") + block for block in blocks.values())
    return LEGACY + body + b"u." + keys + data


def test_files_of_torch_before_0_4():
    values = torch.arange(6.0)
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x03keyU\x03cpuK\x06NtQ"
    part = b"(U\x07storagectorch\nFloatStorage\nU\x03keyU\x03cpuK\x06U\x04viewK\x02K\x03\x87tQ"
    tensor = b"ctorch\nFloatTensor\n)\x81(" + storage + b"K\x00K\x02K\x03\x86K\x03K\x01\x86tb"
    view = b"ctorch\nFloatTensor\n)\x81(" + part + b"K\x01ctorch\nSize\nK\x02\x85\x85RK\x01\x85tb"
    parameter = b"ctorch.nn.parameter\nParameter\n)\x81(" + tensor + b"N\x88\x89}tb"
    found = read(old_file({"weight": tensor, "view": view, "parameter": parameter}, {"key": values.numpy().tobytes()})).tensors
    assert_same(found, {"weight": values.reshape(2, 3), "view": values[3:5], "parameter": values.reshape(2, 3)})


def test_reading_agrees_with_torch_load_on_a_python_2_file():
    state = torch.nn.Linear(2, 2).state_dict()
    pairs = b"(]"
    for name in ("a", "b"):
        pairs += b"](X\x01\x00\x00\x00" + name.encode()
        pairs += b"ctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\nFloatStorage\nU\x03keyU\x03cpuK\x04NtQ"
        pairs += b"K\x00K\x02K\x02\x86K\x02K\x01\x86tRea"
    body = b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"tR."
    block = state["weight"].numpy().tobytes()
    file = LEGACY + body + pickle.dumps(["key"], 2) + (4).to_bytes(8, "little") + block
    assert_same(read(file).tensors, {"a": state["weight"], "b": state["weight"]})


# The other sources


def test_safetensors_keep_their_metadata(tmp_path, state):
    path = tmp_path / "net.bin"  # the content tells the format
    path.write_bytes(safetensors.torch.save(state, {"format": "pt", "compactcli": "{}"}))
    found = read(path)
    assert found.metadata == {"format": "pt", "compactcli": "{}"}
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[name], state[name]) for name in state)


def test_our_own_files_are_not_peeled(state):
    named = {f"module.{name}": tensor for name, tensor in state.items()}
    assert read(safetensors.torch.save(named, {"compactcli": "{}"})).tensors.keys() == named.keys()
    assert read(safetensors.torch.save(named, {"format": "pt"})).tensors.keys() == state.keys()


def test_a_path_says_where_the_file_lies(tmp_path, monkeypatch, save, state):
    data = save(state)
    (tmp_path / "net.pth.tar").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    found = read("net.pth.tar")
    assert_same(found.tensors, state)
    assert (found.name, found.folder, found.size_bytes) == ("net.pth.tar", tmp_path, len(data))
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert read(data).sha256 == found.sha256


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_timm(tmp_path, monkeypatch, state, name):
    folder = tmp_path / "resnet"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    torch.save(state, folder / name) if name.endswith("bin") else safetensors.torch.save_file(state, folder / name)
    monkeypatch.chdir(folder)
    found = read(".")
    assert found.tensors.keys() == state.keys()
    assert (found.config, found.name, found.folder) == ({"architecture": "resnet18"}, "resnet", tmp_path)
    assert found.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_stdin(monkeypatch, save, state):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(save(state))))
    found = read("-")
    assert_same(found.tensors, state)
    assert (found.name, found.folder) == ("stdin", None)


def test_empty_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    assert refused("-", "stdin") == "no model on stdin (did the command before it fail?)"


def test_a_process_substitution(tmp_path, save, state):
    """`compactcli analyze <(curl ...)` hands over a pipe, which cannot seek."""
    receiving, sending = os.pipe()
    data = save(state)
    assert len(data) < 65536
    os.write(sending, data)
    os.close(sending)
    try:
        assert_same(read(f"/dev/fd/{receiving}").tensors, state)
    finally:
        os.close(receiving)


# Peeling


@pytest.mark.parametrize("wrapper", peel.WRAPPERS)
def test_a_wrapper_comes_off(save, state, wrapper):
    found = read(save({"epoch": 3, wrapper: state, "acc": 93.0}))
    assert_same(found.tensors, state)
    assert found.notes == (f"took {wrapper} (beside epoch, acc)",)


def test_averaged_weights_go_before_raw_ones(save, state):
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert_same(read(save({"model": raw, "state_dict": raw, "model_ema": state})).tensors, state)
    parameters = {name: tensor for name, tensor in state.items() if "running" not in name}
    assert 0 < len(parameters) < len(state)
    for averages in (parameters, {"decay": torch.tensor(0.9), "shadow_params": [raw]}):
        found = read(save({"ema": averages, "state_dict": state}))  # without statistics, or without names, they are no network
        assert_same(found.tensors, state)
        assert "took state_dict (beside ema)" in found.notes
    counted = {**raw, "total_ops": torch.zeros(1), "bn1.num_batches_tracked": torch.tensor(3)}
    assert_same(read(save({"model": counted, "ema": state})).tensors, state)


def test_what_a_lightning_module_holds_beside_the_network_is_dropped(save, state):
    """Metrics and the weights of a loss; any other file may hold a network with a part of that name."""
    held = {f"model.{name}": tensor for name, tensor in state.items()} | {"criterion.weight": torch.ones(10)}
    found = read(save({"state_dict": held, "pytorch-lightning_version": "2.5.0"}))
    assert_same(found.tensors, state)
    assert "dropped what lies beside the network: criterion.weight" in found.notes
    assert list(read(save({"state_dict": held})).tensors) == list(held)


def test_wrappers_nest(save, state):
    found = read(save({"model": {"state_dict": state, "epoch": 1}}))
    assert_same(found.tensors, state)
    assert found.notes == ("took model / state_dict",)


def test_the_only_table_of_tensors_is_taken_under_any_name(save, state):
    found = read(save({"resnet": state, "acc": torch.tensor(93.0)}))
    assert_same(found.tensors, state)
    assert found.notes == ("took resnet (beside acc)",)


def test_two_networks_are_not_guessed_between(save, state):
    other = {name: tensor.clone() for name, tensor in state.items()}
    refused(
        save({"generator": state, "critic": other}), r"holds several networks \(generator, critic\); save the state_dict of one"
    )


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "backbone."]
)
def test_a_prefix_of_all_names_comes_off(save, state, prefix):
    found = read(save({prefix + name: tensor for name, tensor in state.items()}))
    assert_same(found.tensors, state)
    assert found.notes == (f"stripped the prefix {prefix} from all 7 names",)


def test_a_prefix_of_some_names_stays(save, state):
    for other in ("other.weight", "module."):
        mixed = {"module.weight": torch.ones(2), other: torch.ones(2)}
        assert_same(read(save(mixed)).tensors, mixed)


def test_a_part_in_data_parallel_is_taken_out_of_it(save):
    state = {"features.module.0.weight": torch.ones(2), "features.module.0.bias": torch.zeros(2), "fc.weight": torch.ones(3)}
    plain = {name.replace("module.", ""): tensor for name, tensor in state.items()}
    for prefix in ("", "module."):
        found = read(save({prefix + name: tensor for name, tensor in state.items()}))
        assert_same(found.tensors, plain)
        assert found.notes[-1] == "took module. out of 2 names that begin with features.module."


@pytest.mark.parametrize("other", ["features.0.weight", "features.module."])
def test_a_part_that_is_wrapped_by_half_stays(save, other):
    mixed = {"features.module.0.weight": torch.ones(2), other: torch.ones(2), "fc.weight": torch.ones(3)}
    assert_same(read(save(mixed)).tensors, mixed)


def test_a_table_that_holds_itself(save, state):
    table = dict(state)
    table["model"] = table
    assert_same(read(save(table)).tensors, state)


def test_leftovers_of_thop_and_of_training_go(save, state):
    left = {"module.total_ops": torch.zeros(1), "module.conv.total_params": torch.zeros(1), "n_averaged": torch.tensor(3)}
    found = read(save({**{f"module.{name}": tensor for name, tensor in state.items()}, **left, "total_ops": torch.zeros(1)}))
    assert_same(found.tensors, state)
    assert found.notes == (
        "dropped 3 counters that thop left behind (total_ops, total_params)",
        "stripped the prefix module. from all 7 names",
    )


# Code in files


def test_code_in_a_file_never_runs(tmp_path, save, state):
    canary = tmp_path / "canary"
    line = refused(save(Shell(f"touch {canary}")), "only --trust-pickle unpickles it, which runs code from the file")
    assert "holds a pickled object of class posix.system" in line
    found = read(save({"state_dict": state, "args": Shell(f"touch {canary}")}))
    assert_same(found.tensors, state)
    assert found.notes[-1] == "left 1 pickled classes unread and unrun: posix.system"
    assert not canary.exists()


def test_code_in_place_of_a_key_or_a_storage_never_runs(tmp_path, save):
    canary = tmp_path / "canary"
    shell = b"cposix\nsystem\nX" + len(f"touch {canary}").to_bytes(4, "little") + f"touch {canary}".encode() + b"\x85R"
    for body in (b"}" + shell + b"K\x01s", b"(U\x07storage" + shell + b"U\x01aU\x03cpuK\x01tQ", b"cos\nsystem\n" + shell + b"b"):
        pickled = b"\x80\x02" + body + b"."
        refused(zip_of({"data.pkl": pickled}), "stdin: ")
        refused(LEGACY + pickled + pickle.dumps([], 2), "stdin: ")
    assert not canary.exists()


def test_a_pickled_network_needs_trust(save):
    network = Net()
    for content in (network, {"model": network, "epoch": 3}, {"z": Shell("true"), "model": network, "a": Shell("true")}):
        line = refused(save(content), r"holds a pickled object of class .*\bNet; only --trust-pickle unpickles it")
        assert line.endswith("better: save model.state_dict()")


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_trust_gives_the_state_dict_of_a_pickled_network(save):
    network = Net()
    for content in (network, {"model": network, "epoch": 3}):
        found = read(save(content), trust_pickle=True)
        assert_same(found.tensors, network.state_dict())
        assert found.notes[0] == "unpickled the file (--trust-pickle), which ran code from it"


def test_trust_runs_nothing_that_is_not_needed(tmp_path, save, state):
    canary = tmp_path / "canary"
    assert_same(read(save({"state_dict": state, "args": Shell(f"touch {canary}")}), trust_pickle=True).tensors, state)
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_trust_in_a_class_that_cannot_be_imported():
    file = io.BytesIO()
    torch.save(Net(), file, _use_new_zipfile_serialization=False)
    data = file.getvalue().replace(b"\nNet\n", b"\nTen\n")
    refused(data, r"unpickling failed: .*Ten.*run where its classes can be imported", trust_pickle=True)


def test_trust_in_a_network_of_torchvision_that_was_built_for_another_torch(tmp_path):
    """Simulated where it was not: the extension cannot be found."""
    network = torchvision().models.squeezenet1_1()
    torch.save(network, tmp_path / "whole.pt")
    program = f"""
from torch import ops
ops.load_library = lambda path: (_ for _ in ()).throw(OSError("built for another torch"))
from compactcli.checkpoint import read
print(len(read({str(tmp_path / "whole.pt")!r}, trust_pickle=True).tensors))
"""
    root = Path(checkpoint.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(network.state_dict()))]


def test_torchscript_is_refused_in_one_line():
    refused(zip_of({"data.pkl": b"", "constants.pkl": b"", "code/x.py": b""}), "TorchScript archive.*save model.state_dict")


# What is no checkpoint


def test_a_missing_file(tmp_path):
    assert refused(tmp_path / "net.pt", "no such file") == f"{tmp_path / 'net.pt'}: no such file"
    refused("a\0b", "no such file")


def test_a_folder_without_config_or_weights(tmp_path):
    refused(tmp_path, "a folder without config.json; give the weights file in it instead")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json is not a JSON object")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "neither model.safetensors nor pytorch_model.bin")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "the file is empty"),
        (b"\n <!DOCTYPE html><html>", "this is an HTML page, not a checkpoint; the download probably failed"),
        (b"<?xml version='1.0'?><Error>", "this is an HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
            "git-lfs pointer, not the checkpoint itself; run git lfs pull",
        ),
        (b"\x1f\x8b\x08\x00", "compressed file or a tar archive; unpack it first"),
        (b"\x89HDF\r\n", "HDF5 file"),
        (bytes(range(100, 120)), r"not a checkpoint \(it begins with b'defghijk'\); wanted a file of torch.save or safetensors"),
        (b"PK\x05\x06" + bytes(18), "not a checkpoint"),
        (pickle.dumps({"a": 1}, 2), "a pickle that torch.save did not write"),
        (LEGACY.replace(b"\xe9\x03", b"\xea\x03"), "a format of torch.save that this compactcli does not know"),
        (LEGACY.replace(b"\x88", b"\x89"), "big-endian machine"),
        (zip_of({"a.txt": b"a"}), "a zip archive without data.pkl"),
        (zip_of({"data.pkl": b"a", "byteorder": b"big"}), "big-endian machine"),
    ],
)
def test_strangers(data, line):
    refused(data, line)


def test_a_tar_archive(tmp_path):
    with tarfile.open(tmp_path / "net.tar", "w") as archive:
        archive.add(__file__, "storages")
    refused(tmp_path / "net.tar", "a tar archive; unpack it first")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"epoch": 3, "lr": 0.1}, "no tensors in the file, only epoch, lr; wanted a state_dict"),
        ({}, "no tensors in the file, only an empty table; wanted a state_dict"),
        ({"total_ops": torch.zeros(1)}, "no tensors in the file, only total_ops"),
        ([torch.zeros(1)], "holds a list; wanted a state_dict"),
        (3, "holds a int; wanted a state_dict"),
        (torch.zeros(1), "holds a single tensor without a name"),
        ({"weight": np.zeros(3)}, "holds a pickled object of class numpy.ndarray"),
        ({"a\nb": 1}, r"only 'a\\nb'\.\.\.; wanted"),
    ],
)
def test_no_tensors(save, content, line):
    refused(save(content), line)


ODD = {
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "meta": lambda: torch.zeros(2, device="meta"),
    "negated": lambda: torch.zeros(2, dtype=torch.complex64).conj().imag,
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_tensors_that_are_no_plain_numbers(save, make):
    refused(save({"a": torch.zeros(2), "odd": make()}), r"odd is .*; only dense tensors of real numbers are read; convert it")


# Damaged and hostile files


def test_a_truncated_file_is_refused_at_every_length(save, state):
    data = save(state)
    for length in [*range(0, len(data) - 1, 97), len(data) - 1]:
        refused(data[:length], "stdin: ")
    data = safetensors.torch.save(state)
    for length in [*range(0, len(data) - 1, 17), len(data) - 1]:
        refused(data[:length], "stdin: ")


def test_a_flipped_bit_in_a_zip_file_is_noticed(state):
    file = io.BytesIO()
    torch.save(state, file)
    data = bytearray(file.getvalue())
    data[data.index(state["conv.weight"].numpy().tobytes())] ^= 1
    refused(bytes(data), r"the zip archive is damaged or cut short \(Bad CRC-32")


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ((1 << 62).to_bytes(8, "little") + b"{}", f"header should be {1 << 62} bytes, the file has 10"),
        (header_file(b"{" * 10), "the safetensors header is damaged"),
        (header_file(b'{"a":' * 200_000), "nested too deeply"),
        (header_file(b'{"a": ' + b"9" * 5000), "the safetensors header is damaged"),
        (header_file(b"{\xff}"), "the safetensors header is damaged"),
        (header_file({}), "no tensors in the file"),
        (header_file({"__metadata__": {"a": 1}, "w": ONE}, bytes(4)), "is not a table of strings"),
        (header_file({"w": []}), "w is not described as safetensors does"),
        (header_file({"w": ONE | {"data_offsets": [0, 4, 8]}}, bytes(4)), "w is not described as safetensors does"),
        (header_file({"w": ONE | {"dtype": "C64"}}, bytes(4)), "w is of type C64; only dense tensors of real numbers"),
        (header_file({"w": ONE | {"shape": [2]}}, bytes(4)), "w is F32 .2., which is not what the header's offsets leave for it"),
        (header_file({"w": ONE | {"shape": [-1, -1]}}, bytes(4)), "w has an impossible shape"),
        (header_file({"w": ONE | {"shape": [True]}}, bytes(4)), "w has an impossible shape"),
        (header_file({"w": ONE | {"shape": [0, 1 << 40, 1 << 40]}}, bytes(4)), "w has an impossible shape"),
        (header_file({"w": ONE | {"shape": [1] * 9}}, bytes(4)), "w has an impossible shape"),
        (header_file({"w": ONE | {"shape": [1 << 45], "data_offsets": [0, 1 << 47]}}, bytes(4)), "the tensors should take"),
        (header_file({"w": ONE | {"data_offsets": [4, 8]}}, bytes(8)), "w begins at byte 4 of the data, not at 0"),
        (header_file({"v": ONE, "w": ONE}, bytes(4)), "w begins at byte 0 of the data, not at 4"),
        (header_file({"w": ONE}, bytes(5)), "the tensors should take 4 bytes, the file has 5"),
    ],
)
def test_hostile_safetensors(data, line):
    refused(data, line)


def test_safetensors_header_beyond_the_limit(monkeypatch, state):
    monkeypatch.setattr(checkpoint, "HEADER_BYTES", 10)
    refused(safetensors.torch.save(state), "and 10 are allowed")


def tensor_operations(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle operations of a float tensor over storage "0"."""

    def integers(*numbers: object) -> bytes:
        return pickle.dumps(numbers, 2)[2:-1]  # less protocol and stop

    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + pickle.dumps(numel, 2)[2:-1]
        + b"tQ"
        + pickle.dumps(offset, 2)[2:-1]
        + integers(*size)
        + integers(*stride)
        + b"\x89}tR"
    )


def with_pickle(operations: bytes, zipped: bool, numel: int = 4) -> bytes:
    pickled = b"\x80\x02}X\x01\x00\x00\x00w" + operations + b"s."
    if zipped:
        return zip_of({"data.pkl": pickled, "data/0": bytes(16)})
    return LEGACY + pickled + pickle.dumps(["0"], 2) + numel.to_bytes(8, "little") + bytes(16)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("numel", "size", "stride", "offset", "line"),
    [
        (4, (5,), (1,), 0, "does not fit in its storage of 16 bytes"),
        (4, (2, 2), (2, 1), 1, "does not fit in its storage of 16 bytes"),
        (4, (1 << 40,), (0,), 0, "does not fit in its storage of 16 bytes"),
        (1 << 40, (1 << 40,), (1,), 0, "does not fit in its storage of 16 bytes"),
        (4, (2, 2), (1 << 62, 1), 0, "impossible strides"),
        (4, (2, 2), (-1, 1), 0, "impossible strides"),
        (4, (2, 2), (1,), 0, "impossible strides"),
        (4, (1,), (1,), -1, "impossible strides"),
        (4, (1,), (1,), 1.0, "impossible strides"),
        (4, (-1,), (1,), 0, "impossible shape"),
        (4, (0, 1 << 48, 1 << 48), (1, 1, 1), 0, "impossible shape"),
        (4, (1 << 9000,), (1,), 0, "impossible shape"),
        (4, ("a",), (1,), 0, "impossible shape"),
        (-4, (1,), (1,), 0, "a storage of kind torch.FloatStorage with -4 elements"),
    ],
)
def test_views_that_leave_their_storage(zipped, numel, size, stride, offset, line):
    assert read(with_pickle(tensor_operations(4, (2, 2), (2, 1)), zipped)).tensors["w"].shape == (2, 2)
    refused(with_pickle(tensor_operations(numel, size, stride, offset), zipped), line)


def test_a_view_between_the_bytes_of_a_number():
    kind = b"ctorch\nfloat32\n"
    storage = b"(X\x07\x00\x00\x00storagectorch.storage\nUntypedStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10"
    for start, line in ((4, None), (1, "does not fit in its storage of 16 bytes")):
        part = storage + b"(X\x01\x00\x00\x00vK" + bytes([start]) + b"K\x08ttQ"
        content = with_pickle(
            b"ctorch._utils\n_rebuild_tensor_v3\n(" + part + b"K\x00K\x02\x85K\x01\x85\x89}" + kind + b"}tR", True
        )
        if line is None:
            assert read(content).tensors["w"].shape == (2,)
        else:
            refused(content, line)


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_programs_of_torch_say_that_they_are_none(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, which gives up its own format
        torch.jit.trace(Scripted(), torch.zeros(1)).save(str(tmp_path / "net.pt"))
    refused((tmp_path / "net.pt").read_bytes(), "TorchScript archive.*save model.state_dict")
    refused(
        zip_of({"net/archive_format": b"pt2", "net/models/model.json": b"{}"}, zipfile.ZIP_DEFLATED), "a program of torch.export"
    )
    refused(b"\x08\x08\x12\x07pytorch\x1a\x062.13.0" + bytes(99), "this is an ONNX file.* give the checkpoint")


def test_arrays_of_numpy_need_trust_and_are_weights_then(tmp_path):
    torch.save({"state_dict": {"conv.weight": np.ones((2, 3)), "conv.bias": np.zeros(2)}, "epoch": 3}, tmp_path / "net.pt")
    refused((tmp_path / "net.pt").read_bytes(), "only --trust-pickle unpickles it")
    found = read(tmp_path / "net.pt", trust_pickle=True).tensors
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"conv.weight": (2, 3), "conv.bias": (2,)}


@pytest.mark.parametrize("operation", [b"\x8e", b"\x8d", b"\x8b", b"X", b"B", b"T"])
def test_a_word_as_long_as_a_pickle_says_is_not_waited_for(operation):
    """Its buffer would be made at once."""
    wide = operation in (b"\x8e", b"\x8d")
    length = ((1 << 46) if wide else (1 << 31) - 1).to_bytes(8 if wide else 4, "little")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(b"\x80\x04" + operation + length)
        file.flush()
        with pytest.raises(CompactError, match="the pickle is damaged or cut short"):
            read(file.name)


def test_many_names_for_one_table_without_tensors_are_read_once(save, monkeypatch):
    """Else a small file would take for ever."""
    table = {f"entry{number}": number for number in range(100)}
    tree: dict[str, object] = {"last": torch.ones(1)}
    for number in range(50):
        tree = {"model": tree, f"table{number}": table}
    looked: list[object] = []
    known = peel.is_tensor
    monkeypatch.setattr(peel, "is_tensor", lambda value: looked.append(value) or known(value))
    assert list(read(save(tree)).tensors) == ["last"]
    assert len(looked) < 500


def test_a_legacy_storage_longer_than_the_file():
    for numel in (5, 1 << 40, (1 << 64) - 1):
        refused(with_pickle(tensor_operations(4, (4,), (1,)), False, numel), "the storages should end at byte")


def test_many_names_for_one_storage_have_a_limit(save):
    ones = torch.ones(100_000)
    data = save({f"layer{i}": ones for i in range(300)})
    refused(data, "its tensors name 120000000 bytes, more than 256 times")


def test_a_zip_bomb_and_overlapping_entries():
    refused(zip_of({"data.pkl": bytes(1 << 24)}, zipfile.ZIP_DEFLATED), "compressed, which torch.save never does")
    data = bytearray(zip_of({"data.pkl": b"\x80\x02}.", "data/0": bytes(4000)}))
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (1 << 31).to_bytes(4, "little")
    refused(bytes(data), "declares more bytes than the file has")


def test_a_zip_directory_without_end(monkeypatch):
    monkeypatch.setattr(torchfile, "ZIP_ENTRIES", 20)
    refused(zip_of({f"data/{i}": b"" for i in range(21)}), "more than 20 entries")


def test_a_storage_that_is_not_in_the_archive():
    data = zip_of({"data.pkl": b"\x80\x02}X\x01\x00\x00\x00w" + tensor_operations(4, (4,), (1,)) + b"s."})
    refused(data, "the zip archive has no archive/data/0, which the pickle refers to")


def memo(number: int) -> bytes:
    return number.to_bytes(4, "little")


def deep_parameter(depth: int) -> bytes:
    """A table of one good tensor wrapped `depth` times in Parameter."""
    wrap = b"ctorch._utils\n_rebuild_parameter\n"
    return b"}X\x01\x00\x00\x00a" + wrap * depth + tensor_operations(4, (4,), (1,)) + b"\x85R" * depth + b"s"


# A list of two references to the list before it, thirty times: 2^30 when walked, hashed, compared or printed.
LAUGHS = b")" + b"".join(b"r" + memo(i) + b"j" + memo(i) + b"\x86" for i in range(30))
LONG = b"X" + memo(1_000_000) + b"a" * 1_000_000
HOSTILE = {
    "long integer": b"\x8b\xff\xff\xff\x7f",
    "long string": b"\x8d" + b"\xff" * 7 + b"\x0f",
    "long bytes": b"\x8e" + b"\xff" * 7 + b"\x0f",
    "long bytearray": b"\x96" + b"\xff" * 7 + b"\x0f",
    "long frame": b"\x95" + b"\xff" * 8,
    "memo far away": b"Nr\xff\xff\xff\xff",
    "memo missing": b"j\xff\xff\xff\xff",
    "allocation by call": b"cbuiltins\nbytearray\n" + pickle.dumps(1 << 40, 2)[2:-1] + b"\x85R",
    "allocation by tensor class": b"ctorch\nFloatTensor\n" + pickle.dumps(1 << 40, 2)[2:-1] + b"\x85R",
    "laughs": LAUGHS,
    "laughs as a key": b"}" + LAUGHS + b"Ns",
    "laughs as a class name": LAUGHS + b"\x8c\x01a\x93",
    "laughs as arguments": b"ctorch._utils\n_rebuild_tensor_v2\n" + LAUGHS + b"R",
    "laughs as a size": tensor_operations(4, (4,), (1,)).replace(pickle.dumps((4,), 2)[2:-1], LAUGHS),
    "deep lists": b"]" * 100_000 + b"a" * 99_999,
    "deep parameters": b"ctorch._utils\n_rebuild_parameter\n" * 50_000 + b")" + b"R\x85" * 49_999 + b"R",
    "itself": b"}q\x00X\x05\x00\x00\x00modelh\x00s",
    "deep states": b"ca\nb\n)R" * 50_000 + b"b" * 49_999,
    "marks": b"(" * 100_000,
    "no stack": b"0",
    "extension": b"\x82\x01",
    "names without end": LONG + b"q\x00" + b"h\x00h\x00\x93" * 1000,
    "huge sizes": tensor_operations(4, (4,), (1,)).replace(
        pickle.dumps((4,), 2)[2:-1], b"(\x8b" + memo(4_000_000) + b"a" * 4_000_000 + b"2" * 7 + b"t"
    ),
    "shared pairs": (
        b"(](" + b"X\x01\x00\x00\x00aN\x86" * 5000 + b"e\x85q\x00" + b"ccollections\nOrderedDict\nh\x00R" * 50_000 + b"l"
    ),
    "one deep parameter": deep_parameter(500),
    "backslash in a name": b"ca\\z\nb\n",
    "growing name": b"c" + b"a" * 100_000 + b"\nb\n",
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("operations", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(monkeypatch, zipped, operations):
    """Beside a tensor: ignored or refused, in little memory and time."""
    monkeypatch.setattr(fuzz, "SECONDS", 3)
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 28)
    outcome = fuzz.run(read, with_pickle(tensor_operations(4, (4,), (1,)) + b"sX\x01\x00\x00\x00x" + operations, zipped))
    assert outcome.kind != "failed", outcome.detail


@pytest.mark.parametrize("operations", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_alone(monkeypatch, operations):
    """As the whole of a file: refused, in little memory and time."""
    monkeypatch.setattr(fuzz, "SECONDS", 3)
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 28)
    outcome = fuzz.run(read, LEGACY + b"\x80\x02" + operations + b"." + pickle.dumps([], 2))
    assert outcome.kind == "refused", outcome.detail


def test_a_tensor_wrapped_too_often():
    """A thousand tensors around one chain of a thousand would be a million steps."""
    twice, often = (zip_of({"data.pkl": b"\x80\x02" + deep_parameter(depth) + b".", "data/0": bytes(16)}) for depth in (2, 5))
    assert read(twice).tensors["a"].shape == (4,)
    refused(often, "a is wrapped in other tensors too often")


def test_operations_that_share_an_argument_do_not_copy_it():
    """A thousand OrderedDicts made of one table of a thousand entries would be a million entries."""
    table = b"}(" + b"".join(b"X\x04\x00\x00\x00%04dN" % i for i in range(5000)) + b"u\x85q\x00"
    body = b"\x80\x02" + table + b"ccollections\nOrderedDict\nh\x00R" * 5000 + b"."
    content = pickles.Pickle(io.BytesIO(body))
    assert content.tree is content.memo[0][0]


def test_a_pickle_without_end(monkeypatch):
    monkeypatch.setattr(pickles, "OPERATIONS", 1000)
    refused(LEGACY + b"\x80\x02" + b"N0" * 1000 + b"N.", "more than 1000 operations")


# Files that other people made


@pytest.mark.skipif(not REAL, reason="the reference checkpoints are not there")
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_read_as_torch_reads_them(name):
    content = torch.load(SHARED / name, weights_only=True, map_location="cpu")
    state = content.get("state_dict", content.get("net"))
    found = read(SHARED / name)
    assert isinstance(found, Checkpoint)
    assert_same(found.tensors, {key.removeprefix("module."): tensor for key, tensor in state.items()})
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.tensors.values()}
    assert len(storages) == len({tensor.untyped_storage().data_ptr() for tensor in state.values()})
    assert found.notes[0].startswith(("took state_dict", "took net"))
    assert found.notes[1].startswith("stripped the prefix module. from all")
