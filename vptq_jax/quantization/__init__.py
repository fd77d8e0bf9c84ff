"""The quantization of one matrix: pure functions of arrays."""
