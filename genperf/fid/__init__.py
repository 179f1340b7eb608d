# SPDX-License-Identifier: Apache-2.0
"""The computation of `genperf fid`: image sources, feature extractors, statistics and scores."""
