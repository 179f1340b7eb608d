"""The command line: `genperf`, also `python -m genperf`."""
