"""Lets `ranksearch.search(...)` be a call while `ranksearch.trial.trial` stays a module.

The public functions `search`, `allocate` and `compress` bear the names of the packages that hold their parts. Python binds a
subpackage to its parent on import, which would hide a function of the same name; so these three packages are callable.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def make_callable(package: str, target: str) -> None:
    """Calling the module `package` calls `target` ("module:function"), which is imported at the first call."""
    module_name, function_name = target.split(":")

    class CallablePackage(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module_name), function_name)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
