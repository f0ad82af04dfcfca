"""Released versions: ledger, signatures, decisions about releases, and the MLflow model registry."""
