"""Responses of /v1/responses that outlive their request: the store, background runs, routes."""
