"""Station 3: what flows through a model: its inputs, outputs and gradients, linear by linear, layer by layer."""
