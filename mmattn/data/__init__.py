"""Data: built-in scenes, readers for the user's own pictures and texts, tokenizers, batches."""
