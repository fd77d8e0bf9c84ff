"""Options of the fuzz suite, the process that runs its commands, and a table of what was tried.

FUZZ=long        many more cases, under a new seed (`make fuzz`)
FUZZ_SEED=17     the cases of that seed
"""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from runner import QUICK, Runner

LONG = os.environ.get("FUZZ") == "long"
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(1 << 32) if LONG else 0))
_TRIED: Counter = Counter()


def pytest_report_header():
    return f"fuzz: {'long' if LONG else 'quick'} form, FUZZ_SEED={SEED}"


def pytest_terminal_summary(terminalreporter):
    if _TRIED:
        terminalreporter.section(f"fuzz, FUZZ_SEED={SEED}")
        for (kind, outcome), count in sorted(_TRIED.items()):
            terminalreporter.write_line(f"{kind:28} {outcome:14} {count}")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fuzz"] = [[*key, count] for key, count in _TRIED.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for kind, outcome, count in getattr(node, "workeroutput", {}).get("fuzz", ()):
        _TRIED[kind, outcome] += count


@pytest.fixture(scope="session")
def long():
    """Whether this is the long form."""
    return LONG


@pytest.fixture
def rng(request):
    """Random numbers of this test; the seed is in the report of a failure."""
    request.node.user_properties.append(("FUZZ_SEED", SEED))
    print(f"FUZZ_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def tried(request):
    """Counts outcomes for the table: `tried(kind, outcome)`."""
    return lambda kind, outcome: _TRIED.update([(kind, outcome)])


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """Runs commands in forked processes; programs are compiled once for all of them."""
    with Runner(tmp_path_factory.mktemp("fuzz")) as found:
        yield found


@pytest.fixture(scope="session")
def saved(runner, tiny_hf, tmp_path_factory) -> Path:
    """A quantized model as `save` writes it."""
    path = tmp_path_factory.mktemp("saved") / "model"
    done = runner.command(["quantize", tiny_hf, path, *QUICK], path.parent)
    assert done.status == 0, done.err
    return path
