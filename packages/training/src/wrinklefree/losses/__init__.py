"""Losses as pure functions of tensors: nothing here knows a model, a batch or a configuration."""
