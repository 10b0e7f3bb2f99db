"""One student trained on many images, and what it can be asked afterwards."""
