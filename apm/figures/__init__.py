"""Pictures of fields and label maps: what `--explain`, `apm field` and `apm interpolate` draw."""
