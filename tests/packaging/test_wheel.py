"""The built wheel: what is in it, and that it works without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_content(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "mmattn = mmattn.cli.main:main" in archive.read(entry_points).decode()
    tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmattn").rglob("*.py")}
    recipes = {f"mmattn/_recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    configs = {
        f"mmattn/_configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").glob("*/*.yaml")
    }
    assert tree | recipes | configs | {"mmattn/py.typed"} <= names
    outside = {name for name in names if not name.startswith("mmattn/") and ".dist-info/" not in name}
    assert outside == set()


def test_it_runs_without_the_source_tree(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")

    def run(*arguments: str) -> str:
        # -P and another working directory: the source tree cannot be on the path by accident.
        command = [sys.executable, "-P", "-m", "mmattn", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run("ls")
    for path in (ROOT / "configs").glob("*/*.yaml"):
        name = f"{path.parent.name}/{path.stem}"
        assert f"  {name} " in shown
        copied = f"{path.parent.name}-{path.name}"
        assert run("cp", name, copied).startswith(f"wrote {copied}")
        assert (tmp_path / copied).read_bytes() == path.read_bytes()
    assert "\n  # Steps of the whole run" in run("show", "vlm/debug", "--explain", "--only", "training")
