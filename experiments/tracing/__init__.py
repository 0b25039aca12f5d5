"""Experiments on causal tracing."""
