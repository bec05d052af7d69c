"""Devices, files and versions. Imports errors only."""
