"""How training loops are measured and compared."""
