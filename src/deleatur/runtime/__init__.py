"""What every long stage runs with: models, checkpoints, progress, worker processes, provenance, event log."""
