"""Swapping attention in diffusers models and pipelines."""
