"""MLflow, figures, reports: the study as others read it. Nothing here decides anything."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def _import_without_a_home() -> None:
    """MLflow asks for the home folder while it is imported, and fails for a user who has none, such as a container's unknown one."""
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
