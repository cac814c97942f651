"""Losses against targets that are drawn from the net's own prediction: `fisher` and `kfac` are made of their gradients.

Drawn so, the expected square of the gradients is the true Fisher information: it needs no targets, and does not vanish on data that the net
has learnt by heart. Which distribution the prediction stands for follows from the task's loss:

| loss | prediction | drawn |
|---|---|---|
| cross-entropy, with or without class weights | logits [N, classes, ...] | a class |
| binary cross-entropy with logits | a logit each | 0 or 1 |
| squared, absolute, Huber's error | a mean each | it plus noise of variance 1 |

Weights of classes are those of the loss's Gauss-Newton matrix: a sample counts as much as the class that it is predicted to be, on average
over the prediction; its loss is multiplied by the root of that, since the information is the gradients' square.

Under any other loss nothing can be drawn: there the gradients are the loss's own on the training targets (the empirical Fisher).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.errors import UsageError
from ranksearch.model.inputs import LOGITS, class_logits, field_of

SummedLoss = Callable[[Any], Tensor]
"""Output of the net on a batch -> the sum of the samples' losses."""
Drawn = Callable[[Tensor, Any], Tensor]
"""(outputs of a batch, its targets or None) -> the sum of the samples' losses against drawn targets."""
SQUARED = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
SQUARED_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
RAREST = 0.02
"""The least share of a class that `balanced` weighs by, times that of an even split: a rarer class counts as if it had it."""


def labels_loss(
    generator: torch.Generator, *, weight: Tensor | None = None, ignore: int | None = None, balanced: bool = False
) -> Drawn:
    """Cross-entropy, summed, against classes drawn from the prediction: classes in dimension 1 of a floating output.

    Args:
        weight: one per class, [classes].
        ignore: positions whose target is this count for nothing.
        balanced: every class counts alike, whatever its share of the predictions so far.
    """
    seen: list[Tensor] = []  # sum of the chances [classes], and how many there were

    def loss(output: Tensor, targets: Any) -> Tensor:
        logits = output.movedim(1, -1).flatten(0, -2).float()
        chances = logits.detach().softmax(-1).cpu()
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
        if ignore is not None and isinstance(targets, Tensor) and targets.numel() == len(labels):
            labels[targets.flatten().to(labels.device) == ignore] = ignore
        weights = torch.ones(chances.shape[1]) if weight is None else weight.cpu().float()
        if balanced:
            seen[:] = [chances.sum(0) + (seen[0] if seen else 0.0)]
            weights = weights / (len(seen[0]) * seen[0] / seen[0].sum()).clamp_min(RAREST)
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100 if ignore is None else ignore)
        return (losses * (chances @ weights).sqrt().to(logits)).sum()

    return loss


def binary_loss(
    generator: torch.Generator, *, weight: Tensor | None = None, positive: Tensor | None = None, balanced: bool = False
) -> Drawn:
    """Binary cross-entropy of logits, summed, against 0 and 1 as they are drawn from the prediction.

    Args:
        weight, positive: as `nn.BCEWithLogitsLoss` has them.
        balanced: both answers count alike, whatever their shares of the predictions so far.
    """
    seen = [0.0, 0.0]

    def loss(output: Tensor, targets: Any) -> Tensor:
        logits = output.float()
        chances = logits.detach().sigmoid().cpu()
        drawn = torch.bernoulli(chances, generator=generator).to(logits)
        own = 1.0 if weight is None else weight.cpu().float()
        ones, zeros = own * (1.0 if positive is None else positive.cpu().float()), own
        if balanced:
            seen[:] = [seen[0] + float(chances.sum()), seen[1] + chances.numel()]
            share = seen[0] / seen[1]
            ones, zeros = ones / max(2 * share, RAREST), zeros / max(2 * (1 - share), RAREST)
        losses = F.binary_cross_entropy_with_logits(logits, drawn, reduction="none")
        return (losses * (chances * ones + (1 - chances) * zeros).sqrt().to(logits)).sum()

    return loss


def gaussian_loss(generator: torch.Generator) -> Drawn:
    """½ (prediction - target)², summed, against the prediction plus noise of variance 1: its gradient is that noise."""

    def loss(output: Tensor, targets: Any) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return (output.float() * noise).sum()

    return loss


def drawn_directions_loss(generator: torch.Generator) -> SummedLoss:
    """`gaussian_loss` of any floating output, for outputs that are compared by squared distance, such as embeddings. The second moment of
    its gradients is the Gauss-Newton matrix of the outputs, exactly.

    Reference: Martens 2020, arXiv 1412.1193, sections 5 and 6 (the Fisher information of a normal density is the Gauss-Newton matrix).
    """
    drawn = gaussian_loss(generator)

    def loss(output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise UsageError(
                "The net's output is no floating tensor, so no direction can be drawn in it: give a loss of your own."
            )
        return drawn(output, None)

    return loss


def drawn_for(loss: Any, generator: torch.Generator, *, balanced: bool) -> Drawn | None:
    """What is drawn under a task's `loss`, a module or function of torch's or ours for cross-entropy (None); None where nothing can be."""
    if loss is None or loss is F.cross_entropy:
        return labels_loss(generator, ignore=-100, balanced=balanced)
    if isinstance(loss, nn.CrossEntropyLoss):
        return labels_loss(generator, weight=loss.weight, ignore=loss.ignore_index, balanced=balanced)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return binary_loss(generator, weight=loss.weight, positive=loss.pos_weight, balanced=balanced)
    if loss is F.binary_cross_entropy_with_logits:
        return binary_loss(generator, balanced=balanced)
    if isinstance(loss, SQUARED) or loss in SQUARED_FUNCTIONS:
        return gaussian_loss(generator)
    return None


def predicted(output: Any) -> Tensor | None:
    """The floating tensor that a prediction is read from, classes in dimension 1: the output itself, or its `logits`; None without one."""
    if not isinstance(output, Tensor) and field_of(output, LOGITS) is None:
        return None
    found = class_logits(output)
    return found if found.is_floating_point() else None


def default_loss(generator: torch.Generator, *, balanced: bool) -> SummedLoss:
    """What is drawn where no loss is known: [N, classes, ...] are logits; one output per sample is a mean, as it has no class to draw."""
    classes, single = labels_loss(generator, balanced=balanced), gaussian_loss(generator)

    def loss(output: Any) -> Tensor:
        found = predicted(output)
        if found is None:
            raise UsageError(
                "The net's output is no tensor [N, classes, ...], nor holds one called 'logits', so no labels can be drawn from it: give "
                "the sensitivity a loss of its own (output -> sum of the samples' losses), or take sensitivity 'activation' or 'none'."
            )
        alone = found.dim() < 2 or found.shape[1] == 1
        return (single if alone else classes)(found, None)

    return loss
