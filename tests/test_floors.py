"""The map of the code: a folder imports only from those above it, and the command line starts light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ranksearch import lowering

PACKAGE = Path(lowering.__file__).parent.parent
ROWS = [
    ("errors", "_callable", "costs", "cores"),
    ("places", "words"),
    ("linalg", "maxvol", "pareto"),
    ("subspaces",),
    ("lowering",),
    ("model",),
    ("compress",),
    ("deploy",),
    ("calibration",),
    ("allocate",),
    ("data",),
    ("tasks",),
    ("training",),
    ("space",),
    ("trial",),
    ("search",),
    ("front",),
    ("store",),
    ("study",),
    ("tracking",),
    ("cluster",),
    ("preflight",),
    ("jobs",),
    ("api", "nets", "run_study", "cli", "console", "tables", "result_tables", "__init__", "__main__"),
]
HEIGHT = {name: row for row, names in enumerate(ROWS) for name in names}
APART = [(one, other) for one in ("calibration", "allocate") for other in ("data", "tasks", "training")]
APART += [("preflight", "jobs")]


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
        for one, other in APART:
            assert {here, place} != {one, other}, f"{one} and {other} know nothing of each other"


def imported_files(path: Path) -> set[Path]:
    """The package's files that a file names in an import, wherever in it, but for those that only types need."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ranksearch"):
            module = PACKAGE.parent / Path(*node.module.split("."))
            for name in (alias.name for alias in node.names):
                places = [module / f"{name}.py", module.with_suffix(".py"), module / name / "__init__.py"]
                found |= set([place for place in places if place.is_file()][:1])
    return found


def test_no_files_import_each_other_in_a_circle():
    graph = {path: imported_files(path) - {path} for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    while leaves := {path for path, needs in graph.items() if not needs & graph.keys()}:
        graph = {path: needs for path, needs in graph.items() if path not in leaves}
    assert not graph, f"in or behind a circle: {sorted(str(path.relative_to(PACKAGE)) for path in graph)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "search").glob("*.py")), ids=lambda path: path.name)
def test_a_proposer_writes_nothing(path):
    """Neither to a disk nor to Optuna's study: what is proposed is recorded by `study/` alone."""
    writes = (
        "write_text",
        "write_bytes",
        "mkdir",
        "unlink",
        "tell",
        "set_user_attr",
        "enqueue_trial",
        "write_atomically",
        "write_durably",
        "partly_written",
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in (*writes, "open"), f"line {node.lineno} calls {called}"


HEAVY = ("torch", "ray", "mlflow", "optuna", "scipy", "sympy", "sklearn", "pandas")


def loaded_after(*command: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `command`."""
    probe = "import sys, runpy, contextlib, io\n" + "\n".join(command)
    probe += f"\nprint(*[m for m in {HEAVY} if m in sys.modules])"
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


def test_a_worker_loads_no_more_than_it_needs():
    """Every trial of a study on digits waits for these imports; scikit-learn, pandas and sympy would be another 1.7 s."""
    trained = "import ranksearch.trial.trial, ranksearch.search.workbench\nfrom ranksearch.tasks import digits"
    made = "digits.make_task('resnet8', data=None, validation=200, split_seed=0)"
    assert loaded_after(trained, made) == {"torch", "scipy"}


def test_public_names_are_there_and_packages_can_be_called():
    import ranksearch
    import ranksearch.compress.surgery
    import ranksearch.study.study

    assert set(ranksearch.__all__) == {"__version__", *ranksearch._HOMES}
    for name in ranksearch.__all__:
        assert getattr(ranksearch, name) is not None
    assert callable(ranksearch.compress)
    assert callable(ranksearch.search)
    assert callable(ranksearch.allocate)
    assert ranksearch.study.study.Study is ranksearch.Study
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = ranksearch.serch
