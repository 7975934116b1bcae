"""Published pickles are read without executing anything; ours go back under the reference's names, unchanged."""

import collections
import io
import json
import os
import pickle
import shutil
import types
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models import import_edm2, inert_pickle
from models.denoiser import build
from tests.golden import Vectors, in_use, network
from trainer.snapshots import load_denoiser

VECTORS = Path(__file__).parent / "data" / "golden_edm2"
PICKLE = VECTORS / "gi_network-snapshot-0001024-0.050.stripped.pkl"


@pytest.fixture
def trap(tmp_path):
    """Return (command that leaves a trace, the trace): what a hostile file would like to run."""
    trace = tmp_path / "executed"
    return f"touch {trace}", trace


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def stand_in(module: str, name: str):
    """Return a function that pickle writes as module.name, which need not exist."""

    def function(*args):
        return None

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


class Renaming(pickle._Pickler):
    """Write functions by the names they carry, without looking whether they exist."""

    def save_function(self, obj):
        self.save(obj.__module__), self.save(obj.__qualname__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)

    dispatch = pickle._Pickler.dispatch.copy()
    dispatch[types.FunctionType] = save_function


def pickled(value) -> bytes:
    out = io.BytesIO()
    Renaming(out, protocol=4).dump(value)
    return out.getvalue()


