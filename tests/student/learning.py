"""A few steps of what peft's users do, for tests of students with adapters."""

import torch
from torch import Tensor, nn


def learn(model: nn.Module, inputs: dict[str, Tensor], steps: int) -> list[float]:
    """The loss of each step, in which what asks for gradients learns to predict `inputs`."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
