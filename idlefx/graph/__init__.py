"""Graphs: questions to ATen graphs, sizes, module state, and building nodes. Imports records, utils and errors."""
