"""Networks on mmattn's blocks, and the folders they are opened from and saved to."""
