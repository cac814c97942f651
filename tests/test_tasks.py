"""Data, models, the training loop: splits, augmentation against a plain loop, the real CIFAR-10 and its baselines."""

import itertools
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ranksearch.data.batches import Batches
from ranksearch.data.folder import data_folder, writable_cache
from ranksearch.data.resident import Augment, Normalise
from ranksearch.errors import UsageError
from ranksearch.tasks import build_reference, cifar10, digits, model_reference, task_kind
from ranksearch.tasks.schedule import SCHEDULES, learning_rate
from ranksearch.tasks.task import Task
from ranksearch.training.dense import checkpoint_path, dense_state, read_checkpoint
from ranksearch.training.device import use_bf16
from ranksearch.training.distillation import Distillation
from ranksearch.training.evaluate import evaluate
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Diverged, Training

CPU = torch.device("cpu")


def settings(**changes) -> Optimisation:
    return Optimisation(
        **{
            "optimizer": "sgd", "schedule": "cosine", "lr": 0.05, "warmup": 0.15, "momentum": 0.9, "weight_decay": 5e-4,
            "batch_size": 64, "total_steps": 60, "label_smoothing": 0, "clip_norm": 0, "ema": 0, "bf16": False,
            "compile": False,
        }
        | changes
    )  # fmt: skip


def training(model, task, steps, *, seed=0, distillation=None, **changes) -> Training:
    generator = torch.Generator().manual_seed(seed)
    return Training(model, task, settings(**changes), range(steps), generator=generator, distillation=distillation)


@pytest.fixture
def task():
    return digits.make_task("resnet8", data=None, validation=200, split_seed=0)


def test_digits_splits_are_disjoint_and_seeded(task):
    def keys(split):
        return {(image.numpy().tobytes(), int(label)) for image, label in zip(split.inputs, split.targets, strict=True)}

    assert [len(s) for s in (task.train, task.val, task.test)] == [1237, 200, 360]
    assert not keys(task.train) & keys(task.val)
    assert not (keys(task.train) | keys(task.val)) & keys(task.test)
    again = digits.make_task("resnet8", data=None, validation=200, split_seed=0)
    other = digits.make_task("resnet8", data=None, validation=200, split_seed=1)
    assert torch.equal(again.val.inputs, task.val.inputs)
    assert not torch.equal(other.val.inputs, task.val.inputs)
    assert torch.equal(other.test.inputs, task.test.inputs)  # the test set never depends on the split
    assert task.without_test().test is None


def test_digits_are_scikit_learns_own(task):
    from sklearn.datasets import load_digits

    ours = torch.cat([part.inputs for part in (task.train, task.val, task.test)]).flatten(1)
    targets = torch.cat([part.targets for part in (task.train, task.val, task.test)])
    theirs = load_digits()
    found = sorted((image.numpy().tobytes(), int(digit)) for image, digit in zip(ours, targets, strict=True))
    assert found == sorted(
        (x.astype("uint8").tobytes(), int(y)) for x, y in zip(theirs.data, theirs.target, strict=True)
    )
    assert theirs.data.max() == ours.max() == 16


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_shift_and_a_flip_of_each_image(flip):
    images = torch.arange(40 * 3 * 6 * 5, dtype=torch.int64).reshape(40, 3, 6, 5) % 251
    images = images.to(torch.uint8)
    out = Augment(pad=2, flip=flip)(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, [2] * 4)
    seen = set()
    for i in range(len(images)):
        candidates = {
            (dy, dx, mirrored): (crop.flip(-1) if mirrored else crop)
            for dy in range(5)
            for dx in range(5)
            for mirrored in ((False, True) if flip else (False,))
            for crop in [padded[i, :, dy : dy + 6, dx : dx + 5]]
        }
        found = [key for key, crop in candidates.items() if torch.equal(crop, out[i])]
        assert found, f"image {i} is no shifted copy"
        seen.add(found[0])
    assert len(seen) > 10
    assert {mirrored for *_, mirrored in seen} == ({False, True} if flip else {False})


