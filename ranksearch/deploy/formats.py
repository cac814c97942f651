"""The forms in which a net leaves ranksearch: how each is written to a folder, and how what was written is opened again.

`state_dict`: `plan.json` and `model.safetensors`, for `ranksearch.load`. `pt2`: torch.export's graph, for PyTorch without ranksearch, C++
included. `onnx`: for ONNX Runtime, TensorRT, OpenVINO and the like. The last two take any number of images per call. `exported.py` checks
what is written here. Opening a .pt2 may run what its writer put there (torch says so): only what was just written is opened.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from ranksearch.compress.export import Build, load_net, save_net
from ranksearch.errors import RanksearchError, StudyError, UsageError, nearest
from ranksearch.model.axes import BATCH, free_axes, name_axes_, stretched
from ranksearch.model.experts import with_open_experts
from ranksearch.model.inputs import batch_size, call, cut, joined
from ranksearch.model.plain import is_plain, named_inputs, plain, plain_outputs
from ranksearch.model.plan import RankPlan

Function = Callable[[Any], Any]
"""A net as what it computes: a batch, a tensor [N, ...] or arguments as `inputs.py` says -> outputs [N, ...]."""

OPSET = 20
"""The oldest version of the default ONNX domain; torch's exporter writes 18 and newer."""
ONE_FILE_BYTES = 1_900_000_000
"""Above it an ONNX model's weights go to a second file: its own format ends at 2 GiB."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Format:
    """A form of a net on disk."""

    name: str
    write: Callable[[nn.Module, RankPlan, Any, Path], ExportedProgram | None]
    """Writes a net in evaluation mode and its plan to a folder; the third is a batch to trace with, as the net takes it. Returns the
    graph that was written, None where the format keeps layers."""
    open: Callable[[Path, Build], Function]
    """The net of such a folder as a function, with the threads of this process."""
    traced: bool
    """Whether the file holds what the net computes, not its layers: it needs no ranksearch, and its BN may be folded."""
    needs: tuple[str, ...] = ()
    """Packages of the extra of the format's name."""
    opset: int | None = None
    """The version of the default ONNX domain."""


def format_named(name: str) -> Format:
    """The format `name`, if everything that it needs is installed.

    Raises:
        UsageError: no such format (the text names the nearest one), or its extra is not installed.
    """
    if name not in FORMATS:
        raise UsageError(f"There is no export format {name!r}. {nearest(name, FORMATS)}")
    missing = [package for package in FORMATS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"Format {name} needs {', '.join(missing)}, not installed here: `pip install 'ranksearch[{name}]'`."
        )
    return FORMATS[name]


def traced(model: nn.Module, batch: Any) -> ExportedProgram:
    """The exported graph of `model`, its first axis (samples per call) free, and every other one (tokens, height, width) that can be.

    Where the net does not map one tensor to one tensor, it is `plain(model, batch)` that is exported, called by keyword.

    Raises:
        StudyError: torch.export cannot trace the net; the text says why.
    """
    try:
        program = _traced(model, batch, free=True)
        if _keeps_its_word(program, model, batch):
            return program
    except StudyError:
        pass
    return _traced(model, batch, free=False)  # a net whose other axes cannot be free


@torch.inference_mode()
def _keeps_its_word(program: ExportedProgram, model: nn.Module, batch: Any) -> bool:
    """Whether the graph takes what its shapes promise: torch may guard an axis that it calls free."""
    with quiet():
        function = _as_function(program)
    one = cut(batch, 0, 1)
    longer = stretched(model, batch, free_axes(program, batch))
    try:
        for inputs in (one, joined([batch, one]), longer):
            if inputs is not None:
                function(inputs)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return True


def _traced(model: nn.Module, batch: Any, *, free: bool) -> ExportedProgram:
    first = Dim(BATCH, min=1)

    def axes(x: Tensor) -> dict[int, Any]:
        own = {0: first} if x.dim() and x.shape[0] == batch_size(batch) else {}
        # torch takes an axis of one step as fixed, and says so
        return own | ({i: Dim.AUTO for i in range(1, x.dim()) if x.shape[i] > 1} if free else {})

    with told("torch.export cannot trace this net with a free batch axis"), quiet():
        if is_plain(model, batch):
            return torch.export.export(model, (batch,), dynamic_shapes=(axes(batch),))
        named = named_inputs(batch)
        shapes = {name: axes(x) for name, x in named.items()}
        return torch.export.export(plain(model, batch), (), named, dynamic_shapes=shapes)


