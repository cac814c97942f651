"""What is used of Optuna beyond its public interface, each with the reason; `tests/test_private_parts.py` names the version that has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial


@contextmanager
def quiet() -> Iterator[None]:
    """Within, Optuna says nothing below a warning: a study shows its own progress. The process's own verbosity comes back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def storage_of(study: optuna.Study) -> BaseStorage:
    """Where a study keeps its trials. A result and what is told of it are written as one, which `Study.tell` cannot."""
    return study._storage


def delete(study: optuna.Study) -> None:
    """Removes a study from its storage; `optuna.delete_study` would open the storage anew."""
    study._storage.delete_study(study._study_id)


def id_of(trial: FrozenTrial | Trial) -> int:
    """The storage's name of a trial."""
    return trial._trial_id


def trials_of(study: optuna.Study) -> list[FrozenTrial]:
    """All trials, neither copied nor read again: at thousands of trials a proposal's time was that of the copies."""
    return study._get_trials(deepcopy=False, use_cache=True)


def holds(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution may give `value`.

    Raises:
        ValueError, TypeError: nothing like a value of it.
    """
    return distribution._contains(distribution.to_internal_repr(value))