def test_normalise_is_the_plain_formula():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    out = Normalise((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))(images)
    np.testing.assert_allclose(out[:, 1].numpy(), (images[:, 1].numpy() / 255 - 0.2) / 0.6, rtol=1e-5, atol=1e-6)


def test_every_epoch_sees_every_image_once():
    batches = Batches(64, 16, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches) for _ in range(4)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(64)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_one_cycle_warms_up_to_its_peak_and_ends_near_zero():
    rates = [learning_rate("cosine", step, 100, peak=0.1, warmup=0.15) for step in range(100)]
    assert max(rates) == pytest.approx(0.1)
    assert rates.index(max(rates)) in (14, 15)
    assert rates[-1] < 1e-3
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_learns(task, bf16):
    torch.manual_seed(0)
    model = digits.build_model("resnet8")
    before = evaluate(model, task.val, task).accuracy
    seen = []
    stats = training(model, task, 60, bf16=bf16).run(lambda training: seen.append(training.done))
    assert evaluate(model, task.val, task).accuracy > max(60, before)
    assert stats.images == 60 * 64
    assert seen == list(range(1, 61))


def test_training_is_reproducible(task):
    def weights():
        torch.manual_seed(0)
        model = digits.build_model("resnet8")
        training(model, task, 5, seed=3, total_steps=5).run()
        return model.linear.weight

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_warm_up_peak_once_and_never_rise_again(name):
    rates = [learning_rate(name, step, 200, peak=0.1, warmup=0.1) for step in range(200)]
    assert rates[:20] == pytest.approx([0.1 * (step + 1) / 20 for step in range(20)])
    assert max(rates) == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))
    ends = {"cosine": 0.0, "linear": 0.0, "step": 1e-3, "constant": 0.1}
    assert rates[-1] == pytest.approx(ends[name], abs=1e-3)
    without = [learning_rate(name, step, 200, peak=0.1, warmup=0.0) for step in (0, 100)]
    assert without[0] == pytest.approx(0.1)
    assert without[1] == pytest.approx({"cosine": 0.05, "linear": 0.05, "step": 0.01, "constant": 0.1}[name])


def weights_of(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_adamw_is_torchs(task):
    torch.manual_seed(0)
    model = digits.build_model("resnet8")
    run = training(model, task, 3, optimizer="adamw", lr=1e-3, momentum=0.8)
    assert isinstance(run.optimizer, torch.optim.AdamW)
    assert run.optimizer.defaults["betas"] == (0.8, 0.999)
    before = weights_of(model)
    run.run()
    assert not torch.equal(before, weights_of(model))


def test_the_average_is_the_exponential_one_of_the_weights_after_each_step(task):
    torch.manual_seed(0)
    model, seen = digits.build_model("resnet8"), []
    expected = None
    training(model, task, 6, ema=0.6).run(lambda t: seen.append(weights_of(t.model)))
    for weights in seen:
        expected = weights if expected is None else 0.6 * expected + 0.4 * weights
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights_of(model), seen[-1], atol=1e-4)


def test_gradients_are_clipped_to_their_norm(task, monkeypatch):
    norms = []
    model = digits.build_model("resnet8")
    run = training(model, task, 4, clip_norm=0.01)
    step = run.optimizer.step

    def spy():
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        step()

    monkeypatch.setattr(run.optimizer, "step", spy)
    run.run()
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_label_smoothing_is_torchs(task):
    torch.manual_seed(0)
    model = digits.build_model("resnet8")
    run = training(model, task, 1, label_smoothing=0.2)
    x, y = next(task.train.in_order(32))
    logits = model(x)
    spread = -0.02 * logits.log_softmax(1).sum(1) - 0.8 * logits.log_softmax(1).gather(1, y[:, None])[:, 0]
    assert run._loss(model, x, y).item() == pytest.approx(spread.mean().item(), rel=1e-5)


def test_a_probe_tells_the_loss_of_the_last_batch_and_leaves_everything_as_it_was(task):
    torch.manual_seed(0)
    model = digits.build_model("resnet8")
    run = training(model, task, 3)
    assert run.probe() is None
    run.run()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    loss = run.probe()
    assert 0 < loss == run.probe()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    with torch.no_grad():
        model.linear.weight.mul_(float("nan"))
    assert run.probe() is None


