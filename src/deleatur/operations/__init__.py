"""What keeps a deployment healthy: preflight checks, estimates, canary, emergency, doctor, backup, metrics exporter."""
