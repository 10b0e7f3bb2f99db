"""Class names and prompts become text features, and tokens become logits."""
