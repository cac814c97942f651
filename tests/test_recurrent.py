"""LSTM, GRU and RNN: their input and recurrent weights are layers like any other, in every setting that torch has."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, dense_cost, load_net, plan_cost, project_, save_net, trace
from ranksearch.compress.surgery import open_parts_
from ranksearch.errors import UsageError
from ranksearch.model.slots import survey

SETTINGS = {
    "lstm": (nn.LSTM, {}),
    "lstm, two layers forth and back": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm, projected": (nn.LSTM, {"proj_size": 5, "bidirectional": True, "num_layers": 2}),
    "lstm, no bias": (nn.LSTM, {"bias": False, "batch_first": True}),
    "gru": (nn.GRU, {"num_layers": 2}),
    "gru, forth and back": (nn.GRU, {"bidirectional": True, "batch_first": True}),
    "rnn": (nn.RNN, {"nonlinearity": "relu"}),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def made(name):
    torch.manual_seed(0)
    kind, settings = SETTINGS[name]
    return kind(10, 12, **settings)


def opened(module):
    net = copy.deepcopy(module)
    open_parts_(net, [next(iter(trace(net, torch.randn(4, 3, 10)).layers)).name])
    return net


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@every_setting
def test_opened_it_computes_the_same(name):
    module = made(name)
    other = opened(module)
    assert isinstance(other, SETTINGS[name][0])
    assert torch.equal(other.weight_hh_l0, module.weight_hh_l0)
    x = torch.randn(3, 3, 10)
    output, state = module(x)
    close(other(x), (output, state))
    start = tuple(torch.randn_like(h) for h in state) if isinstance(state, tuple) else torch.randn_like(state)
    close(other(x, start), module(x, start))
    alone = tuple(h[:, 0] for h in start) if isinstance(start, tuple) else start[:, 0]
    close(other(x[:, 0], alone), module(x[:, 0], alone))
    close(pickle.loads(pickle.dumps(other))(x), (output, state))
    for ordered in (True, False):
        packed = pack_padded_sequence(torch.randn(5, 3, 10), [5, 3, 2] if ordered else [2, 5, 3], False, ordered)
        (ours, own), (theirs, wanted) = other(packed, start), module(packed, start)
        close(pad_packed_sequence(ours), pad_packed_sequence(theirs))
        close(own, wanted)


class Tagger(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.rnn = made(name)
        width = self.rnn.proj_size or self.rnn.hidden_size
        self.tags = nn.Linear(width * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x):
        return self.tags(self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))[0])


@every_setting
def test_its_matrices_are_lowered_exactly_counted_exactly_and_kept(name, tmp_path):
    model, x = Tagger(name).eval(), torch.randn(2, 4, 10)
    net = trace(model, x)
    matrices = sum(p.dim() > 1 for p in model.rnn.parameters())
    assert len(net.layers) == matrices + 1
    assert not net.skipped
    assert dense_cost(net).params == sum(p.numel() for p in model.parameters())
    assert net.other_macs == 0
    whole = {layer.name: LayerPlan("svd", min(layer.spec.weight_shape)) for layer in net.layers}
    close(ranksearch.compress(model, RankPlan(whole), example_input=x)(x), model(x))
    plan = RankPlan({layer: LayerPlan("svd", 3) for layer in whole if "hr" not in layer}, "own")
    small = ranksearch.compress(model, plan, example_input=x)  # checks MACs and outputs, too
    assert plan_cost(net, plan).params == sum(p.numel() for p in small.parameters())
    projected = copy.deepcopy(model)
    project_(projected, plan)
    close(projected(x), small(x))
    save_net(small, plan, tmp_path)
    close(load_net(tmp_path, lambda _: Tagger(name))(x), small(x))


@pytest.mark.parametrize("sensitivity", ["activation", "kfac"])
def test_it_is_planned_by_data_trained_under_projections_and_exported(sensitivity, tmp_path):
    model, x = Tagger("lstm, two layers forth and back"), torch.randn(4, 5, 10)
    plan = ranksearch.allocate(model, x, {"flops": "50%"}, sensitivity=sensitivity, calibration=[x])
    assert {layer.rpartition(".")[2][:2] for layer, _ in plan.lowered()} >= {"ih", "hh"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ranksearch.project_every(model, optimizer, plan, period=2) as projection:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    small = projection.compress()
    close(small(x), model(x))
    if sensitivity == "kfac":
        found = ranksearch.export(small, x, format="pt2", output=tmp_path / "net")
        assert found["max_rel_error"] < 1e-5
        assert found["fixed_axes"] == ("input, axis 1",)  # a loop over the steps that the example has


def test_a_recurrent_net_whose_weights_are_computed_or_that_has_a_forward_of_its_own_is_refused_with_the_reason():
    class Own(nn.GRU):
        def forward(self, x):
            return super().forward(2 * x)

    dropped = nn.LSTM(10, 12)
    weight = dropped.weight_hh_l0
    del dropped.weight_hh_l0
    dropped.raw, dropped.weight_hh_l0 = weight, nn.functional.dropout(weight.detach(), 0.5)
    for odd, says in ((Own(10, 12), "forward of its own"), (dropped, "weights are computed")):
        model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(8, 8)})
        with pytest.raises(UsageError, match=r"'odd\.ih_l0'"):
            ranksearch.compress(model, RankPlan({"odd.ih_l0": LayerPlan("svd", 2)}))
        assert says in survey(model)[1]["odd"]
