"""Samplers. They know a velocity function and nothing of models."""
