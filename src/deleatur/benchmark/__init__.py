"""The benchmark: every method on every concept, each a run of the ordinary pipeline in a folder of its own.

plan       rows of the benchmark, and why one is refused     digests    which trials are up to date
trial      one row of one concept with one training seed     schedule   runs the missing trials
aggregate  results → table per concept                       publish    tables → CSV, plot, HTML page
"""
