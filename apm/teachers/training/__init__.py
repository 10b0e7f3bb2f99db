"""How the embedded teacher is trained."""
