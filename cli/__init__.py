"""The `apm` command: one file per sub-command, no logic of the method."""
