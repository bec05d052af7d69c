"""Choosing a plan for a budget, on pictures of the user. May import `bench`, the pipeline and what is below it."""
