"""Ops with a public meaning, each with several implementations."""
