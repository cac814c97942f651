"""Fused experts of Hugging Face: every expert's matrices are layers like any other, whichever operator runs them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, dense_cost, load_net, plan_cost, project_, save_net, trace
from ranksearch.compress.surgery import open_parts_
from ranksearch.compress.whole import check_rebuilt
from ranksearch.deploy.hugging_face import from_pretrained, save_pretrained
from ranksearch.deploy.plan_to import plan_to
from ranksearch.errors import UsageError
from ranksearch.lowering.chain import Chain
from ranksearch.model.counting import counter, macs
from ranksearch.model.experts import are_experts, with_open_experts
from ranksearch.model.slots import survey

transformers = pytest.importorskip("transformers")
SHAPES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "use_cache": False, "pad_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": 2,
}  # fmt: skip
NETS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},  # turned, interleaved, with biases
}
every_net = pytest.mark.parametrize("name", NETS)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def made(name, implementation="grouped_mm", layers=2):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPES | NETS[name], num_hidden_layers=layers)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(std=0 if path.endswith("router.bias") else 0.15)
    model.set_experts_implementation(implementation)
    return model


def words(samples=3, length=9):
    return {"input_ids": torch.randint(2, 40, (samples, length), generator=torch.Generator().manual_seed(1))}


def of_experts(net):
    return [layer for layer in net.layers if "experts" in layer.name]


def lowered_experts(net, rank=3):
    return RankPlan({layer.name: LayerPlan("svd", rank) for layer in of_experts(net)}, "own")


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_net
def test_opened_they_compute_the_same_and_learn_the_same(name, implementation):
    model = made(name, implementation)
    fused = model.model.layers[0].mlp.experts
    other = copy.deepcopy(fused)
    open_parts_(other, ["down_proj.0"])
    assert isinstance(other, type(fused))
    assert pickle.loads(pickle.dumps(other)).state_dict().keys() == other.state_dict().keys()
    x, index, share = torch.randn(7, 32), torch.randint(3, (7, 2)), torch.rand(7, 2)  # the last expert gets none
    wanted, found = fused(x, index, share), other(x, index, share)
    close(found, wanted)
    wanted.square().sum().backward()
    found.square().sum().backward()
    stacked = fused.down_proj.grad.mT if fused.is_transposed else fused.down_proj.grad
    for e in range(3):
        close(other.down_proj[e].weight.grad, stacked[e])
    assert other.down_proj[3].weight.grad is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_net
def test_an_expert_counts_by_its_tokens_and_is_lowered_exactly(name, implementation):
    model, x = made(name, implementation), words()
    net = trace(model, x)
    assert len(of_experts(net)) == 2 * 4 * 2
    assert dense_cost(net).params == sum(p.numel() for p in model.parameters())
    one = of_experts(net)[0].spec.macs((1,)) + net["model.layers.0.mlp.experts.down_proj.0"].spec.macs((1,))
    rows = 2 * 2 * 3 * 9  # layers, experts of a token, samples, tokens
    assert sum(layer.macs for layer in of_experts(net)) == pytest.approx(rows * one / 3, abs=len(net.layers))
    whole = {layer.name: LayerPlan("svd", min(layer.spec.weight_shape)) for layer in of_experts(net)}
    close(ranksearch.compress(model, RankPlan(whole), example_input=x)(**x).logits, model(**x).logits)


@every_net
def test_a_lowered_net_is_counted_projected_and_kept(name, tmp_path):
    model, x = made(name), words()
    net = trace(model, x)
    plan = lowered_experts(net)
    small = ranksearch.compress(model, plan, example_input=x)  # checks MACs and outputs, too
    assert plan_cost(net, plan).params == sum(p.numel() for p in small.parameters())
    projected = copy.deepcopy(model)
    project_(projected, plan)
    close(projected(**x).logits, small(**x).logits)
    save_net(small, plan, tmp_path / "own")
    loaded = load_net(tmp_path / "own", lambda _: made(name))
    assert torch.equal(loaded(**x).logits, small(**x).logits)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.01)
    check_rebuilt(loaded, plan, made(name), x)
    save_pretrained(small, plan, tmp_path / "theirs")
    assert torch.equal(from_pretrained(tmp_path / "theirs")(**x).logits, small(**x).logits)


def test_only_the_experts_of_which_one_is_lowered_are_opened():
    model, x = made("Mixtral"), words()
    model.requires_grad_(False)
    name = "model.layers.1.mlp.experts.down_proj.2"
    small = ranksearch.compress(model, RankPlan({name: LayerPlan("svd", 3)}), example_input=x)
    assert isinstance(small.get_submodule(name), Chain)
    assert type(small.model.layers[0].mlp.experts) is type(model.model.layers[0].mlp.experts)
    assert type(small.get_submodule("model.layers.1.mlp.experts.down_proj.1")) is nn.Linear
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_16_bits_rounding_that_sends_a_token_elsewhere_is_no_reason_to_refuse_them(implementation):
    model, x = made("Mixtral", implementation).bfloat16(), words(8, 16)
    ranksearch.compress(model, lowered_experts(trace(model, x), 5), example_input=x)
    plan = lowered_experts(trace(model, x), 5)
    other = ranksearch.compress(model, plan)
    other.model.layers[0].mlp.experts.act_fn = nn.ReLU()
    with pytest.raises(UsageError, match=r"The compressed net"):
        check_rebuilt(other, plan, model, x)


def test_onnx_is_written_of_a_copy_whose_experts_are_all_opened():
    model, x = made("GptOss"), words()
    opened = with_open_experts(model)
    assert not any(are_experts(module) for module in opened.modules())
    assert sum(are_experts(module) for module in model.modules()) == 2
    close(opened(**x).logits, model(**x).logits)
    plan = lowered_experts(trace(model, x))
    with pytest.raises(UsageError, match=r"no matrices of an LSTM, GRU, RNN or of fused experts"):
        plan_to(plan, "peft", model=model)
    with pytest.raises(UsageError, match=r"a part of a stacked weight and has no name"):
        plan_to(plan, "torchao", model=model)


def test_all_experts_of_a_stack_take_one_rank_so_that_macs_are_as_planned_wherever_tokens_go():
    model = made("Mixtral")
    few = words(1, 1)  # one token: two of the four experts of a layer
    net = trace(model, few)
    idle = [layer for layer in of_experts(net) if layer.idle]
    assert len(idle) == 2 * 2 * 2
    assert all(layer.macs == 0 < layer.params for layer in idle)
    plan = ranksearch.allocate(model, few, {"flops": "50%"}, sensitivity="activation", calibration=[few])
    ranks = {(layer.stack, plan[layer.name].lowering, plan[layer.name].rank) for layer in of_experts(net)}
    assert len(ranks) == 2 * 2
    small = ranksearch.compress(model, plan, example_input=few)
    for x in (few, words()):
        assert plan_cost(trace(model, x), plan).macs == pytest.approx(measured(small, x), abs=len(net.layers))


def measured(net, x):
    with torch.no_grad(), counter() as counted:
        net(**x)
    return macs(counted) / len(x["input_ids"])


def test_they_are_planned_by_data_trained_under_projections_and_exported_with_their_routing(tmp_path):
    model, x = made("Mixtral", layers=1).model.layers[0].mlp, torch.randn(3, 9, 32)
    plan = ranksearch.allocate(model, x, {"flops": "50%"}, sensitivity="kfac", calibration=[x])
    assert any("experts" in layer for layer, _ in plan.lowered())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ranksearch.project_every(model, optimizer, plan, period=2) as projection:
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    small = projection.compress()
    close(small(x), model(x))
    found = ranksearch.export(small, x, format="pt2", output=tmp_path / "net")
    assert found["max_rel_error"] < 1e-5
    assert found["fixed_axes"] == ()


class Odd(nn.Module):
    """Experts as they are named, which compute something else."""

    def __init__(self, how):
        super().__init__()
        self.how, self.act_fn = how, nn.SiLU()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 4))
        if how == "another matrix":
            self.mixing = nn.Parameter(torch.randn(6, 6))
        if how == "a hook":
            self.register_forward_hook(lambda *given: None)

    def forward(self, x, index, share):
        found = torch.zeros_like(x)
        for e in range(3):
            rows, place = torch.where(index == e)
            gate, up = nn.functional.linear(x[rows], self.gate_up_proj[e]).chunk(2, -1)
            y = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[e])
            found[rows] += y * (share[rows, place, None] if self.how != "no shares" else 1)
        return found


class Dense(Odd):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Odd("no shares"), r"Odd computes something else than its experts one by one do \(off by"),
        (Odd("another matrix"), "Odd computes with mixing beside its experts' matrices"),
        (Odd("a hook"), "it has hooks"),
        (Dense("as named"), r"Dense takes \(x\), not tokens, their experts and the shares of these"),
    ],
)
def test_what_computes_something_else_is_refused_with_the_reason(module, says):
    model = nn.ModuleDict({"odd": module, "plain": nn.Linear(8, 8)})
    with pytest.raises(UsageError, match=says):
        ranksearch.compress(model, RankPlan({"odd.down_proj.0": LayerPlan("svd", 2)}))
    assert survey(nn.ModuleDict({"as": Odd("named")}))[1] == {}
