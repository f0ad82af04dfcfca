"""The values that pass between packages: frozen, typed dataclasses without I/O."""
