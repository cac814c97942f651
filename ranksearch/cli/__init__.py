"""The command line: verbs, results on stdout, logs and progress on stderr.

Exit codes: 0 done, 1 the study failed, 2 bad usage or configuration, 130 interrupted (Ctrl-C), 143 stopped by SIGTERM. A user's mistake is
one message, never a traceback.
Heavy packages are imported inside the verbs: `ranksearch --help` loads neither torch nor ray nor mlflow.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Annotated, TextIO, cast

import typer

from ranksearch import __version__
from ranksearch.cli.options import app
from ranksearch.errors import RanksearchError, UsageError
from ranksearch.places.streams import Shown

# their verbs, in the order of the help
from ranksearch.cli import studies  # noqa: F401  # isort: skip
from ranksearch.cli import spaces  # noqa: F401  # isort: skip
from ranksearch.cli import results  # noqa: F401  # isort: skip
from ranksearch.cli import clusters  # noqa: F401  # isort: skip
from ranksearch.cli import doctor  # noqa: F401  # isort: skip


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ranksearch {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: turns our own errors into one message and an exit code; a closed or full output ends without a traceback."""
    _settle_output()
    try:
        code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has stopped
        _drop_output()
        code = 1
    except OSError as error:
        if error.errno not in FULL:
            raise
        _drop_output()
        _say(f"the output cannot be written: {error.strerror}")
        code = 1
    sys.exit(code)


def _settle_output() -> None:
    """Replaces a closed stream by one that drops what is written; a stream that cannot encode a character shows another one instead.

    Text for stderr, a user's own prints included, is lost if nobody reads it.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.StringIO())
        elif hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    sys.stderr = cast(TextIO, Shown(sys.stderr))


def _run() -> int | str | None:
    """Runs the verb and returns its exit code."""
    try:
        app()
    except SystemExit as left:
        return left.code
    except UsageError as error:
        _say(str(error))
        return 2
    except RanksearchError as error:
        _say(str(error))
        return 1
    return 0


def _say(message: str) -> None:
    with suppress(OSError, AttributeError):  # stderr may be gone as well
        print(f"ranksearch: {message}", file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Keeps Python from trying again, at its end, to write what could not be written."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
