"""Decoder language models: loading aside, everything from their config to text."""
