"""Nets that leave ranksearch: every lowering in every format, checked against the net; BN folding; damaged files; the verb."""

import copy
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import ranksearch
from ranksearch import cli
from ranksearch.compress import LayerPlan, RankPlan, load_net, save_net
from ranksearch.deploy.exported import TOLERANCE, export_net
from ranksearch.deploy.fold import fold_bn_
from ranksearch.deploy.formats import FORMATS, format_named, traced
from ranksearch.errors import StudyError, UsageError
from ranksearch.lowering import LOWERINGS, LayerSpec
from ranksearch.model.slots import find_slots
from ranksearch.search.parametrize import Opening
from ranksearch.space.reading import read_space
from ranksearch.study import export_trial
from ranksearch.study.study import Study
from ranksearch.trial.result import Status
from tests.conftest import REPOSITORY, SmallNet

NO_ONNX = [name for name in FORMATS["onnx"].needs if importlib.util.find_spec(name) is None]
ONNX = pytest.mark.skipif(bool(NO_ONNX), reason=f"the extra onnx is not installed: {', '.join(NO_ONNX)} missing")
ALL = ["state_dict", "pt2", pytest.param("onnx", marks=ONNX)]
TRACED = ALL[1:]


def lively_(model: nn.Module) -> nn.Module:
    """Gives every BN statistics and scales that a mistake would show in."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model.eval()


class ManyConvs(nn.Module):
    """Plain, grouped, depthwise and transposed convs, BN, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(16))
        self.grouped = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=1, groups=2, bias=False), nn.BatchNorm2d(32))
        self.depthwise = nn.Conv2d(32, 32, (3, 5), padding="same", groups=32)
        self.up = nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.grouped(self.stem(x)))))
        return self.head(torch.relu(self.bn(self.up(x))).mean((2, 3)))


class Attending(nn.Module):
    """Attention over the rows of an image: packed in a layer of torch's own encoder, then across."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)
        self.across = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x.transpose(1, 2).flatten(2))
        return self.across(x, x.flip(1), x.flip(1), need_weights=False)[0]


def net_for(name: str) -> type[nn.Module]:
    """Where the lowering finds most to take."""
    takes_convs = LOWERINGS[name].supports(LayerSpec.conv(16, 32, (3, 3)))
    return ManyConvs if takes_convs else Attending


def plan_of(model: nn.Module, name: str) -> RankPlan:
    """Every layer that the lowering takes, at half its full rank; attention packed where it may be."""
    lowering = LOWERINGS[name]
    slots = {path: slot for path, slot in find_slots(model).items() if lowering.supports(slot.spec)}
    if isinstance(model, Attending):
        other = {"across.in_proj", *(f"encoder.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj"))}
        slots = {path: slot for path, slot in slots.items() if path not in other}
    assert slots, f"{name} takes no layer of this net"
    return RankPlan(
        {
            path: LayerPlan(name, lowering.scaled_rank(slot.spec, 0.5) if lowering.has_rank else 0)
            for path, slot in slots.items()
        },
        model="many",
    )


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("name", LOWERINGS)
def test_every_lowering_computes_the_same_in_every_format(name, form, tmp_path):
    torch.manual_seed(0)
    dense = lively_(net_for(name)())
    plan = plan_of(dense, name)
    small = ranksearch.compress(dense, plan)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    options = {"form": format_named(form), "build": lambda _: net_for(name)(), "fold_bn": False}
    exported = export_net(small, plan, torch.zeros(1, 3, 8, 8), tmp_path, **options)
    assert exported.max_rel_error <= TOLERANCE
    assert exported.folded_bn == 0
    assert exported.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert exported.latency_ms > 0
    assert exported.opset == (20 if form == "onnx" else None)
    assert before.keys() == small.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


@ONNX
def test_an_onnx_model_is_one_file_of_the_stated_opset_with_a_free_batch(small_net, tmp_path):
    import onnx

    form = format_named("onnx")
    export_net(
        small_net, RankPlan(), torch.zeros(1, 3, 8, 8), tmp_path, form=form, build=lambda _: SmallNet(), fold_bn=False
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(tmp_path / "model.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": form.opset}
    (given,), (found,) = model.graph.input, model.graph.output
    assert (given.name, found.name) == ("input", "output")
    assert [axis.dim_param or axis.dim_value for axis in given.type.tensor_type.shape.dim][:2] == ["batch", 3]
    assert found.type.tensor_type.shape.dim[0].dim_param == "batch"
    onnx.checker.check_model(model, full_check=True)


class Several(nn.Module):
    """Outputs of several forms; one tensor twice, one under the input's name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> object:
        y = self.layer(x)
        return {
            "twice": (y, y),
            "nested": {"logits": y, "other": [y + 1, y.mean(1)]},
            "clash": {"input": y, "batch": y + 1},
        }[self.how]


