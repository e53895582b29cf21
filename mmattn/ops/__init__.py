"""The attention operation (`attention.py`), its backends, masks, caches, rotary positions and observers."""
