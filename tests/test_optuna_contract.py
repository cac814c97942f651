"""Optuna's own published contracts: of a storage over the journal that a study is kept in, of a sampler over our own."""

from pathlib import Path

import pytest
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase
from optuna.testing.pytest_storages import StorageTestCase

from ranksearch.search.local_tpe import LocalTPE
from ranksearch.store.journal import open_journal


class TestJournal(StorageTestCase):
    @pytest.fixture
    def storage(self, tmp_path: Path):
        return open_journal(tmp_path / "optuna.journal")

    @pytest.mark.skip(reason="the driver's storage stays in its process, and an open file's lock cannot travel")
    def test_pickle_storage(self, storage):
        pass


class TestLocalTPE(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self):
        return lambda: LocalTPE({}, accuracy_at=0, cost_at=None, share=lambda value: value, dense=1.0, seed=0)
