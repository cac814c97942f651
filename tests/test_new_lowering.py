"""A new lowering is one new file: this adds one to a copy of the package and edits nothing else there."""

import os
import shutil
import subprocess
import sys

from tests.conftest import REPOSITORY

HORIZONTAL_FIRST = '''
"""`horizontal`: the other order of `spatial`, (S·kw) x (T·kh). A 1 x kw conv S -> r, then a kh x 1 conv r -> T."""

from ranksearch.lowering.contract import register
from ranksearch.lowering.matrix import MatrixLowering


@register
class Horizontal(MatrixLowering):
    name = "horizontal"

    def refusal(self, spec):
        return None if len(spec.kernel_size) == 2 else "horizontal splits a kernel over two axes alone."

    def matrix_shape(self, spec):
        outputs, inputs, kh, kw = spec.block_shape
        return inputs * kw, outputs * kh

    def unfold(self, blocks, spec):
        return blocks.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)

    def fold(self, matrices, spec):
        outputs, inputs, kh, kw = spec.block_shape
        return matrices.reshape(spec.groups, inputs, kw, outputs, kh).permute(0, 3, 1, 4, 2)

    def chain(self, spec, rank):
        hidden, groups = spec.groups * rank, spec.groups
        first = spec.along(1, spec.in_channels, hidden, groups=groups)
        return first, spec.along(0, hidden, spec.out_channels, groups=groups, bias=spec.bias)

    def split(self, left, right, spec):
        kh, kw = spec.kernel_size
        return left.transpose(1, 2).unflatten(2, (-1, 1, kw)), right.unflatten(2, (-1, kh, 1)).transpose(1, 2)

    def join(self, factors, spec):
        first, second = factors
        return first.flatten(2).transpose(1, 2), second.flatten(3).transpose(1, 2).flatten(2)
'''

USE = """
import torch, ranksearch
model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3, stride=(2, 1)), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, (1, 5))).eval()
x = torch.randn(2, 6, 9, 11)
plan = ranksearch.allocate(model, x, {"params": "60%"}, lowerings=["horizontal"])
assert {layer.lowering for layer in plan.layers.values()} <= {"horizontal", "dense"}, plan
assert any(layer.lowering == "horizontal" for layer in plan.layers.values()), plan
ranksearch.project_(model, plan)
torch.testing.assert_close(ranksearch.compress(model, plan)(x), model(x), rtol=1e-4, atol=1e-5)
from ranksearch.space.layers import LayersSpace
assert "horizontal" in LayersSpace().lowerings
"""


def test_one_new_file_is_a_lowering_everywhere(tmp_path):
    shutil.copytree(REPOSITORY / "ranksearch", tmp_path / "ranksearch", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("__init__.py", "test_lowerings.py"):
        shutil.copy(REPOSITORY / "tests" / name, tmp_path / "tests")
    (tmp_path / "ranksearch" / "lowering" / "horizontal.py").write_text(HORIZONTAL_FIRST)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "2"}

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )

    contract = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_lowerings.py", "-k", "horizontal")
    assert contract.returncode == 0, contract.stdout[-3000:]
    assert "passed" in contract.stdout
    used = run("-c", USE)
    assert used.returncode == 0, used.stderr
