"""What a forked process does with many files of unknown origin, one after the other."""

import hashlib
import json
import resource
import traceback
from pathlib import Path

CLEAN = (ValueError, OSError, NotImplementedError, ImportError)
_LONGEST = 12000  # twenty problems of up to 500 characters


def digest(model) -> str:
    """Digest of every array of a model, and of its config."""
    import jax
    import numpy as np
    from flax import nnx

    found = hashlib.blake2b(repr(model.config).encode())
    for path, leaf in jax.tree.leaves_with_path(nnx.state(model.module)):
        found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def digests(paths: list[str]) -> None:
    """Prints the digest of each saved model, or how it fails to load."""
    from vptq_jax.convert.loading import load

    for path in paths:
        try:
            print(digest(load(path)))
        except Exception as error:
            print(f"{type(error).__name__}: {error}"[:300].replace("\n", " "))


def limit_memory(extra: int) -> None:
    """Bounds the memory that this process may take beside what it has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, used + extra))


def load_all(paths: list[str], notes: str, action: str, memory: int) -> None:
    """Loads each path and appends a line about it to `notes`: outcome, and digest or message."""
    import jax

    from vptq_jax.convert.hessian_files import load_hessians
    from vptq_jax.convert.loading import load

    jax.devices()
    limit_memory(memory)
    for path in paths:
        try:
            if action == "hessians":
                hessians = load_hessians(path)
                found = [
                    "ok",
                    hashlib.blake2b(b"".join(hessians.for_module(p).tobytes() for p in hessians)).hexdigest(),
                ]
            else:
                found = ["ok", digest(load(path))]
        except MemoryError:
            found = ["memory", traceback.format_exc()[-1500:]]
        except CLEAN as error:
            text = str(error)
            plain = not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text)
            found = ["clean", text[:300]] if len(text) < _LONGEST and plain else ["message", text[:600]]
        except BaseException:
            found = ["traceback", traceback.format_exc()[-1500:]]
        with Path(notes).open("a") as file:
            file.write(json.dumps(found) + "\n")
