"""python -m bench [SECTION …]: the figures that fxlrd is held to, measured side by side on this machine.

Each section runs in a process of its own. ``table3`` runs twice: with the C library's allocator as it comes,
and told to keep freed memory, as jemalloc and tcmalloc do. On Linux the former returns large activations to
the kernel and faults them in again at each layer, which costs deeper models more.
"""

from __future__ import annotations

import os
import subprocess
import sys

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}

SECTIONS = {
    "import_time": [{}],
    "decomposition": [{}],
    "memory": [{}],
    "scaling": [{}],
    "search": [{}],
    "table1": [{}],
    "table2": [{}],
    "table3": [{}, KEEP_MEMORY],
    "fig2": [{}],
    "fig5": [{}],
    "attained": [{}],
    "tables456": [{}],
    "peers": [{}],
    "backend": [{}],
    "trained": [{}],
    "drops": [{}],
    "frontier": [{}],
    "zoo": [{}],
    "int8": [{}],
    "cuda": [{}],
}


def main() -> int:
    wanted = sys.argv[1:] or list(SECTIONS)
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        print(f"bench: no section {unknown[0]!r}: {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    status = 0
    for name in wanted:
        for extra in SECTIONS[name]:
            note = f" ({' '.join(f'{k}={v}' for k, v in extra.items())})" if extra else ""
            print(f"\n== {name}{note}", flush=True)
            status |= subprocess.run([sys.executable, "-m", f"bench.{name}"], env={**os.environ, **extra}).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
