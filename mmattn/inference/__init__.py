"""Using trained models: decoding, and the façades that turn pictures and texts into results."""
