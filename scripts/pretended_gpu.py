"""A GPU that is pretended on a CPU: what would fail, wait or be missed on a card does so here, numbers included.

    with PretendedGpu() as gpu:          torch.cuda is available, tensors can be `.to("cuda")`
        ...                            gpu.launches, gpu.waits: what was launched so far, and where the host waited

Every tensor is an ordinary one of the CPU; those whose storage is marked say that they are on `cuda:0`. What is watched:

- operations on tensors of both devices fail as they do on a card, but for scalars of the CPU and copies;
- whatever makes the host wait (`.item()`, copies that block, masks that pick, checks of decompositions) is counted, warned of in the sync
  debug mode, and refused while a graph is captured;
- a CUDA graph holds the operations that were launched while it was captured, and runs these again on the same memory. Capturing itself
  computes nothing: what it would have written is undone, what it has made is NaN until the first replay;
- random numbers without a generator come from one of the device's own, which a capture draws from by replays alone; a captured generator
  must be registered.

Not pretended: streams that run at the same time, memory, the numbers of bf16 kernels of a card, kernels that fail there alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._linalg_check_errors.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.bincount.default, aten.repeat_interleave.Tensor, aten._linalg_svd.default, aten.is_nonzero.default,
}  # fmt: skip
"""Operations whose result, or the check of it, the host looks at."""
COPIES = {aten.copy_.default, aten._to_copy.default}
MIXED = {*COPIES, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.is_same_size.default}
"""Operations that take tensors of both devices."""
RealGenerator, RealAutocast = torch.Generator, torch.autocast


GENERATORS: WeakValueDictionary[int, Generator] = WeakValueDictionary()
"""By their address: operations are given them as plain ones."""


class Generator(RealGenerator):
    """A generator of the CPU that says it is on the GPU where it was asked to be."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._place = CUDA if torch.device(device).type == "cuda" else CPU
        GENERATORS[self._cdata] = self

    @property
    def device(self) -> torch.device:
        return self._place

    def clone_state(self) -> Generator:
        other = Generator(self._place)
        other.set_state(self.get_state())
        return other

    def graphsafe_set_state(self, state: Generator) -> None:
        self.set_state(state.get_state())


class Autocast(RealAutocast):
    """Autocast of the GPU is that of the CPU here."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class Stream:
    def __init__(self, device: Any = None) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...
    def synchronize(self) -> None: ...


class Event:
    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Graph:
    """`torch.cuda.CUDAGraph`: operations that were launched while it was captured."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu
        self.generators = [gpu.generator]
        self.launched: list[tuple[Any, Any, Any, list[int], list[Tensor]]] = []
        """Operation, its arguments, and which of its results lie in memory of their own."""
        self.failed: str | None = None
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()
        self._states: list[tuple[RealGenerator, Tensor]] = []

    def register_generator_state(self, generator: Generator) -> None:
        self.generators.append(generator)

    def begin(self) -> None:
        self._states = [(generator, generator.get_state()) for generator in self.generators]

    def add(self, func: Any, args: Any, kwargs: Any, result: Any, fresh: list[Tensor]) -> None:
        new = {id(tensor) for tensor in fresh}
        places = [i for i, tensor in enumerate(tensors_of(result)) if id(tensor) in new]
        self.launched.append((func, args, kwargs, places, [tensor.detach() for tensor in fresh]))
        self._made |= {_key(tensor) for tensor in fresh}

    def keep(self, written: Tensor) -> None:
        """Notes what a tensor held before the capture, since nothing is computed in it."""
        storage = _key(written)
        if storage not in self._made and storage not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(written.untyped_storage())
            self._before[storage] = whole, whole.clone()

    def end(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)
        for *_, fresh in self.launched:
            for made in fresh:
                if made.is_floating_point():
                    made.fill_(float("nan"))
        for generator, state in self._states:
            generator.set_state(state)

    @torch.no_grad()
    def replay(self) -> None:
        """Runs what was launched, in its order and on its memory."""
        gpu = self.gpu
        gpu.replays += 1
        with gpu.aside():
            for func, args, kwargs, places, fresh in self.launched:
                again = gpu.computed(func, args, kwargs)
                if fresh:
                    found = tensors_of(again)
                    for place, old in zip(places, fresh, strict=True):
                        old.copy_(found[place])


