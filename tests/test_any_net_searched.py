"""Nets that are no float32 classifiers of images go through a whole search, MLflow models included, or what cannot be stored is said."""

import json

import pytest

import ranksearch
from tests.conftest import Told

TASK = '''
import torch, ranksearch
from torch import nn

class Looping(nn.Module):
    """A net whose graph depends on the number of samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.b(torch.stack([torch.relu(self.a(x[i])) for i in range(int(x.shape[0]))]))

class Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, (weight - weight.mean((1, 2), keepdim=True)) / weight.std((1, 2), keepdim=True), bias)

class Mixed(nn.Module):
    """Weight norm, a standardised weight and a recurrent net."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 16, 3, padding=1))
        self.b, self.c, self.d = Standardised(16, 16, 3), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.d(self.c(torch.relu(self.b(torch.relu(self.a(x)))).mT)[1][-1])

def make_task():
    torch.manual_seed(0)
    net, shape = {
        "video": (nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 16, 3, padding=1), nn.AdaptiveAvgPool3d(1),
                                nn.Flatten(), nn.Linear(16, 4)), (1, 4, 4, 4)),
        "double": (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).double(), (16,)),
        "looping": (Looping(), (16,)),
        "mixed": (Mixed(), (4, 6)),
    }["KIND"]
    x, y = torch.randn(48, *shape, dtype=next(net.parameters()).dtype), torch.randint(4, (48,))
    return ranksearch.Task(model=net, train=(x[:32], y[:32]), val=(x[32:], y[32:]))
'''
SPACE = """
name: s
task: t.py:make_task
budgets: {flops: SHARE}
recipe: {steps: 2, batch_size: 16, bn_batches: 1, projection: {period: 1}}
search: {trials: 1, calibration_batches: 1}
tracking: {models: MODELS}
"""


@pytest.mark.parametrize("kind", ["video", "double", "looping", "mixed"])
def test_any_net_is_searched_to_its_end(kind, tmp_path):
    (tmp_path / "t.py").write_text(TASK.replace("KIND", kind))
    share = 0.4 if kind == "mixed" else 0.7
    space = SPACE.replace("MODELS", "false" if kind == "video" else "true").replace("SHARE", f"{share:.0%}")
    (tmp_path / "s.yaml").write_text(space)
    notes = Told()
    study = ranksearch.search(tmp_path / "s.yaml", runs=tmp_path / "runs", inline=True, observer=notes)
    (row,) = study.front["trials"] if isinstance(study.front, dict) else study.front
    assert row["macs_ratio"] <= share
    refused = [text for text in notes.lines if "its run has no model" in text]
    assert bool(refused) == (kind == "looping"), notes.lines
    stored = (study.trial_folder(row["trial"]) / "model.safetensors").stat().st_size
    assert row["size_bytes"] <= stored <= row["size_bytes"] + 4000
    assert json.loads((study.folder / "front.json").read_text())["trials"]
    if kind == "looping":  # nor does what is brought up to date later end in an error
        ranksearch.sync("s", runs=tmp_path / "runs", observer=notes)
