"""Where the work runs: Ray, storage and MLflow; no mathematics."""