@pytest.mark.parametrize(
    ("how", "names"),
    [("twice", ["output_0", "output_1"]), ("nested", ["logits", "other_0", "other_1"]), ("clash", ["output_input", "batch"])],
)  # fmt: skip
@pytest.mark.parametrize("form", TRACED)
def test_every_output_is_there_by_name(how, names, form, tmp_path):
    torch.manual_seed(0)
    net, kind = Several(how).eval(), format_named(form)
    made = export_net(net, RankPlan(), torch.zeros(1, 8), tmp_path, form=kind, build=lambda _: net, fold_bn=False)
    assert made.max_rel_error <= TOLERANCE
    if form == "onnx":
        import onnx

        outputs = onnx.load(tmp_path / "model.onnx").graph.output
        assert [output.name for output in outputs] == names
        assert all(output.type.tensor_type.shape.dim[0].dim_param == "batch" for output in outputs)


class Twice(nn.Module):
    """BN layers that must stay: their layer's output is used elsewhere, they are called twice, or take channels elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.forked, self.bn_forked = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b, self.bn_shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.again, self.bn_again = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.tokens, self.bn_tokens = nn.Linear(64, 4), nn.BatchNorm1d(4)
        self.conv, self.relu = nn.Conv1d(4, 4, 1), ReluNorm(4)
        self.last, self.bn_last = nn.Linear(16, 5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forked(x)
        x = x + self.bn_forked(x)
        x = self.bn_shared(self.b(self.bn_shared(self.a(x))))
        x = self.bn_again(self.again(x)) + self.again(x)
        x = self.bn_tokens(self.tokens(x.flatten(2)))  # [N, 4, 4]: BN scales rows, the Linear makes columns
        return self.bn_last(self.last(self.relu(self.conv(x)).flatten(1)))


class ReluNorm(nn.BatchNorm1d):
    """More than BN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def test_bn_is_folded_where_it_alone_takes_a_layers_output_and_nowhere_else():
    torch.manual_seed(0)
    batch = torch.randn(2, 3, 8, 8)
    for model, count in ((ManyConvs(), 3), (Twice(), 1)):
        lively_(model)
        with torch.no_grad():
            wanted = model(batch)
            assert fold_bn_(model, traced(model, batch)) == count
            torch.testing.assert_close(model(batch), wanted, rtol=1e-4, atol=1e-5)
    assert isinstance(model.bn_last, nn.Identity)
    assert isinstance(model.relu, ReluNorm)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, bias=False), (4, 5)),
        (nn.Linear(4, 6), (4,)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.Linear(4, 6, bias=False), (4,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False])
def test_folding_is_exact_and_agrees_with_torch(layer, size, affine):
    torch.manual_seed(0)
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(size)](6, affine=affine)
    model, batch = lively_(nn.Sequential(copy.deepcopy(layer), norm)), torch.randn(2, *size)
    with torch.no_grad():
        wanted = model(batch)
        reference = copy.deepcopy(model)
        assert fold_bn_(model, traced(model, batch)) == 1
        torch.testing.assert_close(model(batch), wanted, rtol=1e-4, atol=1e-5)
        transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
        if isinstance(layer, nn.Linear) and affine:
            fused = fuse_linear_bn_eval(*reference)
        elif not isinstance(layer, nn.Linear) and not (transposed and layer.groups > 1):
            fused = fuse_conv_bn_eval(*reference, transposed)
        else:
            return  # torch has no fusion of these
        torch.testing.assert_close(model[0].weight, fused.weight)
        torch.testing.assert_close(model[0].bias, fused.bias)


@pytest.mark.parametrize("form", TRACED)
def test_an_export_with_folded_bn_is_held_against_the_net_with_bn(form, tmp_path):
    torch.manual_seed(0)
    dense = lively_(ManyConvs())
    plan = plan_of(dense, "im2col")
    small = ranksearch.compress(dense, plan)
    options = {"form": format_named(form), "build": lambda _: ManyConvs()}
    exported = export_net(small, plan, torch.zeros(1, 3, 8, 8), tmp_path, fold_bn=True, **options)
    assert exported.folded_bn == 3
    assert 0 < exported.max_rel_error <= TOLERANCE
    assert sum(isinstance(module, nn.BatchNorm2d) for module in small.modules()) == 3


class Branching(nn.Module):
    """What torch.export cannot trace: a branch on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class OneSize(nn.Module):
    """A net for batches of two alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1)


@pytest.mark.parametrize("form", TRACED)
@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (Branching(), StudyError, "cannot"),
        (OneSize(), StudyError, "cannot"),
    ],
    ids=["branching", "one size"],
)
def test_a_net_that_cannot_be_exported_is_told_in_a_sentence(form, model, error, says, tmp_path):
    example = torch.zeros(1, 3)
    with pytest.raises(error, match=says) as told:
        export_net(model, RankPlan(), example, tmp_path, form=format_named(form), build=None, fold_bn=False)
    assert len(str(told.value)) < 700


