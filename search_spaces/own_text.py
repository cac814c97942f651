"""A text classifier of Hugging Face as `own_text.yaml` names it: the net, a data collator's loaders, and no more.

Here a BERT of random weights (`transformers`, the extra `text`; nothing is downloaded) learns which of two words a text has more often.
Yours would be `AutoModelForSequenceClassification.from_pretrained("/my/model")`, your tokenizer and your texts.
"""

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import ranksearch

WORDS, LONGEST = 64, 24


def make_task() -> ranksearch.Task:
    train, val = texts(512, seed=0), texts(256, seed=1)
    # dict batches with masks and labels, as a data collator of Hugging Face makes them; the net's own loss is taken
    return ranksearch.Task(
        model=trained_net(train),
        train=DataLoader(train, 32, shuffle=True, collate_fn=collated, generator=torch.Generator().manual_seed(0)),
        val=DataLoader(val, 64, collate_fn=collated),
        # what one call takes where it is exported and timed
        example_input={name: part for name, part in collated(val[:1]).items() if name != "labels"},
    )


def texts(count: int, seed: int) -> list[dict[str, list[int] | int]]:
    """Samples as a tokenizer leaves them: token numbers of different lengths, and a label."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(8, LONGEST + 1, (), generator=generator))
        tokens = torch.randint(3, 12, (length,), generator=generator).tolist()
        found.append({"input_ids": [1, *tokens], "labels": int(tokens.count(3) > tokens.count(4))})
    return found


def collated(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Padded to the longest of the batch, as `DataCollatorWithPadding` does it with a tokenizer."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        ids[row, :length], mask[row, :length] = torch.tensor(sample["input_ids"]), 1
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained_net(train: list[dict]) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2,
        max_position_embeddings=64,
    )  # fmt: skip
    net = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    loader = DataLoader(train, 32, shuffle=True, collate_fn=collated, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        for batch in loader:
            optimizer.zero_grad()
            net(**batch).loss.backward()
            optimizer.step()
    return net.eval()
