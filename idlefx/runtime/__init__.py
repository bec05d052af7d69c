"""What ends up in a converted graph or beside it: the module, operators, the cut loss. Imports graph and below."""
