"""Test-time training: targets, views, the trainer that adapts one student to each image."""
