"""What a graph is made of: attention, blocks, tokens, prefix. Imports runtime and below; not capture or planning."""
