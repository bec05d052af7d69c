"""Drawn scenes and a small trained model for them. Imports rewriting and below; not passes or reporting."""
