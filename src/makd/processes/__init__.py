"""The processes of one run: which this one is (`started`), what they send (`messages`), who does what (`first`)."""
