"""Several models behind one port: which are loaded, and how a request reaches its model."""
