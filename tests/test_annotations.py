"""The hook of `hooked.py` is there, and checks."""

import importlib
import pkgutil
import re

import hooked
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from modules import module_names, source_of

from vptq_jax.array import VQArray
from vptq_jax.format import Format
from vptq_jax.lm.rope import Rotary, rotate
from vptq_jax.packing import pack_indices
from vptq_jax.quantization.linalg import proxy_loss


def _is_listed(name):
    return any(f"{name}.".startswith(f"{package}.") for package in hooked.PACKAGES)


SHAPE = re.compile(r'\b(?:Bool|Float|Int|Integer|UInt)\[[\w. |]+, "[^"]*"\]')


def test_every_module_with_shapes_is_hooked():
    loaders = {name: type(importlib.import_module(name).__spec__.loader) for name in module_names()}
    checked = {name for name, loader in loaders.items() if loader.__module__ == "jaxtyping._import_hook"}
    assert checked <= {name for name in loaders if _is_listed(name)}
    with_shapes = {name for name in loaders if SHAPE.search(source_of(name))}
    assert with_shapes <= checked
    assert len(with_shapes) > 30


def test_every_shape_can_be_read():
    # Whatever it cannot make sense of, jaxtyping passes over.
    for name in filter(_is_listed, module_names()):
        for shape in SHAPE.findall(source_of(name)):
            eval(shape, vars(importlib.import_module(name)))


def test_what_is_left_out_exists():
    for name in (*hooked.PYTREES, *hooked.OWN_CHECKS):
        found = pkgutil.resolve_name(name)
        assert f"{found.__module__}.{found.__qualname__}" == name


def _rotary():
    angles = jnp.zeros((1, 3, 2))
    return Rotary(jnp.zeros((1, 3), jnp.int32), angles, angles)


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda: proxy_loss(jnp.zeros((3, 2)), jnp.zeros((2, 2))), "H"),  # a size
        (lambda: rotate(jnp.zeros((1, 3, 4)), _rotary()), "x"),  # the number of axes
        (lambda: pack_indices(jnp.zeros((2, 4)), None, 8), "main"),  # a dtype
        (lambda: VQArray.random([0, 0], Format.of("v8-k16", (8, 8))), "key"),  # a type
    ],
)
def test_a_wrong_argument_is_found(call, parameter):
    with pytest.raises(TypeCheckError, match=f"parameter '{parameter}'"):
        call()


def test_a_wrong_result_is_found(monkeypatch):
    array = VQArray.random(jax.random.key(0), Format.of("v8-k16-noperm", (8, 8)))
    monkeypatch.setattr(VQArray, "permuted_columns", lambda self: jnp.zeros((1, 8, 8)))
    with pytest.raises(TypeCheckError, match=r"return value of vptq_jax\.array\.VQArray\.dequantize"):
        array.dequantize()
