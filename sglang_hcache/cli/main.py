"""`hcache COMMAND`: one module each, with `add_arguments(parser)` and `run(arguments) -> exit status`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

from sglang_hcache import TESTED_SGLANG, __version__
from sglang_hcache.cli.common import CommandFailed, explain, fill_in

COMMANDS = {
    "advise": (
        "sglang_hcache.cli.advise",
        "plan what to store of a model on given hardware, and how fast it restores",
    ),
    "doctor": ("sglang_hcache.cli.doctor", "show the rates measured on this machine, and what limits restoring"),
    "status": ("sglang_hcache.cli.status", "show the running prefetcher: clients, models, memory, directories"),
    "inspect": ("sglang_hcache.cli.inspect", "list the stored models and their pages"),
    "fsck": ("sglang_hcache.cli.fsck", "verify the index and all checksums; optionally repair"),
    "gc": ("sglang_hcache.cli.gc", "delete orphaned, unused or least valuable pages, or a prompt"),
    "export": ("sglang_hcache.cli.export", "write stored prefixes to one file"),
    "import": ("sglang_hcache.cli.import_", "store the pages of an exported file"),
    "prefetcher": ("sglang_hcache.cli.prefetcher", "run a prefetcher in the foreground, also for other hosts"),
    "keygen": ("sglang_hcache.cli.keygen", "create the keys for a prefetcher and its clients on other hosts"),
}
FAILED = 3
DEFECT = 70  # sysexits.h: EX_SOFTWARE
INTERRUPTED = 130  # as a shell has it

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the command: 0 done; 2 bad arguments; 3 it could not do its work; 70 a defect of ours;
    130 interrupted.

    Others: see the command's --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = f"hcache {arguments[0]}" if arguments else "hcache"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        run, parsed = _parse(arguments)
        status = int(run(parsed))
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
        return status
    except CommandFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever reads this has seen enough; Python would flush the rest, and fail again
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        print(f"{name}: {explain(error)}", file=sys.stderr)
        return FAILED
    except Exception:  # Python's own status for it, 1, means something else to the commands
        logger.exception("%s: this is a defect of sglang-hcache; please report it.", name)
        return DEFECT


def _parse(arguments: Sequence[str]) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace]:
    """Return the command's `run` and its parsed arguments. Only that command's module is imported."""
    parser = argparse.ArgumentParser(
        prog="hcache", description="Inspect and manage what sglang-hcache stores, and run its prefetcher."
    )
    parser.add_argument(
        "--version", action="version", version=f"sglang-hcache {__version__}, tested with SGLang {TESTED_SGLANG}"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = None
    for name, (module_name, summary) in COMMANDS.items():
        asked = arguments[:1] == [name]
        module = importlib.import_module(module_name) if asked else None
        description = module.__doc__ if module is not None else None
        subparser = subparsers.add_parser(
            name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if module is not None:
            module.add_arguments(subparser)
            run = module.run
    parsed = parser.parse_args(arguments)
    fill_in(parsed)
    assert run is not None
    return run, parsed


if __name__ == "__main__":
    sys.exit(main())