class PretendedGpu:
    """The device, for the length of a block."""

    def __init__(self) -> None:
        self.on: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self.generator = Generator(CUDA)
        self.launches, self.replays, self.waits = 0, 0, list[str]()
        """Operations launched one by one, graphs replayed, and where the host waited."""
        self.capturing: Graph | None = None
        self.sync_mode = 0
        self.making = CPU
        """Where the factory that is running makes its tensor."""
        self._functions, self._operations = Functions(self), Operations(self)

    def __enter__(self) -> PretendedGpu:
        self._stack = ExitStack()
        for where, name, value in self._replacements():
            self._stack.enter_context(mock.patch.object(where, name, value, create=True))
        self._stack.enter_context(self._operations)
        self._stack.enter_context(self._functions)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within is not watched."""
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield

    # Where tensors are ----------------------------------------------------------------------------------------------

    def has(self, tensor: Tensor) -> bool:
        return _key(tensor) in self.on  # a storage that is gone keeps its place: no other one is taken for it

    def mark(self, tensor: Tensor, on: bool) -> None:
        storage = tensor.untyped_storage()
        if on:
            self.on[storage._cdata] = StorageWeakRef(storage)
        else:
            self.on.pop(storage._cdata, None)

    def mark_pinned(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)

    def is_pinned(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._pinned

    def place_of(self, tensor: Tensor) -> torch.device:
        return CUDA if self.has(tensor) else tensor.device

    # What is done on it ---------------------------------------------------------------------------------------------

    def wait(self, what: str) -> None:
        """The host waits for the device: for the first caller that is neither torch nor this file."""
        frame = sys._getframe(1)
        while frame.f_back is not None and (
            "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        if self.capturing is not None:
            self.capturing.failed = what
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        self.waits.append(f"{what} at {frame.f_code.co_filename}:{frame.f_lineno}")
        if self.sync_mode:
            warnings.warn_explicit(
                f"called a synchronizing CUDA operation ({what})", UserWarning, frame.f_code.co_filename, frame.f_lineno
            )

    def copy(self, what: str, there: Tensor, non_blocking: bool) -> None:
        """Copies between a tensor on the device and `there`, on the CPU; only from and to pinned memory does it go on in a capture."""
        if not non_blocking or (self.capturing is not None and not self.is_pinned(there)):
            self.wait(what)

    def computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives; random numbers without a generator are the device's own."""
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def _replacements(self) -> Iterator[tuple[Any, str, Any]]:
        gpu, cuda = self, torch.cuda

        @contextmanager
        def on_stream(stream: Any) -> Iterator[None]:
            yield

        @contextmanager
        def graph(graph: Graph, **options: Any) -> Iterator[None]:
            graph.begin()
            gpu.capturing = graph
            try:
                yield
            finally:
                gpu.capturing = None
                graph.end()
            if graph.failed is not None:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        def set_sync_debug_mode(mode: Any) -> None:
            gpu.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

        def set_rng_state(state: Tensor, device: Any = None) -> None:
            gpu.generator.set_state(state)

        def group(lists: Any, with_indices: bool = False) -> Any:
            with torch._C.DisableTorchFunction():
                found = torch._C._group_tensors_by_device_and_dtype(lists, with_indices)
                return {(gpu.place_of(tensors_of(value)[0]), key[1]): value for key, value in found.items()}

        properties = mock.Mock(total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0)
        properties.name = "pretended"
        always: dict[str, Any] = {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended", "is_initialized": True,
            "get_device_properties": properties, "get_device_capability": (9, 0), "is_bf16_supported": True,
            "mem_get_info": (79 * 2**30, 80 * 2**30), "memory_reserved": 0, "max_memory_reserved": 2**20, "memory_allocated": 0,
            "empty_cache": None, "reset_peak_memory_stats": None, "set_per_process_memory_fraction": None, "init": None,
            "_lazy_init": None, "max_memory_allocated": 2**20, "ipc_collect": None,
        }  # fmt: skip
        for name, value in always.items():
            yield cuda, name, lambda *args, value=value, **kwargs: value
        yield cuda, "synchronize", lambda device=None: gpu.wait("torch.cuda.synchronize")
        yield cuda, "Stream", Stream
        yield cuda, "Event", Event
        yield cuda, "current_stream", lambda device=None: Stream()
        yield cuda, "default_stream", lambda device=None: Stream()
        yield cuda, "stream", on_stream
        yield cuda, "CUDAGraph", lambda **options: Graph(gpu)
        yield cuda, "graph", graph
        yield cuda, "default_generators", (self.generator,)
        yield cuda, "manual_seed", self.generator.manual_seed
        yield cuda, "manual_seed_all", self.generator.manual_seed
        yield cuda, "get_rng_state", lambda device=None: gpu.generator.get_state()
        yield cuda, "set_rng_state", set_rng_state
        yield cuda, "set_sync_debug_mode", set_sync_debug_mode
        yield cuda, "get_sync_debug_mode", lambda: gpu.sync_mode
        yield cuda, "is_current_stream_capturing", lambda: gpu.capturing is not None
        yield torch, "Generator", Generator
        yield torch, "autocast", Autocast
        yield torch.amp.autocast_mode, "autocast", Autocast
        deepcopy = torch.Tensor.__deepcopy__

        def copied(tensor: Tensor, memo: Any) -> Tensor:
            with gpu.aside():
                copy: Tensor = deepcopy(tensor, memo)
            gpu.mark(copy, gpu.has(tensor))
            return copy

        yield torch.Tensor, "__deepcopy__", copied
        for module in (torch._tensor, torch.functional, torch.nn.functional, torch.nn.init, torch.autograd):
            # what torch has in Python then runs with these modes on
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
                yield module, name, lambda *tensors: False
        yield Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(group)
        for module in (torch.utils._foreach_utils, torch.nn.utils.clip_grad):
            yield module, "_group_tensors_by_device_and_dtype", group


