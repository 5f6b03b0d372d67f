"""The WebUI side, and the only package that imports the host's `modules`.

`session` is the life of one request (parse, prepare, inject, eject); `panel`, `api`, `axes`, `settings` and `paste` are
the ways in; `instances` holds what lives as long as the process.
"""
