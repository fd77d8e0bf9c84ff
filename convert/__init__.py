"""Checkpoints of other formats: Hugging Face, the community's VPTQ format, GGUF, Hessian files."""
