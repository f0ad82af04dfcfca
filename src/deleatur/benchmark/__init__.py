"""Every method side by side: a row is the ordinary chain, with another method, source or guide, in a folder of its own.

plan     what each row is, and which cannot be       cell     one row of one concept with one training seed
drive    all cells that are missing, one by one      collect  what lies there → table, page, plot
"""
