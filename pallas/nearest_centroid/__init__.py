"""The nearest centroid of every vector, for k-means, the column pass and the refinement."""

from vptq_jax.pallas.nearest_centroid.api import cluster_sums, nearest_centroid

__all__ = ["cluster_sums", "nearest_centroid"]
