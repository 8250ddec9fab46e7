"""Losses as pure, batched functions of tensors."""
