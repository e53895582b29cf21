"""Backends, one file each. None imports another; `mmattn.ops.registry` lists them."""
