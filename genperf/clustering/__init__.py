# SPDX-License-Identifier: Apache-2.0
"""Identifiers of vectors in files, by residual k-means: `genperf kmeans`."""

from .identifiers import Collisions, collisions, number_collisions
from .run import Clustering, ClusterSettings, cluster_file
from .vector_files import open_vectors

__all__ = ["ClusterSettings", "Clustering", "Collisions", "cluster_file", "collisions", "number_collisions", "open_vectors"]
