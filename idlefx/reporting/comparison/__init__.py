"""Converted models beside their dense one, on images of the user. Imports what reporting may."""
