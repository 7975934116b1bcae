"""The copy holds what the checkout holds at that moment, and says what was not committed."""

import json
import subprocess

import pytest

from cluster.code_copy import UNTRACKED_LIMIT_BYTES, copy_code


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "checkout"
    for name in ("cluster/submit.py", "trainer/train.py", "README.md", "gone.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    return root


def git(root, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *identity, *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_uncommitted_state_travels_and_is_recorded(root, tmp_path):
    (root / ".gitignore").write_text("runs/\n*.secret\n")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    (root / "trainer/train.py").write_text("# edited\n")
    (root / "gone.py").unlink()
    (root / "trainer/new.py").write_text("# new\n")
    (root / "key.secret").write_text("ignored")
    (root / "big.bin").write_bytes(bytes(UNTRACKED_LIMIT_BYTES + 1))
    (root / "my_data").mkdir()
    (root / "my_data/a.npy").write_bytes(b"123")
    (root / "runs/x").mkdir(parents=True)
    record = copy_code(root, root / "runs/x/code")
    code = root / "runs/x/code"
    assert names(code) == [
        ".gitignore",
        "COMMIT.json",
        "README.md",
        "UNCOMMITTED.diff",
        "cluster/submit.py",
        "trainer/new.py",
        "trainer/train.py",
    ]
    assert (code / "trainer/train.py").read_text() == "# edited\n"
    assert json.loads((code / "COMMIT.json").read_text()) == record
    assert record["commit"] == git(root, "rev-parse", "HEAD") and record["dirty"]
    assert record["untracked"] == ["trainer/new.py"] and record["left_out"] == ["big.bin", "my_data/a.npy"]
    diff = (code / "UNCOMMITTED.diff").read_text()
    assert "+# edited" in diff and "gone.py" in diff
    # the diff and the commit together give the sources back
    git(root, "stash")
    git(root, "apply", str(code / "UNCOMMITTED.diff"))
    assert (root / "trainer/train.py").read_text() == "# edited\n" and not (root / "gone.py").exists()


def test_clean_checkout(root, tmp_path):
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    record = copy_code(root, tmp_path / "code")
    assert record["dirty"] is False and (tmp_path / "code/UNCOMMITTED.diff").read_bytes() == b""


def test_without_git_and_a_copy_of_a_copy(root, tmp_path):
    (root / "trainer/__pycache__").mkdir()
    (root / "trainer/__pycache__/train.pyc").write_bytes(b"")
    (root / ".venv/lib").mkdir(parents=True)
    (root / ".venv/lib/x.py").write_text("")
    record = copy_code(root, tmp_path / "code")
    assert record["commit"] == ""
    assert names(tmp_path / "code") == [
        "COMMIT.json",
        "README.md",
        "UNCOMMITTED.diff",
        "cluster/submit.py",
        "gone.py",
        "trainer/train.py",
    ]
    (tmp_path / "code/COMMIT.json").write_text(json.dumps({"commit": "abc", "dirty": True}))
    (tmp_path / "code/UNCOMMITTED.diff").write_text("what was changed")
    again = copy_code(tmp_path / "code", tmp_path / "again")
    assert (
        again["commit"] == "abc"
        and again["dirty"]
        and (tmp_path / "again/UNCOMMITTED.diff").read_text() == "what was changed"
    )


def test_inside_a_repository_that_ignores_it(root, tmp_path):
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text("checkout/\n")
    assert "cluster/submit.py" in names_of_copy(root, tmp_path)


def test_a_monorepo_that_tracks_it(root, tmp_path):
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "elsewhere.txt").write_text("not ours")
    assert copy_code(root, tmp_path / "code")["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert "elsewhere.txt" not in names(tmp_path / "code")


def names_of_copy(root, tmp_path):
    copy_code(root, tmp_path / "code")
    return names(tmp_path / "code")
