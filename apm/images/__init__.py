"""A user's file becomes an RGB image, safely; paths; the one writer of files."""
