"""One step of AdamW, in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor


class AdamWOptions(NamedTuple):
    """beta1, beta2 in [0, 1); eps > 0; weight_decay >= 0, decoupled."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@torch.no_grad()
def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: Tensor | float,
    grad_scale: Tensor | float,
    options: AdamWOptions,
) -> None:
    """Move one parameter, in place (Loshchilov and Hutter 2019).

        g = grad * grad_scale;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p = p (1 - lr weight_decay) - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

    Arguments:
        param, grad, exp_avg, exp_avg_sq: p, its gradient, m and v, of one shape.
        step: 0-d, the number of this step from 1 on.
        lr, grad_scale: a number or a 0-d tensor.
    """
    grad = grad * grad_scale
    exp_avg.mul_(options.beta1).add_(grad * (1.0 - options.beta1))
    exp_avg_sq.mul_(options.beta2).add_(grad.square() * (1.0 - options.beta2))
    corrected = exp_avg / (1.0 - options.beta1**step)
    denominator = (exp_avg_sq / (1.0 - options.beta2**step)).sqrt() + options.eps
    param.copy_(param * (1.0 - lr * options.weight_decay) - lr * corrected / denominator)
