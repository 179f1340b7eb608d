# SPDX-License-Identifier: Apache-2.0
"""The values of keyword arguments that choose: for type checkers, and for the checks of arguments, which take them from here."""

from typing import Literal

Impl = Literal["reference", "native", "triton", "eigen", "polar"]

# Vector quantization.
Metric = Literal["euclidean", "cosine"]
Gradient = Literal["straight_through", "rotation"]
Logits = Literal["distance", "squared_distance", "dot"]
CodebookInit = Literal["uniform", "data", "kmeans"]
UpdateTime = Literal["step", "accumulate", "none"]

# k-means.
ClusterInit = Literal["k-means++", "random"]
ClusterUpdate = Literal["lloyd", "ema"]

# Frechet distance.
Precision = Literal["float64", "mixed"]
StatisticsLayout = Literal["pytorch-fid", "edm", "adm", "fd-loss", "stylegan"]

# Losses and models.
AdversarialLoss = Literal["non-saturating", "saturating", "least-squares", "hinge", "wasserstein"]
Penalty = Literal["wgan-gp", "one-sided", "zero-centered", "dragan", "r1", "r2", "r1+r2", "finite-difference"]
Interpolation = Literal["lerp", "slerp"]
Normalization = Literal["batch", "virtual", "none"]
Corruption = Literal["gaussian", "salt-and-pepper", "masking"]
Likelihood = Literal["bernoulli", "gaussian"]
PyramidKernel = Literal["binomial", "box"]

# Training, and the scores of samples.
TrainingPrecision = Literal["32", "bf16"]
Pixels = Literal["unit", "signed", "uint8"]
