"""Data on a Ray worker: read in the object store, not copied per trial."""

import numpy as np
import torch

from ranksearch.cluster.pack import pack, unpack
from ranksearch.tasks import digits


def test_a_packed_task_comes_back_as_views_of_the_same_memory():
    task = digits.make_task("resnet8", data=None, validation=100, split_seed=0)
    packed = pack(task)
    inputs, _targets = packed.arrays["train"]
    assert isinstance(inputs.values, np.ndarray)
    assert len(packed.rest) < 400_000  # the model, and no data
    inputs.values.setflags(write=False)  # as Ray hands it out
    back = unpack(packed)
    assert torch.equal(back.train.inputs, task.train.inputs)
    assert torch.equal(back.val.targets, task.val.targets)
    assert back.train.inputs.data_ptr() == inputs.values.ctypes.data
    assert back.train.augment == task.train.augment
    assert back.test is None
    assert back.example_input.shape == (1, 1, 8, 8)
