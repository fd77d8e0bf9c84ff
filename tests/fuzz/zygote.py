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
import json
import os
import resource
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


def child(case: dict, tally: str, out: str, err: str) -> None:
    """Runs one case in this (forked) process and ends it."""
    for number, file in ((0, os.devnull), (1, out), (2, err)):
        descriptor = os.open(file, os.O_RDWR)
        os.dup2(descriptor, number)
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
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import transformers  # noqa: F401

    import vptq_jax.cli.app  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    place = sys.argv[1]
    names = [os.path.join(place, name) for name in ("tally", "out", "err")]
    for line in sys.stdin:
        case = json.loads(line)
        for name in names:
            open(name, "w").close()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(case, *names)
        timeout, status = case.get("timeout", 120), None
        while status is None:
            found, raw = os.waitpid(pid, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(raw)
            elif time.monotonic() - started > timeout:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                status = "timeout"
            else:
                time.sleep(0.01)
        tally, out, err = (Path(name).read_text(errors="replace") for name in names)
        answer = {
            "status": status, "operations": int(tally or 0), "out": out, "err": err,
            "seconds": time.monotonic() - started,
        }  # fmt: skip
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
