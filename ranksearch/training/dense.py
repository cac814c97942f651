"""The dense net that a study starts from: a checkpoint, or trained once and kept for later studies."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ranksearch.compress import dense_cost, trace
from ranksearch.data.folder import data_folder, writable_cache
from ranksearch.data.resident import Resident
from ranksearch.errors import StudyError, UsageError, first_line
from ranksearch.model.inputs import tensors
from ranksearch.places.files import partly_written
from ranksearch.tasks.task import Task
from ranksearch.training.device import pick_device, use_bf16
from ranksearch.training.evaluate import evaluate
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Diverged, Training

State = dict[str, Tensor]

PUBLIC_CHECKPOINTS = {
    ("cifar10", "resnet20"): "resnet20-12fca82f.th",
    ("cifar10", "resnet32"): "resnet32-d509ac18.th",
    ("cifar10", "resnet44"): "resnet44-014dd654.th",
    ("cifar10", "resnet56"): "resnet56-4bfd9763.th",
}
"""Trained nets of akamaster/pytorch_resnet_cifar10 (BSD 2-clause, Yerlan Idelbayev)."""

KEYED_BY_NAME = ("digits", "cifar10", "idx")
"""Tasks whose models are known by their names."""

EPOCHS = {"digits": 100, "idx": 10}
"""Length of the dense training of a task that has no public checkpoint; others take 100 epochs."""

TOO_LONG = ("imagefolder",)
"""Tasks whose dense net is not trained here unless that is asked for."""


def read_checkpoint(path: Path) -> State:
    """A state dict from .safetensors or a torch file (weights only: no code is run), `module.` prefixes dropped.

    Raises:
        UsageError: the file is missing or is no checkpoint.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint: there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise UsageError(f"checkpoint: {path} is no checkpoint of weights: {first_line(error)}") from error


def checkpoint_path(task: Task, checkpoint: str, data: str | None) -> Path | None:
    """Where the dense weights are read from; None where the net is to be trained here.

    `checkpoint` is "auto" (the public one where the task has it, else train), "train", or a path; a relative path is looked for in
    the working directory, then in the data folder and its `weights/`.

    Raises:
        UsageError: nothing is there; the text says what to put where.
    """
    public = PUBLIC_CHECKPOINTS.get((task.name, task.model_name or ""))
    if checkpoint == "auto" and task.name in TOO_LONG:
        raise UsageError(
            f"checkpoint: {task.name} has no public weights of {task.model_name}: name a file with them, `checkpoint: FILE`, or train "
            f"them here, which takes long: `--set checkpoint=train`."
        )
    if checkpoint == "train" or (checkpoint == "auto" and public is None):
        return None
    name = public if checkpoint == "auto" and public else checkpoint
    folder = data_folder(data)
    places = [Path(name).expanduser(), folder / name, folder / "weights" / name]
    for place in places[2:] if checkpoint == "auto" else places:
        if place.is_file():
            return place
    if checkpoint == "auto":
        raise UsageError(
            f"The trained {task.model_name} is not in {folder / 'weights'}: put {name} there (from "
            f"akamaster/pytorch_resnet_cifar10, folder pretrained_models; `python scripts/download_cifar10.py` fetches it on a "
            f"machine with internet), name another file by `--set checkpoint=FILE`, or train one: `--set checkpoint=train`."
        )
    raise UsageError(f"checkpoint: {checkpoint!r} is not there; looked at {', '.join(map(str, places))}.")


def _train_dense(task: Task, log: Callable[[str], None]) -> State:
    device = pick_device()
    torch.manual_seed(0)
    model = task.dense_model().to(device)
    on_device = task.without_test().to(device)
    batch = 64 if len(task.train) < 5_000 else 128
    steps = EPOCHS.get(task.name, 100) * max(1, len(task.train) // batch)
    macs = dense_cost(trace(model, on_device.example_input)).macs
    # the recipe is for cross-entropy; other losses have other scales, and gradients that a tenth would throw off
    lr, clip = (0.1, 0.0) if task.cross_entropy else (0.02, 1.0)
    settings = Optimisation(
        optimizer="sgd", schedule="cosine", lr=lr, warmup=0.15, momentum=0.9, weight_decay=5e-4, batch_size=batch,
        total_steps=steps, label_smoothing=0, clip_norm=clip, ema=0, bf16=use_bf16("auto", device, macs), compile=False,
    )  # fmt: skip
    log(f"training the dense {task.model_name} on {task.name} once: {steps} steps")

    def tell(training: Training) -> None:
        if training.done % max(1, steps // 10) == 0:
            log(f"  dense net: {100 * training.done // steps} %")

    generator = torch.Generator(device).manual_seed(0)
    try:
        stats = Training(model, on_device, settings, range(steps), generator=generator).run(tell)
    except Diverged as error:
        raise StudyError(f"Training the dense net failed: {error}.") from error
    score = evaluate(model, on_device.val, on_device)
    log(f"dense net trained: validation {task.metric_name} {score.accuracy:.4g} {task.unit}, {stats.seconds:.0f} s")
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def _training_key(task: Task) -> str | None:
    """Names a dense training by what decides its result, so that another split never meets weights that saw it.

    None where data come from a loader, of which nothing can be said.
    """
    if not isinstance(task.train, Resident):
        return None
    found = hashlib.sha256()
    for part in (*tensors(task.train.targets), *(x[::7] for x in tensors(task.train.inputs))):
        found.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    if task.name not in KEYED_BY_NAME:
        for name, tensor in task.model.state_dict().items():
            found.update(f"{name} {list(tensor.shape)}".encode() + tensor.double().numpy().tobytes())
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{task.name}-{task.model_name}-{found.hexdigest()[:12]}")


def dense_state(task: Task, *, checkpoint: str, data: str | None, fallback: Path, log: Callable[[str], None]) -> State:
    """The dense net's state dict: the task's own, read from the checkpoint, or trained here once and kept in the data folder.

    Where the data folder cannot be written, `fallback` is used.

    Raises:
        UsageError: the checkpoint is missing or does not fit the model.
    """
    if task.trained and checkpoint == "auto":
        # copied: a tensor that two layers share would not be written twice
        return {name: tensor.detach().cpu().clone() for name, tensor in task.model.state_dict().items()}
    path = checkpoint_path(task, checkpoint, data)
    if path is None:
        if (key := _training_key(task)) is None:
            return _train_dense(task, log)
        cache = writable_cache(data_folder(data), fallback) / f"{key}.safetensors"
        if not cache.is_file():
            with partly_written(cache) as partial:
                safetensors.torch.save_file(_train_dense(task, log), partial, metadata={"task": json.dumps(task.name)})
        path = cache
    state = read_checkpoint(path)
    try:
        task.dense_model().load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(
            f"checkpoint: {path} does not fit {task.model_name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    log(f"dense net: {path}")
    return state
