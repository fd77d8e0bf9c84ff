"""The package's modules, wherever its installation has them."""

import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path


def module_names() -> list[str]:
    """All modules, by name; packages are imported on the way, modules are not."""
    names = set()
    for package in ("vptq_jax", "vptq_jax.pallas", "vptq_jax.convert"):  # in three directories where it is editable
        path = importlib.import_module(package).__path__
        names |= {package} | {name for _, name, _ in pkgutil.walk_packages(path, f"{package}.")}
    return sorted(names)


def source_of(name: str) -> str:
    """The text of a module, which is not imported for it."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()
