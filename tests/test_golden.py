"""The golden vectors of the EDM2 reference hold, and the checks notice when they should not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import import_edm2, magnitude
from tests import golden, golden_training

VECTORS = Path(__file__).parent / "data" / "golden_edm2"


@pytest.mark.parametrize("family", ["g0", "ga", "gb", "gc", "gd", "ge", "gf", "gg", "gi"])
def test_vectors_hold(family):
    report = golden.run(VECTORS, {family}, quiet=True)
    assert report.checks and not report.misses, "\n".join(line for line in report.lines if line.startswith("MISS"))


@pytest.mark.slow
def test_full_size_network_holds():
    report = golden.run(VECTORS, {"gh"}, quiet=True)
    assert report.checks and not report.misses, "\n".join(report.lines)


def no_epsilon(patch):
    patch.setattr(magnitude, "EPS", 0.0)


def no_normalised_start(patch):
    patch.setattr(magnitude, "normalize_rows_", lambda module: None)


def no_forced_normalisation(patch):
    patch.setattr(
        golden_training.MagnitudeAdam, "_after_adam", lambda self: self.ema.update(self._clock_after, self._batch)
    )


def swapped_q_and_k(patch):
    def swapped(name, value):
        value = original(name, value)
        if import_edm2.is_qkv(name):
            q, k, v = value.chunk(3)
            value = torch.cat([q, v, k])
        return value

    original = import_edm2.from_reference
    patch.setattr(import_edm2, "from_reference", swapped)


def other_beta2(patch):
    adam = torch.optim.Adam
    patch.setattr(torch.optim, "Adam", lambda p, **o: adam(p, **{**o, "betas": (0.9, 0.999)}))


def rate_after_the_step(patch):
    original = golden_training.learning_rate
    patch.setattr(golden_training, "learning_rate", lambda clock, *rest: original(clock + 4, *rest))


@pytest.mark.parametrize(
    ("mutation", "family", "names"),
    [
        (no_epsilon, "ga", ["eval.D "]),
        (no_normalised_start, "ga", ["train.D "]),
        (no_normalised_start, "gc", ["step 0: loss", "step 0: weights,"]),
        (no_forced_normalisation, "gc", ["step 2: weights"]),
        (swapped_q_and_k, "ga", ["eval.D "]),
        (other_beta2, "gc", ["final.w"]),
        (rate_after_the_step, "gc", ["final.w"]),
    ],
)
def test_a_broken_feature_misses(mutation, family, names, monkeypatch):
    mutation(monkeypatch)
    missed = [line for line in golden.run(VECTORS, {family}, quiet=True).lines if line.startswith("MISS")]
    for name in names:
        assert any(name in line for line in missed), "\n".join(missed)


@pytest.fixture
def copied(tmp_path):
    for file in VECTORS.glob("g0_*"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def test_command_exits_0_for_vectors_that_hold(copied, capsys):
    assert golden.main([str(copied)]) == 0
    out = capsys.readouterr().out
    assert "error" in out and "bound" in out and out.strip().endswith("0 missed")


def test_command_exits_1_for_a_changed_number(copied, capsys):
    path = copied / "g0_primitives.safetensors"
    tensors = load_file(path)
    tensors["mp_silu"][0, 0, 0, 0] += 1e-3
    save_file(tensors, path)
    assert golden.main([str(copied)]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISS")][0].split()[2] == "mp_silu"


def test_command_exits_1_for_a_not_a_number(copied):
    path = copied / "g0_primitives.safetensors"
    tensors = load_file(path)
    tensors["mp_silu"][:] = float("nan")
    save_file(tensors, path)
    assert golden.main([str(copied)]) == 1


def test_index_names_files_that_differ(copied, capsys):
    shutil.copyfile(VECTORS / "INDEX.json", copied / "INDEX.json")
    assert golden.main([str(copied)]) == 1
    assert "ga_precond.json" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "no json", "entry missing"])
def test_bad_directory_is_one_line_and_exit_2(damage, copied, capsys):
    tensors, facts = copied / "g0_primitives.safetensors", copied / "g0_primitives.json"
    directory = copied
    if damage == "absent":
        directory = copied / "nowhere"
    elif damage == "empty":
        tensors.unlink(), facts.unlink()
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:5000])
    elif damage == "no json":
        facts.write_text("{")
    else:
        content = json.loads(facts.read_text())
        del content["block_channels_per_head"]
        facts.write_text(json.dumps(content))
    assert golden.main([str(directory)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
