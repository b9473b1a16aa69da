"""Run the fuzzers for as long as wanted: python -m tests.fuzz --seconds 3600."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.fuzz.campaign import NAMES, Case, CaseError, fuzzers, run


def main() -> int:
    """Run the fuzzers; the status is 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FUZZER", help=f"{', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each (default: 20)")
    parser.add_argument("--start", type=int, default=0, metavar="CASE", help="number of the first case")
    parser.add_argument("--failures", type=int, default=1, metavar="N", help="stop at the N-th failure (default: 1)")
    arguments = parser.parse_args()
    with fuzzers() as cases:
        failed = [_run(name, cases[name], arguments) for name in arguments.names or NAMES]
    return int(any(failed))


def _run(name: str, case: Case, arguments: argparse.Namespace) -> int:
    """Run a fuzzer, and return how many cases failed."""
    end, start, failed = time.monotonic() + arguments.seconds, arguments.start, 0
    while True:
        try:
            outcome = run(name, case, end - time.monotonic(), start)
        except CaseError as error:
            failed, start = failed + 1, error.number + 1
            print(error, file=sys.stderr)
            if failed == arguments.failures:
                traceback.print_exception(error.__cause__)
                return failed
            continue
        cases = start + outcome.cases - arguments.start
        print(f"{name}: {cases} cases, {outcome.read} read in the last run, {failed} failed", flush=True)
        return failed


if __name__ == "__main__":
    sys.exit(main())