def test_integer_inputs_are_drawn_from_the_example(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3))
    example = torch.tensor([[0, 6, 1, 5, 3]])
    exported = export_net(model, RankPlan(), example, tmp_path, form=format_named("pt2"), build=None, fold_bn=False)
    assert exported.max_rel_error <= TOLERANCE


def test_a_missing_extra_and_an_unknown_format_say_what_to_do(monkeypatch):
    with pytest.raises(UsageError, match=r"no export format 'onnxx'\. Did you mean 'onnx'"):
        format_named("onnxx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UsageError, match=r"needs onnxscript, .*pip install 'ranksearch\[onnx\]'"):
        format_named("onnx")
    assert format_named("pt2").name == "pt2"


def test_onnx_is_loaded_by_its_format_alone():
    probe = "import sys, ranksearch.deploy.formats; print([m for m in ('onnx', 'onnxscript', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# Damaged files ---------------------------------------------------------------------------------------------------


class Malicious:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


PLAN = RankPlan({"stem": LayerPlan("channel", 2), "head": LayerPlan("svd", 4)}, model="small")


def damage(folder, how):
    weights, plan = folder / "model.safetensors", folder / "plan.json"
    whole = weights.read_bytes()
    if how == "pickle":
        weights.write_bytes(pickle.dumps(Malicious(folder / "executed")))
    elif how == "torch.save":
        torch.save({"stem.0.weight": Malicious(folder / "executed")}, weights)
    elif how == "truncated":
        weights.write_bytes(whole[: len(whole) // 2])
    elif how == "header":
        weights.write_bytes(b"\xff" * 8 + whole[8:])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "plan of another net":
        plan.write_text(RankPlan({"layer1.0.conv1": LayerPlan("im2col", 3)}, model="small").to_json())
    elif how == "plan of other ranks":
        plan.write_text(RankPlan({**PLAN.layers, "stem": LayerPlan("channel", 1)}, model="small").to_json())
    elif how == "plan without text":
        plan.write_bytes(pickle.dumps(Malicious(folder / "executed")))
    elif how == "plan of brackets":
        plan.write_text("[" * 100_000)
    elif how == "plan that names no model":
        plan.write_text(json.dumps(PLAN.to_dict() | {"model": ["small"]}))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("pickle", "does not fit"),
        ("torch.save", "does not fit"),
        ("truncated", "does not fit"),
        ("header", "does not fit"),
        ("empty", "does not fit"),
        ("plan of another net", r"no layer 'layer1\.0\.conv1'"),
        ("plan of other ranks", "does not fit"),
        ("plan without text", "it is no text"),
        ("plan of brackets", "no JSON"),
        ("plan that names no model", "model is a name"),
    ],
)
def test_a_damaged_net_is_refused_and_executes_nothing(small_net, tmp_path, how, says):
    save_net(ranksearch.compress(small_net, PLAN), PLAN, tmp_path)
    damage(tmp_path, how)
    with pytest.raises(UsageError, match=says):
        load_net(tmp_path, lambda name: SmallNet())
    assert not (tmp_path / "executed").exists()
    # the traps work: they would have left their trace
    if how == "pickle":
        pickle.loads((tmp_path / "model.safetensors").read_bytes()).close()
        assert (tmp_path / "executed").exists()


# The verb --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, short_settings):
    """A folder with a study of three trials on digits."""
    folder = tmp_path_factory.mktemp("runs")
    space = read_space(
        REPOSITORY / "search_spaces" / "digits_resnet8.yaml", settings=short_settings, budgets=["flops=50%"]
    )
    ranksearch.search(space, runs=folder, inline=True)
    return folder


@pytest.fixture
def call(runs, monkeypatch, capsys):
    """Calls the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ranksearch", *map(str, arguments), "--runs", str(runs)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, errors = capsys.readouterr()
        return ended.value.code or 0, out, errors

    return run


@pytest.mark.parametrize("form", ALL)
def test_the_verb_exports_the_best_trial(call, runs, tmp_path, form):
    study = Study.open(runs / "digits_resnet8")
    best = study.best()
    net = ranksearch.load(study.trial_folder(best["trial"]))
    code, out, errors = call("export", "digits_resnet8", "best", "--format", form, "--json")
    assert code == 0, errors
    record = json.loads(out)
    folder = runs / "digits_resnet8" / "exports" / f"{best['trial']:03d}-{form}"
    assert record.pop("folder") == str(folder)
    assert json.loads((folder / "export.json").read_text()) == record
    assert sorted(path.name for path in folder.iterdir()) == sorted(["export.json", *record["files"]])
    assert (record["study"], record["trial"], record["format"]) == ("digits_resnet8", best["trial"], form)
    assert record["model"] == "digits/resnet8"
    assert record["input_shape"] == ["batch", 1, 8, 8]
    assert record["input_made_by"]["scale"] == 16
    assert record["size_bytes"] == sum((folder / name).stat().st_size for name in record["files"])
    for key in ("val_accuracy", "test_accuracy", "macs", "params", "plan"):
        assert record[key] == best[key]
    batch = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(opened(folder, form)(batch), net(batch), rtol=1e-4, atol=1e-4)
    code, out, _ = call("export", "digits_resnet8", best["trial"], "--format", form, "-o", tmp_path / "elsewhere")
    assert code == 0
    assert "max relative error" in out
    assert (tmp_path / "elsewhere" / "export.json").is_file()


def opened(folder, form):
    """As a reader without ranksearch's own exporter would."""
    if form == "state_dict":
        return ranksearch.load(folder)
    if form == "pt2":
        return torch.export.load(folder / "model.pt2").module()
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return lambda batch: torch.from_numpy(session.run(["output"], {"input": batch.numpy()})[0])


def test_bad_input_is_one_message(call, runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for arguments, says in (
        (["nothing", "1"], "There is no study 'nothing'"),
        (["digits_resnet8", "7"], "no trial 7. Nearest that can be exported: 2, 1, 0; or `best`"),
        (["digits_resnet8", "bset"], "neither a trial's number nor `best`"),
        (["digits_resnet8", "1", "--fold-bn"], "Formats that take it: pt2 and onnx"),
        (["digits_resnet8", "1", "-o", tmp_path / "full"], "holds other things than an export (thesis.tex)"),
        (["digits_resnet8", "1", "-o", tmp_path / "full", "--force"], "holds other things than an export"),
        (["digits_resnet8", "1", "-o", tmp_path / "full" / "thesis.tex"], "is a file: name a folder"),
        (["digits_resnet8", "1", "-o", "/proc/nowhere/x"], "cannot be written"),
    ):
        code, out, errors = call("export", *arguments, "--format", "state_dict")
        assert code == 2, errors
        assert says in errors
        assert "Traceback" not in errors
        assert out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.tex"]


def test_trials_without_a_net_are_refused_by_their_status(runs, tmp_path):
    study = Study.open(runs / "digits_resnet8")
    net = study.trial_folder(1)
    net.rename(tmp_path / "away")
    try:
        with pytest.raises(UsageError, match=r"The net of trial 1 is not in .*Nearest that can be exported: 0, 2"):
            export_trial.pick_trial(study, 1)
        shutil.copytree(study.trial_folder(0), net)
        with pytest.raises(UsageError, match=r"holds another net: its plan\.json is not the plan of trial 1"):
            ranksearch.export("digits_resnet8", 1, format="state_dict", output=tmp_path / "out", runs=runs)
        shutil.rmtree(net)
    finally:
        (tmp_path / "away").rename(net)
    study.enqueue(Opening({}, "uniform"))
    with pytest.raises(UsageError, match=r"Trial 3 of 'digits_resnet8' is waiting, not complete\. Nearest.*: 2, 1, 0"):
        export_trial.pick_trial(study, 3)
    with pytest.raises(UsageError, match="has no trial -1"):
        export_trial.pick_trial(study, -1)
    study._ledger._rows[0] = replace(study._ledger._rows[0], status=Status.DIVERGED)
    with pytest.raises(UsageError, match="Trial 0 of 'digits_resnet8' is diverged"):
        export_trial.pick_trial(study, "000")


def test_force_replaces_an_export_and_what_differs_leaves_everything_as_it_was(call, runs, monkeypatch, tmp_path):
    target = tmp_path / "out"
    options = ("export", "digits_resnet8", "0", "-o", target)
    assert call(*options, "--format", "state_dict")[0] == 0
    code, _, errors = call(*options, "--format", "pt2")
    assert code == 2
    assert "--force replaces it" in errors
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def off_by_a_thousandth(folder, build):
        net = pt2.open(folder, build)
        return lambda batch: net(batch) * 1.001

    pt2 = FORMATS["pt2"]
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "pt2", replace(pt2, open=off_by_a_thousandth))
        code, out, errors = call(*options, "--format", "pt2", "--force")
    assert code == 1
    assert "differs from the net by 0.001" in errors
    assert out == ""
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert call(*options, "--format", "pt2", "--force")[0] == 0
    assert sorted(path.name for path in target.iterdir()) == ["export.json", "model.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = ranksearch.export("digits_resnet8", 0, format="pt2", output=target, runs=runs, fold_bn=True, force=True)
    assert record["folded_bn"] == 7
