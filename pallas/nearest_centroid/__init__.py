"""The nearest centroid of every vector, for k-means, the column pass and the refinement."""

from vptq_jax.pallas.nearest_centroid.api import nearest_centroid

__all__ = ["nearest_centroid"]
