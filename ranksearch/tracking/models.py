"""The nets of a front as MLflow models: exported programs that load without our code and without a pickle.

Beside the program, each holds `plan.json` and `model.safetensors`, from which `ranksearch.load` rebuilds a net that can be trained further.
Making one (`save_model`) takes seconds and needs no store, so that any process can do it (`model_maker.py`); the store is the driver's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ranksearch.data.resident import Normalise
from ranksearch.deploy.exported import max_rel_error
from ranksearch.deploy.formats import quiet, told, traced
from ranksearch.model.axes import free_axes
from ranksearch.model.inputs import call, repeated
from ranksearch.model.plain import is_plain, named_inputs, plain, plain_outputs
from ranksearch.places.net_files import PLAN, WEIGHTS
from ranksearch.tracking.store import quiet_mlflow

quiet_mlflow()
import mlflow.pytorch  # noqa: E402  (its settings are read at import)
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import LoggedModelOutput, Metric  # noqa: E402
from mlflow.models import Model, ModelSignature  # noqa: E402
from mlflow.models.model import MLMODEL_FILE_NAME  # noqa: E402
from mlflow.types import Schema, TensorSpec  # noqa: E402

CHAMPION = "champion"
TOLERANCE = 1e-5
"""How far a model that is loaded again may be off: the largest difference of outputs as a share of the largest output."""
BATCH = 2
"""Samples of the input example; with two or more, the exported batch can have any size."""


def save_model(net: nn.Module, folder: Path, target: Path, example: Any, normalise: Normalise | None) -> None:
    """Writes a trial's net, from its `folder`, as an MLflow model to `target`, loads it again and compares it with the net.

    The model belongs to no store yet: `log_model` gives it its IDs.

    Args:
        net: in evaluation mode, on the CPU.
        example: a batch of one input, as the net takes it.
        normalise: how an input is made from an image, where that is known.

    Raises:
        StudyError: the net cannot be exported, or what is loaded again computes something else.
    """
    made_by = {"input": "(image / scale - mean) / std, per channel"}
    one, example = example, repeated(example, BATCH, torch.Generator().manual_seed(0))
    with told(f"The net in {folder} cannot be stored as an MLflow model"), torch.inference_mode():
        free = set(free_axes(traced(net, example), example))
        alone = is_plain(net, example)
        stored = net if alone else plain(net, example)
        named = named_inputs(example)
        wanted = plain_outputs(call(net, example))
        outputs = [(None, wanted)] if isinstance(wanted, torch.Tensor) else list(wanted.items())
        signature = ModelSignature(
            Schema([_spec(x, None if alone else name, free, name) for name, x in named.items()]),
            Schema([_spec(x, name, free, None) for name, x in outputs]),
        )
    version = torch.__version__.partition("+")[0]
    with told(f"The net in {folder} cannot be exported"), quiet("mlflow"):
        mlflow.pytorch.save_model(
            stored, target, mlflow_model=Model(), signature=signature, serialization_format="pt2",
            input_example=example.numpy() if alone else [x.numpy() for x in named.values()],
            pip_requirements=[f"mlflow=={mlflow.__version__}", f"torch=={version}", f"numpy=={np.__version__}"],
            extra_files=[str(folder / PLAN), str(folder / WEIGHTS)],
            metadata=made_by | asdict(normalise) if normalise is not None else {"input": "as the task's own data have it"},
        )  # fmt: skip
        again = mlflow.pytorch.load_model(str(target))
    more = repeated(one, BATCH + 1, torch.Generator().manual_seed(1))
    opened = again if alone else lambda batch: again(*named_inputs(batch).values())
    max_rel_error(opened, net, [example, more], tolerance=TOLERANCE)


def _spec(tensor: torch.Tensor, name: str | None, free: set[tuple[str, int]], axes_of: str | None) -> TensorSpec:
    """A tensor in a model's signature, with -1 for the batch and for every other axis that may have any extent."""
    shape = [-1 if i == 0 or (axes_of, i) in free else extent for i, extent in enumerate(tensor.shape)]
    return TensorSpec(tensor.numpy().dtype, shape, name)


def log_model(
    client: MlflowClient, experiment_id: str, run_id: str, name: str, made: Path,
    *, tags: Mapping[str, str], params: Mapping[str, str], metrics: Mapping[str, float], at_ms: int,
) -> str:  # fmt: skip
    """Logs the model that `save_model` wrote to `made`, linked to its trial's run and metrics; returns its ID.

    Where the store refuses, no half of a model is left in it.
    """
    entry = client.create_logged_model(
        experiment_id, name=name, source_run_id=run_id, tags=dict(tags), params=dict(params), model_type="pt2"
    )
    try:
        model = Model.load(made)
        model.artifact_path, model.run_id = entry.artifact_location, run_id
        model.model_id = model.model_uuid = entry.model_id
        model.save(made / MLMODEL_FILE_NAME)
        client.log_model_artifacts(entry.model_id, str(made))
    except BaseException:
        client.delete_logged_model(entry.model_id)
        raise
    client.finalize_logged_model(entry.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(entry.model_id, step=0)])
    client.log_batch(
        run_id, metrics=[Metric(k, v, at_ms, 0, model_id=entry.model_id, run_id=run_id) for k, v in metrics.items()]
    )
    return entry.model_id


def register(client: MlflowClient, name: str, model_id: str, run_id: str, *, description: str) -> str:
    """Makes a model the `champion` among the versions of the registered model `name`; returns its version. A model is registered once."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=f"The best nets of the study {name} within its budgets.")
    # named by its place, not as models:/ID, which a database's registry would look up in the process's default store
    source = client.get_logged_model(model_id).artifact_location
    known = [
        version.version for version in client.search_model_versions(f"name = '{name}'") if version.source == source
    ]
    if known:
        version = known[0]
    else:
        version = client.create_model_version(name, source, run_id, model_id=model_id, description=description).version
        client.set_logged_model_tags(
            model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version}])}
        )
    client.set_registered_model_alias(name, CHAMPION, version)
    return version
