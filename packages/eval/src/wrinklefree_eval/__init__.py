"""Evaluates 1.58-bit models: perplexity, labelled tasks and result cards."""
