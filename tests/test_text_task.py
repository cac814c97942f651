"""A net of Hugging Face with a data collator's dict batches, from its task to a front and an ONNX file of any text's length."""

import shutil
from pathlib import Path

import pytest
import torch

import ranksearch
from ranksearch.errors import UsageError

pytest.importorskip("transformers")
SPACES = Path(__file__).parent.parent / "search_spaces"


def test_a_text_classifier_is_searched_and_exported_with_any_length(tmp_path):
    for name in ("own_text.yaml", "own_text.py"):
        shutil.copy(SPACES / name, tmp_path)
    settings = ["recipe.steps=6", "tracking.models=false"]
    study = ranksearch.search(
        tmp_path / "own_text.yaml", settings=settings, trials=2, runs=tmp_path / "runs", inline=True
    )
    best = study.best()
    assert best["params_ratio"] <= 0.6
    pytest.importorskip("onnxruntime")
    import onnxruntime

    record = ranksearch.export(study.folder, "best", format="onnx")
    assert [entry["name"] for entry in record["inputs"]] == ["input_ids", "attention_mask"]
    session = onnxruntime.InferenceSession(f"{record['folder']}/model.onnx")
    net = ranksearch.load(study.trial_folder(best["trial"]))
    for samples, length in ((1, 5), (3, 17)):
        x = {"input_ids": torch.randint(3, 12, (samples, length)), "attention_mask": torch.ones(samples, length).long()}
        found = session.run(None, {name: part.numpy() for name, part in x.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), net(**x).logits, rtol=1e-4, atol=1e-5)


def test_accuracy_is_refused_where_the_nets_own_loss_is_another():
    from transformers import BertConfig, BertForSequenceClassification

    from ranksearch.tasks.probe import check_task

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1
    )
    batch = {"input_ids": torch.randint(1, 20, (4, 6)), "labels": torch.rand(4)}
    with pytest.raises(UsageError, match="give the task a metric="):
        check_task(ranksearch.Task(model=BertForSequenceClassification(config), train=[batch], val=[batch]))
