# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and sampling of the systems in `genperf.models`, as the command line offers them."""
