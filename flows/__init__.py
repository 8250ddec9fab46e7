"""Prefect flows, and the `stillhouse` command: which stages run, in what order, where. No arithmetic, no file formats."""
