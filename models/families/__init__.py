"""The model families: what a family calls its modules, one row of FAMILIES each."""
