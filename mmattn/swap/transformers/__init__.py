"""Our attention in transformers models: through the attention interface, or by patching classes that do without it."""
