"""The command line: verbs, results on stdout, logs and progress on stderr.

Exit codes: 0 done, 1 the study failed, 2 bad usage or configuration, 130 interrupted (Ctrl-C), 143 stopped by SIGTERM. A user's mistake is
one message, never a traceback.
Heavy packages are imported inside the verbs: `ranksearch --help` loads neither torch nor ray nor mlflow.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ranksearch import __version__
from ranksearch.cli.options import app
from ranksearch.errors import RanksearchError, UsageError

# their verbs, in the order that the help shows them in
from ranksearch.cli import studies  # noqa: F401  # isort: skip
from ranksearch.cli import spaces  # noqa: F401  # isort: skip
from ranksearch.cli import results  # noqa: F401  # isort: skip
from ranksearch.cli import clusters  # noqa: F401  # isort: skip
from ranksearch.cli import doctor  # noqa: F401  # isort: skip


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ranksearch {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: turns our own errors into one message and an exit code."""
    try:
        app()
    except UsageError as error:
        print(f"ranksearch: {error}", file=sys.stderr)
        sys.exit(2)
    except RanksearchError as error:
        print(f"ranksearch: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
