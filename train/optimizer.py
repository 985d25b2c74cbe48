"""The learning rate of every step, and which parameters decay."""

import math

import torch
from settings import Settings


def learning_rate(settings: Settings, step: int) -> float:
    """Of the update after `step` updates: linear warm-up, then a cosine from learning_rate to its min_lr_ratio."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    floor = settings.min_lr_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: torch.nn.Module, settings: Settings) -> list[dict]:
    """Matrices decay; norms, biases and embeddings do not; spline coefficients have a rate and a decay of their own."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    groups = {
        "matrices": {"params": [], "weight_decay": settings.weight_decay, "lr_ratio": 1.0},
        "vectors": {"params": [], "weight_decay": 0.0, "lr_ratio": 1.0},
        "splines": {
            "params": [],
            "weight_decay": settings.spline_weight_decay,
            "lr_ratio": settings.spline_lr_ratio,
        },
    }
    for name, parameter in model.named_parameters():
        if name.endswith("spline_weight"):
            groups["splines"]["params"].append(parameter)
        else:
            vector = parameter.ndim < 2 or id(parameter) in embeddings
            groups["vectors" if vector else "matrices"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
