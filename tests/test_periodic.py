"""Projection by a hook on the optimizer: in plain loops, wrapped models, accumulated and skipped steps, and what is refused."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, project_, trace
from ranksearch.errors import NonFiniteError, UsageError
from tests.conftest import SmallNet

PLAN = RankPlan({"stem": LayerPlan("im2col", 3), "body.0": LayerPlan("spatial", 6), "head": LayerPlan("svd", 2)})


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, optimizer, images, steps):
    """A loop that knows nothing of projections."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def has_the_ranks(model):
    return all(share < 1e-6 for share in project_(copy.deepcopy(model), PLAN).values())


def test_the_hook_does_what_a_loop_with_a_projector_does(small_net, image):
    theirs = copy.deepcopy(small_net)
    optimizer, projector = optimizer_of(theirs), ranksearch.Projector(PLAN)
    for step in range(1, 8):
        train(theirs, optimizer, image, 1)
        if step % 3 == 0:
            projector(theirs)
    projector(theirs)

    optimizer = optimizer_of(small_net)
    with ranksearch.project_every(small_net, optimizer, PLAN, period=3) as projection:
        train(small_net, optimizer, image, 7)
    assert (projection.steps, projection.projections) == (7, 3)
    assert all(torch.equal(a, b) for a, b in zip(small_net.parameters(), theirs.parameters(), strict=True))
    assert set(projection.removed) == set(PLAN.layers)
    assert max(projection.removed.values()) > 1e-6
    small = projection.compress()
    torch.testing.assert_close(small(image), small_net(image), rtol=1e-4, atol=1e-6)
    before = copy.deepcopy(small_net.state_dict())
    train(small_net, optimizer, image, 3)  # the hook is gone: nothing projects
    assert projection.projections == 3
    assert not has_the_ranks(small_net)
    assert any(not torch.equal(before[name], value) for name, value in small_net.state_dict().items())


def test_a_run_that_ends_on_a_projection_gets_no_second_one(small_net, image):
    optimizer = optimizer_of(small_net)
    projection = ranksearch.project_every(small_net, optimizer, PLAN, period=2)
    train(small_net, optimizer, image, 4)
    assert has_the_ranks(small_net)
    assert projection.finish() is projection.removed
    assert projection.projections == 2


def test_without_a_step_finishing_projects(small_net):
    assert not has_the_ranks(small_net)
    ranksearch.project_every(small_net, optimizer_of(small_net), PLAN, period=5).finish()
    assert has_the_ranks(small_net)


def test_an_exception_ends_it_without_a_projection(small_net, image):
    optimizer = optimizer_of(small_net)
    projection = ranksearch.project_every(small_net, optimizer, PLAN, period=100)
    with pytest.raises(RuntimeError, match="channels"), projection:
        train(small_net, optimizer, image[:, :2], 1)
    assert projection.projections == 0
    assert not optimizer._optimizer_step_post_hooks


