"""How nets are called and outputs are read: every form of an input gives what the plain call gives; forms and identities stay."""

import collections
import dataclasses

import pytest
import torch
from torch import nn
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

import ranksearch
from ranksearch.compress import reestimate_bn_, trace
from ranksearch.errors import UsageError
from ranksearch.model import inputs as forms

Pair = collections.namedtuple("Pair", "logits features")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    note: str = "kept"


class Two(nn.Module):
    """Two inputs and a BN; a pair, in a form of its own, comes out."""

    def __init__(self, form=Pair):
        super().__init__()
        self.a, self.norm, self.b, self.form = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4), form

    def forward(self, x, y, scale=1.0):
        x, y = (x["in"], y) if isinstance(x, dict) else (x, y)
        h = self.norm(self.a(x)) + scale * y
        return self.form(self.b(h), h)


def pair(samples=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 16, generator=generator), torch.randn(samples, 16, generator=generator)


def in_every_form():
    x, y = pair()
    return {
        "tuple": (x, y),
        "list": [x, y, 1.0],
        "dict": {"x": x, "y": y},
        "encoding": BatchEncoding({"x": x, "y": y, "scale": 1.0}),
        "nested": ({"in": x}, y),
    }


@pytest.mark.parametrize("form", in_every_form())
def test_every_form_of_inputs_is_traced_planned_calibrated_and_compressed_alike(form):
    torch.manual_seed(0)
    given, (x, y) = in_every_form()[form], pair()
    net = Two().eval()
    wanted = trace(net, (x, y))
    assert trace(net, given) == wanted
    plans = [
        ranksearch.allocate(net, one, {"params": "80%"}, sensitivity="kfac", calibration=[one], seed=3)
        for one in ((x, y), given)
    ]
    assert plans[0] == plans[1]
    small = ranksearch.compress(net, plans[0]).eval()
    assert torch.equal(forms.call(small, given).logits, small(x, y).logits)
    nets = [Two(), Two()]
    nets[1].load_state_dict(nets[0].state_dict())
    reestimate_bn_(nets[0], [(x, y)])
    reestimate_bn_(nets[1], [given])
    assert torch.equal(nets[0].norm.running_var, nets[1].norm.running_var)
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in forms.tensors(given))


OUTPUTS = {
    "tensor": torch.ones(3, 2),
    "tuple": (torch.ones(3, 2), [torch.zeros(3)]),
    "named": Pair(torch.ones(3, 2), torch.zeros(3, 1)),
    "dataclass": Output(torch.ones(3, 2)),
    "mapping": collections.OrderedDict(logits=torch.ones(3, 2)),
    "transformers": SequenceClassifierOutput(logits=torch.ones(3, 2), loss=torch.tensor(1.0)),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_an_output_keeps_its_form(form):
    given = OUTPUTS[form]
    doubled = forms.mapped(lambda x: 2 * x, given)
    assert type(doubled) is type(given)
    wanted = [2 * x for x in forms.tensors(given)]
    assert all(torch.equal(a, b) for a, b in zip(forms.tensors(doubled), wanted, strict=True))
    if form not in ("tuple",):
        assert torch.equal(forms.main_output(doubled), torch.full((3, 2), 2.0))
    whole = forms.joined([given, given])
    assert type(whole) is type(given)
    assert [len(x) for x in forms.tensors(whole) if x.dim()] == [2 * len(x) for x in forms.tensors(given) if x.dim()]
    if form == "transformers":
        assert forms.own_loss(doubled) == 2.0
        assert torch.equal(doubled["logits"], doubled.logits)


def test_cutting_and_picking_leave_alone_what_is_not_of_the_batch():
    x, _ = pair()
    given = {"x": x, "mask": x > 0, "table": torch.ones(1, 9), "scale": torch.tensor(2.0), "flag": True}
    part = forms.cut(given, 1, 3)
    assert torch.equal(part["x"], x[1:3])
    assert part["mask"].dtype == torch.bool
    assert part["table"].shape == (1, 9)
    assert part["scale"] == 2.0
    assert part["flag"] is True
    assert torch.equal(forms.picked(given, torch.tensor([4, 0]))["x"], x[[4, 0]])
    query, key = forms.mapped(lambda t: t + 1, (x, x))
    assert query is key


def test_logits_of_tokens_have_their_classes_last_where_they_are_named():
    tokens = torch.randn(2, 5, 3)
    assert forms.class_logits(tokens) is tokens
    assert torch.equal(forms.class_logits({"logits": tokens}), tokens.movedim(-1, 1))
    with pytest.raises(UsageError, match="logits"):
        forms.class_logits((tokens, tokens + 1))


def test_what_holds_no_batch_is_told():
    with pytest.raises(UsageError, match=r"batched tensor.*got a str"):
        trace(Two(), "words")
