"""Tools of the passes: the rebuilder, selector heads, verification. Imports analysis, capture, planning and below."""
