"""The HTTP layer around the routes: TLS, limits, API keys, errors and the web page's files."""
