"""The `recloop` command: parse, find the command's function, run it, print its result, return an exit code.

In:  the command line.  Out: a result on stdout, everything else on stderr, and the exit code of `cluster/errors.py`.
Knows nothing of what a command does: it names each function by import string and imports the one that is asked for.
"""

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import cast

from cluster.commands.parser import build_parser
from cluster.errors import RecloopError
from cluster.home import find_home
from cluster.imports import load_target
from cluster.output import Result, print_result
from cluster.progress import hush_progress

CTRL_C_EXIT_CODE = 130
BROKEN_PIPE_EXIT_CODE = 141

Command = Callable[[argparse.Namespace], Result | None]

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an exception outside our error tree is a defect and passes through."""
    args = build_parser().parse_args(argv)
    # A shell script starts `recloop … &` with SIGINT ignored, and what Ray starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _prepare(args)
        result = _load_command(args.target)(args)
        if result is not None:
            print_result(result, as_json=args.json or args.result_is_json)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("recloop: interrupted", file=sys.stderr)
        return CTRL_C_EXIT_CODE
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_EXIT_CODE
    except RecloopError as error:
        print(f"recloop: error: {error}", file=sys.stderr)
        log.info("raised here", exc_info=error)
        return error.exit_code
    return 0


def _load_command(target: str) -> Command:
    """Import a command's function. What an import makes stays, so it is not searched for garbage, then or later."""
    gc.disable()
    try:
        return cast(Command, load_target(target))
    finally:
        gc.freeze()
        gc.enable()


def _prepare(args: argparse.Namespace) -> None:
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if args.json:
        hush_progress()
    args.home = find_home(args.home)
