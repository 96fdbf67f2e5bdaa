"""Families of verifiable tasks: one file a family; `catalogue` knows them by name."""