def test_a_compiled_step_trains_as_an_eager_one(task):
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile needs a C++ compiler here, and there is none")
    trained = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = digits.build_model("resnet8")
        training(model, task, 3, compile=compiled).run()
        trained.append(weights_of(model))
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_is_divergence(task):
    model = digits.build_model("resnet8")
    with pytest.raises(Diverged, match="step"):
        training(model, task, 60, lr=1e12).run()


def test_distillation_is_zero_against_itself_and_adds_the_divergence(task):
    x, y = next(task.train.in_order(8))
    teacher = digits.build_model("resnet8").eval()
    logits = teacher(x)
    hard = torch.tensor(3.0)
    assert Distillation(teacher, 1.0, 2.0).loss(logits, x, y, hard).item() == pytest.approx(0, abs=1e-5)
    assert Distillation(teacher, 0.25, 2.0).loss(logits, x, y, hard).item() == pytest.approx(0.75 * 3, rel=1e-4)
    p, q = (logits / 2).softmax(1), (torch.zeros_like(logits)).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    assert Distillation(teacher, 1.0, 2.0).loss(torch.zeros_like(logits), x, y, hard).item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_bf16_is_chosen_by_size_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert use_bf16("auto", CPU, 40_000_000)
    assert not use_bf16("auto", CPU, 700_000)
    assert use_bf16("bf16", CPU, 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not use_bf16("auto", CPU, 40_000_000)


# CIFAR-10 ------------------------------------------------------------------------------------------------------------


def write_fake_cifar(folder, images_per_batch=40):
    root = folder / "cifar-10-batches-py"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in cifar10.TRAIN_FILES + cifar10.TEST_FILES:
        data = rng.integers(0, 256, (images_per_batch, 3072), dtype=np.uint8)
        batch = {b"data": data, b"labels": rng.integers(0, 10, images_per_batch).tolist()}
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


def test_batches_are_read_in_channel_row_column_order(tmp_path):
    root = write_fake_cifar(tmp_path)
    task = cifar10.make_task("resnet20", data=str(tmp_path), validation=50, split_seed=0)
    assert (len(task.train), len(task.val), len(task.test)) == (150, 50, 40)
    raw = pickle.loads((root / "test_batch").read_bytes(), encoding="bytes")
    assert task.test.inputs[7, 1, 2, 3] == raw[b"data"][7][1024 + 2 * 32 + 3]
    assert task.test.targets.tolist() == raw[b"labels"]


def test_a_batch_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    root = write_fake_cifar(tmp_path)
    (root / "data_batch_3").write_bytes(pickle.dumps({b"data": Bomb(), b"labels": []}))
    with pytest.raises(UsageError, match=r"data_batch_3 is no CIFAR-10 python batch.*open"):
        cifar10.make_task("resnet20", data=str(tmp_path), validation=50, split_seed=0)
    assert not (tmp_path / "ran").exists()


def test_missing_batches_say_what_to_put_where(tmp_path):
    with pytest.raises(UsageError, match=r"cifar-10-batches-py.*data_batch_1.*download_cifar10.*RANKSEARCH_DATA"):
        cifar10.make_task("resnet20", data=str(tmp_path), validation=50, split_seed=0)


def real_cifar():
    if not (data_folder() / cifar10.FOLDER / "test_batch").is_file():
        pytest.skip(f"CIFAR-10 is not in {data_folder()}: python scripts/download_cifar10.py")
    return data_folder()


@pytest.mark.parametrize(("model", "accuracy", "params"), [("resnet20", 91.73, 269_722), ("resnet32", 92.63, 464_154)])
def test_public_checkpoints_score_as_published_on_the_official_test_set(model, accuracy, params, tmp_path):
    folder = real_cifar()
    task = cifar10.make_task(model, data=str(folder), validation=5000, split_seed=0)
    if not (folder / "weights").is_dir():
        pytest.skip(f"the trained nets are not in {folder / 'weights'}")
    state = dense_state(task, checkpoint="auto", data=str(folder), fallback=tmp_path, log=print)
    net = task.dense_model()
    net.load_state_dict(state)
    assert sum(p.numel() for p in net.parameters()) == params
    assert evaluate(net.to(memory_format=torch.channels_last), task.test, task).accuracy == pytest.approx(
        accuracy, abs=1e-9
    )


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_checkpoints_are_found_by_name_and_read_without_running_code(task, tmp_path):
    state = digits.build_model("resnet8").state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.th")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "net.safetensors")
    for name in ("net.th", "net.safetensors"):
        found = read_checkpoint(checkpoint_path(task, name, str(tmp_path)))
        assert torch.equal(found["linear.weight"], state["linear.weight"])
    torch.save({"state_dict": print}, tmp_path / "code.th")
    with pytest.raises(UsageError, match="is no checkpoint"):
        read_checkpoint(tmp_path / "code.th")
    with pytest.raises(UsageError, match=r"'nte\.th' is not there; looked at"):
        checkpoint_path(task, "nte.th", str(tmp_path))
    assert checkpoint_path(task, "auto", str(tmp_path)) is None  # digits have no public checkpoint


def test_a_missing_public_checkpoint_says_what_to_put_where(tmp_path):
    write_fake_cifar(tmp_path)
    fake = cifar10.make_task("resnet56", data=str(tmp_path), validation=50, split_seed=0)
    with pytest.raises(UsageError, match=r"resnet56-4bfd9763\.th.*--set checkpoint=train"):
        checkpoint_path(fake, "auto", str(tmp_path))


def test_a_checkpoint_of_another_net_does_not_fit(task, tmp_path):
    other = digits.build_model("resnet14").state_dict()
    save_file({k: v.contiguous() for k, v in other.items()}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="does not fit resnet8"):
        dense_state(task, checkpoint=str(tmp_path / "other.safetensors"), data=None, fallback=tmp_path, log=print)


def test_a_folder_that_cannot_be_written_has_a_fallback(tmp_path):
    (tmp_path / "file").write_text("")
    assert writable_cache(tmp_path / "file", tmp_path / "runs") == tmp_path / "runs"
    assert writable_cache(tmp_path / "data", tmp_path / "runs") == tmp_path / "data" / "dense"


def test_models_and_tasks_by_name_and_nearest():
    assert sum(p.numel() for p in build_reference(model_reference("cifar10", "resnet56")).parameters()) == 853_018
    with pytest.raises(UsageError, match="Did you mean 'resnet20'"):
        build_reference("cifar10/resnet200")
    with pytest.raises(UsageError, match="Did you mean 'cifar10'"):
        task_kind("cifar")
    for validation in (0, 2000):
        with pytest.raises(UsageError, match="validation"):
            digits.make_task("resnet8", data=None, validation=validation, split_seed=0)


# What the dense net was trained with ----------------------------------------------------------------------------------


def test_trials_train_as_the_dense_net_did_where_the_recipe_names_neither():
    from ranksearch.search.workbench import trained_alike
    from ranksearch.space.reading import parse_space

    splits = {name: (torch.randn(8, 4), torch.randint(3, (8,))) for name in ("train", "val")}
    net = torch.nn.Linear(4, 3)
    own = Task(model=net, **splits, trained_with={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01})

    def recipe(**given):
        space = parse_space(
            {"name": "s", "task": "digits", "model": "resnet8", "validation": 1, "recipe": {"steps": 1, **given}}, "s"
        )
        return trained_alike(space, own).recipe

    assert (recipe().optimizer, recipe().lr, recipe().weight_decay) == ("adamw", 1e-3, 0.01)
    assert recipe(weight_decay=0.0).weight_decay == 0.0
    assert (recipe(lr=0.1).optimizer, recipe(lr=0.1).lr) == ("sgd", 0.1)
    assert recipe(optimizer="sgd").optimizer == "sgd"
    for wrong, text in (
        ({"optimizer": "adam", "lr": 1e-3}, "adamw"), ({"lr": 1e-3}, "belong together"),
        ({"optimizer": "sgd", "lr": 0}, "expected a number"),
        ({"rate": 1}, "no 'rate'"), ("adamw", "mapping"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=text):
            Task(model=net, **splits, trained_with=wrong)