def persistent(class_name, state, version=6):
    meta = {"type": "class", "version": version, "module_src": "", "class_name": class_name, "state": state}
    return Call(stand_in("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def tensor_of(storage_bytes, offset=0, shape=(2,), strides=(1,)):
    storage = Call(stand_in("torch.storage", "_load_from_bytes"), storage_bytes)
    rebuild = stand_in("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, collections.OrderedDict())


def snapshot_with(tensor, class_name="Precond", version=6):
    state = {"_init_args": (), "_init_kwargs": {}, "_parameters": {"w": tensor}, "_buffers": {}, "_modules": {}}
    return {"ema": persistent(class_name, state, version)}


def saved(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def hostile_files(command):
    trap = Call(os.system, command)
    with warnings.catch_warnings(action="ignore"):  # deprecated, but what the published files hold
        good = saved(torch.storage.TypedStorage([0.0, 0.0], dtype=torch.float16))
    return {
        "os.system": (pickled({"ema": trap}), "posix.system"),
        "eval": (pickled({"ema": Call(eval, f"__import__('os').system({command!r})")}), "builtins.eval"),
        "getattr": (pickled({"ema": Call(getattr, "x", "upper")}), "builtins.getattr"),
        "a real torch class": (pickled({"ema": torch.nn.Linear(1, 1)}), "torch.nn.modules.linear.Linear"),
        "source to execute": (
            pickled({"ema": Call(stand_in("torch_utils.persistence", "_src_to_module"), command)}),
            "torch_utils.persistence._src_to_module",
        ),
        "inside a tensor's bytes": (pickled(snapshot_with(tensor_of(saved(trap)))), "plain storage"),
        "raw pickle as a tensor's bytes": (pickled(snapshot_with(tensor_of(pickle.dumps(trap)))), "plain storage"),
        "tensor as bytes": (pickled(snapshot_with(tensor_of(saved(torch.zeros(2))))), "storage is expected"),
        "beyond the storage": (pickled(snapshot_with(tensor_of(good, 0, (3,)))), "beyond its storage"),
        "negative offset": (pickled(snapshot_with(tensor_of(good, -1))), "malformed shape"),
        "a terabyte of zeros": (pickled(snapshot_with(tensor_of(good, 0, (10**12,), (0,)))), "beyond its storage"),
        "forged reduce": (pickled({"ema": Call(stand_in("torch._utils", "_rebuild_parameter"), trap)}), "posix.system"),
        "wrong class": (pickled(snapshot_with(tensor_of(good), "Discriminator")), "Discriminator"),
        "wrong version": (pickled(snapshot_with(tensor_of(good), version=7)), "class format 7"),
        "other content": (pickled([1, 2, 3]), "list"),
        "no ema": (pickled({"model": 1}), "'ema'"),
        "persistent id": (b"\x80\x04Pevil\n.", "outside of the file"),
        "a memo of 32 GiB": (b"\x80\x04Nr\xff\xff\xff\xff.", "numbers an object 4294967295"),
        "empty": (b"", "no readable pickle"),
        "text": (b"hello world", "no readable pickle"),
    }


@pytest.mark.parametrize("name", hostile_files(""))
def test_hostile_files_are_refused_in_one_line(name, trap, tmp_path, capsys):
    command, trace = trap
    content, expected = hostile_files(command)[name]
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    source.write_bytes(content)
    before = set(tmp_path.iterdir())
    assert import_edm2.main([str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {source}: ") and expected in error
    assert not trace.exists() and set(tmp_path.iterdir()) == before


def test_the_trap_works(trap):
    command, trace = trap
    pickle.loads(hostile_files(command)["os.system"][0])
    assert trace.exists()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_truncated_files_are_refused(share, tmp_path, capsys):
    content, target = PICKLE.read_bytes(), tmp_path / "out.safetensors"
    source = tmp_path / "cut.pkl"
    source.write_bytes(content[: int(len(content) * share)])
    assert import_edm2.main([str(source), str(target)]) == 2
    assert "cut off" in capsys.readouterr().err and not target.exists()


def test_no_flipped_byte_raises_anything_but_a_refusal(tmp_path):
    content = bytearray(PICKLE.read_bytes())
    for place in range(0, 1800, 3):
        forged = content.copy()
        forged[place] ^= 0x5A
        try:
            inert_pickle.read_nodes(bytes(forged))
        except ValueError as error:
            assert "\n" not in str(error)
    for place in (130, 840, 1100, 1430, 1600, 2700):  # versions, class names, hooks, names, storages
        content[place] ^= 0x5A
        path = tmp_path / "forged.pkl"
        path.write_bytes(content)
        content[place] ^= 0x5A
        try:
            import_edm2.read_pickle(path)
        except ValueError as error:
            assert "\n" not in str(error)


def test_an_existing_file_survives_a_refusal(tmp_path):
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    source.write_bytes(b"nothing")
    target.write_text("precious")
    assert import_edm2.main([str(source), str(target)]) == 2
    assert target.read_text() == "precious"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    monkeypatch.setattr(import_edm2, "save_file", full_disk)
    assert import_edm2.main([str(PICKLE), str(target)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert target.read_text() == "precious" and list(tmp_path.iterdir()) == [target]


def test_allowed_names_are_never_the_real_things():
    unpickler = inert_pickle.InertUnpickler(io.BytesIO())
    for module, name in inert_pickle.ALLOWED:
        made = unpickler.find_class(module, name)
        assert issubclass(made, inert_pickle.Node) and made.__init__ is inert_pickle.Node.__init__
    again = inert_pickle.InertUnpickler(io.BytesIO())
    assert all(again.known[name] is not unpickler.known[name] for name in inert_pickle.ALLOWED)


@pytest.fixture
def imported(tmp_path):
    target = tmp_path / "imported.safetensors"
    assert import_edm2.main([str(PICKLE), str(target)]) == 0
    return target


def test_imported_network_gives_the_golden_output(imported):
    net, header = load_denoiser(imported)
    golden = Vectors(VECTORS / "ga_precond.json")
    with torch.no_grad():
        d = net(golden["x"], golden["sigma"], golden["class_labels"])
    assert (d - golden["eval.D"]).abs().max() < 1e-3  # stored in fp16
    raw = network(golden.facts["config"], golden.facts["weights_seed"])
    rounded = build(header["model"])
    rounded.load_state_dict({name: value.half().float() for name, value in raw.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(d, in_use(rounded)(golden["x"], golden["sigma"], golden["class_labels"]))


def test_header_says_where_it_comes_from(imported):
    with safe_open(str(imported), framework="pt") as file:
        header = json.loads(file.metadata()["evenkeel"])
        names = set(file.keys())
    assert header["kind"] == "import" and header["dtype"] == "fp16" and header["format_version"] == 1
    assert header["activations"] == "fp16", "what drawing takes by itself on a GPU"
    assert (header["clock"], header["sigma_rel"]) == (1_024_000, 0.05)
    assert header["data"]["codec"] == "sd-vae-ft-mse" and header["data"]["shape"] == [8, 16, 16]
    assert PICKLE.name in header["parent"] and set(header["checksums"]) == names
    assert set(header["buffers"]) == {name for name in names if "fourier" in name}


def test_a_damaged_import_is_noticed(imported):
    content = bytearray(imported.read_bytes())
    content[-5] ^= 1
    imported.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_denoiser(imported)


def test_export_gives_the_reference_its_tensors_back(imported, tmp_path):
    target = tmp_path / "exported.safetensors"
    assert import_edm2.main(["--export", str(imported), str(target)]) == 0
    exported, golden = load_file(target), Vectors(VECTORS / "gi_snapshot.json")
    for name, value in golden.under("ema.").items():
        assert torch.equal(exported[name], value) and exported[name].shape == value.shape
    assert sorted(exported) == sorted(load_file(imported))
    with safe_open(str(target), framework="pt") as file:
        options = json.loads(file.metadata()["edm2"])
    assert import_edm2.model_of(options) == import_edm2.model_of(golden.facts["config"])


def test_layout_is_converted_both_ways():
    rows = torch.arange(12).reshape(12, 1, 1, 1).float()  # 4 channels of q, k, v
    ours = import_edm2.from_reference("x.attn_qkv.weight", rows)
    assert ours.flatten().tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert torch.equal(import_edm2.to_reference("x.attn_qkv.weight", ours), rows)
    assert import_edm2.from_reference("unet.out_gain", torch.tensor(2.0)).shape == (1,)
    assert import_edm2.to_reference("unet.out_gain", torch.ones(1)).shape == ()
    assert torch.equal(import_edm2.from_reference("x.conv_res0.weight", rows), rows)


def test_export_refuses_other_files(tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"12345678")
    assert import_edm2.main(["--export", str(other), str(tmp_path / "out")]) == 2
    shutil.copyfile(VECTORS / "g0_primitives.safetensors", other)
    assert import_edm2.main(["--export", str(other), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "clock", "sigma_rel"),
    [
        ("edm2-img512-xs-2147483-0.135.pkl", 2_147_483_648, 0.135),
        ("network-snapshot-0008388-0.050.pkl", 8_388_608, 0.05),
        ("weights.pkl", 0, 0.0),
    ],
)
def test_clock_and_length_come_from_the_name(name, clock, sigma_rel):
    assert import_edm2.from_name(name) == (clock, sigma_rel)
