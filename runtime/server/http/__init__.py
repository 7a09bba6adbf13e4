"""What every request passes before and around its route: TLS, limits, keys, errors, the page's files."""
