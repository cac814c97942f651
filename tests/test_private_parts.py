"""What the package uses of Optuna, Ray and MLflow beyond their public interfaces stands in one file each, as the versions here have it."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.test_floors import PACKAGE

PRIVATE = {
    "optuna": (
        "5.0",
        PACKAGE / "search" / "optuna_private.py",
        r"\._(storage|trial_id|study_id|contains|get_trials)\b(?! =)",
    ),
    "ray": ("2.60", PACKAGE / "cluster" / "ray_private.py", r"\bray\._private\b"),
    "mlflow": ("3.17", PACKAGE / "tracking" / "mlflow_private.py", r"\bmlflow\.server\b|\b_MLFLOW_"),
}


@pytest.mark.parametrize("library", PRIVATE)
def test_private_parts_stand_in_one_file(library):
    _, own, pattern = PRIVATE[library]
    assert re.search(pattern, own.read_text())
    users = [path for path in PACKAGE.rglob("*.py") if path != own and re.search(pattern, path.read_text())]
    assert not users


@pytest.mark.parametrize("library", PRIVATE)
def test_the_installed_version_is_the_one_whose_private_parts_were_read(library):
    known, own, _ = PRIVATE[library]
    assert version(library).startswith(f"{known}."), (
        f"read what {own.name} uses again, run the drills, then name the new version here"
    )


def test_importing_the_package_leaves_other_libraries_loggers_alone():
    code = (
        "import logging, optuna; before = optuna.logging.get_verbosity(); import ranksearch.study.study, ranksearch.cluster.tune; "
        "assert optuna.logging.get_verbosity() == before; assert logging.getLogger('ray.tune.tune').level == logging.NOTSET"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
