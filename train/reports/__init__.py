"""How results are read and shown."""
