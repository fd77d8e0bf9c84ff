"""A process that has imported everything and forks a child for every command it is told: a case takes a second.

Its argument is a directory for notes. No JAX backend is started before the fork. Each line on standard input is a JSON
object:

    arguments   of `vptq-jax`, or a list of statements of Python in `python`
    cwd         working directory
    root        file operations under this directory count
    mode        "count", "kill" (SIGKILL), "full" (no space left), "interrupt" (Ctrl-C) or "none"
    at          the operation, counted from 1, before which it happens
    limits      {"memory": bytes, "seconds": CPU seconds, "file": bytes of the largest file}

Each line on standard output answers one: exit status, operations counted, standard output and error.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import time
from pathlib import Path

OPERATIONS = {
    "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod",
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hook:
    """Counts what changes files under a root, and strikes at the chosen one."""

    def __init__(self, root: str, mode: str, at: int, tally: str):
        self.root, self.mode, self.at = os.path.realpath(root), mode, at
        self.count, self.struck = 0, False
        self.tally = os.open(tally, os.O_RDWR)
        self.here = os.getpid()

    def __call__(self, event: str, arguments: tuple) -> None:
        if os.getpid() != self.here or not self._concerns(event, arguments):
            return
        self.count += 1
        os.pwrite(self.tally, b"%d" % self.count, 0)
        if self.count < self.at or self.mode == "count":
            return
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.mode == "full" and event in ("open", "os.mkdir"):  # a full disk stays full; renaming needs no space
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.mode == "interrupt" and not self.struck:
            self.struck = True
            signal.raise_signal(signal.SIGINT)

    def _concerns(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            path, mode, flags = arguments
            if not (isinstance(flags, int) and flags & _WRITING) and not (
                isinstance(mode, str) and set(mode) & set("wxa+")
            ):
                return False
        elif event in OPERATIONS:
            path = arguments[0]
        else:
            return False
        if isinstance(path, int):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.root + os.sep)


def child(case: dict, tally: str, out: int, err: int) -> None:
    """Runs one case in this (forked) process and ends it."""
    for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = case.get("limits", {})
    for name, kind in (
        ("memory", resource.RLIMIT_AS),
        ("seconds", resource.RLIMIT_CPU),
        ("file", resource.RLIMIT_FSIZE),
    ):
        if name in limits:
            resource.setrlimit(kind, (limits[name], limits[name]))
    os.chdir(case["cwd"])
    if case.get("mode", "none") != "none":
        sys.addaudithook(Hook(case["root"], case["mode"], case.get("at", 1 << 60), tally))
    code = 0
    try:
        if "python" in case:
            exec("\n".join(case["python"]), {})
        else:
            from vptq_jax.cli import main

            main(case["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # As the interpreter does at its end: threads that libraries left behind may still complain.
    import threading

    threading._shutdown()
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


def serve() -> None:
    """Answers cases until standard input ends."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import PIL.PngImagePlugin  # noqa: F401
    import transformers.models.llama  # noqa: F401
    from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

    import vptq_jax

    for module in pkgutil.walk_packages([*vptq_jax.__path__], "vptq_jax."):
        importlib.import_module(module.name)

    answers = os.fdopen(os.dup(1), "w")
    tally = os.path.join(sys.argv[1], "tally")
    for line in sys.stdin:
        case = json.loads(line)
        Path(tally).write_text("")
        # Pipes, since a limit of file sizes is to be no limit of what a command says.
        pipes = [os.pipe(), os.pipe()]
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(case, tally, pipes[0][1], pipes[1][1])
        for _, end in pipes:
            os.close(end)
        out, err, late = read_both([start for start, _ in pipes], started + case.get("timeout", 120))
        if late:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {
            "status": "timeout" if late else status, "operations": int(Path(tally).read_text() or 0), "out": out,
            "err": err, "seconds": time.monotonic() - started,
        }  # fmt: skip
        print(json.dumps(answer), file=answers, flush=True)


def read_both(pipes: list[int], deadline: float) -> tuple[str, str, bool]:
    """What comes out of two pipes until both end, and whether the deadline came before that."""
    found, open_ones = dict.fromkeys(pipes, b""), list(pipes)
    while open_ones and time.monotonic() < deadline:
        for pipe in select.select(open_ones, [], [], 0.5)[0]:
            piece = os.read(pipe, 1 << 16)
            found[pipe] += piece
            if not piece:
                open_ones.remove(pipe)
    for pipe in pipes:
        os.close(pipe)
    out, err = (found[pipe].decode(errors="replace") for pipe in pipes)
    return out, err, bool(open_ones)


if __name__ == "__main__":
    serve()
