"""Nets as a whole, from the trace to ONNX: the known architectures where torchvision and timm load, small nets of their structures
anywhere.

The laws are those of `scripts/check_nets.py`: counts as torch has them, the net itself at full rank, decomposed = projected, exported
= decomposed, what is not lowered said by name and reason.
"""

import importlib.util
import sys

import pytest
import torch

from ranksearch.deploy.formats import FORMATS
from ranksearch.errors import UsageError
from ranksearch.tasks.nets import build_named
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))

from check_nets import BUDGET, FORMS, LIBRARY_NETS, build, check_net, faults, untouched
from structures import STRUCTURES

HERE = tuple(form for form in FORMS if all(map(importlib.util.find_spec, FORMATS[form].needs)))

UNTOUCHED = {
    "resnet18": {},
    "mobile": {},
    "densenet": {},
    "convnext": dict.fromkeys("235", "layer_scale itself"),
    "vit": {"(the model itself)": "token, positions itself"},
    "unet": {},
}
"""Net -> what is not lowered, and a part of the reason that is given."""
LIBRARY_UNTOUCHED = {
    "torchvision:convnext_tiny": "layer_scale itself",
    "timm:vit_small_patch16_224": "cls_token, pos_embed itself",
    "timm:swin_tiny_patch4_window7_224": "relative_position_bias_table itself",
}


def lawful(name):
    row = check_net(name, HERE)
    assert faults(row) == []
    assert 0.9 * BUDGET < row["macs_ratio"] <= BUDGET
    assert 0 < row["lowered"] <= row["layers"]
    return row


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_keeps_the_laws_from_the_trace_to_the_export(name):
    row = lawful(name)
    assert row["skipped"].keys() == UNTOUCHED[name].keys()
    assert all(part in row["skipped"][layer] for layer, part in UNTOUCHED[name].items())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LIBRARY_NETS)
def test_a_known_architecture_keeps_the_laws_from_the_trace_to_the_export(name):
    try:
        build_named(name, 10)
    except UsageError as error:
        pytest.skip(str(error))
    row = lawful(name)
    assert all(LIBRARY_UNTOUCHED.get(name, "nothing else") in reason for reason in row["skipped"].values())
    assert bool(row["skipped"]) == (name in LIBRARY_UNTOUCHED)


def test_the_laws_would_notice_a_layer_that_computes_something_else(monkeypatch):
    from ranksearch.lowering import LOWERINGS

    lowering = LOWERINGS["svd"]
    decompose = lowering.decompose
    monkeypatch.setattr(
        type(lowering), "decompose", lambda self, *a, **k: tuple(1.001 * factor for factor in decompose(*a, **k))
    )
    assert {fault.split()[0] for fault in faults(check_net("vit", ()))} == {
        "full_rank_error", "full_rank_fp64", "projected_error",
    }  # fmt: skip


def test_a_layer_that_cannot_become_cheaper_is_named_with_the_reason():
    from ranksearch.compress import trace

    thin = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 1, groups=16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(16, 1),
    )  # fmt: skip
    found = dict(untouched(trace(thin, torch.zeros(1, 3, 8, 8))))
    assert found.keys() == {"1", "4"}
    assert found["4"] == "no rank of svd_pivoted costs less than the dense layer."
    assert found["1"].startswith("no rank of spatial, channel_pivoted, im2col_pivoted, spatial_pivoted")


def test_nets_are_built_for_the_input_that_is_stated():
    for name in STRUCTURES:
        assert build(name).eval()(torch.zeros(1, 3, 32, 32)).shape[0] == 1
