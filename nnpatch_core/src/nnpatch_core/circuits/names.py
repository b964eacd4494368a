"""How circuits are called that are made of others."""

#: What stands before the names of circuits that are made of others.
WITHOUT, RANDOM = "all without ", "random "