class Functions(TorchFunctionMode):
    """What Python asks of tensors: where they are, and to be made or brought elsewhere."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu, name = dict(kwargs or {}), self.gpu, getattr(func, "__name__", "")
        if name == "__get__":
            for attribute, answer in GETTERS.items():
                if func == getattr(torch.Tensor, attribute).__get__:
                    return answer(gpu, args[0])
            return func(*args, **kwargs)
        if name in MOVES and isinstance(args[0], Tensor):
            return self._moved(name, *args, **kwargs)
        if name in ("numpy", "__array__") and gpu.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name == "tolist" and gpu.has(args[0]):
            gpu.wait("tolist")
        if name == "pin_memory":
            pinned = args[0].clone()
            gpu.mark_pinned(pinned)
            return pinned
        if name == "is_pinned":
            return gpu.is_pinned(args[0])
        if name == "get_device":
            return 0 if gpu.has(args[0]) else -1
        return self._called(func, args, kwargs)

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        gpu, device = self.gpu, kwargs.get("device")
        pinned = bool(kwargs.pop("pin_memory", False))
        before = gpu.making
        if device is not None and torch.device(device).type == "cuda":
            if gpu.capturing is not None and getattr(func, "__name__", "") in ("tensor", "as_tensor", "asarray"):
                gpu.wait("a tensor made from numbers of the host")
            kwargs["device"], gpu.making = CPU, CUDA
        elif device is not None:
            gpu.making = CPU
        try:
            found = func(*args, **kwargs)
        finally:
            making, gpu.making = gpu.making, before
        if making is CUDA and device is not None and isinstance(found, Tensor):
            gpu.mark(found, True)
        if pinned:
            gpu.mark_pinned(found)
        return found

    def _moved(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gpu, here = self.gpu, self.gpu.has(tensor)
        if name == "to":
            if args and isinstance(args[0], Tensor):
                other, *args = args  # type: ignore[assignment]
                device, dtype = gpu.place_of(other), other.dtype
                non_blocking, form = kwargs.get("non_blocking", False), kwargs.get("memory_format")
            else:
                device, dtype, non_blocking, form = torch._C._nn._parse_to(
                    *args, **{k: v for k, v in kwargs.items() if k != "copy"}
                )
        else:
            device, dtype, form = CPU if name == "cpu" else CUDA, None, None
            non_blocking = kwargs.get("non_blocking", False)
        there = here if device is None else device.type == "cuda"
        if device is not None and device.type == "meta":
            return torch.Tensor.to(tensor, *args, **kwargs)
        plain = {"copy": kwargs.get("copy", False) or here != there, "dtype": dtype or tensor.dtype}
        if form is not None:
            plain["memory_format"] = form
        gpu.making = CUDA if there else CPU
        try:
            moved = torch.Tensor.to(tensor, **plain)
        finally:
            gpu.making = CPU
        if here != there:
            what = "a copy to the CPU" if here else "a copy from the CPU"
            gpu.copy(what, moved if here else tensor, non_blocking)
            gpu.mark(moved, there)
        return moved


class Operations(TorchDispatchMode):
    """What is launched, backward passes included."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._launch(func, args, kwargs or {})

    def _launch(self, func: Any, args: Any, kwargs: Any) -> Any:
        gpu, given = self.gpu, tensors_of((args, kwargs))
        keys = {_key(tensor) for tensor in given}
        on = keys & gpu.on.keys()
        if on or (gpu.making is CUDA and not given):
            self._check_generator(kwargs.get("generator"))
        if on:
            self._check(func, args, kwargs, given)
            written = _written(func, args, kwargs)
            if gpu.capturing is not None:
                for tensor in written:
                    if gpu.has(tensor):
                        gpu.capturing.keep(tensor)
            there = not (func in COPIES and written and not gpu.has(written[0]))
            result = gpu.computed(func, args, kwargs)
        else:
            there, result = gpu.making is CUDA, func(*args, **kwargs)
        fresh = [tensor for tensor in tensors_of(result) if _key(tensor) not in keys]
        for tensor in fresh:
            gpu.mark(tensor, there)
        if on or (there and not given):
            self._launched(func, args, kwargs, result, fresh)
        return result

    def _launched(self, func: Any, args: Any, kwargs: Any, result: Any, fresh: list[Tensor]) -> None:
        gpu = self.gpu
        if gpu.capturing is not None:
            gpu.capturing.add(func, args, kwargs, result, fresh)
        elif not func.is_view and func not in (aten.detach.default, aten.lift_fresh.default, aten.empty.memory_format):
            gpu.launches += 1

    def _check(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        gpu = self.gpu
        off = [tensor for tensor in given if not gpu.has(tensor)]
        if off and func not in MIXED and any(tensor.dim() for tensor in off):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
            )
        if off and func is aten.copy_.default:
            gpu.copy("a copy between CPU and GPU", off[0], bool(kwargs.get("non_blocking") or args[2:] == (True,)))
        indices = args[1] if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default) else ()
        for index in indices:
            if index is not None and (index.dtype in (torch.bool, torch.uint8) or not gpu.has(index)):
                gpu.wait("an index that is looked at")
        if func in WAITS and not (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None):
            gpu.wait(str(func))

    def _check_generator(self, given: Any) -> None:
        gpu, generator = self.gpu, GENERATORS.get(given._cdata) if given is not None else None
        if given is not None and (generator is None or generator.device.type != "cuda"):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if generator is not None and gpu.capturing is not None and generator not in gpu.capturing.generators:
            raise RuntimeError("the generator is not registered with the graph that is captured")


MOVES = ("to", "cpu", "cuda")
GETTERS: dict[str, Callable[[PretendedGpu, Tensor], Any]] = {
    "device": lambda gpu, tensor: gpu.place_of(tensor),
    "is_cuda": lambda gpu, tensor: gpu.has(tensor),
    "is_cpu": lambda gpu, tensor: tensor.is_cpu and not gpu.has(tensor),
}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of the CPU in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value] if value.is_cpu else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors_of(part)]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    if func is aten.native_batch_norm.default:  # its schema does not say so
        return tensors_of(args[3:5]) if args[5] else []
    if not func._schema.is_mutable:
        return []
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += tensors_of(value)
    return found
