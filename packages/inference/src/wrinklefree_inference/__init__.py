"""Proven GGUF export, generation and an OpenAI-compatible server for 1.58-bit models."""
