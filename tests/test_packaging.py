"""What gets installed: `pallas/` and `convert/` inside vptq_jax, nothing beside it, nothing forgotten."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from tiny_model import write_llama

import vptq_jax

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
        if file.suffix in (".py", ".json", ".typed") and "__pycache__" not in file.parts
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


def test_public_names():
    source = ast.parse((ROOT / "vptq_jax/__init__.py").read_text())
    for_types = {
        alias.asname
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vptq_jax.")
        for alias in node.names
    }
    assert {*for_types, "__version__"} == set(vptq_jax.__all__)
    for name in vptq_jax.__all__:
        assert getattr(vptq_jax, name) is not None
    assert set(vptq_jax.__all__) <= set(dir(vptq_jax))
    assert vptq_jax.__version__ == importlib.metadata.version("vptq_jax")
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = vptq_jax.quantise


def test_names_in_the_readme_exist():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), "README.md", "exec"), {})
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vq":
                assert node.attr in vptq_jax.__all__, node.attr


def test_no_module_hides_a_public_name():
    modules = {module.name for module in pkgutil.iter_modules(vptq_jax.__path__)}
    assert not modules & set(vptq_jax.__all__)


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = {modules}
sys.meta_path.insert(0, Blocker())
"""
EXTRAS = {"transformers", "tokenizers", "huggingface_hub", "jinja2", "tqdm", "datasets", "gguf", "matplotlib", "typer"}
"""What nothing that an importer needs brings along (flax brings rich)."""
WITHOUT_EXTRAS = """
import pathlib, jax, jax.numpy as jnp, numpy as np, vptq_jax as vq
W = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
weight, _ = vq.quantize_weight(W, np.eye(8, dtype=np.float32), "v2-k4", key=jax.random.key(0))
assert vq.matmul(jnp.ones((3, 8)), weight).shape == (3, 16)
model = vq.load(sys.argv[1])
small, report = vq.quantize(model, vq.QuantConfig("v2-k4"), [np.ones((1, 8), int)], progress=False)
vq.save(small, sys.argv[2])
assert vq.generate(vq.load(sys.argv[2]), [1, 2, 3], max_new_tokens=2)

def says(words, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ImportError as error:
        assert words in str(error) and "pip install 'vptq_jax[" in str(error), error
    else:
        raise AssertionError(words)

says("matplotlib", report.save, pathlib.Path(sys.argv[2]))
says("tqdm", vq.quantize, model, vq.QuantConfig("v2-k4"), [np.ones((1, 8), int)])
says("huggingface_hub", vq.load, "nobody/nothing")
says("gguf", vq.load, sys.argv[3])
from vptq_jax.lm import chat, data
says("jinja2", chat.render, "x", {})
says("datasets", data.load_text, "wikitext2")
"""


def test_what_an_importer_needs_is_enough(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    write_llama(plain, 40)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    program = BLOCKED.replace("{modules}", repr(EXTRAS)) + WITHOUT_EXTRAS
    arguments = [str(plain), str(tmp_path / "out"), str(tmp_path / "model.gguf")]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_a_command_line_without_its_extra_says_so(module):
    program = BLOCKED.replace("{modules}", repr({module})) + "from vptq_jax.cli import main\nmain(['--help'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: the command line needs {module}, which is not installed: pip install 'vptq_jax[cli]'\n"
    )


def test_importing_costs_little():
    def seconds(program: str) -> float:
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", program], check=True)
        return time.monotonic() - start

    pairs = [(seconds("import vptq_jax"), seconds("import jax, flax.nnx")) for _ in range(3)]
    assert min(ours / theirs for ours, theirs in pairs) < 1.0


INTERRUPTED = """
import signal, sys
from vptq_jax.cli import main

class Interrupt:
    left = int(sys.argv[1])

    def find_spec(self, name, path=None, target=None):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
main(sys.argv[2:])
"""


@pytest.mark.parametrize("imports", [1, 20, 400, 1000])
def test_ctrl_c_while_modules_are_imported(imports, tiny_hf):
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(imports), "generate", tiny_hf, "the fox", "--max-new-tokens", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 130, result.stderr
    assert result.stderr.startswith("error: interrupted")
    assert len(result.stderr.splitlines()) == 1
