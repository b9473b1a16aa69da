"""What importing fxlrd adds to importing torch: under 100 ms."""

from __future__ import annotations

import statistics
import subprocess
import sys

SCRIPT = "import time, torch; start = time.perf_counter(); import fxlrd; print(time.perf_counter() - start)"


def main() -> None:
    samples = [float(subprocess.check_output([sys.executable, "-c", SCRIPT])) * 1e3 for _ in range(7)]
    print(
        f"import fxlrd after torch: {statistics.median(samples):.0f} ms "
        f"(of {min(samples):.0f}-{max(samples):.0f}; limit 100)"
    )


if __name__ == "__main__":
    main()
