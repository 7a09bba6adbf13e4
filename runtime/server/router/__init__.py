"""Several models behind one port: which are loaded, and how requests reach them."""
