"""The command line. fxlrd/app/arguments.py has its options, fxlrd/app/commands.py what each command does."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fxlrd import __version__
from fxlrd.app.arguments import parser_of
from fxlrd.app.output import warn
from fxlrd.errors import FxlrdError


def main(argv: Sequence[str] | None = None, loaded: Callable[[], Any] = lambda: None) -> int:
    """Run the command line and return its exit status; ``loaded`` is called between the imports and the work.

    The status is 0 for success and 2 for a request that cannot be met. For ``diff`` it is that of diff(1): 0 the
    same, 1 different, 2 trouble. Ctrl-C gives 130.
    """
    try:
        arguments = _arguments(argv)
        run = _command(arguments)
        loaded()
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            return run(arguments) or 0
    except FxlrdError as error:
        print(f"fxlrd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxlrd: interrupted; no file is half-written, and timings stay in the cache", file=sys.stderr)
        return 130
    except Exception:  # a defect; Python's own exit status, 1, would read as "different"
        traceback.print_exc()
        return 2


def _warn(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    warn(str(message))


def _command(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], int | None]:
    """Import what the command does, and torch with it: a mistake in the options, and --help, need not wait for that."""
    from fxlrd.app import commands

    run: Callable[[argparse.Namespace], int | None] = getattr(commands, f"run_{arguments.command}")
    return run


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. argparse does not find the second model of diff where it follows options."""
    parser = parser_of(__version__)
    if "_ARGCOMPLETE" in os.environ:
        from fxlrd.app.completion import complete

        complete(parser)
    arguments, rest = parser.parse_known_args(argv)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(arguments, "other", "") is None:
        arguments.other, rest = rest[0], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments
