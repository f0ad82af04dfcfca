"""A stage is one function: read → call → write, a page each."""
