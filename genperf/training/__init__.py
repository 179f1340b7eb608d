"""Training, evaluation and sampling of the systems in `genperf.models`, as the command line offers them."""
