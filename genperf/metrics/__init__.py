# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated samples, and the feature statistics that they are computed from."""

from .feature_moments import FeatureMoments
from .frechet_distance import FrechetDistance
from .frechet_reference import FrechetReference
from .kernel_inception_distance import KernelInceptionDistance, polynomial_mmd
from .maximum_mean_discrepancy import MaximumMeanDiscrepancy, gaussian_mmd
from .mode_coverage import ModeCoverage, mode_coverage
from .nearest_images import NearestImages, duplicate_rate, nearest_images
from .precision_recall import PrecisionRecall, PrecisionRecallScores, precision_recall
from .statistics_files import load_features, load_moments, load_statistics, save_statistics

__all__ = [
    "FeatureMoments",
    "FrechetDistance",
    "FrechetReference",
    "KernelInceptionDistance",
    "MaximumMeanDiscrepancy",
    "ModeCoverage",
    "NearestImages",
    "PrecisionRecall",
    "PrecisionRecallScores",
    "duplicate_rate",
    "gaussian_mmd",
    "load_features",
    "load_moments",
    "load_statistics",
    "mode_coverage",
    "nearest_images",
    "polynomial_mmd",
    "precision_recall",
    "save_statistics",
]
