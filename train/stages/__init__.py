"""What each stage computes; no command line."""
