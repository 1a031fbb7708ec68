"""Station 7: what a training leaves to be gone on with, and whether it is the same training that goes on."""
