"""Adapting a trained model to another data set: plans, merged models, adapter files."""
