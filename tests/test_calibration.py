"""Calibration leaves no trace, needs no gradient where there is none, and counts every call once."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ranksearch
from ranksearch.calibration.statistics import collect
from ranksearch.compress import trace


class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.embed = how, nn.Embedding(20, 16)
        self.a, self.b, self.h = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, mask=None):
        self.calls += 1
        match self.how:
            case "ids and mask":
                return self.h(self.b(self.a(self.embed(x)) * mask[..., None]).mean(1))
            case "no_grad":
                with torch.no_grad():
                    y = self.b(torch.relu(self.a(x)))
                return self.h(y)
            case "detached":
                y = torch.relu(self.a(x))
                return self.h(y + self.b(y.detach()))
            case "two outputs":
                y = torch.relu(self.a(x))
                return self.h(y), self.b(y)
            case "keyword":
                return self.h(input=self.b(input=torch.relu(self.a(input=x))))
            case "unreached":
                y = torch.relu(self.a(x))
                return self.h(self.b(y) if len(x) == 3 else y)
            case "reentrant" | "plain checkpoint":
                y = checkpoint(lambda v: self.b(torch.relu(self.a(v))), x, use_reentrant=self.how == "reentrant")
                return self.h(y)
        return self.h(self.b(torch.relu(self.a(x))))


def batches(how):
    torch.manual_seed(1)
    if how == "ids and mask":
        return [(torch.randint(20, (4, 6)), torch.ones(4, 6)) for _ in range(2)]
    return [torch.randn(8, 16) for _ in range(2)]


HOW = ["ids and mask", "no_grad", "detached", "two outputs", "keyword", "unreached", "reentrant", "plain checkpoint"]


@pytest.mark.parametrize("sensitivity", ["activation", "kfac", "fisher"])
@pytest.mark.parametrize("how", HOW)
def test_every_net_is_weighed_and_nothing_of_the_callers_is_changed(how, sensitivity):
    torch.manual_seed(0)
    net, given = Net(how), batches(how)
    example = torch.randn(3, 16) if how == "unreached" else given[0]
    before, kept, drawn = copy.deepcopy(net.state_dict()), copy.deepcopy(given), torch.get_rng_state()
    loss = (lambda out: out[0].logsumexp(-1).sum()) if how == "two outputs" else None
    plan = ranksearch.allocate(net, example, {"params": "80%"}, sensitivity=sensitivity, calibration=given, loss=loss)
    assert list(plan.lowered())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    for mine, was in zip(given, kept, strict=True):
        for x, y in zip(mine, was, strict=True) if isinstance(mine, tuple) else [(mine, was)]:
            assert torch.equal(x, y)
            assert not x.requires_grad
            assert x.grad is None


@pytest.mark.parametrize("how", ["reentrant", "plain checkpoint", "keyword"])
def test_a_checkpointed_or_keyword_call_counts_as_a_plain_one(how):
    torch.manual_seed(0)
    plain, given = Net("plain"), batches(how)
    other = Net(how)
    other.load_state_dict(plain.state_dict())

    def found(net):
        return collect(
            net, trace(net, given[0]), given, gradients=True, fisher=True, loss=lambda out: out.logsumexp(-1).sum(),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    mine, wanted = found(other), found(plain)
    for name in ("a", "b", "h"):
        assert mine[name].inputs.rows == wanted[name].inputs.rows == 16
        assert mine[name].gradients.rows == 16
        torch.testing.assert_close(mine[name].fisher, wanted[name].fisher)


class Domains(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norms = nn.Linear(8, 8), nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        self.register_buffer("calls", torch.zeros(()))
        for norm in self.norms:
            norm.running_mean.fill_(3.0)

    def forward(self, x):
        self.calls += 1
        return self.norms[0](self.fc(x))


@pytest.mark.parametrize("wrong", [False, True, None])
def test_bn_that_no_batch_reaches_keeps_its_statistics(wrong):
    net = Domains()
    before = copy.deepcopy(net.state_dict())
    if wrong is False:
        ranksearch.reestimate_bn_(net, [torch.randn(16, 8) for _ in range(3)])
        assert net.norms[0].num_batches_tracked == 3
        changed = {name for name, tensor in net.state_dict().items() if not torch.equal(before[name], tensor)}
        assert changed == {f"norms.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        return
    with pytest.raises(RuntimeError if wrong else ValueError):
        ranksearch.reestimate_bn_(net, [torch.randn(16, 8), torch.randn(16, 7)] if wrong else [])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_size_counts_what_a_state_dict_holds():
    from ranksearch.compress import dense_cost

    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net.register_buffer("mask", torch.ones(64, 64), persistent=False)
    assert dense_cost(trace(net, torch.randn(2, 8))).size_bytes == sum(t.nbytes for t in net.state_dict().values())


def test_a_name_with_brackets_can_be_excluded():
    net = nn.Sequential()
    net.add_module("conv[1]", nn.Linear(32, 32))
    net.add_module("b", nn.Linear(32, 32))
    plan = ranksearch.allocate(net, torch.randn(2, 32), {"flops": "80%"}, exclude=["conv[1]"])
    assert [name for name, _ in plan.lowered()] == ["b"]
