"""Training of a system: the trainer, data, checkpoints and evaluation that the command line uses."""
