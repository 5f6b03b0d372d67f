"""Generation without the WebUI, on diffusers' networks: the same request, the same conditioning, the same injection."""
