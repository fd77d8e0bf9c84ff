"""The examples in docstrings do what they say."""

import doctest
import importlib

import pytest
from modules import module_names, source_of

MODULES = [name for name in module_names() if ">>> " in source_of(name)]


def test_there_are_examples():
    assert len(MODULES) >= 10


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed
