"""VPTQ as pure functions of arrays, and the driver that runs them over a model."""