def _write_state_dict(model: nn.Module, plan: RankPlan, batch: Any, folder: Path) -> None:
    save_net(model, plan, folder)


def _open_state_dict(folder: Path, build: Build) -> Function:
    net = load_net(folder, build)
    return lambda batch: call(net, batch)


def _write_pt2(model: nn.Module, plan: RankPlan, batch: Any, folder: Path) -> ExportedProgram:
    program = traced(model, batch)
    with told("torch.export cannot save this net"), quiet():
        torch.export.save(program, folder / "model.pt2")
    return program


def _open_pt2(folder: Path, build: Build) -> Function:
    with quiet():
        return _as_function(torch.export.load(folder / "model.pt2"))


def _as_function(program: ExportedProgram) -> Function:
    net = program.module()
    by_name = program.call_spec.in_spec.child(1).num_children > 0  # type: ignore[union-attr]
    # not as a module: an exported one has no train() and eval()
    return lambda batch: net(**named_inputs(batch)) if by_name else net(batch)


def _write_onnx(model: nn.Module, plan: RankPlan, batch: Any, folder: Path) -> ExportedProgram:
    model = with_open_experts(model)  # ONNX has no grouped product
    program = traced(model, batch)
    try:
        _save_onnx(program, model, batch, folder)
        return program
    except StudyError:
        pass
    # fused attention is decomposed wrongly under a mask such as T5's, and where its result is viewed in the layout that it happens to have
    with sdpa_kernel(SDPBackend.MATH):
        program = traced(model, batch)
        try:
            _save_onnx(program, model, batch, folder)
        except StudyError:
            if not free_axes(program, batch):
                raise
            program = _traced(model, batch, free=False)
            _save_onnx(program, model, batch, folder)
    return program


def _save_onnx(program: ExportedProgram, model: nn.Module, batch: Any, folder: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    names = list(named_inputs(batch))
    with torch.no_grad():
        found = plain_outputs(call(model, batch))
    outputs = ["output"] if isinstance(found, Tensor) else [n if n not in names else f"output_{n}" for n in found]
    batched = {name for name, x in named_inputs(batch).items() if x.dim() and x.shape[0] == batch_size(batch)}
    with told(f"torch.onnx cannot write this net at opset {OPSET}"), quiet():
        made: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=names, output_names=outputs, verbose=False
        )
        name_axes_(made, batched)
        made.save(folder / "model.onnx", external_data=size > ONE_FILE_BYTES)


def _open_onnx(folder: Path, build: Build) -> Function:
    return opened_onnx(folder / "model.onnx")


def opened_onnx(model: Path | bytes) -> Function:
    """An ONNX model, a file or its bytes, in ONNX Runtime on the CPU with the threads of this process."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # threads that spin after a call would slow down whatever is timed in turn with it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    taken = [node.name for node in session.get_inputs()]  # without inputs that nothing is computed from
    names = [node.name for node in session.get_outputs()]

    def run(batch: Any) -> Any:
        given = named_inputs(batch)
        # a layer's input has the name that its graph was cut at
        values = {n: (given[n] if n in given else next(iter(given.values()))).numpy() for n in taken}
        found = dict(zip(names, map(torch.from_numpy, session.run(None, values)), strict=True))
        return next(iter(found.values())) if len(found) == 1 else found

    return run


@contextlib.contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Keeps the exporters' notes for their developers, and those of the loggers `more`, off the terminal; stdout is for results."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", *more)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turns whatever an exporter or a runtime raises into a StudyError that says `what` and why; they share no base class."""
    try:
        yield
    except (RanksearchError, OSError):
        raise
    except Exception as error:
        origin = error.__cause__ or error
        lines = [line.strip() for line in str(origin).splitlines() if line.strip()]  # may be pages
        raise StudyError(f"{what}: {type(origin).__name__}: {' '.join(lines[:3])[:500]}") from error


FORMATS = {
    made.name: made
    for made in (
        Format("state_dict", _write_state_dict, _open_state_dict, traced=False),
        Format("pt2", _write_pt2, _open_pt2, traced=True),
        Format("onnx", _write_onnx, _open_onnx, traced=True, needs=ONNX_PACKAGES, opset=OPSET),
    )
}
