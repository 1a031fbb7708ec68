"""Station 7: the losses of a plan on a batch, inside the layers and behind them, and what each is a mean over."""
