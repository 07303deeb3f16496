"""Run networks: the stages, their measurement, and what drives them."""
