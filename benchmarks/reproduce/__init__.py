"""The paper's tables as runs: what they take, the runs, and ours beside the published numbers with likely causes."""
