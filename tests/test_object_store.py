"""Data on a Ray worker: read in the object store, not copied per trial."""

import numpy as np
import torch

from ranksearch.search.ray_tune import pack, unpack
from ranksearch.tasks import digits


def test_a_packed_task_comes_back_as_views_of_the_same_memory():
    task = digits.make_task("resnet8", data=None, validation=100, split_seed=0)
    packed = pack(task.without_test())
    assert isinstance(packed.train.images, np.ndarray)
    packed.train.images.setflags(write=False)  # as Ray hands it out
    back = unpack(packed)
    assert torch.equal(back.train.images, task.train.images)
    assert torch.equal(back.val.labels, task.val.labels)
    assert back.train.images.data_ptr() == packed.train.images.ctypes.data
    assert back.test is None
    assert back.example_input.shape == (1, 1, 8, 8)