def test_accumulated_gradients_count_once_and_skipped_steps_not_at_all(small_net, image):
    optimizer = optimizer_of(small_net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    projection = ranksearch.project_every(small_net, optimizer, PLAN, period=2)
    for step in range(4):
        optimizer.zero_grad()
        for _ in range(3):
            scaler.scale(small_net(image).square().mean() * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert (projection.steps, projection.projections) == (1, 0)
    assert (projection.steps, projection.projections) == (3, 1)


def test_a_step_that_a_fused_optimizer_skips_does_not_count(small_net, image):
    # without momentum: of a first step that is skipped, torch leaves its buffer as memory happened to be
    optimizer = torch.optim.SGD(small_net.parameters(), lr=0.05, fused=True)
    projection = ranksearch.project_every(small_net, optimizer, PLAN, period=1)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())  # as a GradScaler sets them
    train(small_net, optimizer, image, 1)
    assert (projection.steps, projection.projections) == (0, 0)
    del optimizer.grad_scale, optimizer.found_inf
    train(small_net, optimizer, image, 1)
    assert (projection.steps, projection.projections) == (1, 1)


@pytest.fixture
def one_process(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "compiled", "compiled ddp", "in place"])
def test_a_wrapped_model_is_projected_like_itself(wrap, small_net, image, one_process):
    plain, wrapped = copy.deepcopy(small_net), small_net
    if "ddp" in wrap:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    if "compiled" in wrap:
        wrapped = torch.compile(wrapped, backend="eager")
    if wrap == "in place":
        wrapped.compile(backend="eager")
    prefixed = RankPlan({name.removesuffix(".weight"): PLAN[short] for name, short in names_in(wrapped).items()})
    for plan in (PLAN, prefixed):
        small_net.load_state_dict(plain.state_dict())
        theirs = copy.deepcopy(plain)
        for model, optimizer, chosen in (
            (wrapped, optimizer_of(wrapped), plan),
            (theirs, optimizer_of(theirs), PLAN),
        ):
            with ranksearch.project_every(model, optimizer, chosen, period=2) as projection:
                train(model, optimizer, image, 3)
            assert projection.projections == 2
        assert has_the_ranks(small_net)
        for a, b in zip(small_net.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def names_in(wrapped):
    """Name of a weight in the wrapped model -> the layer's name in `PLAN`."""
    return {
        name: short
        for name, _ in wrapped.named_parameters()
        for short in PLAN.layers
        if f".{name}".endswith(f".{short}.weight")
    }


def test_packed_attention_is_projected(image):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plan = RankPlan({"self_attn.q_proj": LayerPlan("svd", 2), "linear1": LayerPlan("svd", 3)})
    optimizer = optimizer_of(model)
    with ranksearch.project_every(model, optimizer, plan, period=2):
        train(model, optimizer, image[:, 0], 3)
    assert max(project_(model, plan).values()) < 1e-6


def test_a_loop_goes_on_from_a_checkpoint(small_net, image):
    whole, part = copy.deepcopy(small_net), small_net
    optimizer = optimizer_of(whole)
    with ranksearch.project_every(whole, optimizer, PLAN, period=2):
        train(whole, optimizer, image, 5)
    optimizer = optimizer_of(part)
    first = ranksearch.project_every(part, optimizer, PLAN, period=2)
    train(part, optimizer, image, 3)
    saved, of_optimizer = first.state_dict(), optimizer.state_dict()
    first.remove()
    resumed, optimizer = copy.deepcopy(part), None
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(of_optimizer)
    with ranksearch.project_every(resumed, optimizer, PLAN, period=2) as second:
        second.load_state_dict(saved)
        train(resumed, optimizer, image, 2)
    assert (second.steps, second.projections) == (5, 3)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Wrapper:
    """As Lightning and Accelerate put one around an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_an_optimizer_in_a_wrapper_is_found(small_net, image):
    optimizer = optimizer_of(small_net)
    projection = ranksearch.project_every(small_net, Wrapper(optimizer), PLAN, period=1)
    train(small_net, optimizer, image, 2)
    assert projection.projections == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"period": 0}, "period is a whole number of optimizer steps, 1 or more, got 0"),
        ({"period": 2.5}, "got 2.5"),
        ({"optimizer": "SGD"}, "expected a torch.optim.Optimizer, got a str"),
        ({"plan": RankPlan({"steam": LayerPlan("im2col", 3)})}, "Did you mean 'stem'"),
        ({"plan": RankPlan({"stem": LayerPlan("im2col", 300)})}, "rank 300 is outside"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_hook_is_there(change, says, small_net):
    optimizer = optimizer_of(small_net)
    given = {"optimizer": optimizer, "plan": PLAN, "period": 1} | change
    with pytest.raises(UsageError, match=says):
        ranksearch.project_every(small_net, given["optimizer"], given["plan"], period=given["period"])
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_of_a_copy_is_refused_but_frozen_layers_are_fine(small_net, image):
    with pytest.raises(UsageError, match="does not hold the weight of 'stem'"):
        ranksearch.project_every(small_net, optimizer_of(SmallNet()), PLAN, period=1)
    small_net.stem.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in small_net.parameters() if p.requires_grad], lr=0.05)
    with ranksearch.project_every(small_net, optimizer, PLAN, period=1):
        train(small_net, optimizer, image, 1)
    assert has_the_ranks(small_net)


def test_divergence_names_the_layer(small_net, image):
    optimizer = optimizer_of(small_net)
    ranksearch.project_every(small_net, optimizer, PLAN, period=1)
    with pytest.raises(NonFiniteError, match="Layer"):
        train(small_net, optimizer, image * float("nan"), 1)


def test_a_plan_of_the_solver_and_norms_are_taken(small_net, image):
    plan = ranksearch.allocate(small_net, image, {"flops": "60%"})
    optimizer = optimizer_of(small_net)
    with ranksearch.project_every(
        small_net, optimizer, plan, period=2, norms=trace(small_net, image).norms()
    ) as projection:
        train(small_net.train(), optimizer, image, 4)
    small = projection.compress().eval()
    torch.testing.assert_close(small(image), small_net.eval()(image), rtol=1e-4, atol=1e-6)
