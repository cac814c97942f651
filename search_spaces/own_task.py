"""A task of one's own, as `own_task.yaml` names it: any net, any data, any loss, any metric. Copy it and put yours in.

Here: how far diabetes has come after a year (scikit-learn's embedded data, 442 patients, 10 numbers each), by a small MLP, as a regression
whose root-mean-square error is minimised. The dense net is trained here in a second; yours would be read from a checkpoint.
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import ranksearch


def rmse(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The metric: a function of the outputs and targets of a whole split, [N, 1] each, on the CPU."""
    return (outputs - targets).square().mean().sqrt().item()


def make_task() -> ranksearch.Task:
    data = load_diabetes()
    x = torch.tensor(data.data * 20, dtype=torch.float32)
    y = torch.tensor(data.target, dtype=torch.float32)[:, None] / 100
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val, test = ((x[part], y[part]) for part in (order[:300], order[300:370], order[370:]))
    return ranksearch.Task(
        model=trained_net(*train),
        # a split is a pair of tensors, a torch Dataset, or a DataLoader of (inputs, targets) batches
        train=train,
        val=val,
        test=test,  # optional: read once, at the end, for the front
        loss=nn.MSELoss(),  # left out: cross-entropy
        metric=rmse,  # left out: accuracy in percent
        direction="minimize",
    )


def trained_net(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(150):
        loss = nn.functional.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net
