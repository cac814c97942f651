"""Images from files: JPEGs in class folders, idx files; nets by name; and `ranksearch init`."""

import gzip
import importlib.util
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ranksearch
from ranksearch import cli
from ranksearch.errors import UsageError
from ranksearch.model.inputs import tensors
from ranksearch.search.workbench import open_net
from ranksearch.space.reading import parse_space, read_space
from ranksearch.space.starter import Given, write_start
from ranksearch.tasks import build_reference, idx, imagefolder, nets
from tests.conftest import REPOSITORY

SHADES = {"dark": 40, "light": 210}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A folder with 16 training and 6 validation JPEGs of two shades, of many sizes, one of them grey."""
    root, rng = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, shade in SHADES.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(shade - 30, shade + 30, (40 + 7 * i, 60 - 3 * i, 3), dtype=np.uint8)
                image = Image.fromarray(pixels)
                (image.convert("L") if i == 1 else image).save(folder / f"{i}.jpg")
    return root


class Tiny(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 8, 3, 2), nn.Linear(8, outputs)

    def forward(self, x):
        return self.fc(torch.relu(self.mix(torch.relu(self.conv(x)))).mean((2, 3)))


@pytest.fixture
def library(monkeypatch):
    """A stand-in for torchvision, which need not be here: a net `tiny` of its models, no weights."""
    models = types.ModuleType("torchvision.models")
    models.list_models = lambda module: ["tiny", "resnet18"]
    models.get_model = lambda name, num_classes, weights: Tiny(num_classes)
    package = types.ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def folder_space(root, **changes):
    values = {
        "name": "jpegs", "task": "imagefolder", "model": "torchvision:tiny:2", "data": str(root), "checkpoint": "train",
        "budgets": {"flops": "80%"}, "layers": {"lowerings": ["im2col", "svd"]},
        "recipe": {"steps": 4, "batch_size": 8, "bn_batches": 1, "projection": {"period": 2}},
        "search": {"trials": 2, "calibration_batches": 1}, "resources": {"data_workers": 1}, "tracking": {"models": False},
    }  # fmt: skip
    return parse_space(values | changes, "test")


def test_a_folder_of_jpegs_is_searched_with_worker_processes(jpegs, library, tmp_path, monkeypatch):
    monkeypatch.setattr("ranksearch.training.dense.EPOCHS", {"imagefolder": 2})
    study = ranksearch.search(folder_space(jpegs), runs=tmp_path, inline=True)
    front = study.front_record()["trials"]
    assert front
    assert front[0]["plan"]["model"] == "imagefolder/torchvision:tiny:2"
    net = ranksearch.load(study.trial_folder(front[0]["trial"]))
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 2)


def test_images_are_prepared_as_imagenet_is(jpegs):
    training, scored = (imagefolder.ImageFolder(jpegs / "train", training=t) for t in (True, False))
    assert training.classes == ["dark", "light"]
    assert len(training) == 16
    for data in (training, scored):
        for index in (0, 1, 15):
            image, number = data[index]
            assert image.shape == (3, 224, 224)
            shade = image[0].mean().item() * 0.229 + 0.485
            assert shade == pytest.approx(list(SHADES.values())[number] / 255, abs=0.04)
    torch.manual_seed(0)
    first = training[3][0]
    assert not torch.equal(first, training[3][0])
    assert torch.equal(scored[3][0], scored[3][0])
    torch.manual_seed(0)
    assert torch.equal(first, training[3][0])  # randomness is torch's, which worker processes seed
    assert imagefolder.middle_crop(512, 256) == (144, 16, 224, 224)
    for _ in range(200):
        left, top, width, height = imagefolder.random_crop(30, 20)
        assert 0 <= left <= left + width <= 30
        assert 0 <= top <= top + height <= 20


def test_validation_images_may_be_carved_from_the_training_folder(jpegs, library):
    task = imagefolder.make_task("torchvision:tiny:2", data=str(jpegs), validation=5, split_seed=0, workers=0)
    assert (len(task.train), len(task.val), len(task.test)) == (11, 5, 6)
    kept = {task.train.dataset.dataset.files[i] for i in task.train.dataset.indices}
    held_out = {task.val.dataset.dataset.files[i] for i in task.val.dataset.indices}
    assert not kept & held_out
    assert (task.train.dataset.dataset.training, task.val.dataset.dataset.training) == (True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "torchvision:tiny"},
            r"has 1000 outputs, and .*train has 2 classes: write model: torchvision:tiny:2\.",
        ),
        ({"model": "torchvision:tyni"}, "torchvision has no net 'tyni'. Did you mean 'tiny'"),
        ({"model": "torchvison:tiny"}, "Did you mean 'torchvision'"),
        ({"model": "torchvision:tiny:two"}, "ends in 'two', which is no number of outputs"),
        ({"model": "resnet18"}, "imagefolder takes torchvision:NAME or timm:NAME"),
        ({"data": "nowhere"}, r"nowhere/train holds no class folders"),
        ({"validation": 16}, r"validation: 16 is outside 1\.\.15"),
        ({"checkpoint": "auto"}, r"no public weights of torchvision:tiny:2: name a file"),
        ({"checkpoint": "no.pth"}, r"'no\.pth' is not there"),
    ],
)
def test_mistakes_with_folders_and_nets(jpegs, library, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        ranksearch.search(folder_space(jpegs, **changes), runs=tmp_path, inline=True)


def test_a_broken_image_is_named(jpegs, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes((jpegs / "train" / "dark" / "0.jpg").read_bytes()[:300])
    with pytest.raises(UsageError, match=r"broken\.jpg is no readable image"):
        _ = imagefolder.ImageFolder(tmp_path, training=False)[0]


# Nets by name --------------------------------------------------------------------------------------------------------


def test_a_library_that_is_not_there_or_does_not_load_is_told(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(nets.importlib, "import_module", missing)
    with pytest.raises(
        UsageError, match=r"needs timm, which is not installed here: `pip install 'ranksearch\[vision\]'`"
    ):
        build_reference("imagefolder/timm:vit_small_patch16_224")
    monkeypatch.setattr(nets.importlib, "import_module", broken)
    with pytest.raises(UsageError, match=r"does not load beside torch .*nms does not exist.*built for this torch"):
        build_reference("cifar10/torchvision:resnet18")


def real_library(name):
    try:
        found = importlib.util.find_spec(name) is not None and __import__(name) is not None
    except (ImportError, RuntimeError):
        found = False
    if not found:
        pytest.skip(f"{name} does not load here")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "search_spaces" / "imagenet").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_spaces_of_imagenet_fit_their_nets(path):
    space = read_space(path)
    real_library(space.model.partition(":")[0])
    net, traced = open_net(space)
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    published = {"resnet18": 11_689_512, "resnet50": 25_557_032, "mobilenet_v2": 3_504_872, "vit_small": 22_050_664}
    assert sum(p.numel() for p in net.parameters()) == published[path.stem]
    assert len(traced.layers) > 15


# idx -----------------------------------------------------------------------------------------------------------------


def write_idx(path, array, *, gz):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = head + array.astype(np.uint8).tobytes()
    path.with_name(path.name + ".gz" * gz).write_bytes(gzip.compress(raw) if gz else raw)


@pytest.fixture
def idx_folder(tmp_path):
    """300 images whose class is the row of a bright bar; training files gzipped, the others not."""
    rng, folder = np.random.default_rng(0), tmp_path / "idx"
    folder.mkdir()
    for split, count in (("train", 240), ("test", 60)):
        images, labels = rng.integers(0, 60, (count, 28, 28)), rng.integers(0, 10, count)
        images[np.arange(count), 2 * labels + 4] = 250
        for name, array in zip(idx.FILES[split], (images, labels), strict=True):
            write_idx(folder / name, array, gz=split == "train")
    return folder


def test_idx_files_are_read_and_searched(idx_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ranksearch.training.dense.EPOCHS", {"idx": 3})
    settings = [f"data={idx_folder}", "validation=40", "recipe.steps=8", "recipe.batch_size=32", "recipe.bn_batches=2"]
    settings += ["search.trials=2", "tracking.models=false", "search.calibration_batches=2"]
    study = ranksearch.search(
        REPOSITORY / "search_spaces" / "fashion_convnet.yaml", settings=settings, runs=tmp_path / "runs", inline=True
    )
    record = study.front_record()
    assert record["dense"]["val_accuracy"] > 25  # of ten classes
    assert all(row["size_bytes"] <= 0.2 * record["dense"]["size_bytes"] for row in record["trials"])
    assert record["trials"][0]["test_accuracy"] is not None
    task = idx.make_task("convnet", data=str(idx_folder), validation=40, split_seed=0)
    raw = gzip.decompress((idx_folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert sorted(task.train.inputs.flatten(1).sum(1).tolist() + task.val.inputs.flatten(1).sum(1).tolist()) == sorted(
        np.frombuffer(raw[16:], np.uint8).reshape(240, -1).sum(1).tolist()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08junk", "cannot be read"),
        (gzip.compress(b"not idx", mtime=0), "is no idx file of bytes: it begins with 6e 6f 74 20"),
        (
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]), mtime=0),
            r"is not whole: its head says \(9,\), and 2 bytes follow",
        ),
        (
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1, 1]), mtime=0),
            r"holds images \(240, 28, 28\) and .* labels \(1,\)",
        ),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 240, *[11] * 240]), mtime=0), "labels up to 11"),
        (None, r"train-labels-idx1-ubyte missing\. Put Fashion-MNIST's"),
    ],
)
def test_idx_files_that_are_none_are_told(idx_folder, content, message):
    labels = idx_folder / "train-labels-idx1-ubyte.gz"
    labels.unlink() if content is None else labels.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        idx.make_task("convnet", data=str(idx_folder), validation=40, split_seed=0)


# A task of one's own, begun -------------------------------------------------------------------------------------------

MINE = """
from torch import nn

