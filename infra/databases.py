"""Creates missing databases. The server and the user are given by libpq's environment variables (PGHOST, …)."""

import psycopg

NAMES = ("prefect", "mlflow", "mlflow_auth")

with psycopg.connect("dbname=postgres", autocommit=True) as connection:
    existing = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
    for name in NAMES:
        if name not in existing:
            connection.execute(f"CREATE DATABASE {name}")
        print(f"{name}: {'exists' if name in existing else 'created'}")
