"""A plan in the words of other libraries, and a compressed net of Hugging Face in its own folder."""

import json
import math
import re
import sys

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch import cli
from ranksearch.compress import LayerPlan, RankPlan, save_net
from ranksearch.errors import UsageError


class Several(nn.Module):
    """A conv, a grouped one, Linears, a packed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(8, 12, 3), nn.Conv2d(12, 12, 3, groups=2)
        self.fc, self.fc2 = nn.Linear(12, 12), nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 2)


PLAN = RankPlan(
    {
        "conv": LayerPlan("im2col", 5),
        "grouped": LayerPlan("im2col", 2),
        "fc": LayerPlan("svd_pivoted", 7),
        "fc2": LayerPlan("tiled_8", 3),
        "attention.in_proj": LayerPlan("svd", 4),
    }
)


def test_peft_has_a_rank_and_an_alpha_for_every_layer_by_its_whole_name():
    found = ranksearch.plan_to(PLAN, "peft", model=Several())
    assert found["target_modules"] == ["conv", "fc"]
    assert found["rank_pattern"] == found["alpha_pattern"] == {"^conv": 5, "^fc": 7}
    assert found["left_out"].keys() == {"grouped", "fc2", "attention.in_proj"}
    for name, rank in {"conv": 5, "fc": 7, "block.fc": None, "fc2": None}.items():  # as peft matches them
        matched = [r for key, r in found["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", name)]
        assert matched == ([] if rank is None else [rank])


def test_torchao_cuts_to_the_plans_ranks():
    net = Several()
    found = ranksearch.plan_to(PLAN, "torchao", model=net, period=30)
    assert found["left_out"].keys() == {"grouped", "fc2"}
    ranks = {"conv.weight": 5, "fc.weight": 7, "attention.in_proj_weight": 4}
    assert found["config"].keys() == ranks.keys()
    for name, group in found["config"].items():
        values = torch.linalg.svdvals(net.get_parameter(name).flatten(1))
        assert len(values) - math.ceil(group["min_sparsity"] * len(values)) == ranks[name] == group["rank"]
        assert (group["group_type"], group["prox_type"], group["prox_freq"]) == ("SVDGrouper", "MinRankConstraint", 30)
    whole = ranksearch.plan_to(RankPlan({"fc": LayerPlan("svd", 12)}), "torchao", model=net)
    assert whole["config"]["fc.weight"]["min_sparsity"] == 0
    assert "prox_freq" not in whole["config"]["fc.weight"]


def test_what_cannot_be_said_is_refused_in_a_sentence():
    with pytest.raises(UsageError, match=r"'pefd'.*peft"):
        ranksearch.plan_to(PLAN, "pefd", model=Several())
    with pytest.raises(UsageError, match=r"(?s)Nothing of this plan.*grouped"):
        ranksearch.plan_to(RankPlan({"grouped": LayerPlan("im2col", 2)}), "torchao", model=Several())
    with pytest.raises(UsageError, match="no layer 'fd'"):
        ranksearch.plan_to(RankPlan({"fd": LayerPlan("svd", 2)}), "json", model=Several())


def verb(monkeypatch, *arguments):
    """The exit code of `ranksearch plan-to ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["ranksearch", "plan-to", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_verb_reads_a_folder_or_a_file(tmp_path, capsys, monkeypatch):
    from ranksearch.tasks import build_reference

    net = build_reference("digits/resnet8")
    name = next(name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels > 8)
    plan = RankPlan({name: LayerPlan("im2col", 3)}, model="digits/resnet8")
    save_net(ranksearch.compress(net, plan), plan, tmp_path)
    assert verb(monkeypatch, "json", tmp_path) == 0
    assert json.loads(capsys.readouterr().out) == plan.to_dict()
    assert verb(monkeypatch, "torchao", tmp_path / "plan.json", "--period", 5, "-o", tmp_path / "p.json") == 0
    assert json.loads((tmp_path / "p.json").read_text())["config"][f"{name}.weight"]["prox_freq"] == 5
    assert verb(monkeypatch, "peft", tmp_path / "nothing.json") == 2
    assert "plan.json" in capsys.readouterr().err


def test_a_compressed_net_of_hugging_face_saves_and_loads_with_its_plan(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    net = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**settings, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    ).eval()
    x = torch.randint(0, 50, (2, 6))
    plan = ranksearch.allocate(net, x, {"flops": "70%"})
    small = ranksearch.compress(net, plan)
    ranksearch.save_pretrained(small, plan, tmp_path)
    assert RankPlan.from_dict(json.loads((tmp_path / "config.json").read_text())["ranksearch_plan"]) == plan
    again = ranksearch.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, small(x).logits, rtol=0, atol=0)
    assert isinstance(again, transformers.GPT2LMHeadModel)
    net.save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="holds no plan"):
        ranksearch.from_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="takes a model of Hugging Face"):
        ranksearch.save_pretrained(nn.Linear(2, 2), RankPlan(), tmp_path)
