"""The map of the code: a folder imports only from those above it, and the command line starts light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ranksearch import lowering

PACKAGE = Path(lowering.__file__).parent.parent
ROWS = [
    ("errors", "files", "_callable"),
    ("linalg", "pareto"),
    ("lowering",),
    ("compress",),
    ("allocate",),
    ("tasks",),
    ("search",),
    ("tracking",),
    ("cluster",),
    ("api", "run_study", "cli", "console", "tables", "__init__", "__main__"),
]
HEIGHT = {name: row for row, names in enumerate(ROWS) for name in names}
SIBLINGS = [("allocate", "tasks")]


def place_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_places(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module] if node.module != "ranksearch" else [f"ranksearch.{a.name}" for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ranksearch.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_above(path):
    here = place_of(path)
    for place in imported_places(path) - {here, "__version__"}:
        top = len(ROWS) - 1
        assert HEIGHT[place] < HEIGHT[here] or HEIGHT[place] == HEIGHT[here] == top, f"{path} imports {place}"
        for one, other in SIBLINGS:
            assert {here, place} != {one, other}, f"{one} and {other} lie on one floor"


def loaded_after(*command: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `command`."""
    probe = "import sys, runpy, contextlib, io\n" + "\n".join(command)
    probe += "\nprint(*[m for m in ('torch', 'ray', 'mlflow', 'optuna', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_import_is_light():
    assert loaded_after("import ranksearch") == set()


def test_help_is_light():
    run = "sys.argv = ['ranksearch', '--help']\nimport ranksearch.cli"
    guard = "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): ranksearch.cli.main()"
    assert loaded_after(run, guard) == set()
    # the probe can fail: a verb that needs torch loads it
    assert loaded_after("import ranksearch", "ranksearch.RankPlan") >= {"torch"}


def test_public_names_are_there_and_packages_can_be_called():
    import ranksearch
    import ranksearch.compress.surgery
    import ranksearch.search.study

    for name in ranksearch.__all__:
        assert getattr(ranksearch, name) is not None
    assert callable(ranksearch.compress)
    assert callable(ranksearch.search)
    assert callable(ranksearch.allocate)
    assert ranksearch.search.study.Study is ranksearch.Study
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = ranksearch.serch
