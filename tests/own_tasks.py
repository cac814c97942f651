"""Task files as users write them, for the tests: a classifier, a segmentation and a regression, trained in a moment."""

import textwrap

SPACE = """
name: {name}
task: {file}
budgets: {{flops: 60%}}
recipe: {{steps: 16, batch_size: 32, bn_batches: 2, lr: 0.005, factor_share: 0.5}}
search: {{trials: 3}}
tracking: {{models: false}}
"""

FIT = """
import torch
from torch import nn
import ranksearch

def fit(net, x, y, loss, steps=40):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        value = loss(net(x[index]), y[index])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return net
"""

CLASSIFIER = (
    FIT
    + """
from sklearn.datasets import load_digits
from my_net import Net  # beside this file

def make_task():
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    net = fit(Net(), x[:1000], y[:1000], nn.functional.cross_entropy)
    train = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:1000], y[:1000]), 50, shuffle=True)
    return ranksearch.Task(model=net, train=train, val=(x[1000:1300], y[1000:1300]), test=(x[1300:], y[1300:]))
"""
)

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""

SEGMENTATION = (
    FIT
    + """
class Squares(torch.utils.data.Dataset):
    def __init__(self, count, first):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.first + index)
        mask = torch.zeros(12, 12, dtype=torch.int64)
        top, left = torch.randint(8, (2,), generator=generator).tolist()
        mask[top : top + 4, left : left + 4] = 1
        return (mask + 0.3 * torch.randn(12, 12, generator=generator))[None], mask

def mean_iou(outputs, targets):
    predicted = outputs.argmax(1)
    both = [((predicted == c) & (targets == c)).sum() / ((predicted == c) | (targets == c)).sum() for c in (0, 1)]
    return sum(both) / 2

def make_task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x, y = (torch.stack(part) for part in zip(*(Squares(100, 0)[i] for i in range(100))))
    net = fit(net, x, y, nn.functional.cross_entropy)
    return ranksearch.Task(model=net, train=Squares(96, 0), val=Squares(40, 500), metric=mean_iou)
"""
)

REGRESSION = (
    FIT
    + """
from sklearn.datasets import load_diabetes

class Rmse:
    def reset(self):
        self.total = self.count = 0

    def update(self, outputs, targets):
        self.total, self.count = self.total + (outputs - targets).square().sum().item(), self.count + len(targets)

    def compute(self):
        return (self.total / self.count) ** 0.5

def make_task():
    data = load_diabetes()
    x, y = torch.tensor(data.data, dtype=torch.float32) * 20, torch.tensor(data.target, dtype=torch.float32)[:, None] / 100
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    net = fit(net, x[:300], y[:300], nn.functional.mse_loss)
    return ranksearch.Task(
        model=net, train=(x[:300], y[:300]), val=(x[300:370], y[300:370]), test=(x[370:], y[370:]),
        loss=nn.MSELoss(), metric=Rmse(), metric_name="rmse", direction="minimize", unit="K",
    )
"""
)


def write_task(folder, source, *, name="own", function="make_task", extra=""):
    """Writes NAME.py, what it imports, and NAME.yaml to `folder`; returns the space's path."""
    (folder / "my_net.py").write_text(NET)
    (folder / f"{name}.py").write_text(source)
    space = folder / f"{name}.yaml"
    space.write_text(SPACE.format(name=name, file=f"{name}.py:{function}") + textwrap.dedent(extra))
    return space
