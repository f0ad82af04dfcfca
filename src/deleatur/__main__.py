from deleatur.cli import app

app()
