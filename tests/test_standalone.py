"""Nets by themselves: kept, read again, exported and timed beside the dense net in the same runtime."""

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, save_net
from tests.conftest import SmallNet

PLAN = RankPlan({"stem": LayerPlan("im2col", 4), "body.0": LayerPlan("channel", 5)}, model="own:SmallNet")


def same(a, b, x):
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x))


def test_a_net_that_was_trained_further_is_kept_and_read_again(small_net, image, tmp_path):
    save_net(ranksearch.compress(small_net, PLAN), PLAN, tmp_path / "trial")
    net = ranksearch.load(tmp_path / "trial", build=SmallNet).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(image).square().sum().backward()
    optimizer.step()
    ranksearch.save(net, tmp_path / "kept", like=tmp_path / "trial")
    same(ranksearch.load(tmp_path / "kept", build=SmallNet), net, image)
    ranksearch.save(net, tmp_path / "by_plan", like=PLAN)
    same(ranksearch.load(tmp_path / "by_plan", build=SmallNet), net, image)
    for wrong, text in ((small_net, "has none"), (nn.Sequential(net, nn.Linear(10, 2)), "has none")):
        with pytest.raises(ranksearch.UsageError, match=text):
            ranksearch.save(wrong, tmp_path / "other", like=tmp_path / "trial")
    net.more = nn.Parameter(torch.zeros(2))
    with pytest.raises(ranksearch.UsageError, match="more"):
        ranksearch.save(net, tmp_path / "other", like=tmp_path / "trial")
    with pytest.raises(ranksearch.UsageError, match="name another folder"):
        ranksearch.save(net, tmp_path / "trial", like=tmp_path / "trial")
    with pytest.raises(ranksearch.UsageError, match="holds no compressed net"):
        ranksearch.save(net, tmp_path / "other", like=tmp_path / "nothing")
    assert not (tmp_path / "other").exists()


def test_a_net_by_itself_is_exported_and_timed_beside_dense_in_its_runtime(small_net, image, tmp_path):
    small = ranksearch.compress(small_net, PLAN)
    record = ranksearch.export(small, image[:1], format="pt2", output=tmp_path / "net", dense=small_net)
    found = torch.export.load(tmp_path / "net" / "model.pt2").module()(image)
    torch.testing.assert_close(found, small(image), atol=1e-5, rtol=1e-4)
    assert record["max_rel_error"] <= 1e-4
    assert all(
        record[key] > 0 for key in ("latency_ms", "latency_eager_ms", "latency_dense_ms", "latency_dense_runtime_ms")
    )
    for options, text in (
        ({"format": "pt2"}, "output="), ({"format": "state_dict", "output": tmp_path / "s"}, "ranksearch.save"),
        ({"format": "pt2", "output": tmp_path / "net"}, "holds something"),
        ({"format": "pt2", "output": tmp_path / "x", "force": True}, "force"),
    ):  # fmt: skip
        with pytest.raises(ranksearch.UsageError, match=text):
            ranksearch.export(small, image[:1], **options)
