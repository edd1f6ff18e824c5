"""The Claude simulator: an HTTP server that speaks Anthropic's Messages API, for the demo and the tests.

Reading order: `script` (what can be scripted) → `requests` (what is accepted) → `answers` (what is said) → `server`.
`catalogue` holds the models, `schemas` the JSON Schemas. Only `server` and `requests` load heavy packages.
"""
