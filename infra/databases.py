"""Makes the databases that are not there yet. Where the server is and who may, libpq's variables say (PGHOST, …)."""

import psycopg

NAMES = ("prefect", "mlflow", "mlflow_auth")

with psycopg.connect("dbname=postgres", autocommit=True) as connection:
    there = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
    for name in NAMES:
        if name not in there:
            connection.execute(f"CREATE DATABASE {name}")
        print(f"{name}: {'was there' if name in there else 'made'}")
