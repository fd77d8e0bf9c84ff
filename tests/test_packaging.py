"""What gets installed: `pallas/` and `convert/` inside vptq_jax, nothing beside it, nothing forgotten."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = {"vptq_jax": "vptq_jax", "pallas": "vptq_jax/pallas", "convert": "vptq_jax/convert"}
IMPORT = """
import sys
sys.path[:0] = sys.argv[1:]
import vptq_jax, vptq_jax.convert, vptq_jax.pallas, vptq_jax.pallas.vq_matmul
print(vptq_jax.__file__, vptq_jax.convert.__file__, vptq_jax.pallas.__file__, sep="\\n")
"""


def imported_from(directory: Path, *search_path: str) -> list[Path]:
    command = [sys.executable, "-c", IMPORT, *search_path]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=True)
    return [Path(line).parent for line in result.stdout.split("\n")[-4:-1]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for house in HOUSES:
        shutil.copytree(ROOT / house, source / house, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = target.glob("vptq_jax-*.whl")
    return file


def test_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    site = tmp_path / "site" / "vptq_jax"
    assert imported_from(tmp_path, str(tmp_path / "site")) == [site, site / "convert", site / "pallas"]


def test_wheel_holds_every_file_and_claims_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        str(target / file.relative_to(ROOT / house))
        for house, target in ((house, Path(target)) for house, target in HOUSES.items())
        for file in (ROOT / house).rglob("*")
        if file.suffix in (".py", ".json") and "__pycache__" not in file.parts
    }
    assert expected <= names, f"missing in the wheel: {sorted(expected - names)}"
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vptq_jax"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_editable_install_imports(tmp_path):
    places = imported_from(tmp_path)
    if "site-packages" in str(places[0]):
        pytest.skip("vptq_jax is not installed in editable mode here")
    assert places == [ROOT / "vptq_jax", ROOT / "convert", ROOT / "pallas"]


def test_command_is_installed():
    command = Path(sys.executable).with_name("vptq-jax")
    result = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("vptq-jax ")


def test_import_is_light():
    """Importing the package pulls in none of the slow libraries that only some calls need."""
    heavy = ("transformers", "datasets", "matplotlib", "orbax.checkpoint", "torch", "gguf")
    code = f"import sys, vptq_jax; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ)
    )
    assert result.stdout.strip() == "[]"
