"""Released versions: ledger, signatures, decisions about releases, and the MLflow model registry.

Runs and model registry are two interfaces of MLflow, and two modules here: `mlflow_runs` and `mlflow_registry`.
"""

import os

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # half a minute instead of four: our callers retry anyway
}
for _name, _value in MLFLOW_DEFAULTS.items():  # MLflow reads them when it is imported, so they are set before that
    os.environ.setdefault(_name, _value)
