"""The adapters of the older library: a module for each, which takes it from its plugin."""
