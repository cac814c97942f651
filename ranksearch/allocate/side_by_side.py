"""Many small computations on several cores: each core takes one after the other, where torch would spread each of them thinly over all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch


def side_by_side(work: Sequence[Callable[[], object]]) -> None:
    """Does all `work`, in as many threads as torch may use, each of which computes alone; with one thread, one after the other.

    The first error of any, in their order, is raised.
    """
    threads = torch.get_num_threads()
    if min(threads, len(work)) < 2:
        for one in work:
            one()
        return
    try:
        with ThreadPoolExecutor(min(threads, len(work)), initializer=partial(torch.set_num_threads, 1)) as pool:
            for done in [pool.submit(one) for one in work]:
                done.result()
    finally:
        torch.set_num_threads(threads)
