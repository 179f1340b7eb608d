# SPDX-License-Identifier: Apache-2.0
"""The command line: `genperf`, also `python -m genperf`."""
