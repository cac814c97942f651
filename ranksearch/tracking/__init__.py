"""MLflow, figures, reports: the study as others read it. Nothing here decides anything."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def _import_without_a_home() -> None:
    """Imports MLflow for a user without a home folder, such as an unknown one in a container: its import asks for one and would fail."""
    try:
        Path.home()
        return
    except RuntimeError:
        pass
    with tempfile.TemporaryDirectory() as nowhere:
        os.environ["HOME"] = nowhere
        try:
            import mlflow  # noqa: F401
        finally:
            del os.environ["HOME"]


_import_without_a_home()
