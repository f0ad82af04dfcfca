"""deleatur: let it be deleted. Human feedback → soft token → erased model → verdict → release."""

__version__ = "0.1.0"
