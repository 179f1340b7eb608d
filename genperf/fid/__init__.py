"""The computation of `genperf fid`: image sources, feature extractors, statistics and scores."""
