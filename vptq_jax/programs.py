"""Keeps compiled programs from using up what the system lets one process map into memory.

On a CPU every program takes hundreds of memory mappings, of which Linux allows 65,530 a process;
without one XLA ends the process. A server that sees all prompt lengths gets there in about eighty
programs of a model with thirty layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FEWEST = 16  # So many programs stay, whatever else the process maps.
_MAPS = Path("/proc/self/maps")
_MAP_LIMIT = Path("/proc/sys/vm/max_map_count")


class Programs:
    """The compiled programs of jitted functions, forgotten where the process has used half of its mappings.

    Args:
        functions: what `jax.jit` returned.
    """

    def __init__(self, *functions: Any):
        self._functions = functions
        self._checked = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(function._cache_size() for function in self._functions)

    def make_room(self) -> None:
        """Forgets all programs where mappings run low; what runs still goes on. Free when nothing is new."""
        count = self.count
        if count != self._checked and count >= _FEWEST and mappings_run_low():
            for function in self._functions:
                function.clear_cache()
            count = 0
        self._checked = count


def mappings_run_low() -> bool:
    """Whether the process uses more than half of the mappings it may have; False where the system does not say."""
    try:
        limit = int(_MAP_LIMIT.read_text())
        with _MAPS.open("rb") as lines:
            return sum(1 for _ in lines) > limit // 2
    except OSError:
        return False
