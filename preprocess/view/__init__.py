"""Masks as a person looks at them: pieces, statistics, tables, terminal, page."""
