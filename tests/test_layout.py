"""The shape of the house: arrows point one way, heavy imports stay in their one file, no room has a name that says nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("models", "data_pipeline", "trainer", "cluster")
MAY_IMPORT = {"models": set(), "data_pipeline": set(), "trainer": {"models", "data_pipeline"}}
CLUSTER_MAY_IMPORT = {
    "trainer.config",
    "trainer.communication",
    "trainer.groups",
    "trainer.typed",
    "trainer.origin",
    "trainer.size",
    "trainer.peaks",
    "trainer.snapshot_plan",
    "trainer.metrics_table",
    "trainer.ema_profiles",
    "data_pipeline.command",
    "data_pipeline.durable",
    "data_pipeline.manifest",
}
# outside package: the program files that may import it
ONLY_IN = {
    "deepspeed": {"trainer/engine.py"},
    "prometheus_client": {"trainer/metrics.py"},
    "streaming": {"data_pipeline/mds.py"},
    "hydra": {"trainer/config.py"},
    "omegaconf": {"trainer/config.py"},
}
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that the file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the room"
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room, where = path.relative_to(ROOT).parts[0], str(path.relative_to(ROOT))
    for name in imports(path):
        other = name.split(".")[0]
        if other in ROOMS and other != room:
            if room == "cluster":
                known = {"trainer", "data_pipeline"} | CLUSTER_MAY_IMPORT
                assert name in known or name.rpartition(".")[0] in CLUSTER_MAY_IMPORT, f"{where} imports {name}"
            else:
                assert other in MAY_IMPORT[room], f"{where} imports {name}"
        if other in ONLY_IN:
            assert where in ONLY_IN[other], f"{where} imports {other}"
        if other == "submitit":
            assert room == "cluster", f"{where} imports submitit"
        if other in ("tests", "torchvision"):
            pytest.fail(f"{where} imports {other}")


@pytest.mark.parametrize("module", ["cluster.submit", "cluster.status", *sorted(CLUSTER_MAY_IMPORT)])
def test_the_login_node_needs_no_torch(module):
    code = f"import {module}, sys; sys.exit(sorted(m for m in sys.modules if m.split('.')[0] == 'torch')[:1] != [])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_training_needs_neither_hydra_nor_submitit_nor_streaming():
    code = (
        "import sys\n"
        "names = 'hydra omegaconf submitit streaming webdataset sklearn torchdiffeq'.split()\n"
        "for name in names: sys.modules[name] = None\n"
        "import trainer.train, trainer.posthoc, trainer.generate, trainer.evaluate, trainer.flops\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_cluster_knows_slurm():
    for path in FILES:
        if path.parent.name != "cluster":
            assert "SLURM_" not in path.read_text(), path


def test_no_file_has_a_name_that_says_nothing():
    assert not [p for p in FILES if p.stem in {"utils", "util", "common", "helpers", "misc", "base"}]


def test_every_module_says_what_it_is():
    assert [str(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_the_readme_shows_a_stranger_every_room():
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in FILES if p.name != "__init__.py" and p.name not in readme] == []
