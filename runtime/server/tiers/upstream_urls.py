"""Which models of a command line are servers at URLs. Nothing heavy is imported."""

import re

URL_PREFIX = "url:"
# Pages of models, which are downloaded.
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")


def is_upstream(reference: str) -> bool:
    """Whether a model is the URL of a server: url:ADDRESS, or http:// or https:// of no hub."""
    if reference.startswith(URL_PREFIX):
        return True
    host = re.match(r"https?://([^/?#]*)", reference)
    return host is not None and host[1].lower() not in _HUB_HOSTS
