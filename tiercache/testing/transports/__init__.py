"""Transports: another process to talk to, and memory that both know."""
