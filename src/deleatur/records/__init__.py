"""The values that travel between rooms. Frozen, typed, without behaviour beyond what their own fields decide."""
