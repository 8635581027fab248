"""How many weights a model has, and a start from another one's."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> str:
    """The number of a model's parameters, and of those that are trained where that is another."""
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{parameters:,}" + (f" ({trainable:,} trained)" if trainable != parameters else "")


def load_matching_weights(model: nn.Module, saved: nn.Module, name: str) -> None:
    """Copy all weights of `saved` into `model`.

    Raises:
        ValueError: with tensors that are missing, surplus or of another shape.
    """
    mine, theirs = model.state_dict(), saved.state_dict()
    differing = [
        f"{key}: {tuple(theirs[key].shape) if key in theirs else 'absent'} there, "
        f"{tuple(mine[key].shape) if key in mine else 'absent'} here"
        for key in sorted(mine.keys() | theirs.keys())
        if key not in mine or key not in theirs or mine[key].shape != theirs[key].shape
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(f"init_from={name} does not fit this model: {'; '.join(differing[:4])}{more}")
    model.load_state_dict(theirs)
