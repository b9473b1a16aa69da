# PYTHON_ARGCOMPLETE_OK
"""The command line: as ``python -m fxlrd``, and as the script fxlrd."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 130


def run() -> NoReturn:
    """Run the command line and exit with its status, which is 130 for Ctrl-C at any time."""
    leaves = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as in a shell's foreground
    if leaves:
        # To import torch takes seconds, and some of what it runs meanwhile drops a KeyboardInterrupt.
        signal.signal(signal.SIGINT, _leave)
    from fxlrd.cli import main

    try:
        status = main(loaded=_raises if leaves else lambda: None)
        if leaves:
            signal.signal(signal.SIGINT, _leave)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status == INTERRUPTED:
        _exit()
    sys.exit(status)


def _raises() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    os.write(2, b"fxlrd: interrupted\n")
    _exit()


def _exit() -> NoReturn:
    """Exit with status 130. Python itself ends by the signal if the exception passed through ``exec`` of a text."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    run()
