"""Move token ids: sources to token stores, scores to mask indices. Runs no network."""