class SmallNet(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, width, 3), nn.Conv2d(width, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids, other=None):
        return self.head(self.body(self.words(ids))).mean(1) + (0 if other is None else other.sum())

def needs(width):
    return SmallNet(width)

def nothing():
    return {}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets_of_mine", raising=False)
    yield tmp_path
    sys.modules.pop("nets_of_mine", None)


def test_init_writes_a_space_and_a_task_that_are_valid_as_they_are(project):
    space, task = write_start("nets_of_mine:SmallNet", (1, 12, 12), project)
    assert (space.name, task.name) == ("small_net.yaml", "small_net_task.py")
    text = space.read_text()
    assert "#   stem  6×1×3×3" in text
    assert "exclude: [stem, head]" in text
    done = subprocess.run(
        [sys.executable, "-m", "ranksearch", "search", str(space), "--set", "recipe.steps=4", "--trials", "1", "--inline",
         "--set", "tracking.models=false", "--set", "search.calibration_batches=1"],
        cwd=project, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.raises(UsageError, match=r"small_net\.yaml is there already, and it is kept"):
        write_start("nets_of_mine:SmallNet", (1, 12, 12), project)


@pytest.mark.parametrize(
    "given", [[Given((6,), "int64")], [Given((6,), "int64", "ids"), Given((6,), "int64", "other")], [Given((6,), "int64"), Given((6,))]]
)  # fmt: skip
def test_init_of_integers_and_of_several_inputs_writes_a_task_that_is_valid_as_it_is(project, given):
    space, _ = write_start("nets_of_mine:Words", given, project)
    example = read_space(space).kind().example_input
    assert [x.dtype for x in tensors(example)] == [getattr(torch, one.dtype) for one in given]
    if given[0].name is not None:
        assert example.keys() == {"ids", "other"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--input", "ids=6", "--input", "6"], "give every input a name of its own, or none"),
        (["--input", "6", "--dtype", "int46"], "--dtype int46.*int64"),
        (["--input", "6", "--dtype", "int64", "--dtype", "int64"], "2 for 1 inputs"),
        (["--input", "i d=6"], "expected a shape"),
    ],
)
def test_init_says_which_input_is_wrong(project, monkeypatch, capsys, options, says):
    monkeypatch.setattr(sys, "argv", ["ranksearch", "init", "nets_of_mine:Words", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        ("nets_of_mine:SmallNte", (1, 12, 12), "has no 'SmallNte'. Did you mean 'SmallNet'"),
        ("nets_of_mine:SmallNet", (3, 12, 12), r"does not take inputs \[1, 3, 12, 12\].*--input"),
        ("nets_of_mine:needs", (1, 12, 12), r"needs\(\) raised .*TypeError.*takes no arguments"),
        ("nets_of_mine:nothing", (1, 12, 12), "gives a dict: expected an nn.Module"),
        ("nets_of_mine", (1, 12, 12), "expected package.module:callable"),
        ("nets_of_yours:Net", (1, 12, 12), "'nets_of_yours' cannot be imported: ModuleNotFoundError"),
    ],
)
def test_init_says_what_is_wrong_and_writes_nothing(project, model, shape, message):
    with pytest.raises(UsageError, match=message):
        write_start(model, shape, project)
    assert [path.name for path in project.glob("*.yaml")] == []


def test_init_of_a_librarys_net_writes_how_it_is_made(library, tmp_path):
    space, task = write_start("torchvision:tiny:7", (3, 64, 64), tmp_path)
    assert 'get_model("tiny", num_classes=7, weights=None)' in task.read_text()
    assert read_space(space).kind().build_model("").fc.out_features == 7
