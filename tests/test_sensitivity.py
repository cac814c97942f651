"""Sensitivities against what they stand for: outputs that were run, gradients by autograd, formulas by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ranksearch
from ranksearch.allocate import MEASURES, SENSITIVITIES, LayerRules, rank_curves, weigh
from ranksearch.allocate.sensitivity import activation, fisher, kfac
from ranksearch.calibration import statistics
from ranksearch.calibration.drawn import default_loss, drawn_for
from ranksearch.calibration.statistics import Moment, collect, patches
from ranksearch.compress import trace
from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.tasks.resnet import CifarResNet

SPECS = [
    LayerSpec(6, 8),
    LayerSpec(6, 8, bias=True),
    LayerSpec.conv(4, 6, (5,), stride=(2,), padding=(2,), bias=True),
    LayerSpec.conv(4, 6, (3, 3)),
    LayerSpec.conv(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=True),
    LayerSpec.conv(4, 6, (4, 3), padding="same", dilation=(1, 2)),
    LayerSpec.conv(4, 6, (3, 3), padding=(1, 1), groups=2),
    LayerSpec.conv(4, 4, (3, 3), padding=(1, 1), groups=4, bias=True),
    *(LayerSpec.conv(4, 6, (3, 3), padding=(1, 2), padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
    LayerSpec.conv(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(1, 1, 0)),
    LayerSpec.conv(4, 6, (4,), transposed=True, stride=(2,), padding=(1,)),
    LayerSpec.conv(4, 6, (3, 3), transposed=True, stride=(2, 1), padding=(1, 2), output_padding=(1, 0), groups=2),
    LayerSpec.conv(4, 6, (3, 2), transposed=True, dilation=(2, 1), padding=(5, 0), bias=True),
    LayerSpec.conv(2, 3, (2, 2, 3), transposed=True, stride=(2, 1, 1)),
]


def make(spec: LayerSpec, samples: int = 5) -> tuple[nn.Module, torch.Tensor]:
    """The layer in fp64 with seeded weights, and inputs of an odd size; a Linear sees tokens."""
    torch.manual_seed(0)
    layer = spec.build(dtype=torch.float64)
    sizes = (7, 6, 5)[: len(spec.kernel_size)]
    x = torch.randn(samples, spec.in_channels, *sizes) if spec.is_conv else torch.randn(samples, 3, spec.in_channels)
    return layer, x.double() + 0.3


def as_net(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Flatten())


def found_in(layer: nn.Module, x: torch.Tensor, **asked):
    """(spec, statistics) of the layer alone."""
    net, spec = as_net(layer), LayerSpec.of(layer)
    asked = {"gradients": False, "fisher": False, "loss": None} | asked
    traced = trace(net, x[:2])
    return spec, collect(net, traced, [x[:2], x[2:]], generator=torch.Generator().manual_seed(0), **asked)["0"]


def an_error(layer: nn.Module, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight-shaped error in torch's layout and as [g, T/g, n]."""
    error = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return error, spec.blocks(error).flatten(2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_patches_times_weights_are_the_layers_output(spec):
    layer, x = make(spec)
    blocks = spec.blocks(layer.weight.detach())  # [g, T/g, S/g, *k]
    found = patches(x, spec)  # [N, *out, S, *k]
    rows = found.reshape(*found.shape[: found.dim() - 1 - len(spec.kernel_size)], spec.groups, -1)
    output = torch.einsum("...gn,gtn->...gt", rows, blocks.flatten(2)).flatten(-2)
    output = output + (layer.bias.detach() if spec.bias else 0)
    torch.testing.assert_close(
        output.movedim(-1, 1) if spec.is_conv else output, layer(x).detach(), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_activation_is_the_outputs_error_as_it_would_be_measured(spec, norm):
    layer, x = make(spec)
    error, blocks = an_error(layer, spec)
    _, found = found_in(layer, x)
    with torch.no_grad():
        before = layer(x)
        layer.weight += error
        difference = layer(x) - before
    rows = (difference.movedim(1, -1) if spec.is_conv else difference).flatten(0, -2)
    expected = rows.var(dim=0, correction=0).sum() if norm else rows.square().sum(dim=1).mean()
    assert float(activation(blocks.float(), found, norm, 0.0)) == pytest.approx(float(expected), rel=1e-4)
    assert found.positions == len(rows) / len(x)


def test_wide_inputs_are_stood_for_by_drawn_rows(monkeypatch):
    layer, x = make(LayerSpec.conv(16, 6, (3, 3)), samples=60)
    _, blocks = an_error(layer, LayerSpec.of(layer))
    exact = float(activation(blocks.float(), found_in(layer, x)[1], False, 0.0))
    monkeypatch.setattr(statistics, "WIDE", 100)
    monkeypatch.setattr(statistics, "ROWS", 700)
    drawn = [float(activation(blocks.float(), found_in(layer, x)[1], False, 0.0)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] == pytest.approx(exact, rel=0.2)
    assert drawn[0] != exact


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("chunk", [2**24, 1])
def test_fisher_is_the_mean_square_of_every_samples_gradient(spec, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "FISHER_NUMBERS", chunk)
    layer, x = make(spec)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return output.sin().square().sum()

    _, found = found_in(layer, x, fisher=True, loss=loss)
    squares = torch.zeros_like(layer.weight)
    for sample in x:
        layer.zero_grad()
        loss(layer(sample[None])).backward()
        squares += layer.weight.grad**2 / len(x)
    expected = spec.blocks(squares).flatten(2)
    torch.testing.assert_close(found.fisher.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    error, blocks = an_error(layer, spec)
    assert float(fisher(blocks, found, False, 0.0)) == pytest.approx(0.5 * float((squares * error**2).sum()), rel=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kfac_is_the_trace_of_its_four_matrices(spec):
    layer, x = make(spec)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return output.sin().square().sum()

    _, found = found_in(layer, x, gradients=True, loss=loss)
    output = layer(x)
    (gradient,) = torch.autograd.grad(loss(output), output)
    g = (gradient.movedim(1, -1) if spec.is_conv else gradient).reshape(
        -1, spec.groups, spec.out_channels // spec.groups
    )
    a = patches(x, spec).reshape(len(g), spec.groups, -1)
    _, blocks = an_error(layer, spec)
    expected = {0.0: 0.0, 0.5: 0.0}
    for damping in expected:
        for group in range(spec.groups):
            big_g = (g[:, group].T @ g[:, group] / len(g)).numpy()
            big_a = (a[:, group].T @ a[:, group] / len(a)).numpy()
            big_g, big_a = (m + damping * np.trace(m) / len(m) * np.eye(len(m)) for m in (big_g, big_a))
            e = blocks[group].numpy()
            expected[damping] += 0.5 * len(g) / len(x) * np.trace(big_g @ e @ big_a @ e.T)
        assert float(kfac(blocks.float(), found, False, damping)) == pytest.approx(expected[damping], rel=1e-3)
    assert expected[0.5] > expected[0.0]


def test_kfac_of_one_sample_at_one_position_is_the_squared_first_order_change():
    layer, x = make(LayerSpec(6, 4), samples=1)
    x = x[:, 0]
    found = collect(
        nn.Sequential(layer), trace(nn.Sequential(layer), x), [x], gradients=True, fisher=False,
        loss=lambda y: (y**3).sum(), generator=torch.Generator(),
    )["0"]  # fmt: skip
    gradient = 3 * layer(x).detach() ** 2
    error, blocks = an_error(layer, LayerSpec.of(layer))
    change = float((gradient[0] @ error @ x[0]).detach() ** 2)
    assert float(kfac(blocks.float(), found, False, 0.0)) == pytest.approx(0.5 * change, rel=1e-4)


def test_gradients_at_the_logits_have_the_covariance_of_a_draw():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    nn.init.zeros_(layer.weight)
    x = torch.randn(20_000, 3)
    net = nn.Sequential(layer)
    found = collect(
        net, trace(net, x[:1]), [x], gradients=True, fisher=False, loss=None, generator=torch.Generator().manual_seed(0)
    )["0"].gradients
    p = layer.bias.detach().softmax(0)
    expected = torch.diag(p) - torch.outer(p, p)
    eye = torch.eye(4)[None]
    torch.testing.assert_close(found.times(eye, centred=False, damping=0)[0], expected, rtol=0, atol=0.01)
    assert float(found.mean.abs().max()) < 0.01


@pytest.mark.parametrize("output", [(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.int64)])
def test_an_output_without_classes_is_told_what_to_do(output):
    with pytest.raises(UsageError, match="give the sensitivity a loss"):
        default_loss(torch.Generator(), balanced=False)(output)


def test_moments_add_up_over_batches():
    rows = torch.randn(50, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = Moment(torch.Generator()), Moment(torch.Generator())
    whole.add(rows)
    for part in rows.split(13):
        parts.add(part)
    matrix = torch.randn(2, 3, 5, dtype=torch.float64)
    for centred in (False, True):
        expected = torch.stack(
            [m @ torch.from_numpy(np.cov(r.T, bias=True)) for m, r in zip(matrix, rows.transpose(0, 1), strict=True)]
        )
        for moment in (whole, parts):
            found = moment.times(matrix, centred=centred, damping=0)
            if centred:
                torch.testing.assert_close(found, expected)
            torch.testing.assert_close(found, whole.times(matrix, centred=centred, damping=0))


class Awkward(nn.Module):
    """In-place ReLU behind a conv without BN, a grouped conv, a transposed conv, BN, a tied Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True)
        self.grouped, self.norm = nn.Conv2d(16, 16, 3, groups=2, stride=2, bias=False), nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 12, 3, stride=2)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(self.grouped(self.act(self.conv(x))))
        x = self.act(self.up(x)).mean(dim=(2, 3))
        x = self.second(self.act(self.first(x)))
        return self.head(x if scale is None else x * scale)


class Tokens(nn.Module):
    """Integer inputs, an attention, torch's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 48, batch_first=True, dropout=0.1), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


def awkward(kind: str) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    if kind == "tokens":
        return Tokens(), [torch.randint(0, 20, (6, 7)) for _ in range(2)]
    batches = [torch.randn(6, 3, 9, 9) for _ in range(2)]
    return Awkward(), batches if kind == "convs" else [(x, torch.rand(6, 1)) for x in batches]


@pytest.mark.parametrize("kind", ["convs", "tuples", "tokens"])
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_weighing_leaves_the_model_alone_and_covers_every_layer(kind, sensitivity):
    model, batches = awkward(kind)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = trace(model, batches[0])
    curves = rank_curves(model, net, LayerRules(("im2col", "channel", "spatial", "tucker2", "svd")))
    first, second = (weigh(curves, model, batches, sensitivity, MEASURES["relative_energy"], seed=3) for _ in range(2))
    for options in curves.layers:
        damage = first(options)
        assert damage[0] == 0
        assert (damage >= 0).all()
        assert np.isfinite(damage).all()
        assert (damage == second(options)).all()
        if len(options.choices) > 3:
            assert damage[1:].max() > 0
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("sensitivity", ["activation", "fisher", "kfac"])
@pytest.mark.parametrize("lowering", ["im2col", "channel", "spatial", "tucker2", "tiled_c2", "cp"])
def test_shares_at_the_ends_are_the_exact_form_and_fall_with_the_rank(sensitivity, lowering):
    torch.manual_seed(0)
    model = CifarResNet(1, channels=3, classes=10).eval()
    batch = torch.randn(8, 3, 16, 16)
    net = trace(model, batch)
    curves = rank_curves(model, net, LayerRules((lowering,), include=("layer2.0.conv2",)))
    form = {"activation": activation, "fisher": fisher, "kfac": kfac}[sensitivity]
    damage = weigh(curves, model, [batch], sensitivity, MEASURES["relative_energy"], seed=0, damping=0.1, temper=1.0)
    found = collect(
        model, net, [batch], gradients=sensitivity == "kfac", fisher=sensitivity == "fisher", loss=None,
        generator=torch.Generator().manual_seed(0),
    )["layer2.0.conv2"]  # fmt: skip
    options = next(o for o in curves.layers if o.layer.name == "layer2.0.conv2")
    spec, weight = options.layer.spec, model.layer2[0].conv2.weight.detach()
    total = float(form(spec.blocks(weight).flatten(2), found, True, 0.1))
    order = np.argsort(options.removed[1:]) + 1
    for index in (order[0], order[-1]):
        (near,) = lowering_named(lowering).approximations(weight, [options.choices[index].rank], spec)
        exact = float(form(spec.blocks(weight - near).flatten(2), found, True, 0.1))
        scale = 1.0 if sensitivity != "activation" else total
        # the curves of cp and tucker2 are estimates of what is removed, to which the quotient is held
        tolerance = {"cp": 0.15, "tucker2": 0.05}.get(lowering, 2e-3)
        assert damage(options)[index] * scale == pytest.approx(exact, rel=tolerance, abs=1e-4 * total)
    shares = damage(options)[order]
    assert np.corrcoef(shares, options.removed[order])[0, 1] > 0.9


def test_tempering_and_damping_are_what_they_say():
    model, batches = awkward("convs")
    curves = rank_curves(model, trace(model, batches[0]), LayerRules(("im2col", "channel", "svd")))
    scales = {
        temper: weigh(curves, model, batches, "kfac", MEASURES["relative_energy"], seed=0, temper=temper).scales
        for temper in (0.0, 0.5, 1.0)
    }
    for name, scale in scales[1.0].items():
        assert scales[0.5][name] == pytest.approx(scale**0.5)
        assert scales[0.0][name] == 1
    assert weigh(curves, model, batches, "activation", MEASURES["relative_energy"], seed=0).scales == dict.fromkeys(
        scales[1.0], 1.0
    )


def test_missing_and_broken_data_are_errors():
    model, batches = awkward("convs")
    curves = rank_curves(model, trace(model, batches[0]), LayerRules(("im2col",)))
    with pytest.raises(UsageError, match="at least one batch"):
        weigh(curves, model, [], "activation", MEASURES["relative_energy"], seed=0)
    with pytest.raises(NonFiniteError, match="Layer 'conv'"):
        weigh(curves, model, [batches[0] * float("nan")], "activation", MEASURES["relative_energy"], seed=0)
    assert weigh(curves, model, [], "none", MEASURES["relative_energy"], seed=0).shares == {}


def test_a_loss_of_ones_own_serves_a_regression():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 1), nn.Flatten(0)), torch.randn(40, 12)
    plan = ranksearch.allocate(
        model,
        x,
        {"params": "60%"},
        sensitivity="kfac",
        calibration=[x],
        loss=lambda y: F.mse_loss(y, y.detach() + 1, reduction="sum"),
    )
    assert next(plan.lowered(), None) is not None


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_public_allocate_with_every_sensitivity(small_net, image, sensitivity):
    plan = ranksearch.allocate(small_net, image, {"flops": "50%"}, sensitivity=sensitivity, calibration=[image])
    small = ranksearch.compress(small_net, plan)
    assert small(image).shape == (2, 10)
    assert 0 <= plan.gap < 1
    net = ranksearch.trace(small_net, image)
    assert ranksearch.plan_cost(net, plan).macs <= 0.5 * ranksearch.plan_cost(net, ranksearch.RankPlan()).macs


def squared_gradients(loss, output, draws):
    """Mean of g gᵀ over draws, g the gradient by one sample's output [n]."""
    total = torch.zeros(output.numel(), output.numel())
    for _ in range(draws):
        leaf = output.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, None), leaf)
        total += torch.outer(gradient.flatten(), gradient.flatten())
    return total / draws


@pytest.mark.parametrize("kind", ["labels", "weighted", "binary", "squared"])
def test_drawn_targets_give_the_fisher_information_of_the_likelihood(kind):
    """diag(p) - p pᵀ of classes, times their mean weight; p (1 - p) of yes and no, 1 of a mean: closed forms."""
    output = torch.tensor([[0.5, -0.3, 1.0]])
    weight = torch.tensor([1.0, 2.0, 4.0])
    p, q = output.softmax(1)[0], output.sigmoid()[0]
    classes = p.diag() - torch.outer(p, p)
    loss, expected = {
        "labels": (None, classes),
        "weighted": (nn.CrossEntropyLoss(weight=weight), (p @ weight) * classes),
        "binary": (nn.BCEWithLogitsLoss(), (q * (1 - q)).diag()),
        "squared": (nn.MSELoss(), torch.eye(3)),
    }[kind]
    drawn = drawn_for(loss, torch.Generator().manual_seed(0), balanced=False)
    torch.testing.assert_close(
        squared_gradients(drawn, output, 3000), expected, rtol=0.1, atol=0.05 * expected.max().item()
    )


@pytest.mark.parametrize("loss", [None, nn.BCEWithLogitsLoss()], ids=["classes", "binary"])
def test_balanced_draws_count_the_rare_class_as_much_as_the_common_one(loss):
    """Of a prediction and its mirror image, 95 to 5, the squared gradients are alike; balanced, the rare one has several times as much."""
    rare, common = (torch.tensor([[0.0, 6.0]]), torch.tensor([[6.0, 0.0]])) if loss is None else (6.0, -6.0)
    samples = [common] * 95 + [rare] * 5
    output = 0.5 * (torch.cat(samples) if loss is None else torch.tensor(samples)[:, None])
    for balanced in (False, True):
        drawn = drawn_for(loss, torch.Generator().manual_seed(0), balanced=balanced)
        leaf = output.clone().requires_grad_()
        total = torch.zeros(len(output))
        for _ in range(400):
            (gradient,) = torch.autograd.grad(drawn(leaf, None), leaf)
            total += gradient.square().sum(1)
        ratio = (total[95:].mean() / total[:95].mean()).item()
        assert ratio > 3 if balanced else ratio == pytest.approx(1, rel=0.4)


def test_positions_to_be_ignored_have_no_gradient():
    targets = torch.tensor([[0, -100, 1]])
    drawn = drawn_for(nn.CrossEntropyLoss(), torch.Generator().manual_seed(0), balanced=False)
    leaf = torch.zeros(1, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(drawn(leaf, targets), leaf)
    assert gradient[0, :, 1].abs().max() == 0
    assert gradient[0, :, (0, 2)].abs().min() > 0


def test_one_output_is_no_longer_void(image):
    """Softmax of a single output is 1 whatever the net does: labels drawn from it had no gradient, and every layer fell to rank 1."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1)),
        torch.randn(40, 12),
    )
    curves = rank_curves(model, trace(model, x), LayerRules(("svd",)))
    damage = weigh(curves, model, [x], "kfac", MEASURES["relative_energy"], seed=0)
    assert all(scale > 0 for scale in damage.scales.values())
    assert all(damage(o)[1:].min() > 0 for o in curves.layers if len(o.choices) > 1)


@pytest.mark.parametrize("sensitivity", ["kfac", "fisher"])
def test_a_void_sensitivity_is_said_and_gives_way_to_the_activations(sensitivity):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 4)), torch.randn(40, 12)
    curves = rank_curves(model, trace(model, x), LayerRules(("svd",)))
    measure = MEASURES["relative_energy"]
    with pytest.warns(UserWarning, match="is void here"):
        found = weigh(curves, model, [x], sensitivity, measure, seed=0, loss=lambda y: 0 * y.sum())
    known = weigh(curves, model, [x], "activation", measure, seed=0)
    assert all(np.array_equal(found(o), known(o)) for o in curves.layers)
